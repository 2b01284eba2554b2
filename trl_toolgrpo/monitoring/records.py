"""What a run writes and shows in the course of training: files, metrics, health, trackers and the terminal."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from ..rollout.engine import RolloutBatch
from ..rollout.rewards import Rewards
from ..rollout.rollouts import Rollouts
from ..run_folder.log_failures import LogFailures
from ..run_folder.writer import RunLog
from ..trl_hooks import Run
from ..types import JSONObject
from ..update.policy_update import MicroBatch, PolicyUpdate
from .health.watch import HealthWatch
from .metrics import averages, console_line, length_metrics, rollout_counts, rollout_metrics
from .progress import RunProgress
from .trackers.reports import TrackerReports


CARRIED = ("forced/fraction", "tools/call_frequency", "tools/failure_frequency")
"""Metrics of a rollout batch that steps which reuse it log again."""


class CarriedMetrics:
    """
    The metrics of the rollout batch in use, for the steps that reuse it.

    Args:
        run ([`Run`]):
            The run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._of_batch: dict[str, float] = {}
        self._forced: list[float] = []  # `forced/fraction` of the batch of each micro-batch not yet logged

    def before_loss(self) -> None:
        """Carry over the metrics of the batch that a micro-batch of training belongs to."""
        metrics = self._run.training_metrics
        self._of_batch |= {name: metrics[name][-1] for name in CARRIED if metrics.get(name)}
        if "forced/fraction" in self._of_batch:
            self._forced.append(self._of_batch["forced/fraction"])

    def before_log(self) -> None:
        """Have the share of forced tokens logged that the micro-batches of the step had."""
        if self._forced:
            self._run.training_metrics["forced/fraction"], self._forced = self._forced, []

    def with_carried(self, logs: Mapping[str, float]) -> dict[str, float]:
        """Return what was logged, with what the step has in common with the ones before."""
        return {**self._of_batch, **logs}

    def state_dict(self) -> JSONObject:
        """Return the metrics, for a checkpoint."""
        return {"of_batch": dict(self._of_batch), "forced": list(self._forced)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._of_batch, self._forced = dict(state["of_batch"]), list(state["forced"])


class Records:
    """
    Everything that reports on a run, and changes nothing of it.

    Args:
        run ([`Run`]):
            The run.
        rollouts ([`Rollouts`]), update ([`PolicyUpdate`]):
            What is reported on.
        relative_to_group (`bool`):
            Whether advantages are 0 in a group whose rewards are all equal.
    """

    def __init__(self, run: Run, rollouts: Rollouts, update: PolicyUpdate, relative_to_group: bool) -> None:
        self._run, self._rollouts = run, rollouts
        self.failures = LogFailures()
        for callback in run.callback_handler.callbacks:
            self.failures.guard(callback)
        self.log = RunLog(run, rollouts, self.failures)
        run.add_callback(_TrainBegins(self))
        self.progress = RunProgress(run, self.failures)
        self.trackers = TrackerReports(run, self.failures)
        self.carried = CarriedMetrics(run)
        self.health: HealthWatch | None = None
        if run.args.health_checks != "off":
            report = self.trackers.on_health
            self.health = HealthWatch(run, self.log, self.failures, update.scoring, relative_to_group, report)
        self.eval_prefix = "eval"  # of the evaluation in progress

    # A training

    @contextmanager
    def of_training(self) -> Iterator[None]:
        """Report on a training while open; when it ends, in whatever way, all of that is on disk."""
        with self.progress.of_training(), self.log.of_training(), self.failures.of_profiling():
            yield

    def on_train_begin(self) -> None:
        """Begin, once the step to resume from is known."""
        self.log.on_train_begin()
        if self.health is not None:
            self.health.on_train_begin()

    @contextmanager
    def of_evaluation(self, prefix: str) -> Iterator[None]:
        """Report on an evaluation while open. All metrics of a data set have its prefix."""
        before, self.eval_prefix = self.eval_prefix, prefix
        self._run.metrics_by_mode["eval"].clear()  # of an evaluation that failed, or of `predict`
        try:
            with self.failures.of_profiling():
                yield
        finally:
            self.eval_prefix = before

    # A rollout batch

    def on_rollouts(self, batch: RolloutBatch) -> None:
        """Add this package's metrics, and correct those that TRL judges by the last token of a rollout. Every process
        must call this."""
        run, metrics, stats = self._run, self._run.metrics, batch.stats
        trajectories = batch.trajectories
        names = [tool.name for tool in self._rollouts.tools.toolset.known]
        counts = rollout_counts(
            trajectories,
            stats.seconds,
            stats.tool_wait_seconds,
            sum(batch.invalid),
            names,
            batch.unconstrained,
            stats.abandoned,
            batch.cache_gib,
        )
        for name, value in rollout_metrics(gather_object([counts]), bool(run.tools)).items():
            metrics[name].append(value)
        found = torch.tensor([[float(sum(t.tool_mask)), t.truncated] for t in trajectories])
        lengths, truncated = run.accelerator.gather(found.to(run.accelerator.device)).unbind(dim=1)
        for name, value in length_metrics(lengths, truncated.bool()).items():
            metrics[name][-1] = value

    def on_rewards(self, batch: RolloutBatch | None, rewards: Rewards, count: int) -> None:
        """Report on the rewards of `count` rollouts of this process; on TRL's own path there is no batch. Every
        process must call this."""
        self.log.on_rewards(count)
        if batch is not None:
            if self.health is not None:
                self.health.on_rewards(batch, rewards)
            self.trackers.on_rewards(batch, rewards, self.log.redactor)

    # An update

    def on_update(self, micro_batch: MicroBatch) -> None:
        """Keep the ratios of a micro-batch."""
        if self._run.training and (logps := micro_batch.logps) is not None:
            self.log.on_update(micro_batch.given, logps, micro_batch.mask)

    # A log line

    def before_log(self, logs: dict[str, float]) -> None:
        """Complete what is about to be logged. Every process must call this."""
        run, training = self._run, self._run.training
        if not training and self.eval_prefix != "eval":  # TRL would write `eval_` before each of them
            collected = run.metrics_by_mode["eval"]
            figures = averages(collected)
            logs.update({f"{self.eval_prefix}_{name}": value for name, value in figures.items()})  # type: ignore[misc]
            collected.clear()
        if training and run.recording:
            self.carried.before_log()
        if training and "loss" in logs and self.health is not None:
            self.health.before_log()

    def after_log(self, logs: Mapping[str, float]) -> None:
        """
        Report on what was logged: health, conversations, and the line of the step.

        Raises:
            HealthError: if a rule finds a fault and `health_checks="raise"`.
        """
        training = self._run.training
        if training and "loss" in logs and self.health is not None:
            self.health.after_log()
        self.trackers.after_log(logs)
        if training and self._run.recording:
            self.print(console_line(self.carried.with_carried(logs)), "The line of a step could not be printed")

    def print(self, line: str | None, failure: str) -> None:
        """Print a line in the main process; a terminal that is gone must not end the run."""
        if line is not None and self._run.is_main_process:
            with self.failures.tolerated(failure):
                print(line, flush=True)

    # Texts

    def redacted(self, text: str) -> str:
        """Return a text without the secrets of the run as they are now."""
        return self.log.current_redactor().text(text)


class _TrainBegins(TrainerCallback):
    """Starts the records once the step to resume from is known."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self._records.on_train_begin()
