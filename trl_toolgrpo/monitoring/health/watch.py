"""The health rules, run on every logged step as `health_checks` says.

Every figure that the rules read is over all processes, so that the main process alone runs them.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import TrainerCallback

from ...checkpoints.folder import PREFIX
from ...config.batch_position import optimizer_steps_of
from ...config.fields import ToolGRPOConfig
from ...errors import CheckpointSaveError, HealthError
from ...models.rotary import RowFrequencies
from ...models.rounding import EXACT_TOLERANCE, LOW_PRECISION, compute_dtype
from ...models.sharding import local
from ...rollout.engine import RolloutBatch
from ...rollout.rewards import Rewards
from ...run_folder.files import HEALTH, read_lines
from ...run_folder.log_failures import LogFailures
from ...run_folder.writer import RunLog
from ...trl_hooks import Run
from ...types import JSONObject
from ...update.scoring import Scoring
from ...validation.trainable_parameters import policy_parameters
from .monitor import HealthMonitor, RunFacts, still_open
from .rollout_rules import DISTINCT, SHORTCUTS, correlation_within_groups, costs
from .rules import RULES


logger = logging.getLogger(__name__)

UNMEASURED = 0.05
"""Mean difference in nats taken for rounding in bfloat16 or float16 where no batch was scored twice."""


class HealthWatch:
    """
    Runs the health rules; see `health_checks` of [`ToolGRPOConfig`].

    Args:
        run ([`Run`]):
            The run.
        log ([`RunLog`]):
            Where faults are written.
        failures ([`LogFailures`]):
            Keeps a rule that fails from ending the run.
        scoring ([`Scoring`]):
            Knows what rounding does to log-probs.
        relative_to_group (`bool`):
            Whether advantages are 0 in a group whose rewards are all equal.
        report (`Callable`):
            Called with the line of each fault that begins or is over, on the main process.
    """

    def __init__(
        self,
        run: Run,
        log: RunLog,
        failures: LogFailures,
        scoring: Scoring,
        relative_to_group: bool,
        report: Callable[[JSONObject], None],
    ) -> None:
        self._run, self._log, self._failures, self._scoring = run, log, failures, scoring
        self._relative_to_group, self._report = relative_to_group, report
        self.monitor: HealthMonitor | None = None  # once training has begun
        self._moved: float | None = None  # share of the policy's tensors that moved in the step being logged
        self._motion = _PolicyMotion(run)
        run.add_callback(self._motion)

    def on_train_begin(self) -> None:
        """Begin with what the log of a resumed run says."""
        facts = facts_of(self._run.args, self._run.model, self._relative_to_group)
        monitor = self.monitor = HealthMonitor(RULES, facts)
        monitor.recall(entry for entry in self._run.state.log_history if "loss" in entry)
        if self._log.folder is not None and self._run.is_main_process:
            monitor.open = dict.fromkeys(still_open(read_lines(self._log.folder / HEALTH)), monitor.count)

    def on_rewards(self, batch: RolloutBatch, rewards: Rewards) -> None:
        """Log how the rewards of a batch follow what its rollouts cost. Every process must call this."""
        run = self._run
        if self.monitor is None or not run.training:
            return
        own = torch.tensor([costs(trajectory) for trajectory in batch.trajectories])
        every = run.accelerator.gather(own.to(run.accelerator.device)).T.tolist()
        totals = rewards.totals.tolist()
        for (cost, metric), values in zip(SHORTCUTS.items(), every, strict=True):
            found = correlation_within_groups(totals, values, run.num_generations, DISTINCT[cost])
            if found is not None:
                run.training_metrics[metric].append(found)

    def before_log(self) -> None:
        """Add `policy/moved` to what is logged of a training step. Every process must call this."""
        self._moved = self._motion.take()
        if self._moved is not None and self._run.recording:  # else the log is TRL's own
            self._run.training_metrics["policy/moved"].append(self._moved)

    def after_log(self) -> None:
        """
        Run the rules on the training step that was just logged.

        Raises:
            HealthError: in every process, if one finds a fault and `health_checks="raise"`.
        """
        monitor, run = self.monitor, self._run
        if monitor is None:
            return
        metrics = {**run.state.log_history[-1], **({} if self._moved is None else {"policy/moved": self._moved})}
        faults: list[JSONObject] = []
        rounding = self._scoring.rounding
        if rounding is not None and run.args.logprob_check_tolerance is None:
            monitor.facts = replace(
                monitor.facts, logprob_tolerance=rounding.mean, doubtful_tolerance=rounding.doubtful
            )
        if run.is_main_process:
            with self._failures.tolerated("The health rules could not be run"):
                for line in monitor.step(metrics):
                    self._log.add_line(HEALTH, line)
                    if line["level"] != "ok":
                        faults.append(line)
                        logger.warning("Health, step %d, %s: %s", line["step"], line["rule"], line["message"])
                    self._report(line)
        if run.args.health_checks == "raise":
            (faults,) = broadcast_object_list([faults])
            if faults:
                self._stop_for(faults[0])

    def _stop_for(self, line: JSONObject) -> None:
        """Save the run as it stands and end it, in every process."""
        run = self._run
        folder = Path(run.output_folder()) / f"{PREFIX}{run.state.global_step}"
        remedy = (
            f"The run as it stands is in {folder}; resume from there with `health_checks='warn'` to go on all the "
            f"same, or from an earlier checkpoint."
        )
        run.control.should_training_stop = True  # so that a checkpoint that cannot be written is an error
        try:
            run.save_checkpoint()
        except CheckpointSaveError as error:
            remedy = f"No checkpoint of it could be written: {error}"
        raise HealthError(
            f"The run was stopped in step {line['step']} by the health rule `{line['rule']}`, as "
            f"`health_checks='raise'` asks for. {line['message']}",
            remedy=remedy,
        )


class _PolicyMotion(TrainerCallback):
    """Observes whether the weights of a policy move where the optimizer has reason to move them."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._before: dict[str, Tensor] = {}
        self._has_gradient = False
        self._due = 0  # optimizer steps since the last look that should have moved the policy

    def _policy(self) -> dict[str, nn.Parameter]:
        return policy_parameters(self._run.bare_model)

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self._before, self._due = {}, 0

    def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if not self._before:
            self._before = _fingerprints(self._policy())

    def on_pre_optimizer_step(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if self._run.is_deepspeed_enabled:  # which has taken its step by now, and keeps no gradient
            self._has_gradient = True
            return
        gradients = (parameter.grad for parameter in self._policy().values())
        self._has_gradient = any(bool(local(gradient).any()) for gradient in gradients if gradient is not None)

    def on_optimizer_step(self, args: object, state: object, control: object, **kwargs: object) -> None:
        run: Any = self._run
        own = {id(parameter) for parameter in self._policy().values()}
        groups = run.optimizer.param_groups  # DeepSpeed's hold flat copies, the policy's first
        rates = [g["lr"] for g in groups if any(id(p) in own for p in g["params"])] or [groups[0]["lr"]]
        if self._has_gradient and max(rates) > 0 and not run.accelerator.optimizer_step_was_skipped:
            self._due += 1

    def take(self) -> float | None:
        """
        Return the share of the policy's trained tensors that have changed since the last call. Every process must
        call this.

        Returns:
            `float` or `None`: the same in every process; `None` if no optimizer step had both a gradient of the policy
            and a learning rate.
        """
        before, now = self._before, _fingerprints(self._policy())
        due, self._due = self._due, 0
        changed = [float(name not in before or not torch.equal(value, before[name])) for name, value in now.items()]
        found = torch.tensor([float(due), *changed], device=self._run.accelerator.device)
        due_anywhere, *moved = self._run.accelerator.reduce(found, reduction="sum").tolist()
        if not due_anywhere or not moved:
            return None
        self._before = now
        return sum(count > 0 for count in moved) / len(moved)


def _fingerprints(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return a sum of the bits of each parameter (of this process's share, if it is sharded), on the CPU."""
    sums = []
    for parameter in parameters.values():
        share = local(getattr(parameter, "ds_tensor", parameter))
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(share.element_size(), torch.int64)
        sums.append(share.view(bits).sum(dtype=torch.int64))
    return dict(zip(parameters, torch.stack(sums).cpu(), strict=True)) if sums else {}


def facts_of(args: ToolGRPOConfig, model: nn.Module, relative_to_group: bool) -> RunFacts:
    """
    Return what the rules have to know of a run.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration.
        model (`PreTrainedModel` or `PeftModel`):
            The policy.
        relative_to_group (`bool`):
            Whether advantages are 0 in a group whose rewards are all equal.
    """
    dtype = compute_dtype(args, model)
    return RunFacts(
        logprob_tolerance=args.logprob_check_tolerance or (UNMEASURED if dtype in LOW_PRECISION else EXACT_TOLERANCE),
        dtype=str(dtype).removeprefix("torch."),
        steps_per_batch=optimizer_steps_of(args),
        policy_from=args.assist_warmup_steps + args.value_warmup_steps,
        sync_steps=args.ref_model_sync_steps if args.sync_ref_model else None,
        copies_policy=args.ref_model_mixup_alpha == 1,
        max_grad_norm=args.max_grad_norm or 1.0,
        rollouts=args.generation_batch_size or 1,
        generations=args.num_generations or 1,
        learning_rate=args.learning_rate,
        group_advantages=relative_to_group,
        loss_scaling=args.fp16,
        rope=RowFrequencies(model).kinds,
    )
