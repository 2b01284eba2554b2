"""Losses beside TRL's policy loss. Pure functions: tensors in, tensors out.

Owns the supervised loss of assisted steps, the loss of the value head and what a correction does to the ratio; fed by
the trainer with log-probs and values it computed under its own autocast.
"""

import math

import torch
from torch import Tensor

from .trajectory import Trajectory


def assisted_rows(rewards: Tensor, all_rewards: Tensor) -> Tensor:
    """
    Which rollouts an assisted step learns from: those above the mean of the generation batch.

    Args:
        rewards (`Tensor`):
            Raw reward of each rollout of this process, shape (B,); NaN where it was not scored.
        all_rewards (`Tensor`):
            Raw rewards of the generation batch over all processes, shape (N,).

    Returns:
        `Tensor`: bool, shape (B,). All rollouts when all rewards are equal and positive, none when they are equal and
        not; a rollout that was not scored is left out.
    """
    scored = all_rewards[~all_rewards.isnan()]
    if scored.numel() == 0:
        return rewards > rewards  # nothing was scored
    if bool((scored == scored[0]).all()):
        return ~rewards.isnan() & (rewards > 0)
    return rewards > scored.mean()


def calling_tokens(trajectory: Trajectory) -> list[int]:
    """1 for every assistant token, forced or sampled, of the turns that call a tool; shape (C,)."""
    mask = [0] * len(trajectory.completion_ids)
    for turn in trajectory.turns:
        if any(call.error is None for call in turn.tool_calls):
            mask[turn.start : turn.end] = [1] * (turn.end - turn.start)
    return mask


def assisted_loss(logps: Tensor, mask: Tensor, count: Tensor | float) -> Tensor:
    """
    Cross-entropy in nats, summed over the tokens of `mask` and divided by `count`.

    Args:
        logps (`Tensor`):
            Log-probs of the completion tokens, shape (B, T), nats.
        mask (`Tensor`):
            1 for the tokens to learn, shape (B, T).
        count (`Tensor` or `float`):
            Number of such tokens the mean is taken over, at least 1.
    """
    return -(logps * mask).sum() / count


def within_cap(logps: Tensor, old_logps: Tensor, cap: float) -> Tensor:
    r"""
    Which tokens have a ratio \\(\pi_\theta / \pi_{sample}\\) of at most `cap`.

    Args:
        logps (`Tensor`):
            Log-probs under the policy, nats, shape (B, T).
        old_logps (`Tensor`):
            Log-probs recorded when the tokens were sampled, nats, shape (B, T).
        cap (`float`):
            Largest ratio.

    Returns:
        `Tensor`: bool, shape (B, T).
    """
    return logps.detach() - old_logps <= math.log(cap)


def capped_old_logps(logps: Tensor, old_logps: Tensor, cap: float) -> Tensor:
    """
    Old log-probs under which no ratio is above `cap`: truncated importance sampling (arXiv 1802.01561) on the one
    ratio of the loss, whose gradient is then that of the log-prob, times at most `cap`.

    Args:
        logps, old_logps, cap:
            As in [`within_cap`].

    Returns:
        `Tensor`: nats, shape (B, T), without a gradient; `old_logps` wherever the ratio is at most `cap`.
    """
    return torch.maximum(old_logps, logps.detach() - math.log(cap))


def value_loss(values: Tensor, old_values: Tensor, targets: Tensor, mask: Tensor, clip: float | None) -> Tensor:
    r"""
    Clipped squared error of the value head (arXiv 1707.06347), summed over the steps of `mask`.

    \\(\frac{1}{2} \max((V - R)^2, (\mathrm{clip}(V, V_{old} \pm c) - R)^2)\\): a value that has moved further than
    `clip` from the recorded one in the right direction gets no more gradient.

    Args:
        values (`Tensor`):
            Value before each token now, shape (B, T).
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
