"""Advantages of tokens: generalized advantage estimation by token and by turn.

A rollout is a sequence of steps: its trainable tokens one by one (`"token"`), or its turns (`"turn"`). Tool results
and forced tokens are left out and never bootstrapped through. After the last step the value is 0, whether the rollout
was terminated or truncated: the reward has scored the text as it stands.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.rounding import widest
from ..rollout.trajectory import Trajectory


def steps_of(trajectories: Sequence[Trajectory], width: int, unit: str) -> Tensor:
    """
    Return the step that each token belongs to.

    Args:
        trajectories (`Sequence[Trajectory]`):
            Rollouts.
        width (`int`):
            Padded width T of their completions.
        unit (`str`):
            `"token"` or `"turn"`.

    Returns:
        `Tensor`: int64, shape (B, T); -1 for tokens the policy did not sample.
    """
    steps = torch.full((len(trajectories), width), -1)
    for row, trajectory in enumerate(trajectories):
        mask = torch.tensor(trajectory.trainable_mask, dtype=torch.bool)
        if not bool(mask.any()):
            continue
        number = torch.arange(len(mask)) if unit == "token" else torch.zeros(len(mask), dtype=torch.long)
        if unit == "turn":
            for index, turn in enumerate(trajectory.turns):
                number[turn.start : turn.end] = index
        # Consecutive from 0: a turn without a trainable token is no step
        steps[row, : len(mask)][mask] = torch.unique(number[mask], return_inverse=True)[1]
    return steps


def place_rewards(terminal: Tensor, trajectories: Sequence[Trajectory], width: int) -> Tensor:
    """
    Place the reward of each rollout on its last trainable token, and that of each turn on the turn's last one.

    Args:
        terminal (`Tensor`):
            Reward of each rollout, shape (B,).
        trajectories (`Sequence[Trajectory]`):
            Rollouts; the reward of a turn is the sum of its results' `reward` and its own `reward`. That of a turn
            without a trainable token falls on the last one before it, or is lost if there is none.
        width (`int`):
            Padded width T of their completions.

    Returns:
        `Tensor`: float64, shape (B, T), on the CPU.
    """
    placed = torch.zeros(len(trajectories), width, dtype=torch.float64)
    for row, trajectory in enumerate(trajectories):
        trainable = [place for place, flag in enumerate(trajectory.trainable_mask) if flag]
        if not trainable:
            continue
        placed[row, trainable[-1]] += terminal[row].item()
        for turn in trajectory.turns:
            before = [place for place in trainable if place < turn.end]
            if before and turn.total_reward:
                placed[row, before[-1]] += turn.total_reward
    return placed


def generalized_advantages(
    rewards: Tensor, values: Tensor, steps: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    r"""
    Return generalized advantage estimates (arXiv 1506.02438) over the steps of each rollout.

    With \\(\delta_t = r_t + \gamma V_{t+1} - V_t\\) and \\(V = 0\\) after the last step,
    \\(A_t = \delta_t + \gamma \lambda A_{t+1}\\). A step's reward is the sum of its tokens' rewards, its value that of
    its first token; all its tokens share its advantage.

    Args:
        rewards (`Tensor`):
            Rewards of the tokens, float, shape (B, T).
        values (`Tensor`):
            Value before each token, float, shape (B, T).
        steps (`Tensor`):
            Step of each token, from 0 in each row, -1 for tokens that are left out, int64, shape (B, T).
        gamma, lam (`float`):
            Discount, and weight of longer returns, both in [0, 1].

    Returns:
        `tuple[Tensor, Tensor]`: advantages, and returns \\(A_t + V_t\\) at the first token of each step; in the widest
        dtype of the device (float64, but float32 on MPS), shape (B, T), 0 at tokens that are left out.
    """
    wide = widest(rewards.device)
    taken = steps >= 0
    first = first_of_step(steps)
    count = int(steps.max()) + 1 if steps.numel() else 0
    if count == 0:
        return torch.zeros_like(steps, dtype=wide), torch.zeros_like(steps, dtype=wide)
    index = steps.clamp(min=0)
    step_rewards = torch.zeros(len(steps), count, dtype=wide, device=rewards.device)
    step_values, exists = step_rewards.clone(), step_rewards.clone()
    step_rewards.scatter_add_(1, index, rewards.to(wide) * taken)
    step_values.scatter_add_(1, index, values.to(wide) * first)
    exists.scatter_add_(1, index, first.to(wide))
    advantage = torch.zeros(len(steps), dtype=wide, device=rewards.device)
    following = advantage
    advantages = torch.zeros_like(step_rewards)
    for step in range(count - 1, -1, -1):
        delta = step_rewards[:, step] + gamma * following - step_values[:, step]
        advantage = (delta + gamma * lam * advantage) * exists[:, step]
        following = step_values[:, step] * exists[:, step]
        advantages[:, step] = advantage
    spread = advantages.gather(1, index) * taken
    return spread, (spread + values.to(wide)) * first


def first_of_step(steps: Tensor) -> Tensor:
    """Return whether a token is the first of its step, bool, shape (B, T)."""
    reached = torch.cummax(steps, dim=1).values if steps.shape[1] else steps
    before = torch.nn.functional.pad(reached, (1, 0), value=-1)[:, :-1]
    return (steps >= 0) & (steps > before)


def rewards_to_go(rewards: Tensor, steps: Tensor, gamma: float) -> Tensor:
    """
    Return the Monte-Carlo return from each step on, \\(G_t = r_t + \\gamma G_{t+1}\\).

    Args:
        rewards (`Tensor`):
            Shape (B, T).
        steps (`Tensor`):
            As in [`generalized_advantages`].
        gamma (`float`):
            Discount.

    Returns:
        `Tensor`: float64, shape (B, T).
    """
    return generalized_advantages(rewards, torch.zeros_like(rewards), steps, gamma, 1.0)[0]


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """Return count, sum and sum of squares of the values under the mask, shape (3,), in the device's widest dtype."""
    taken = values[mask.bool()].to(widest(values.device))
    return torch.stack([taken.new_tensor(float(taken.numel())), taken.sum(), taken.square().sum()])


def variance(sums: Tensor) -> float:
    """Return the population variance from [`moments`]; 0 for no values."""
    count, total, squares = sums.tolist()
    return max(squares / count - (total / count) ** 2, 0.0) if count else 0.0


def whiten(values: Tensor, mask: Tensor, sums: Tensor) -> Tensor:
    """
    Return the values with mean 0 and standard deviation 1 under the mask.

    Args:
        values (`Tensor`):
            Shape (B, T).
        mask (`Tensor`):
            Shape (B, T).
        sums (`Tensor`):
            [`moments`] over everything that is whitened together.

    Returns:
        `Tensor`: shape (B, T), 0 outside the mask.
    """
    mean = float(sums[1] / sums[0].clamp(min=1))
    return (values - mean) / (variance(sums) ** 0.5 + 1e-8) * mask


def explained_variance(return_sums: Tensor, error_sums: Tensor) -> float | None:
    r"""
    Return \\(1 - \mathrm{Var}(G - V) / \mathrm{Var}(G)\\): 1 for a perfect critic, 0 for one that knows only
    the mean.

    Args:
        return_sums (`Tensor`):
            [`moments`] of the returns G.
        error_sums (`Tensor`):
            [`moments`] of G - V over the same steps.

    Returns:
        `float` or `None`: `None` if the returns have no variance.
    """
    spread = variance(return_sums)
    return 1 - variance(error_sums) / spread if spread > 1e-12 else None
