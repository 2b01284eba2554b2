"""What an advantage estimator is: two hooks, called once for each group of rollouts of one prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..config.fields import ToolGRPOConfig
from ..rollout.trajectory import Trajectory


@dataclass(eq=False)
class RolloutGroup:
    """
    The rollouts of one prompt, with what is known when they are scored. All tensors are on the CPU.

    Args:
        trajectories (`list[Trajectory]`):
            The rollouts, G of them. Where the estimator is `by_rollout`, `score` gets all those of this process as one
            group, whatever their prompts.
        rewards (`Tensor`):
            Weighted sum of the reward functions for each rollout, float, shape (G,); NaN where none scored it.
        scores (`Tensor`):
            What each reward function gave, float, shape (G, F); NaN where it gave none.
        advantages (`Tensor`):
            TRL's advantages relative to the group, as `scale_rewards` and `multi_objective_aggregation` say, float,
            shape (G,).
        mask (`Tensor`):
            Whether a token trains, bool, shape (G, T), with T the length of the longest completion: sampled by the
            policy, in a rollout that takes part in the update.
        values (`Tensor`, *optional*):
            V(s_t) before each token, float, shape (G, T), if the estimator `needs_values`.
    """

    trajectories: Sequence[Trajectory]
    rewards: Tensor
    scores: Tensor
    advantages: Tensor
    mask: Tensor
    values: Tensor | None = None

    def __len__(self) -> int:
        return len(self.trajectories)

    @property
    def scored(self) -> Tensor:
        """Whether a rollout has a reward, bool, shape (G,)."""
        return ~self.rewards.isnan()


class TokenAdvantages(NamedTuple):
    """
    Advantages of tokens, and what a value head learns from them.

    Attributes:
        advantages (`Tensor`):
            Float, shape (G, T).
        returns (`Tensor`):
            What the value before each step is fitted to, float, shape (G, T).
        rewards_to_go (`Tensor`):
            Discounted sum of the rewards from each step on, which `value/explained_variance` is about, float,
            shape (G, T).
        steps (`Tensor`):
            Step that each token belongs to, from 0 in each row, -1 for tokens without one, int64, shape (G, T).
    """

    advantages: Tensor
    returns: Tensor
    rewards_to_go: Tensor
    steps: Tensor


class Method(NamedTuple):
    """What a model card says of a method: a description, and the arXiv id and title of its paper."""

    description: str
    arxiv: str = ""
    title: str = ""


class AdvantageEstimator:
    """
    Where the advantages of rollouts come from. Subclass it and override [`AdvantageEstimator.score`], and
    [`AdvantageEstimator.admit`] to leave some groups out.

    `advantage_estimator` takes a built-in name, an object of such a class, or `"package.module:Name"`, which is called
    with the configuration. If an estimator has `state_dict` and `load_state_dict`, checkpoints keep its state, each
    process its own.

    Args:
        args ([`ToolGRPOConfig`], *optional*):
            Configuration of the run, which a trainer sets in an object that it is given.
    """

    needs_values: ClassVar[bool] = False
    """Whether [`RolloutGroup.values`] is read: the policy then gets a value head, and `score` returns
    [`TokenAdvantages`]."""
    whitens: ClassVar[bool] = False
    """Whether the advantages of a rollout batch get mean 0 and standard deviation 1 over the tokens of all groups."""
    by_rollout: ClassVar[bool] = False
    """Whether each rollout is scored without looking at the others, so that a group may be scored in parts."""
    relative_to_group: ClassVar[bool] = False
    """Whether a group whose rewards are all equal has an advantage of 0, which a health rule then watches."""
    ignores_turns: ClassVar[bool] = False
    """Whether rewards of turns (`ToolResult.reward`, `turn_reward`) have no place in it, which is then said."""
    methods: ClassVar[tuple[Method, ...]] = ()
    """What a model card says of it; its name by default."""

    args: ToolGRPOConfig | None = None
    """Configuration of the run; a trainer sets it."""

    def __init__(self, args: ToolGRPOConfig | None = None) -> None:
        self.args = args

    def score(self, group: RolloutGroup) -> Tensor | TokenAdvantages:
        """
        Return the advantages of a group.

        Args:
            group ([`RolloutGroup`]):
                The rollouts of one prompt.

        Returns:
            `Tensor` or [`TokenAdvantages`]: one advantage for each rollout, shape (G,), or for each token, shape
            (G, T). Tokens that do not train get 0, whatever it is.
        """
        raise NotImplementedError

    def admit(self, group: RolloutGroup) -> bool:
        """
        Return whether a group takes part in the update; `values` are not known yet. All do by default. `score` is not
        called for a group that does not.
        """
        return True

    @property
    def may_leave_out(self) -> bool:
        """Whether this estimator decides about groups."""
        return type(self).admit is not AdvantageEstimator.admit

    @property
    def name(self) -> str:
        """Its name in messages and cards."""
        return type(self).__name__


def padded(rows: Sequence[Tensor], width: int) -> Tensor:
    """Return vectors as the rows of a matrix, padded on the right with 0, shape (G, `width`)."""
    return torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
