"""The rewards of a rollout batch over all processes, and the check that there are some to learn from."""

import logging
from dataclasses import dataclass

from torch import Tensor, nan

from ..errors import RewardError
from ..trl_hooks import Run


logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Rewards:
    """
    Rewards of a rollout batch.

    Args:
        scores (`Tensor`):
            What each reward function gave each rollout of all processes, shape (N, F); NaN where it gave none.
        totals (`Tensor`):
            Weighted sums, shape (N,); NaN for a rollout that no function scored.
        own (`slice`):
            The rollouts of this process.
    """

    scores: Tensor
    totals: Tensor
    own: slice

    @property
    def own_totals(self) -> Tensor:
        """Weighted sums of this process's rollouts, shape (B,)."""
        return self.totals[self.own]


class RewardCheck:
    """
    Makes [`Rewards`] of what reward functions gave.

    Args:
        run ([`Run`]):
            The run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._scored: bool | None = None  # whether any rollout of the latest batch was; unknown before the first

    def rewards(self, scores: Tensor, count: int, lost: Tensor | None) -> Rewards:
        """
        Return the rewards of a batch.

        Args:
            scores (`Tensor`):
                Shape (N, F).
            count (`int`):
                Rollouts of each process.
            lost (`Tensor`, *optional*):
                Which rollouts lost their environment, bool, shape (N,).

        Raises:
            RewardError: for an infinite reward, and if the first batch of a run gets none at all.
        """
        run = self._run
        if bool(scores.isinf().any()):
            rollout, function = scores.isinf().nonzero()[0].tolist()
            raise RewardError(
                f"The reward function `{run.reward_func_names[function]}` gave {scores[rollout, function].item()} for "
                f"rollout {rollout}. No advantage can be computed from it.",
                remedy="Return a finite number, or None for a rollout that cannot be scored.",
            )
        if run.training:
            self._check_scored(scores if lost is None else scores[~lost], len(scores))
        totals = (scores * run.reward_weights.to(scores.device)).nansum(dim=1)
        start = run.accelerator.process_index * count
        return Rewards(scores, totals.masked_fill(scores.isnan().all(dim=1), nan), slice(start, start + count))

    def _check_scored(self, asked: Tensor, count: int) -> None:
        """Raise if reward functions score nothing from the start; warn when that begins later."""
        scored = not bool(asked.isnan().all())
        if not scored and 2 * len(asked) < count:
            return  # too few to blame the reward functions
        before, self._scored = self._scored, scored
        if scored:
            return
        names = " and ".join(f"`{name}`" for name in self._run.reward_func_names)
        problem = (
            f"No rollout of the batch was scored: {names} gave None or NaN for all {len(asked)}, so that there is "
            f"nothing to learn from."
        )
        if before is None:
            raise RewardError(problem, remedy="Return a number for each rollout that can be scored.")
        if before and self._run.is_main_process:
            logger.warning("Step %d: %s The update does nothing.", self._run.state.global_step, problem)
