"""The assisted warm-up: the first optimizer steps learn the calls of the better rollouts, without a policy gradient.

Whether a rollout batch is assisted is decided when it is generated, and stays with it, so that no batch is half
assisted.
"""

import logging

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOTrainer

from ..config.fields import ToolGRPOConfig
from ..errors import RewardError
from ..rollout.engine import RolloutBatch
from ..types import Batch, Row
from .losses import assisted_loss, assisted_rows, calling_tokens


logger = logging.getLogger(__name__)


class AssistedWarmup(GRPOTrainer):
    """Part of [`ToolGRPOTrainer`]; see `assist_warmup_steps` and `force_rate` of [`ToolGRPOConfig`]."""

    args: ToolGRPOConfig
    model: PreTrainedModel
    _scored: bool | None = None  # whether any rollout of the latest batch was scored; unknown before the first
    _lost: Tensor | None

    @property
    def _assisted(self) -> bool:
        """Whether the rollout batch being generated feeds assisted steps."""
        return self.model.training and self.state.global_step < self.args.assist_warmup_steps

    @property
    def _may_force(self) -> bool:
        return self._assisted or (self.model.training and not self.args.disable_forcing_in_updates)

    def _calculate_rewards(self, inputs: list[Row], *args: list) -> Tensor:
        rewards = super()._calculate_rewards(inputs, *args)
        if bool(rewards.isinf().any()):
            rollout, function = rewards.isinf().nonzero()[0].tolist()
            raise RewardError(
                f"The reward function `{self.reward_func_names[function]}` gave {rewards[rollout, function].item()} "
                f"for rollout {rollout}. No advantage can be computed from it.",
                remedy="Return a finite number, or None for a rollout that cannot be scored.",
            )
        self._check_scored(rewards)
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        self._rewards = weighted.masked_fill(rewards.isnan().all(dim=1), torch.nan)  # of all processes
        return rewards

    def _check_scored(self, rewards: Tensor) -> None:
        """Raise if reward functions score nothing from the start; warn when that begins later."""
        if not self.model.training:
            return
        asked = rewards if self._lost is None else rewards[~self._lost]  # without an environment there is no reward
        scored = not bool(asked.isnan().all())
        if not scored and 2 * len(asked) < len(rewards):
            return  # too few to blame the reward functions
        before, self._scored = self._scored, scored
        if self._scored:
            return
        names = " and ".join(f"`{name}`" for name in self.reward_func_names)
        problem = (
            f"No rollout of the batch was scored: {names} gave None or NaN for all {len(asked)}, so that there is "
            f"nothing to learn from."
        )
        if before is None:
            raise RewardError(problem, remedy="Return a number for each rollout that can be scored.")
        if before and self.accelerator.is_main_process:
            logger.warning("Step %d: %s The update does nothing.", self.state.global_step, problem)

    def _assist(self, output: Batch, batch: RolloutBatch) -> None:
        """Add what assisted steps need to a batch: which tokens to learn, and over how many the mean is taken."""
        count = len(batch.rollouts)
        mine = self._rewards[self.accelerator.process_index * count :][:count]
        mask = torch.zeros_like(output["completion_ids"])
        for row, learned in enumerate(assisted_rows(mine, self._rewards).tolist()):
            if learned and not batch.invalid[row]:
                tokens = calling_tokens(batch.trajectories[row])
                mask[row, : len(tokens)] = torch.tensor(tokens)
        output["assist_mask"] = mask
        output["assist_count"] = self.accelerator.gather(mask.sum()).sum()

    def _assisted_loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        """
        Return the supervised loss of a micro-batch.

        The losses of the micro-batches of an accumulation window add up to its token mean.
        """
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        # All tokens before a learned one are read, also those of a rollout that `completion_mask` leaves out of the
        # policy loss
        read = torch.maximum(inputs["completion_mask"], inputs["assist_mask"]).flip(1).cummax(dim=1).values.flip(1)
        mask = torch.cat([inputs["prompt_mask"], read], dim=1)
        width = inputs["completion_ids"].size(1)
        logps, _, _ = self._get_per_token_logps_and_entropies(model, ids, mask, width)
        window = self.current_gradient_accumulation_steps / (self.args.steps_per_generation or 1)
        count = inputs["assist_count"].clamp(min=1) * window / self.accelerator.num_processes
        loss = assisted_loss(logps, inputs["assist_mask"], count)
        # The mean over the micro-batches of an optimizer step is the token mean of the step
        shown = self.accelerator.reduce(loss.detach(), reduction="mean") * self.current_gradient_accumulation_steps
        self._metrics["train"]["forced/loss"].append(shown.item())
        return self.args.forced_loss_coef * loss
