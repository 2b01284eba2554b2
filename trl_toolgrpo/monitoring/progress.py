"""The progress of a run on the terminal: which callback draws it, and what it is told of rollouts."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import PrinterCallback, ProgressCallback

from ..run_folder.log_failures import LogFailures
from ..trl_hooks import Run
from ..types import Batch
from .progress_bar import RolloutProgress, on_a_terminal


class RunProgress:
    """
    Draws the progress of a run; see `disable_tqdm` of [`~transformers.TrainingArguments`].

    Args:
        run ([`Run`]):
            The run.
        failures ([`LogFailures`]):
            Keeps a terminal that is gone from ending the run.
    """

    def __init__(self, run: Run, failures: LogFailures) -> None:
        self._run, self._failures = run, failures
        self._display: RolloutProgress | None = None
        if not run.args.disable_tqdm and run.pop_callback(ProgressCallback) is not None:
            if on_a_terminal():
                self._display = RolloutProgress()
            run.add_callback(self._display or PrinterCallback)
            failures.guard(run.callback_handler.callbacks[-1])

    @contextmanager
    def of_training(self) -> Iterator[None]:
        """Draw the progress of a training while open, and leave the terminal as it was."""
        try:
            yield
        finally:
            if self._display is not None:
                with self._failures.tolerated("The progress of the run could not be drawn to its end"):
                    self._display.close()

    @contextmanager
    def of_rollouts(self) -> Iterator[Callable[[Batch], None]]:
        """Draw the progress of a rollout batch while open; yield what is called with the batch once it is made."""
        display, started = self._display, time.perf_counter()
        if display is None or not self._run.training:
            yield lambda output: None
            return

        def measure(output: Batch) -> None:
            tokens = int(output["completion_mask"].sum()) * self._run.accelerator.num_processes
            display.tokens_per_second = tokens / (time.perf_counter() - started)

        with display.rollout():
            yield measure
