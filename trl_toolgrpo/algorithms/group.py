"""GRPO's advantages: the reward of a rollout relative to its group, the same for all its tokens."""

from typing import ClassVar

from torch import Tensor

from .base import AdvantageEstimator, Method, RolloutGroup


class GroupRelative(AdvantageEstimator):
    """TRL's own advantages (arXiv 2402.03300), unchanged; rewards of turns have no place in them."""

    by_rollout = True  # TRL has compared them
    relative_to_group = True
    ignores_turns = True
    methods: ClassVar[tuple[Method, ...]] = (
        Method("advantages relative to a group of rollouts (GRPO)", "2402.03300", "DeepSeekMath"),
    )

    def score(self, group: RolloutGroup) -> Tensor:
        """Return TRL's advantages, shape (G,)."""
        return group.advantages
