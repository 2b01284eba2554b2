"""What trackers and the terminal show of a run: conversations, alerts, and its progress.

In addition to the metrics that transformers sends, trackio gets a few conversations of each logged step and an alert
for each fault, wandb the alerts, tensorboard both as text.
"""

import importlib
import json
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PrinterCallback, ProgressCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import TrainOutput

from ..rollout.trajectory import Trajectory
from ..types import Batch, JSONObject, Row
from .health.watch import HealthWatch
from .progress_bar import RolloutProgress, on_a_terminal


CONVERSATIONS = 4
"""Conversations of a logged step that trackers get."""


class Live(HealthWatch):
    """Part of [`ToolGRPOTrainer`]; see `report_to` and `disable_tqdm` of [`~transformers.TrainingArguments`]."""

    _display: RolloutProgress | None = None
    _conversations: Sequence[JSONObject] = ()  # of the last rollout batch

    def _prepare_run_log(self) -> None:
        super()._prepare_run_log()
        if not self.args.disable_tqdm and self.pop_callback(ProgressCallback) is not None:
            if on_a_terminal():
                self._display = RolloutProgress()
            self.add_callback(self._display or PrinterCallback)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as TRL does, and leave the terminal as it was."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._display is not None:
                with self._log_failures.tolerated("The progress of the run could not be drawn to its end"):
                    self._display.close()

    def _generate_and_score_completions(self, inputs: list[Row]) -> Batch:
        if self._display is None or not self.model.training:
            return super()._generate_and_score_completions(inputs)
        with self._display.rollout():
            started = time.perf_counter()
            output = super()._generate_and_score_completions(inputs)
            tokens = int(output["completion_mask"].sum()) * self.accelerator.num_processes
            self._display.tokens_per_second = tokens / (time.perf_counter() - started)
        return output

    def _calculate_rewards(self, inputs: list[Row], *args: list) -> Tensor:
        scores = super()._calculate_rewards(inputs, *args)
        shown = self.accelerator.is_main_process and {"trackio", "tensorboard"} & {*(self.args.report_to or ())}
        if shown and self.model.training and self._recording and self._batch is not None:
            trajectories = self._batch.trajectories
            first = self.accelerator.process_index * len(trajectories)
            rewards = self._rewards[first : first + len(trajectories)].tolist()
            with self._log_failures.tolerated("The conversations of a step could not be kept for trackers"):
                self._conversations = [
                    self._conversation(row, trajectories[row], rewards[row]) for row in extreme_rows(rewards)
                ]
        return scores

    def _conversation(self, row: int, trajectory: Trajectory, reward: float) -> JSONObject:
        prompt, completion = self._texts[0][row], self._texts[1][row]
        messages = [
            *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt),
            *([{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion),
        ]
        metadata = {
            "step": self.state.global_step,
            "reward": reward if reward == reward else None,
            "stop_reason": trajectory.stop_reason,
            "turns": len(trajectory.turns),
            "tokens": sum(trajectory.tool_mask),
        }
        record = {"messages": messages, "metadata": metadata}
        return self._redactor.data(json.loads(json.dumps(record, default=str)))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, and send the conversations of the step to trackers."""
        super().log(logs, start_time)
        if not self._conversations or "loss" not in logs:
            return
        conversations, self._conversations = self._conversations, ()
        with self._log_failures.tolerated("The conversations of a step could not be sent to a tracker"):
            step = self.state.global_step
            if "trackio" in (self.args.report_to or ()) and (trackio := _tracker("trackio")) is not None:
                trackio.log({"conversations": [trackio.Trace(**record) for record in conversations]}, step=step)
            for record in conversations:
                self._write_text("conversations", json.dumps(record, indent=1, ensure_ascii=False), step)

    def _report_fault(self, line: JSONObject) -> None:
        super()._report_fault(line)
        with self._log_failures.tolerated("A finding of the health rules could not be sent to a tracker"):
            for name in ("trackio", "wandb"):
                if name in (self.args.report_to or ()) and (tracker := _tracker(name)) is not None:
                    level = tracker.AlertLevel.ERROR if line["level"] == "error" else tracker.AlertLevel.WARN
                    tracker.alert(title=line["rule"], text=line["message"], level=level)
            self._write_text("health", f"{line['rule']}: {line['message']}", line["step"])

    def _write_text(self, tag: str, text: str, step: int) -> None:
        """Add a text to what tensorboard shows, if it is reported to."""
        for callback in self.callback_handler.callbacks:
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
