"""Correction of the ratio where the sampler and the policy disagree about a token.

The old log-prob is the one recorded when a token was sampled, so that the ratio of the loss is π_θ/π_sample as a
whole: it contains both a sampler's rounding and the steps that the policy has made since, and one bound on its
detached value corrects for both.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.fields import ToolGRPOConfig
from ..trl_hooks import Run
from ..types import Batch
from .losses import BoundedRatio, bounded_ratio


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


class SamplerCorrection:
    """
    Bounds the ratios of a run; see `sampler_correction` of [`ToolGRPOConfig`] and TRL's `vllm_importance_sampling_*`.

    Args:
        run ([`Run`]):
            The run.
        correction ([`Correction`]):
            What happens to ratios out of bounds.
    """

    def __init__(self, run: Run, correction: Correction) -> None:
        self._run, self._correction = run, correction

    def correct(self, inputs: Batch, logps: Tensor, moved: bool) -> None:
        """
        Bound the ratio of a micro-batch by its value at the policy's present log-probs.

        The share of tokens out of bounds is logged.

        Args:
            inputs (`Batch`):
                The micro-batch, which is changed.
            logps (`Tensor`):
                Log-probs of its completion tokens, nats, shape (B, T).
            moved (`bool`):
                Whether the policy has moved since the tokens were sampled.
        """
        correction = self._correction
        old, mask = inputs["old_per_token_logps"], inputs["completion_mask"] * inputs.get("tool_mask", 1)
        present = logps.detach()
        found = bounded_ratio(present - old, mask, correction.mode, correction.low, correction.high)
        if correction.of_trl and not moved:
            # As in TRL: its old log-probs, recomputed, are the present ones, so that nothing is clipped, and its loss
            # is multiplied by the weight
            inputs["old_per_token_logps"], inputs["importance_sampling_ratio"] = present, found.weight
            self._run.use_vllm = True  # for TRL's loss alone
            self._log_weights(present - old, found, mask)
        elif correction.mode.endswith("truncate"):
            inputs["old_per_token_logps"] = torch.where(found.within, old, present - found.log_ratio)
        else:  # neither advantage nor part in the ratio of its sequence, in value and gradient; the KL term stays
            advantages = inputs["advantages"]
            inputs["advantages"] = (advantages if advantages.dim() == 2 else advantages[:, None]) * found.within
            inputs["old_per_token_logps"] = torch.where(found.within, old, logps)
        counts = torch.stack([(~found.within * mask).sum(), mask.sum()]).float()
        met, tokens = self._run.accelerator.reduce(counts, reduction="sum").tolist()
        self._run.metrics["sampling/corrected"].append(met / max(tokens, 1))

    def _log_weights(self, log_ratio: Tensor, found: BoundedRatio, mask: Tensor) -> None:
        """Log TRL's figures on its correction, under TRL's names, for a micro-batch over all processes."""
        weights = found.weight.flatten() if found.weight.size(1) == 1 else found.weight[mask.bool()]
        gaps, none = log_ratio[mask.bool()].abs(), log_ratio.new_zeros(1)
        weights, gaps = (values if values.numel() else none for values in (weights, gaps))
        figures = torch.stack([weights.min(), weights.mean(), weights.max(), gaps.mean(), gaps.max()])
        lowest, mean, highest, mean_gap, largest_gap = self._run.accelerator.gather(figures[None]).unbind(dim=1)
        for name, value in {
            "sampling/importance_sampling_ratio/min": lowest.min(),
            "sampling/importance_sampling_ratio/mean": mean.mean(),
            "sampling/importance_sampling_ratio/max": highest.max(),
            "sampling/sampling_logp_difference/mean": mean_gap.mean(),
            "sampling/sampling_logp_difference/max": largest_gap.max(),
        }.items():
            self._run.metrics[name].append(value.item())
