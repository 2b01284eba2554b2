"""The self-check of log-probs: what a sampler recorded against what the trainer computes for the same tokens."""

import math
from collections.abc import Callable, Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..errors import LogprobMismatchError
from ..models.rounding import Accepted, Exact
from ..rollout.engine import RolloutBatch
from ..rollout.trajectory import Trajectory, locate
from ..trl_hooks import Run
from .scoring import Scoring, Tokens


def check_logprobs(
    recomputed: Tensor,
    trajectories: Sequence[Trajectory],
    accepted: Accepted,
    source: str,
    gather: Callable[[list[str | None]], list[str | None]] = list,
) -> None:
    """
    Compare recorded log-probs with recomputed ones: over all tokens, and over those that begin a turn after a tool
    result.

    Every process raises what one of them finds, so that none waits for another.

    Args:
        recomputed (`Tensor`):
            The trainer's log-probs, shape (B, T), nats, right-padded.
        trajectories (`Sequence[Trajectory]`):
            The rollouts, in the order of the rows.
        accepted ([`Exact`] or [`Rounding`]):
            Which differences are accepted.
        source (`str`):
            Name of the sampler, for the message.
        gather (`Callable`, *optional*):
            Concatenates the lists of all processes; by default there is one process.

    Raises:
        LogprobMismatchError: naming the rollout, the turn, the token and both values.
    """
    mismatches = gather([_mismatch(recomputed.cpu().double(), trajectories, accepted, source)])
    mismatch = next((text for text in mismatches if text is not None), None)
    if mismatch is not None:
        raise LogprobMismatchError(
            mismatch,
            remedy="Check that sampling and training use the same weights, adapter, dtype and temperature; raise "
            "`logprob_check_tolerance` only if the difference is known rounding.",
        )


def _mismatch(recomputed: Tensor, trajectories: Sequence[Trajectory], accepted: Accepted, source: str) -> str | None:
    """Return what is wrong with the log-probs of this process; `None` if nothing is."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []  # of each rollout: gap, doubt, whether a turn begins
    places: list[tuple[int, int]] = []
    for row, trajectory in enumerate(trajectories):
        sampled = torch.tensor(trajectory.trainable_mask, dtype=torch.bool).nonzero()[:, 0]
        recorded = torch.tensor(trajectory.logprobs, dtype=torch.float64)
        ours = recomputed[row, : len(recorded)]
        gap = (ours - recorded)[sampled].abs().nan_to_num(nan=math.inf, posinf=math.inf)
        starts = torch.tensor([turn.start for turn in trajectory.turns[1:]], dtype=torch.long)
        parts.append((gap, 1 - ours[sampled].exp(), torch.isin(sampled, starts)))
        places += [(row, place) for place in sampled.tolist()]
    if not places:
        return None
    gap, doubt, begins = map(torch.cat, zip(*parts, strict=True))
    excess = accepted.excess(gap, doubt)
    if excess is None:
        excess = accepted.excess(gap[begins], doubt[begins])
        if excess is None:
            return None
        excess = f"of the tokens that begin a turn after tool results, {excess}"
        gap = gap.masked_fill(~begins, -1.0)
    row, place = places[int(gap.argmax())]
    trajectory = trajectories[row]
    return (
        f"The log-probs recorded by the {source} sampler are not those the trainer computes: over {len(places)} "
        f"tokens, {excess}. The largest is in rollout {row}, turn {locate(trajectory, place)}, completion token "
        f"{place} (id {trajectory.completion_ids[place]}): recorded {trajectory.logprobs[place]:.6f}, recomputed "
        f"{float(recomputed[row, place]):.6f}. Every ratio would be wrong by as much."
    )


class LogprobCheck:
    """
    Compares the log-probs of rollout batches with the trainer's own; see `logprob_check` of [`ToolGRPOConfig`].

    Args:
        run ([`Run`]):
            The run.
        scoring ([`Scoring`]):
            Scores its batches, and knows what rounding does.
    """

    def __init__(self, run: Run, scoring: Scoring) -> None:
        self._run, self._scoring = run, scoring
        self._done = run.args.logprob_check == "off"

    def on_rollouts(self, tokens: Tokens, batch: RolloutBatch) -> None:
        """
        Check a batch, or only the first one of a run.

        Args:
            tokens (`tuple[Tensor, Tensor, int]`):
                All tokens of the batch.
            batch ([`RolloutBatch`]):
                What was recorded.

        Raises:
            LogprobMismatchError: as [`check_logprobs`].
        """
        if self._done:
            return
        args, scoring, model = self._run.args, self._scoring, self._run.model
        self._done = args.logprob_check == "first"
        logps = scoring.score_policy(tokens).logps
        known, tolerance = scoring.rounding, args.logprob_check_tolerance
        scoring.rounding = known or scoring.measure_rounding(model, tokens)
        accepted = scoring.rounding if tolerance is None else Exact(tolerance)
        try:
            check_logprobs(logps, batch.trajectories, accepted, batch.source, gather_object)
        except LogprobMismatchError:
            if known is None or tolerance is not None or isinstance(known, Exact):
                raise
            # The policy has moved since its rounding was measured; what this batch shows decides
            scoring.rounding = scoring.measure_rounding(model, tokens)
            check_logprobs(logps, batch.trajectories, scoring.rounding, batch.source, gather_object)
