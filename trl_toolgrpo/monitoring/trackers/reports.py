"""What the trackers of a run get: a few conversations of each logged step, and an alert for each fault."""

import json
from collections.abc import Mapping, Sequence

from ...redaction import Redactor
from ...rollout.engine import RolloutBatch
from ...rollout.rewards import Rewards
from ...run_folder.log_failures import LogFailures
from ...trl_hooks import Run
from ...types import JSONObject
from .registry import TRACKERS
from .tracker import Tracker


CONVERSATIONS = 4
"""Conversations of a logged step that trackers get."""


class TrackerReports:
    """
    Sends what is worth looking at to the trackers of a run; see `report_to` of [`~transformers.TrainingArguments`].

    Args:
        run ([`Run`]):
            The run.
        failures ([`LogFailures`]):
            Keeps a tracker that fails from ending the run.
    """

    def __init__(self, run: Run, failures: LogFailures) -> None:
        self._run, self._failures = run, failures
        self._conversations: Sequence[JSONObject] = ()  # of the last rollout batch

    @property
    def _trackers(self) -> list[Tracker]:
        return [kind(self._run) for name, kind in TRACKERS.items() if kind.is_used(self._run, name)]

    def on_rewards(self, batch: RolloutBatch, rewards: Rewards, redactor: Redactor) -> None:
        """Keep a few conversations of a rollout batch."""
        shown = self._run.is_main_process and any(tracker.shows_conversations for tracker in self._trackers)
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
        for tracker in self._trackers:
            with self._failures.tolerated("The conversations of a step could not be sent to a tracker"):
                tracker.conversations(conversations, self._run.state.global_step)

    def on_health(self, line: JSONObject) -> None:
        """Send a fault that begins, or is over."""
        for tracker in self._trackers:
            with self._failures.tolerated("A finding of the health rules could not be sent to a tracker"):
                tracker.recovered(line) if line["level"] == "ok" else tracker.alert(line)


def extreme_rows(rewards: Sequence[float]) -> list[int]:
    """Return the rows of the worst and the best rollouts, worst first; unscored ones (NaN) are worst."""
    order = sorted(range(len(rewards)), key=lambda row: (rewards[row] == rewards[row], rewards[row]))
    half = CONVERSATIONS // 2
    return order if len(order) <= CONVERSATIONS else order[:half] + order[-half:]
