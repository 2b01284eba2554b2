"""Losses in addition to TRL's policy loss: of assisted steps, of the value head, and the correction of the ratio."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..rollout.trajectory import Trajectory


def assisted_rows(rewards: Tensor, all_rewards: Tensor) -> Tensor:
    """
    Return which rollouts an assisted step learns from: those above the mean of the generation batch.

    Args:
        rewards (`Tensor`):
            Raw reward of each rollout of this process, shape (B,); NaN where it was not scored.
        all_rewards (`Tensor`):
            Raw rewards of the generation batch over all processes, shape (N,).

    Returns:
        `Tensor`: bool, shape (B,). If all rewards are equal, all rollouts if they are positive and none otherwise; a
        rollout that was not scored is left out.
    """
    scored = all_rewards[~all_rewards.isnan()]
    if scored.numel() == 0:
        return rewards > rewards  # nothing was scored
    if bool((scored == scored[0]).all()):
        return ~rewards.isnan() & (rewards > 0)
    return rewards > scored.mean()


def calling_tokens(trajectory: Trajectory) -> list[int]:
    """Return 1 for every assistant token, forced or sampled, of turns that call a tool, else 0; shape (C,)."""
    mask = [0] * len(trajectory.completion_ids)
    for turn in trajectory.turns:
        if any(call.error is None for call in turn.tool_calls):
            mask[turn.start : turn.end] = [1] * (turn.end - turn.start)
    return mask


def assisted_loss(logps: Tensor, mask: Tensor, count: Tensor | float) -> Tensor:
    """
    Return the cross-entropy in nats, summed over the tokens of `mask` and divided by `count`.

    Args:
        logps (`Tensor`):
            Log-probs of the completion tokens, shape (B, T), nats.
        mask (`Tensor`):
            1 for the tokens to learn, shape (B, T).
        count (`Tensor` or `float`):
            Number of such tokens that the mean is taken over, at least 1.
    """
    return -(logps * mask).sum() / count


class BoundedRatio(NamedTuple):
    r"""
    What a correction makes of the ratio \\(\pi_\theta / \pi_{sample}\\), without gradients.

    Attributes:
        weight (`Tensor`):
            The ratio of each token, shape (B, T), or of each rollout, shape (B, 1), brought to the nearest bound by
            the `*_truncate` modes and set to 0 out of bounds by the `*_mask` modes.
        within (`Tensor`):
            Whether it is within bounds, bool, shape (B, T).
        log_ratio (`Tensor`):
            Logarithm of the ratio of each token, brought within bounds, nats, shape (B, T). The excess of a rollout's
            ratio is shared evenly by its tokens.
    """

    weight: Tensor
    within: Tensor
    log_ratio: Tensor


def bounded_ratio(log_ratio: Tensor, mask: Tensor, mode: str, low: float | None, high: float | None) -> BoundedRatio:
    """
    Truncate or mask importance sampling ratios by token or by rollout, as TRL's `vllm_importance_sampling_mode` does
    (truncation: arXiv 1802.01561).

    Args:
        log_ratio (`Tensor`):
            Log-probs under the policy minus those recorded when the tokens were sampled, nats, shape (B, T).
        mask (`Tensor`):
            1 for tokens the policy sampled, shape (B, T); all others have a ratio of 1.
        mode (`str`):
            `"token_truncate"`, `"token_mask"`, `"sequence_truncate"` or `"sequence_mask"`. The ratio of a sequence is
            the product of those of its tokens.
        low, high (`float`, *optional*):
            Bounds of the ratio, which are themselves allowed; `None` for no bound.

    Returns:
        [`BoundedRatio`]
    """
    by_token = torch.where(mask.bool(), log_ratio.detach(), 0.0)
    logs = by_token.sum(dim=-1, keepdim=True) if mode.startswith("sequence") else by_token
    ratio = logs.exp()
    nearest = ratio if low is None and high is None else ratio.clamp(low, high)
    within = nearest == ratio
    weight = nearest if mode.endswith("truncate") else torch.where(within, ratio, 0.0)
    excess = torch.where(within, 0.0, logs - nearest.log())  # exactly 0 within bounds
    if mode.startswith("sequence"):
        excess = excess / mask.sum(dim=-1, keepdim=True).clamp(min=1)
    return BoundedRatio(weight, within.expand_as(by_token), by_token - excess * mask.bool())


def value_loss(values: Tensor, old_values: Tensor, targets: Tensor, mask: Tensor, clip: float | None) -> Tensor:
    r"""
    Return the clipped squared error of the value head (arXiv 1707.06347), summed over the steps of `mask`.

    \\(\frac{1}{2} \max((V - R)^2, (\mathrm{clip}(V, V_{old} \pm c) - R)^2)\\): a value that has moved further than
    `clip` from the recorded one in the right direction gets no more gradient.

    Args:
        values (`Tensor`):
            Present value before each token, shape (B, T).
        old_values (`Tensor`):
            The same, recorded when the tokens were sampled, shape (B, T).
        targets (`Tensor`):
            Returns R, shape (B, T).
        mask (`Tensor`):
            1 at the first token of each step, shape (B, T).
        clip (`float`, *optional*):
            How far a value may move; `None` for no limit.

    Returns:
        `Tensor`: a scalar.
    """
    error = (values - targets).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - targets).square())
    return 0.5 * (error * mask).sum()
