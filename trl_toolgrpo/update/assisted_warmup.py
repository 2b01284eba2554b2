"""The assisted warm-up: the first optimizer steps learn the calls of the better rollouts, without a policy gradient.

Whether a rollout batch is assisted is decided when it is generated, and stays with it, so that no batch is half
assisted.
"""

import torch
from torch import Tensor, nn

from ..rollout.engine import RolloutBatch
from ..rollout.rewards import Rewards
from ..trl_hooks import Run
from ..types import Batch
from .losses import assisted_loss, assisted_rows, calling_tokens
from .scoring import Scoring


class AssistedWarmup:
    """
    The assisted steps of a run; see `assist_warmup_steps` and `force_rate` of [`ToolGRPOConfig`].

    Args:
        run ([`Run`]):
            The run.
        scoring ([`Scoring`]):
            Scores its batches.
    """

    def __init__(self, run: Run, scoring: Scoring) -> None:
        self._run, self._scoring = run, scoring

    @property
    def active(self) -> bool:
        """Whether the rollout batch being generated feeds assisted steps."""
        return self._run.training and self._run.state.global_step < self._run.args.assist_warmup_steps

    @property
    def may_force(self) -> bool:
        """Whether turns of the rollout batch being generated may be forced."""
        return self.active or (self._run.training and not self._run.args.disable_forcing_in_updates)

    def on_rewards(self, output: Batch, batch: RolloutBatch, rewards: Rewards) -> None:
        """Add what assisted steps need to a batch: which tokens to learn, and over how many the mean is taken."""
        mask = torch.zeros_like(output["completion_ids"])
        for row, learned in enumerate(assisted_rows(rewards.own_totals, rewards.totals).tolist()):
            if learned and not batch.invalid[row]:
                tokens = calling_tokens(batch.trajectories[row])
                mask[row, : len(tokens)] = torch.tensor(tokens)
        output["assist_mask"] = mask
        output["assist_count"] = self._run.gather_sum(mask)

    def loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        """
        Return the supervised loss of a micro-batch, a scalar.

        The losses of the micro-batches of an accumulation window add up to its token mean.
        """
        run = self._run
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        # All tokens before a learned one are read, also those of a rollout that `completion_mask` leaves out of the
        # policy loss
        read = torch.maximum(inputs["completion_mask"], inputs["assist_mask"]).flip(1).cummax(dim=1).values.flip(1)
        mask = torch.cat([inputs["prompt_mask"], read], dim=1)
        logps = self._scoring.score(model, (ids, mask, inputs["completion_ids"].size(1))).logps
        window = run.current_gradient_accumulation_steps / (run.args.steps_per_generation or 1)
        count = inputs["assist_count"].clamp(min=1) * window / run.accelerator.num_processes
        loss = assisted_loss(logps, inputs["assist_mask"], count)
        # The mean over the micro-batches of an optimizer step is the token mean of the step
        shown = run.accelerator.reduce(loss.detach(), reduction="mean") * run.current_gradient_accumulation_steps
        run.training_metrics["forced/loss"].append(shown.item())
        return run.args.forced_loss_coef * loss
