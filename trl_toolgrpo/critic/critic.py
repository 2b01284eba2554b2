"""The critic of a run: advantages of single tokens from a value head, and the head's loss, optimizer and files.

This is what the estimators "gae" and "group_gae" add to training. The value before each token is recorded when the
token is sampled.
"""

import logging
import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..algorithms.advantages import (
    explained_variance,
    first_of_step,
    generalized_advantages,
    moments,
    place_rewards,
    rewards_to_go,
    steps_of,
    whiten,
)
from ..errors import ConfigError, ValueHeadError
from ..models.rounding import widest
from ..rollout.engine import RolloutBatch
from ..run_folder.storage_failures import tolerated
from ..types import Batch
from ..update.losses import value_loss
from ..update.scoring import SharedPromptScoring
from .value_head import HEAD_FILE, ValueHead, attach_value_head, load_value_head, save_value_head, without_value_head


logger = logging.getLogger(__name__)


class Critic(SharedPromptScoring):
    """Part of [`ToolGRPOTrainer`]; see `advantage_estimator` of [`ToolGRPOConfig`]."""

    _value_head: ValueHead | None = None
    _rewards: Tensor
    _warned_of_turn_rewards = False
    _passing: "_PassingGradient | None" = None
    _seen: list[tuple[Tensor, Tensor, Tensor, Tensor]]  # what the head has read since the last optimizer step

    def _prepare_critic(self) -> None:
        """Attach the head: the one in the folder that the policy came from, if there is one, else a new one."""
        if self.args.advantage_estimator == "group":
            return
        if self.aux_loss_enabled:
            raise ConfigError(
                f"You passed `advantage_estimator={self.args.advantage_estimator!r}` with a mixture-of-experts model "
                f"whose router loss is on, so that values cannot be scored.",
                remedy="Set `output_router_logits` of its configuration to False, or use "
                "`advantage_estimator='group'`.",
            )
        if self.args.value_epochs > 1 and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ConfigError(
                f"You passed `value_epochs={self.args.value_epochs}` with FSDP or DeepSpeed, which shard the value "
                f"head and step it together with the policy.",
                remedy="Set `value_epochs=1`, or train with DDP.",
            )
        if self.args.value_warmup_steps > 0 and self.is_deepspeed_enabled:
            raise ConfigError(
                f"You passed `value_warmup_steps={self.args.value_warmup_steps}` with DeepSpeed, which steps all "
                f"parameters within the backward pass, so that the policy cannot be left as it is while the critic "
                f"learns.",
                remedy="Set `value_warmup_steps=0`, or train with FSDP2 or DDP.",
            )
        if self.lr_scheduler is not None:
            raise ConfigError(
                f"You passed a learning-rate scheduler with `advantage_estimator={self.args.advantage_estimator!r}`. "
                f"It was made before the value head, which is a group of its own in the optimizer, and has no rate "
                f"for it.",
                remedy="Pass `optimizers=(optimizer, None)` and set `lr_scheduler_type` and `warmup_steps`.",
            )
        weight: Tensor = self.model.get_input_embeddings().weight  # type: ignore[assignment]
        head = ValueHead(self.model.config.get_text_config().hidden_size, detach=self.args.value_detach)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._value_head = head.to(weight.device, dtype)
        folder = Path(str(getattr(self.model.config, "_name_or_path", "")))
        if (folder / HEAD_FILE).is_file():
            load_value_head(self._value_head, folder)
        attach_value_head(self.model, self._value_head)
        self._passing = _PassingGradient(self._value_head) if self.is_deepspeed_enabled else None
        self._seen = []
        if self.args.value_epochs > 1:
            self.add_callback(_MoreValueEpochs(self))

    @property
    def _value_warmup(self) -> bool:
        """Whether the critic is trained alone: in the first `value_warmup_steps` after the assisted ones."""
        start = self.args.assist_warmup_steps
        return start <= self.state.global_step < start + self.args.value_warmup_steps

    # Advantages

    def _estimate_advantages(self, output: Batch, batch: RolloutBatch) -> None:
        """
        Replace the advantages (B,) of a scored rollout batch by those of its tokens (B, T).

        What the value loss needs is added to the batch. Without a value head the batch stays as it is.
        """
        if self._value_head is None:
            return self._warn_of_turn_rewards(batch)
        trajectories, width = batch.trajectories, output["completion_ids"].size(1)
        device = output["completion_ids"].device
        # Rewards of this process's rollouts, on the tokens they belong to
        start = self.accelerator.process_index * len(trajectories)
        rewards = self._rewards[start : start + len(trajectories)].to(device)
        terminal = rewards if self.args.advantage_estimator == "gae" else output["advantages"]
        placed = place_rewards(terminal.nan_to_num(nan=0.0).cpu(), trajectories, width).to(device, widest(device))
        # Advantages over the steps of the rollouts that were scored
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        taken = mask.bool() & ~rewards.isnan()[:, None]
        steps = steps_of(trajectories, width, self.args.gae_unit).to(device).where(taken, -1)
        values = self._recorded_values(output, batch)
        advantages, returns = generalized_advantages(placed, values, steps, self.args.gae_gamma, self.args.gae_lambda)
        first = first_of_step(steps)
        self._log_critic(rewards_to_go(placed, steps, self.args.gae_gamma), values, first)
        if self.args.advantage_estimator == "gae":
            advantages = whiten(advantages, steps >= 0, self._summed(moments(advantages, steps >= 0)))
        output["advantages"] = advantages.to(output["advantages"].dtype)
        output["old_values"], output["value_targets"] = values.float(), returns.float()
        output["value_mask"] = first.long()
        output["value_count"] = self.accelerator.gather(first.sum()).sum()
        # TRL's table of completions gets the mean over a rollout's tokens
        counts = (steps >= 0).sum(dim=1).clamp(min=1)
        logged = self.accelerator.gather(output["advantages"].sum(dim=1) / counts).tolist()
        for place, value in enumerate(logged, start=-len(logged)):
            self._logs["advantages"][place] = value  # type: ignore[index]

    def _warn_of_turn_rewards(self, batch: RolloutBatch) -> None:
        """Warn once that a group advantage has no place for the rewards of turns."""
        if not self._warned_of_turn_rewards and any(turn.total_reward for t in batch.trajectories for turn in t.turns):
            self._warned_of_turn_rewards = True
            logger.warning(
                "Tools gave rewards to turns (`ToolResult.reward` or `turn_reward`), which have no effect with "
                "`advantage_estimator='group'`. Set it to 'gae' or 'group_gae', or count them in a reward function."
            )

    def _recorded_values(self, output: Batch, batch: RolloutBatch) -> Tensor:
        """Return V(s_t) for each token, shape (B, T); recomputed without gradient if none was recorded."""
        width, device = output["completion_ids"].size(1), output["completion_ids"].device
        values = torch.zeros(len(batch.rollouts), width, dtype=torch.float64)
        missing = torch.zeros(())
        for row, trajectory in enumerate(batch.trajectories):
            if trajectory.values is not None:
                values[row, : len(trajectory.values)] = torch.tensor(trajectory.values, dtype=torch.float64)
            elif any(trajectory.trainable_mask):
                missing += 1
        values = values.to(device, widest(device))
        if self.accelerator.reduce(missing.to(device), reduction="sum") > 0:
            values = self._computed_values(output, batch)
        if not bool(values.isfinite().all()):
            rows = (~values.isfinite()).any(dim=1).nonzero()[:, 0].tolist()
            raise ValueHeadError(
                f"The value head gave values that are not finite for the rollouts {rows}.",
                remedy="Lower `value_learning_rate`, and look at `value/loss` and `value/grad_norm` of the last "
                "steps.",
            )
        return values

    def _computed_values(self, output: Batch, batch: RolloutBatch) -> Tensor:
        self._ask_values = True
        try:
            self._score_rollouts(self._rollout_tokens(output, batch))
        finally:
            self._ask_values = False
        values = self._take_values()
        return values.to(widest(values.device))

    def _take_values(self) -> Tensor:
        values, self._values, self._value_inputs = self._values, None, None
        if values is None:
            raise RuntimeError("TRL computed a loss without scoring the batch; the installed TRL is not supported.")
        return values

    def _log_critic(self, returns: Tensor, values: Tensor, first: Tensor) -> None:
        sums = torch.stack([moments(returns, first), moments(returns - values, first)])
        found = explained_variance(*self._summed(sums))
        if found is not None:
            self._metrics["train"]["value/explained_variance"].append(found)

    def _summed(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, reduction="sum")

    # Loss

    def _add_value_loss(self, loss: Tensor, inputs: Batch) -> Tensor:
        """Return the policy loss of a micro-batch plus its value loss; while the critic warms up, the latter alone."""
        mask, read = inputs["value_mask"], self._value_inputs
        values = self._take_values()
        window = self.current_gradient_accumulation_steps / (self.args.steps_per_generation or 1)
        steps = inputs["value_count"].clamp(min=1) * window  # of one optimizer step, over all processes
        summed = value_loss(values, inputs["old_values"], inputs["value_targets"], mask, self.args.value_clip)
        # The mean over the micro-batches of an optimizer step is the mean over its steps
        shown = self.accelerator.reduce(summed.detach(), reduction="sum") / steps
        self._metrics["train"]["value/loss"].append((shown * self.current_gradient_accumulation_steps).item())
        if self.args.value_epochs > 1 and self.model.training and read is not None:
            taken = mask.bool()
            targets = inputs["value_targets"][taken]
            # Each step weighs as in the loss itself, where rollout batches of one optimizer step differ in size
            weights = (1 / steps).to(targets.dtype).expand_as(targets)
            self._seen.append((read[taken], inputs["old_values"][taken], targets, weights))
        policy = loss * 0 if self._value_warmup else loss
        return policy + self.args.value_loss_coef * summed * self.accelerator.num_processes / steps

    def _run_value_epochs(self) -> None:
        """
        Train the head alone, after an optimizer step, on what it read in that step: `value_epochs` less one passes.

        A critic that takes one gradient step for a rollout batch trails the policy; phasic policy gradient (arXiv
        2009.04416) trains it for several epochs, too. The hidden states are those of the step itself, so that no pass
        of the policy is needed.
        """
        head, seen = self._value_head, self._seen
        self._seen = []
        if head is None or self.optimizer is None or not seen:
            return
        read, old_values, targets, weights = (torch.cat(parts) for parts in zip(*seen, strict=True))
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # not scaled, as these losses are not
        parameters = list(head.parameters())
        self.model.zero_grad()
        for _ in range(self.args.value_epochs - 1):
            with torch.enable_grad():
                loss = value_loss(head(read), old_values, targets, weights, self.args.value_clip)
                gradients = torch.autograd.grad(self.args.value_loss_coef * loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = self.accelerator.reduce(gradient, reduction="sum")
            if self.args.max_grad_norm:
                nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
            optimizer.step()
        head.zero_grad()

    def _touch_value_head(self, loss: Tensor) -> Tensor:
        """Give the head a part of weight 0 in a loss, since DDP waits for the gradient of every parameter."""
        if self._value_head is None:
            return loss
        return loss + 0.0 * sum(parameter.sum() for parameter in self._value_head.parameters())

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if self._passing is not None:
            self._passing.scale = float(getattr(getattr(model, "optimizer", None), "loss_scale", 1.0))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._value_head is not None and self.accelerator.sync_gradients:
            norm = self._head_gradient_norm(self._value_head)
            if norm is not None and self.state.global_step >= self.args.assist_warmup_steps:
                self._metrics["train"]["value/grad_norm"].append(norm)
            if self._value_warmup:  # not merely a gradient of 0, which decay and momentum would still act on
                own = {id(parameter) for parameter in self._value_head.parameters()}
                for parameter in self.model.parameters():
                    if id(parameter) not in own:
                        parameter.grad = None
        return loss

    def _head_gradient_norm(self, head: ValueHead) -> float | None:
        """
        Return the norm of the head's gradient, without the scale that float16 puts on the loss.

        `None` if there is no gradient, and if it overflowed, so that the scaler skips the step.
        """
        if self._passing is not None:
            return float(self.accelerator.reduce(self._passing.take(), reduction="mean").norm())
        gradients = [parameter.grad for parameter in head.parameters() if parameter.grad is not None]
        if not gradients:
            return None
        total = nn.utils.get_total_norm(gradients)
        norm, scaler = float(total.full_tensor() if isinstance(total, DTensor) else total), self.accelerator.scaler
        if scaler is None or not scaler.is_enabled():
            return norm
        return norm / scaler.get_scale() if math.isfinite(norm) else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make TRL's optimizer, with the value head in a group of its own, at its own learning rate."""
        optimizer = super().create_optimizer(model)
        if self._value_head is None:
            return optimizer
        head = list(self._value_head.parameters())
        own = {id(parameter) for parameter in head}
        if any({id(p) for p in group["params"]} == own for group in optimizer.param_groups):
            return optimizer
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        optimizer.add_param_group({"params": head, "lr": self.args.value_learning_rate or 1e-3, "weight_decay": 0.0})
        return optimizer

    # Files

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as TRL does, and write the head into a file of its own."""
        super().save_model(output_dir, _internal_call)
        if self._value_head is not None:
            with tolerated():
                save_value_head(self._value_head, output_dir or str(self.args.output_dir), self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self._value_head is not None and not hasattr(self.model, "peft_config"):
            state_dict = without_value_head(self.model.state_dict() if state_dict is None else state_dict)
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_head(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            self._load_head(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load as TRL does, also from a checkpoint without a value head: the head's group then starts anew."""
        optimizer = self.optimizer
        missing = checkpoint is not None and not (Path(checkpoint) / HEAD_FILE).is_file()
        if optimizer is None or self._value_head is None or not missing:
            return super()._load_optimizer_and_scheduler(checkpoint)
        group = optimizer.param_groups.pop()
        super()._load_optimizer_and_scheduler(checkpoint)
        optimizer.param_groups.append(group)
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        if schedule is not None and len(schedule.base_lrs) < len(optimizer.param_groups):
            schedule.base_lrs.append(group["initial_lr"])

    def _load_head(self, folder: str) -> None:
        if self._value_head is None:
            return
        if self.args.value_warmup_steps > 0 and not (Path(folder) / HEAD_FILE).is_file():
            return  # a new head, which is warmed up first
        load_value_head(self._value_head, folder)


class _MoreValueEpochs(TrainerCallback):
    """Runs the further epochs of the value head after each optimizer step."""

    def __init__(self, trainer: Critic) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self._trainer._run_value_epochs()


class _PassingGradient:
    """The gradient of a module, summed in the backward pass: DeepSpeed keeps none once its step is made."""

    scale = 1.0  # of the loss, in float16

    def __init__(self, module: nn.Module) -> None:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for place, parameter in enumerate(parameters):
            parameter.register_hook(partial(self._add, place))

    def _add(self, place: int, gradient: Tensor) -> None:
        self._sums[place] = self._sums[place].to(gradient.device) + gradient.detach() / self.scale

    def take(self) -> Tensor:
        """Return, as one vector, what this process has added to the gradient since the last call."""
        taken = torch.cat([summed.flatten() for summed in self._sums])
        self._sums = [torch.zeros_like(summed) for summed in self._sums]
        return taken
