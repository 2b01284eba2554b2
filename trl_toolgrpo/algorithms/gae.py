"""Generalized advantage estimation with a value head (arXiv 1506.02438), on the rewards themselves."""

from typing import ClassVar

import torch
from torch import Tensor

from ..config.fields import ToolGRPOConfig
from .advantages import generalized_advantages, place_rewards, rewards_to_go, steps_of
from .base import AdvantageEstimator, Method, RolloutGroup, TokenAdvantages


class GeneralizedAdvantages(AdvantageEstimator):
    """
    Advantages of tokens or turns from a value head, whitened over the rollout batch; see `gae_gamma`, `gae_lambda` and
    `gae_unit` of [`ToolGRPOConfig`].

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration of the run.
    """

    needs_values = True
    whitens = True
    by_rollout = True
    methods: ClassVar[tuple[Method, ...]] = (
        Method("generalized advantage estimation with a value head", "1506.02438", "GAE"),
    )
    args: ToolGRPOConfig

    def score(self, group: RolloutGroup) -> TokenAdvantages:
        """Return the estimates, with the reward of each rollout on its last trainable token."""
        width, (gamma, lam) = group.mask.size(1), (self.args.gae_gamma, self.args.gae_lambda)
        placed = place_rewards(self.terminal_rewards(group).nan_to_num(nan=0.0), group.trajectories, width)
        taken = group.mask & group.scored[:, None]
        steps = steps_of(group.trajectories, width, self.args.gae_unit).where(taken, -1)
        values = group.values if group.values is not None else torch.zeros_like(placed)
        advantages, returns = generalized_advantages(placed, values, steps, gamma, lam)
        return TokenAdvantages(advantages, returns, rewards_to_go(placed, steps, gamma), steps)

    def terminal_rewards(self, group: RolloutGroup) -> Tensor:
        """Return what is on the last trainable token of each rollout, shape (G,)."""
        return group.rewards
