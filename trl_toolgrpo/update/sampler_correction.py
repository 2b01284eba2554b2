"""Correction of the ratio where the sampler and the policy disagree about a token.

The old log-prob is the one recorded when a token was sampled, so that the ratio of the loss is π_θ/π_sample as a
whole: it contains both a sampler's rounding and the steps that the policy has made since, and one bound on its
detached value corrects for both.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOTrainer

from ..config.fields import ToolGRPOConfig
from ..types import Batch
from .losses import BoundedRatio, bounded_ratio
from .scoring import Scores


@dataclass(frozen=True)
class Correction:
    """
    What happens to ratios out of bounds.

    Args:
        mode (`str`):
            One of TRL's modes; see [`bounded_ratio`].
        low, high (`float`, *optional*):
            Bounds of the ratio.
        of_trl (`bool`):
            Whether it comes from TRL's `vllm_importance_sampling_*` and not from `sampler_correction`.
    """

    mode: str
    low: float | None
    high: float | None
    of_trl: bool


def correction_of(args: ToolGRPOConfig) -> Correction | None:
    """
    Return the correction of a run: `sampler_correction` if it is set, else, with vLLM, TRL's own.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration.
    """
    if args.sampler_correction is not None:
        return Correction(f"token_{args.sampler_correction}", None, args.sampler_correction_cap, of_trl=False)
    if args.rollout_backend != "vllm" or not args.vllm_importance_sampling_correction:
        return None
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    return Correction(args.vllm_importance_sampling_mode, low, high, of_trl=True)


def correction_line(args: ToolGRPOConfig) -> str | None:
    """
    Return one line that says which correction a run uses; `None` if its sampler is the model itself, uncorrected.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration.
    """
    found = correction_of(args)
    if found is None:
        return "sampler correction: none" if args.rollout_backend == "vllm" else None
    level, _, action = found.mode.partition("_")
    bounds = (("below", found.low), ("above", found.high))
    outside = [f"{side} {bound:g}" for side, bound in bounds if bound is not None]
    done = "are held there" if action == "truncate" else "take no part in the policy loss"
    whose = f"ratios of a {level} {' or '.join(outside)} {done}" if outside else f"ratios of a {level}, without bounds"
    if found.of_trl:
        return f"sampler correction: TRL's vllm_importance_sampling_mode={found.mode}, {whose}"
    instead = " (in place of TRL's vllm_importance_sampling_*)" if args.rollout_backend == "vllm" else ""
    return f"sampler correction: sampler_correction={args.sampler_correction}, {whose}{instead}"


class SamplerCorrection(GRPOTrainer):
    """Part of [`ToolGRPOTrainer`]; see `sampler_correction` of [`ToolGRPOConfig`] and TRL's
    `vllm_importance_sampling_*`."""

    args: ToolGRPOConfig
    model: PreTrainedModel
    _recording: bool
    _sampled_at: int
    _corrected: Batch | None = None  # what TRL's loss, in progress, reads after the scoring pass

    def _compute_loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        if not self._recording or correction_of(self.args) is None or "old_per_token_logps" not in inputs:
            return super()._compute_loss(model, inputs)
        self._corrected, kept = dict(inputs), self.use_vllm
        try:
            return super()._compute_loss(model, self._corrected)
        finally:
            self._corrected, self.use_vllm = None, kept

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Scores:
        output = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._corrected is not None:
            self._correct(self._corrected, output[0])
        return output

    def _correct(self, inputs: Batch, logps: Tensor) -> None:
        """
        Bound the ratio of a micro-batch by its value at the policy's present log-probs.

        The share of tokens out of bounds is logged.

        Args:
            inputs (`Batch`):
                The micro-batch, which is changed.
            logps (`Tensor`):
                Log-probs of its completion tokens, nats, shape (B, T).
        """
        correction = correction_of(self.args)
        if correction is None:
            return
        old, mask = inputs["old_per_token_logps"], inputs["completion_mask"] * inputs.get("tool_mask", 1)
        present = logps.detach()
        found = bounded_ratio(present - old, mask, correction.mode, correction.low, correction.high)
        moved = self.model.training and self.state.global_step != self._sampled_at
        if correction.of_trl and not moved:
            # As in TRL: its old log-probs, recomputed, are the present ones, so that nothing is clipped, and its loss
            # is multiplied by the weight
            inputs["old_per_token_logps"], inputs["importance_sampling_ratio"] = present, found.weight
            self.use_vllm = True  # for TRL's loss alone
            self._log_weights(present - old, found, mask)
        elif correction.mode.endswith("truncate"):
            inputs["old_per_token_logps"] = torch.where(found.within, old, present - found.log_ratio)
        else:  # neither advantage nor part in the ratio of its sequence, in value and gradient; the KL term stays
            advantages = inputs["advantages"]
            inputs["advantages"] = (advantages if advantages.dim() == 2 else advantages[:, None]) * found.within
            inputs["old_per_token_logps"] = torch.where(found.within, old, logps)
        counts = torch.stack([(~found.within * mask).sum(), mask.sum()]).float()
        met, tokens = self.accelerator.reduce(counts, reduction="sum").tolist()
        self._metrics["train" if self.model.training else "eval"]["sampling/corrected"].append(met / max(tokens, 1))

    def _log_weights(self, log_ratio: Tensor, found: BoundedRatio, mask: Tensor) -> None:
        """Log TRL's figures on its correction, under TRL's names, for a micro-batch over all processes."""
        weights = found.weight.flatten() if found.weight.size(1) == 1 else found.weight[mask.bool()]
        gaps, none = log_ratio[mask.bool()].abs(), log_ratio.new_zeros(1)
        weights, gaps = (values if values.numel() else none for values in (weights, gaps))
        figures = torch.stack([weights.min(), weights.mean(), weights.max(), gaps.mean(), gaps.max()])
        lowest, mean, highest, mean_gap, largest_gap = self.accelerator.gather(figures[None]).unbind(dim=1)
        for name, value in {
            "sampling/importance_sampling_ratio/min": lowest.min(),
            "sampling/importance_sampling_ratio/mean": mean.mean(),
            "sampling/importance_sampling_ratio/max": highest.max(),
            "sampling/sampling_logp_difference/mean": mean_gap.mean(),
            "sampling/sampling_logp_difference/max": largest_gap.max(),
        }.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value.item())
