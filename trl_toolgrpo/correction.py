"""Correction of the ratio where the sampler and the policy disagree about a token.

Owns what `sampler_correction` changes in an update, as a mixin of the trainer. The old log-prob is the one recorded
when a token was sampled, so that the ratio of the loss is π_θ/π_sample as a whole: a sampler's rounding and the steps
the policy has made since are both in it, and one cap on its detached value corrects for both.
"""

from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from .config import ToolGRPOConfig
from .losses import capped_old_logps, within_cap


class SamplerCorrection(GRPOTrainer):
    """Part of [`ToolGRPOTrainer`]; see `sampler_correction` of [`ToolGRPOConfig`]."""

    args: ToolGRPOConfig
    model: Any
    _corrected: dict[str, Any] | None = None  # what TRL's loss, in progress, reads behind the scoring pass

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.args.sampler_correction is None or "old_per_token_logps" not in inputs:
            return super()._compute_loss(model, inputs)
        self._corrected = dict(inputs)
        try:
            return super()._compute_loss(model, self._corrected)
        finally:
            self._corrected = None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._corrected is not None:
            self._correct(self._corrected, output[0])
        return output

    def _correct(self, inputs: dict[str, Any], logps: Tensor) -> None:
        """Cap the ratio of `inputs` by its value at the policy's log-probs (B, T), and log how many tokens it met."""
        old, cap = inputs["old_per_token_logps"], self.args.sampler_correction_cap
        within = within_cap(logps, old, cap)
        if self.args.sampler_correction == "truncate":
            inputs["old_per_token_logps"] = capped_old_logps(logps, old, cap)
        else:  # no advantage, and no part in the ratio of its sequence where a loss takes that; the KL term stays
            advantages = inputs["advantages"]
            inputs["advantages"] = (advantages if advantages.dim() == 2 else advantages[:, None]) * within
            inputs["old_per_token_logps"] = torch.where(within, old, logps)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        counts = torch.stack([(~within * mask).sum(), mask.sum()]).float()
        met, tokens = self.accelerator.reduce(counts, reduction="sum").tolist()
        self._metrics["train" if self.model.training else "eval"]["sampling/corrected"].append(met / max(tokens, 1))
