"""A run to look at while it goes on: conversations and alerts in trackers, progress on the terminal.

Owns, as a mixin of the trainer, what trackers get beside the metrics that `transformers` sends them: trackio a few
conversations of each logged step and an alert for each fault, wandb the alerts, tensorboard both as text.
"""

import json
import time
from typing import Any

from transformers import PrinterCallback, ProgressCallback
from transformers.integrations import TensorBoardCallback

from .health_watch import HealthWatch
from .progress import RolloutProgress, on_a_terminal


SHOWN = 4
"""Conversations of a logged step that trackers get."""


class Live(HealthWatch):
    """Part of [`ToolGRPOTrainer`]; see `report_to` and `disable_tqdm` of [`~transformers.TrainingArguments`]."""

    _display: RolloutProgress | None = None
    _shown: list[dict[str, Any]] = []  # noqa: RUF012 - replaced, never changed

    def _prepare_run_log(self) -> None:
        super()._prepare_run_log()
        if not self.args.disable_tqdm and self.pop_callback(ProgressCallback) is not None:
            if on_a_terminal():
                self._display = RolloutProgress()
            self.add_callback(self._display or PrinterCallback)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's training, whose progress is drawn on a terminal."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._display is not None:
                with self._log_failures.tolerated("The progress of the run could not be drawn to its end"):
                    self._display.close()

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._display is None or not self.model.training:
            return super()._generate_and_score_completions(inputs)
        with self._display.rollout():
            started = time.perf_counter()
            output = super()._generate_and_score_completions(inputs)
            tokens = int(output["completion_mask"].sum()) * self.accelerator.num_processes
            self._display.tokens_per_second = tokens / (time.perf_counter() - started)
        return output

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        scores = super()._calculate_rewards(*args, **kwargs)
        if self.model.training and self._recording and self._batch is not None and self._trackers():
            first = self.accelerator.process_index * len(self._batch.trajectories)
            rewards = self._rewards[first : first + len(self._batch.trajectories)].tolist()
            with self._log_failures.tolerated("The conversations of a step could not be kept for trackers"):
                self._shown = [self._conversation(row, rewards[row]) for row in self._worth_a_look(rewards)]
        return scores

    def _trackers(self) -> list[str]:
        if not self.accelerator.is_main_process:
            return []
        return [name for name in ("trackio", "tensorboard") if name in (self.args.report_to or ())]

    def _worth_a_look(self, rewards: list[float]) -> list[int]:
        """Rows of the worst and the best rollouts, worst first."""
        order = sorted(range(len(rewards)), key=lambda row: (rewards[row] == rewards[row], rewards[row]))
        return order if len(order) <= SHOWN else order[: SHOWN // 2] + order[-SHOWN // 2 :]

    def _conversation(self, row: int, reward: float) -> dict[str, Any]:
        prompt, completion = self._asked[0][row], self._asked[1][row]
        messages = [
            *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt),
            *([{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion),
        ]
        trajectory: Any = self._batch.trajectories[row] if self._batch is not None else None
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
        super().log(logs, start_time)
        if not self._shown or "loss" not in logs:
            return
        step, shown, self._shown = self.state.global_step, self._shown, []
        with self._log_failures.tolerated("The conversations of a step could not be sent to a tracker"):
            self._send_conversations(shown, step)

    def _send_conversations(self, shown: list[dict[str, Any]], step: int) -> None:
        if "trackio" in self._trackers():
            import trackio

            if trackio.context_vars.current_run.get() is not None:
                trackio.log({"conversations": [trackio.Trace(**record) for record in shown]}, step=step)
        for record in shown:
            self._write_text("conversations", json.dumps(record, indent=1, ensure_ascii=False), step)

    def _say(self, line: dict[str, Any]) -> None:
        super()._say(line)
        with self._log_failures.tolerated("A finding of the health rules could not be sent to a tracker"):
            self._send_finding(line)

    def _send_finding(self, line: dict[str, Any]) -> None:
        report_to = self.args.report_to or ()
        if "trackio" in report_to:
            import trackio

            if trackio.context_vars.current_run.get() is not None:
                level = trackio.AlertLevel.ERROR if line["level"] == "error" else trackio.AlertLevel.WARN
                trackio.alert(title=line["rule"], text=line["message"], level=level)
        if "wandb" in report_to:
            import wandb

            if wandb.run is not None:
                level = wandb.AlertLevel.ERROR if line["level"] == "error" else wandb.AlertLevel.WARN
                wandb.alert(title=line["rule"], text=line["message"], level=level)
        self._write_text("health", f"{line['rule']}: {line['message']}", line["step"])

    def _write_text(self, tag: str, text: str, step: int) -> None:
        """Add a text to what tensorboard shows, if it is reported to."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text(tag, f"```\n{text}\n```", step)
