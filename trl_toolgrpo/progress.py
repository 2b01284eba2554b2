"""Progress of a run on a terminal: the step, what is being done, how fast rollouts are, and the time left.

Owns the callback that draws it with rich; without a terminal it is not used, and nothing is drawn. Fed by `live.py`.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.trainer_utils import has_length


def on_a_terminal() -> bool:
    """Return whether progress can be drawn: standard error is a terminal."""
    return sys.stderr.isatty()


class RolloutProgress(TrainerCallback):
    """
    Draws one line for training, with its phase, and one for an evaluation, on the main process.

    Args:
        console (`rich.console.Console`, *optional*):
            Where to; by default standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._bar: Any = None
        self._training: Any = None
        self._evaluation: Any = None
        self.tokens_per_second = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to draw."""
        if not state.is_world_process_zero:
            return
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        ]
        self._bar = Progress(*columns, console=self._console or Console(stderr=True))
        self._bar.start()
        self._training = self._bar.add_task("update ", total=state.max_steps, completed=state.global_step, speed="")

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """While open, the phase is that of rollouts."""
        self._show(description="rollout")
        try:
            yield
        finally:
            self._show(description="update ")

    def _show(self, **changes: Any) -> None:
        if self._bar is not None:
            speed = f"{self.tokens_per_second:.0f} tokens/s" if self.tokens_per_second else ""
            self._bar.update(self._training, speed=speed, **changes)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the step."""
        self._show(completed=state.global_step)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Draw a batch of an evaluation."""
        if self._bar is None or not has_length(eval_dataloader):
            return
        if self._evaluation is None:
            self._evaluation = self._bar.add_task("evaluate", total=len(eval_dataloader), speed="")
        self._bar.update(self._evaluation, advance=1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the line of the evaluation."""
        if self._bar is not None and self._evaluation is not None:
            self._bar.remove_task(self._evaluation)
        self._evaluation = None

    def close(self) -> None:
        """End drawing; a run that fails leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._evaluation = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End drawing."""
        self.close()
