"""The critic of a run: its value head, what it learns from, and the head's loss, optimizer and files.

This is what estimators that need values add to training. The value before each token is recorded when the token is
sampled.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..config.fields import estimator_name
from ..errors import ConfigError, ValueHeadError
from ..models.rounding import widest
from ..rollout.engine import RolloutBatch
from ..run_folder.storage_failures import tolerated
from ..trl_hooks import Run, name_or_path
from ..update.losses import value_loss
from ..update.policy_update import MicroBatch
from ..update.scoring import Scoring, Tokens
from .value_head import HEAD_FILE, ValueHead, attach_value_head, load_value_head, save_value_head, without_value_head


logger = logging.getLogger(__name__)


class Critic:
    """
    The value head of a run, and its training; see `value_loss_coef` and the other `value_*` fields of
    [`ToolGRPOConfig`].

    The head is the one in the folder that the policy came from, if there is one, else a new one.

    Args:
        run ([`Run`]):
            The run, its model made and not yet wrapped.
        scoring ([`Scoring`]):
            Computes values that the sampler has not recorded.

    Raises:
        ConfigError: for a model, an optimizer or a way to shard that has no place for a value head.
    """

    def __init__(self, run: Run, scoring: Scoring) -> None:
        _check_place_for_head(run)
        self._run, self._scoring, args, model = run, scoring, run.args, run.model
        weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
        head = ValueHead(model.config.get_text_config().hidden_size, detach=args.value_detach)
        self.head = head.to(weight.device, torch.float64 if weight.dtype == torch.float64 else torch.float32)
        folder = Path(name_or_path(model))
        if (folder / HEAD_FILE).is_file():
            load_value_head(self.head, folder)
        attach_value_head(model, self.head)
        self._passing = _PassingGradient(self.head) if run.is_deepspeed_enabled else None
        # What the head has read since the last optimizer step
        self._seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        if args.value_epochs > 1:
            run.add_callback(_MoreValueEpochs(self))

    def on_train_begin(self) -> None:
        """Forget what an earlier training, which may have failed, has not learned from."""
        self._seen = []

    @property
    def warms_up(self) -> bool:
        """Whether the critic is trained alone: in the first `value_warmup_steps` after the assisted ones."""
        start = self._run.args.assist_warmup_steps
        return start <= self._run.state.global_step < start + self._run.args.value_warmup_steps

    # A rollout batch

    def values(self, tokens: Tokens, batch: RolloutBatch) -> Tensor:
        """
        Return V(s_t) for each token of a batch, shape (B, T); recomputed without gradient if none was recorded. Every
        process must call this.

        Args:
            tokens (`tuple[Tensor, Tensor, int]`):
                All tokens of the batch.
            batch ([`RolloutBatch`]):
                The rollouts.

        Raises:
            ValueHeadError: if one of them is not finite.
        """
        width, device = tokens[2], tokens[0].device
        values = torch.zeros(len(batch.rollouts), width, dtype=torch.float64)
        missing = torch.zeros(())
        for row, trajectory in enumerate(batch.trajectories):
            if trajectory.values is not None:
                values[row, : len(trajectory.values)] = torch.tensor(trajectory.values, dtype=torch.float64)
            elif any(trajectory.trainable_mask):
                missing += 1
        values = values.to(device, widest(device))
        if self._run.accelerator.reduce(missing.to(device), reduction="sum") > 0:
            values = self.computed_values(tokens)
        if not bool(values.isfinite().all()):
            rows = (~values.isfinite()).any(dim=1).nonzero()[:, 0].tolist()
            raise ValueHeadError(
                f"The value head gave values that are not finite for the rollouts {rows}.",
                remedy="Lower `value_learning_rate`, and look at `value/loss` and `value/grad_norm` of the last "
                "steps.",
            )
        return values

    def computed_values(self, tokens: Tokens) -> Tensor:
        """Return V(s_t) for each token of a batch from a pass without gradient, shape (B, T)."""
        values = self._scoring.score_policy(tokens, ("logps", "values")).values
        if values is None:
            raise RuntimeError("The pass over a batch gave no values.")
        return values.to(widest(values.device))

    # Loss

    def with_value_loss(self, loss: Tensor, micro_batch: MicroBatch) -> Tensor:
        """
        Return the policy loss of a micro-batch plus its value loss; while the critic warms up, the latter alone.

        Args:
            loss (`Tensor`):
                Policy loss, a scalar.
            micro_batch ([`MicroBatch`]):
                The micro-batch, scored with values.
        """
        run, args, inputs, scores = self._run, self._run.args, micro_batch.given, micro_batch.scores
        if scores is None or scores.values is None:
            raise RuntimeError("TRL computed a loss without scoring the batch; the installed TRL is not supported.")
        mask = inputs["value_mask"]
        window = run.current_gradient_accumulation_steps / (args.steps_per_generation or 1)
        steps = inputs["value_count"].clamp(min=1) * window  # of one optimizer step, over all processes
        summed = value_loss(scores.values, inputs["old_values"], inputs["value_targets"], mask, args.value_clip)
        # The mean over the micro-batches of an optimizer step is the mean over its steps
        shown = run.accelerator.reduce(summed.detach(), reduction="sum") / steps
        run.training_metrics["value/loss"].append((shown * run.current_gradient_accumulation_steps).item())
        if run.training and scores.value_inputs is not None:
            taken = mask.bool()
            targets = inputs["value_targets"][taken]
            # Each step weighs as in the loss itself, where rollout batches of one optimizer step differ in size
            weights = (1 / steps).to(targets.dtype).expand_as(targets)
            self._seen.append((scores.value_inputs[taken], inputs["old_values"][taken], targets, weights))
        policy = loss * 0 if self.warms_up else loss
        return policy + args.value_loss_coef * summed * run.accelerator.num_processes / steps

    def with_idle_head(self, loss: Tensor, model: nn.Module) -> Tensor:
        """
        Give the head a part of weight 0 in a loss, since DDP waits for the gradient of every parameter, unless it
        looks for unused ones itself.

        Args:
            loss (`Tensor`):
                A loss that the head has no part in, a scalar.
            model (`nn.Module`):
                The policy, wrapped.
        """
        if getattr(model, "find_unused_parameters", False):
            return loss
        return loss + 0.0 * sum(parameter.sum() for parameter in self.head.parameters())

    def run_value_epochs(self) -> None:
        """
        Train the head alone, after an optimizer step, on what it read in that step: `value_epochs` less one passes.

        A critic that takes one gradient step for a rollout batch trails the policy; phasic policy gradient (arXiv
        2009.04416) trains it for several epochs, too. The hidden states are those of the step itself, so that no pass
        of the policy is needed.
        """
        head, seen, run, args = self.head, self._seen, self._run, self._run.args
        self._seen = []
        if run.optimizer is None or not seen:
            return
        read, old_values, targets, weights = (torch.cat(parts) for parts in zip(*seen, strict=True))
        optimizer = getattr(run.optimizer, "optimizer", run.optimizer)  # not scaled, as these losses are not
        parameters = list(head.parameters())
        run.model.zero_grad()
        for _ in range(args.value_epochs - 1):
            with torch.enable_grad():
                loss = value_loss(head(read), old_values, targets, weights, args.value_clip)
                gradients = torch.autograd.grad(args.value_loss_coef * loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = run.accelerator.reduce(gradient, reduction="sum")
            if args.max_grad_norm:
                nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
        head.zero_grad()

    # Gradients and optimizer

    def before_backward(self, model: nn.Module) -> None:
        """Note the scale of the loss that DeepSpeed is about to take backwards."""
        if self._passing is not None:
            self._passing.scale = float(getattr(getattr(model, "optimizer", None), "loss_scale", 1.0))

    def after_backward(self) -> None:
        """Log the gradient of the head once all micro-batches of an optimizer step have added to it; while the critic
        warms up, take the policy's away."""
        run = self._run
        if not run.accelerator.sync_gradients:
            return
        norm = self._gradient_norm()
        if norm is not None and run.state.global_step >= run.args.assist_warmup_steps:
            run.training_metrics["value/grad_norm"].append(norm)
        if self.warms_up:  # not merely a gradient of 0, which decay and momentum would still act on
            own = {id(parameter) for parameter in self.head.parameters()}
            for parameter in run.model.parameters():
                if id(parameter) not in own:
                    parameter.grad = None

    def _gradient_norm(self) -> float | None:
        """
        Return the norm of the head's gradient, without the scale that float16 puts on the loss.

        `None` if there is no gradient, and if it overflowed, so that the scaler skips the step.
        """
        accelerator = self._run.accelerator
        if self._passing is not None:
            return float(accelerator.reduce(self._passing.take(), reduction="mean").norm())
        gradients = [parameter.grad for parameter in self.head.parameters() if parameter.grad is not None]
        if not gradients:
            return None
        total = nn.utils.get_total_norm(gradients)
        norm, scaler = float(total.full_tensor() if isinstance(total, DTensor) else total), accelerator.scaler
        if scaler is None or not scaler.is_enabled():
            return norm
        return norm / scaler.get_scale() if math.isfinite(norm) else None

    def join_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the head a group of its own in an optimizer, at its own learning rate."""
        head = list(self.head.parameters())
        own = {id(parameter) for parameter in head}
        if any({id(p) for p in group["params"]} == own for group in optimizer.param_groups):
            return
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        rate = self._run.args.value_learning_rate or 1e-3
        optimizer.add_param_group({"params": head, "lr": rate, "weight_decay": 0.0})

    # Files

    def save(self, folder: str | Path) -> None:
        """Write the head into a file of its own. Every process must call this."""
        with tolerated():
            save_value_head(self.head, folder, self._run.args.should_save)

    def without_head(self, state_dict: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return the state of a model that is saved whole, without the head; of an adapter as it is."""
        if hasattr(self._run.model, "peft_config"):
            return state_dict
        return without_value_head(self._run.model.state_dict() if state_dict is None else state_dict)

    def load(self, folder: str | Path) -> None:
        """Read the head from a checkpoint. One without a head leaves a new one, if that is warmed up first."""
        if self._run.args.value_warmup_steps > 0 and not (Path(folder) / HEAD_FILE).is_file():
            return
        load_value_head(self.head, folder)

    @contextmanager
    def optimizer_without_head(self, checkpoint: str | None) -> Iterator[None]:
        """Load the optimizer of a checkpoint while open, also of one without a value head: the head's group then
        starts anew."""
        optimizer = self._run.optimizer
        if checkpoint is None or optimizer is None or (Path(checkpoint) / HEAD_FILE).is_file():
            yield
            return
        group = optimizer.param_groups.pop()
        yield
        optimizer.param_groups.append(group)
        schedule = getattr(self._run.lr_scheduler, "scheduler", self._run.lr_scheduler)
        if schedule is not None and len(schedule.base_lrs) < len(optimizer.param_groups):
            schedule.base_lrs.append(group["initial_lr"])


def _check_place_for_head(run: Run) -> None:
    """Raise if a value head cannot be trained in a run."""
    args = run.args
    estimator = estimator_name(args)
    if run.aux_loss_enabled:
        raise ConfigError(
            f"You passed `advantage_estimator={estimator!r}` with a mixture-of-experts model "
            f"whose router loss is on, so that values cannot be scored.",
            remedy="Set `output_router_logits` of its configuration to False, or use "
            "`advantage_estimator='group'`.",
        )
    if args.value_epochs > 1 and (run.is_fsdp_enabled or run.is_deepspeed_enabled):
        raise ConfigError(
            f"You passed `value_epochs={args.value_epochs}` with FSDP or DeepSpeed, which shard the value "
            f"head and step it together with the policy.",
            remedy="Set `value_epochs=1`, or train with DDP.",
        )
    if args.value_warmup_steps > 0 and run.is_deepspeed_enabled:
        raise ConfigError(
            f"You passed `value_warmup_steps={args.value_warmup_steps}` with DeepSpeed, which steps all "
            f"parameters within the backward pass, so that the policy cannot be left as it is while the critic "
            f"learns.",
            remedy="Set `value_warmup_steps=0`, or train with FSDP2 or DDP.",
        )
    if run.lr_scheduler is not None:
        raise ConfigError(
            f"You passed a learning-rate scheduler with `advantage_estimator={estimator!r}`. "
            f"It was made before the value head, which is a group of its own in the optimizer, and has no rate "
            f"for it.",
            remedy="Pass `optimizers=(optimizer, None)` and set `lr_scheduler_type` and `warmup_steps`.",
        )


class _MoreValueEpochs(TrainerCallback):
    """Runs the further epochs of the value head after each optimizer step."""

    def __init__(self, critic: Critic) -> None:
        self._critic = critic

    def on_optimizer_step(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self._critic.run_value_epochs()


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
