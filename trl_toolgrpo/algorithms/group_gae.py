"""The group advantage as terminal reward, and a value head as token-level baseline for it."""

from typing import ClassVar

from torch import Tensor

from .base import Method, RolloutGroup
from .gae import GeneralizedAdvantages
from .group import GroupRelative


class GroupBaselineAdvantages(GeneralizedAdvantages):
    """Generalized advantage estimates (arXiv 1506.02438) of GRPO's group advantage (arXiv 2402.03300)."""

    whitens = False  # the group has scaled them
    relative_to_group = True
    methods: ClassVar[tuple[Method, ...]] = GroupRelative.methods + GeneralizedAdvantages.methods

    def terminal_rewards(self, group: RolloutGroup) -> Tensor:
        """Return TRL's advantages, shape (G,)."""
        return group.advantages
