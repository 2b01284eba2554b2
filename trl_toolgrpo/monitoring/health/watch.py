"""The health rules, run on every logged step as `health_checks` says.

Every figure that the rules read is over all processes, so that the main process alone runs them.
"""

import logging
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
from ...models.rounding import EXACT_TOLERANCE, LOW_PRECISION, Accepted, compute_dtype
from ...models.sharding import local
from ...run_folder.files import HEALTH, read_lines
from ...run_folder.writer import RunLog
from ...types import JSONObject, Row
from ...validation.trainable_parameters import policy_parameters
from .monitor import HealthMonitor, RunFacts, still_open
from .rollout_rules import DISTINCT, ROLLOUT_RULES, SHORTCUTS, correlation_within_groups, costs
from .update_rules import UPDATE_RULES


logger = logging.getLogger(__name__)

UNMEASURED = 0.05
"""Mean difference in nats taken for rounding in bfloat16 or float16 where no batch was scored twice."""


class HealthWatch(RunLog):
    """Part of [`ToolGRPOTrainer`]; see `health_checks` of [`ToolGRPOConfig`]."""

    _monitor: HealthMonitor | None = None
    _rounding: Accepted | None
    _motion: "_PolicyMotion | None" = None

    def _prepare_run_log(self) -> None:
        super()._prepare_run_log()
        if self.args.health_checks != "off":
            self._motion = _PolicyMotion(self)
            self.add_callback(self._motion)

    def _begin_run_log(self) -> None:
        super()._begin_run_log()
        self._monitor = None
        if self.args.health_checks == "off":
            return
        self._monitor = HealthMonitor([*UPDATE_RULES, *ROLLOUT_RULES], facts_of(self.args, self.model))
        self._monitor.recall(entry for entry in self.state.log_history if "loss" in entry)
        if self._run_folder is not None and self.accelerator.is_main_process:
            known = still_open(read_lines(self._run_folder / HEALTH))
            self._monitor.open = dict.fromkeys(known, self._monitor.count)

    def _calculate_rewards(self, inputs: list[Row], *args: list) -> Tensor:
        """Compute rewards as TRL does, and log how they follow what the rollouts cost."""
        scores = super()._calculate_rewards(inputs, *args)
        if self._monitor is not None and self._recording and self._batch is not None and self.model.training:
            own = torch.tensor([costs(trajectory) for trajectory in self._batch.trajectories])
            every = self.accelerator.gather(own.to(self.accelerator.device)).T.tolist()
            rewards = self._rewards.tolist()
            for (cost, metric), values in zip(SHORTCUTS.items(), every, strict=True):
                found = correlation_within_groups(rewards, values, self.num_generations, DISTINCT[cost])
                if found is not None:
                    self._metrics["train"][metric].append(found)
        return scores

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, with `policy/moved`, and run the health rules on a training step."""
        moved = self._motion.take() if self._motion is not None and self.model.training and "loss" in logs else None
        if moved is not None and self._recording:  # else the log is TRL's own
            self._metrics["train"]["policy/moved"].append(moved)
        super().log(logs, start_time)
        if self._monitor is not None and self.model.training and "loss" in logs:
            known = {} if moved is None else {"policy/moved": moved}
            self._check_health(self._monitor, {**self.state.log_history[-1], **known})

    def _check_health(self, monitor: HealthMonitor, metrics: JSONObject) -> None:
        faults: list[JSONObject] = []
        if self._rounding is not None and self.args.logprob_check_tolerance is None:
            mean, doubtful = self._rounding.mean, self._rounding.doubtful
            monitor.facts = replace(monitor.facts, logprob_tolerance=mean, doubtful_tolerance=doubtful)
        if self.accelerator.is_main_process:
            with self._log_failures.tolerated("The health rules could not be run"):
                for line in monitor.step(metrics):
                    self._add_line(HEALTH, line)
                    if line["level"] != "ok":
                        faults.append(line)
                        self._report_fault(line)
        if self.args.health_checks == "raise":
            (faults,) = broadcast_object_list([faults])
            if faults:
                self._stop_for(faults[0])

    def _report_fault(self, line: JSONObject) -> None:
        """Report a fault that begins, on the main process."""
        logger.warning("Health, step %d, %s: %s", line["step"], line["rule"], line["message"])

    def _stop_for(self, line: JSONObject) -> None:
        """Save the run as it stands and end it, in every process."""
        folder = Path(self._get_output_dir(trial=None)) / f"{PREFIX}{self.state.global_step}"
        remedy = (
            f"The run as it stands is in {folder}; resume from there with `health_checks='warn'` to go on all the "
            f"same, or from an earlier checkpoint."
        )
        self.control.should_training_stop = True  # so that a checkpoint that cannot be written is an error
        try:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        except CheckpointSaveError as error:
            remedy = f"No checkpoint of it could be written: {error}"
        raise HealthError(
            f"The run was stopped in step {line['step']} by the health rule `{line['rule']}`, as "
            f"`health_checks='raise'` asks for. {line['message']}",
            remedy=remedy,
        )


class _PolicyMotion(TrainerCallback):
    """Observes whether the weights of a policy move where the optimizer has reason to move them."""

    def __init__(self, trainer: HealthWatch) -> None:
        self._trainer = trainer
        self._before: dict[str, Tensor] = {}
        self._has_gradient = False
        self._due = 0  # optimizer steps since the last look that should have moved the policy

    def _policy(self) -> dict[str, nn.Parameter]:
        return policy_parameters(self._trainer.accelerator.unwrap_model(self._trainer.model))

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self._before, self._due = {}, 0

    def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if not self._before:
            self._before = _fingerprints(self._policy())

    def on_pre_optimizer_step(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if self._trainer.is_deepspeed_enabled:  # which has taken its step by now, and keeps no gradient
            self._has_gradient = True
            return
        gradients = (parameter.grad for parameter in self._policy().values())
        self._has_gradient = any(bool(local(gradient).any()) for gradient in gradients if gradient is not None)

    def on_optimizer_step(self, args: object, state: object, control: object, **kwargs: object) -> None:
        trainer: Any = self._trainer
        own = {id(parameter) for parameter in self._policy().values()}
        groups = trainer.optimizer.param_groups  # DeepSpeed's hold flat copies, the policy's first
        rates = [g["lr"] for g in groups if any(id(p) in own for p in g["params"])] or [groups[0]["lr"]]
        if self._has_gradient and max(rates) > 0 and not trainer.accelerator.optimizer_step_was_skipped:
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
        found = torch.tensor([float(due), *changed], device=self._trainer.accelerator.device)
        due_anywhere, *moved = self._trainer.accelerator.reduce(found, reduction="sum").tolist()
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


def facts_of(args: ToolGRPOConfig, model: nn.Module) -> RunFacts:
    """
    Return what the rules have to know of a run.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration.
        model (`PreTrainedModel` or `PeftModel`):
            The policy.
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
        group_advantages=args.advantage_estimator != "gae",
        loss_scaling=args.fp16,
        rope=RowFrequencies(model).kinds,
    )
