"""What trackers and the terminal show of a run: conversations, alerts, and its progress.

In addition to the metrics that transformers sends, trackio gets a few conversations of each logged step and an alert
for each fault, wandb the alerts, tensorboard both as text.
"""

import importlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PrinterCallback, ProgressCallback
from transformers.integrations import TensorBoardCallback

from ..redaction import Redactor
from ..rollout.engine import RolloutBatch
from ..rollout.rewards import Rewards
from ..run_folder.log_failures import LogFailures
from ..trl_hooks import Run
from ..types import Batch, JSONObject
from .progress_bar import RolloutProgress, on_a_terminal


CONVERSATIONS = 4
"""Conversations of a logged step that trackers get."""


class Trackers:
    """
    Sends what is worth looking at to the trackers of a run, and draws its progress; see `report_to` and `disable_tqdm`
    of [`~transformers.TrainingArguments`].

    Args:
        run ([`Run`]):
            The run.
        failures ([`LogFailures`]):
            Keeps a tracker that fails from ending the run.
    """

    def __init__(self, run: Run, failures: LogFailures) -> None:
        self._run, self._failures = run, failures
        self._display: RolloutProgress | None = None
        self._conversations: Sequence[JSONObject] = ()  # of the last rollout batch
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

    def on_rewards(self, batch: RolloutBatch, rewards: Rewards, redactor: Redactor) -> None:
        """Keep a few conversations of a rollout batch for trackers."""
        shown = self._run.is_main_process and {"trackio", "tensorboard"} & {*(self._run.args.report_to or ())}
        if shown and self._run.training:
            totals = rewards.own_totals.tolist()
            with self._failures.tolerated("The conversations of a step could not be kept for trackers"):
                rows = extreme_rows(totals)
                self._conversations = [redactor.data(self._conversation(batch, row, totals[row])) for row in rows]

    def _conversation(self, batch: RolloutBatch, row: int, reward: float) -> JSONObject:
        prompt, completion, trajectory = batch.prompts[row], batch.completions[row], batch.trajectories[row]
        messages = [
            *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt),
            *([{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion),
        ]
        metadata = {
            "step": self._run.state.global_step,
            "reward": reward if reward == reward else None,
            "stop_reason": trajectory.stop_reason,
            "turns": len(trajectory.turns),
            "tokens": sum(trajectory.tool_mask),
        }
        return json.loads(json.dumps({"messages": messages, "metadata": metadata}, default=str))

    def after_log(self, logs: Mapping[str, object]) -> None:
        """Send the conversations of the step that was logged."""
        if not self._conversations or "loss" not in logs:
            return
        conversations, self._conversations = self._conversations, ()
        with self._failures.tolerated("The conversations of a step could not be sent to a tracker"):
            step = self._run.state.global_step
            if "trackio" in (self._run.args.report_to or ()) and (trackio := _tracker("trackio")) is not None:
                trackio.log({"conversations": [trackio.Trace(**record) for record in conversations]}, step=step)
            for record in conversations:
                self._write_text("conversations", json.dumps(record, indent=1, ensure_ascii=False), step)

    def report_fault(self, line: JSONObject) -> None:
        """Send a fault that begins as an alert."""
        with self._failures.tolerated("A finding of the health rules could not be sent to a tracker"):
            for name in ("trackio", "wandb"):
                if name in (self._run.args.report_to or ()) and (tracker := _tracker(name)) is not None:
                    level = tracker.AlertLevel.ERROR if line["level"] == "error" else tracker.AlertLevel.WARN
                    tracker.alert(title=line["rule"], text=line["message"], level=level)
            self._write_text("health", f"{line['rule']}: {line['message']}", line["step"])

    def _write_text(self, tag: str, text: str, step: int) -> None:
        """Add a text to what tensorboard shows, if it is reported to."""
        for callback in self._run.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text(tag, f"```\n{text}\n```", step)


def extreme_rows(rewards: Sequence[float]) -> list[int]:
    """Return the rows of the worst and the best rollouts, worst first; unscored ones (NaN) are worst."""
    order = sorted(range(len(rewards)), key=lambda row: (rewards[row] == rewards[row], rewards[row]))
    half = CONVERSATIONS // 2
    return order if len(order) <= CONVERSATIONS else order[:half] + order[-half:]


def _tracker(name: str) -> Any:
    """Return the module of a tracker that has a run under way."""
    module = importlib.import_module(name)
    run = module.context_vars.current_run.get() if name == "trackio" else module.run
    return None if run is None else module
