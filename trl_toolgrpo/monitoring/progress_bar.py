"""Progress of a run on a terminal: the step, what is being done, how fast rollouts are, and the time left.

rich draws it. TRL's own callback for rich shows neither the phase nor the speed, and leaves the terminal in its live
display when a run fails.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader
from transformers import TrainerState
from transformers.trainer_utils import has_length

from ..run_folder.log_failures import Reporter


def on_a_terminal() -> bool:
    """Return whether progress can be drawn: standard error is a terminal."""
    return sys.stderr.isatty()


class RolloutProgress(Reporter):
    """
    Draws one line for training, with its phase, and one for an evaluation, on the main process.

    Args:
        console (`rich.console.Console`, *optional*):
            Where to; by default standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._training = TaskID(0)
        self._evaluation: TaskID | None = None
        self.tokens_per_second = 0.0

    def on_train_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        """Start drawing."""
        if not state.is_world_process_zero:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TextColumn("{task.fields[speed]}"), TimeRemainingColumn(elapsed_when_finished=True))
        self._bar = Progress(*columns, *times, console=self._console or Console(stderr=True))
        self._bar.start()
        self._training = self._bar.add_task("update ", total=state.max_steps, completed=state.global_step, speed="")

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """Show the phase of rollouts while open."""
        self._update(description="rollout")
        try:
            yield
        finally:
            self._update(description="update ")

    def _update(self, *, description: str | None = None, completed: int | None = None) -> None:
        if self._bar is not None:
            speed = f"{self.tokens_per_second:.0f} tokens/s" if self.tokens_per_second else ""
            self._bar.update(self._training, speed=speed, description=description, completed=completed)

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        """Draw the step."""
        self._update(completed=state.global_step)

    def on_prediction_step(
        self, args: object, state: object, control: object, eval_dataloader: DataLoader | None = None, **kwargs: object
    ) -> None:
        """Draw a batch of an evaluation."""
        if self._bar is None or eval_dataloader is None or not has_length(eval_dataloader):
            return
        if self._evaluation is None:
            self._evaluation = self._bar.add_task("evaluate", total=len(eval_dataloader), speed="")
        self._bar.update(self._evaluation, advance=1)

    def on_evaluate(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        """Remove the line of the evaluation."""
        if self._bar is not None and self._evaluation is not None:
            self._bar.remove_task(self._evaluation)
        self._evaluation = None

    def close(self) -> None:
        """Stop drawing; a run that fails leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._evaluation = None

    def on_train_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        """Stop drawing."""
        self.close()
