"""The advantages of a rollout batch: its groups, what an estimator says of each, and what TRL's loss gets of it."""

import logging
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..config.fields import estimator_name
from ..errors import ConfigError, EstimatorError, ToolGRPOError, TrajectoryError
from ..models.rounding import widest
from ..rollout.engine import RolloutBatch
from ..rollout.rewards import Rewards
from ..rollout.trajectory import Trajectory
from ..run_folder.storage_failures import raised_in_every_process
from ..trl_hooks import Run
from ..types import Batch
from .advantages import explained_variance, first_of_step, moments, whiten
from .base import AdvantageEstimator, RolloutGroup, TokenAdvantages, padded


logger = logging.getLogger(__name__)

_OF_TOKENS = ("entropy", "kl", "clip_ratio/", "cispo_clip_ratio", "vespo/", "sampling/")
"""Beginnings of the names of what is logged as a mean over the tokens of a micro-batch."""


class BatchAdvantages:
    """
    Asks an estimator about the groups of each rollout batch.

    Args:
        run ([`Run`]):
            The run.
        estimator ([`AdvantageEstimator`]):
            Where advantages come from.
    """

    def __init__(self, run: Run, estimator: AdvantageEstimator) -> None:
        self._run, self._estimator = run, estimator
        self._warned_of_turn_rewards = False

    def admit(self, output: Batch, batch: RolloutBatch, rewards: Rewards) -> None:
        """
        Mask the groups that the estimator leaves out of the update. Every process must call this.

        Args:
            output (`Batch`):
                TRL's batch, which is changed.
            batch ([`RolloutBatch`]), rewards ([`Rewards`]):
                The rollouts, and their rewards.
        """
        if not self._estimator.may_leave_out:
            return
        groups = list(self._groups(output, batch, rewards, None, whole=True))
        with self._failing_everywhere():
            admitted = [self._admits(group) for group, _, _ in groups]
        for (_, rows, _), is_in in zip(groups, admitted, strict=True):
            if not is_in:
                for name in ("completion_mask", "tool_mask"):
                    if name in output:
                        output[name][rows] = 0
        # A group that is spread over processes counts in the first of them
        counted = [is_in for (_, _, own), is_in in zip(groups, admitted, strict=True) if own.start == 0]
        counts = torch.tensor([float(sum(counted)), float(len(counted))], device=self._run.accelerator.device)
        kept, total = self._run.accelerator.reduce(counts, reduction="sum").tolist()
        self._run.training_metrics["groups/admitted"].append(kept / max(total, 1))

    def estimate(self, output: Batch, batch: RolloutBatch, rewards: Rewards, values: Tensor | None) -> None:
        """
        Replace TRL's advantages of a scored rollout batch by the estimator's. Every process must call this.

        Args:
            output (`Batch`):
                TRL's batch, which gets `advantages`, shape (B,) or (B, T), and with values what their loss needs.
            batch ([`RolloutBatch`]), rewards ([`Rewards`]):
                The rollouts, and their rewards.
            values (`Tensor`, *optional*):
                V(s_t) before each token, shape (B, T).

        Raises:
            ConfigError: for advantages of another kind or shape.
            EstimatorError: for what the estimator raises.
            TrajectoryError: for advantages or returns that are not finite.
        """
        self._warn_of_turn_rewards(batch)
        found: list[tuple[Tensor | TokenAdvantages, slice]] = []
        whole = not self._estimator.by_rollout
        groups = list(self._groups(output, batch, rewards, values, whole))
        with self._failing_everywhere():
            for group, rows, own in groups:
                scored = self._score(group)
                of_tokens = isinstance(scored, TokenAdvantages)
                found.append((TokenAdvantages(*(x[own] for x in scored)) if of_tokens else scored[own], rows))
        if all(isinstance(scored, Tensor) and scored.dim() == 1 for scored, _ in found):
            flat = torch.cat([scored for scored, _ in found])  # type: ignore[misc]
            output["advantages"] = flat.to(output["advantages"])
            return self._show(output["advantages"])
        return self._put_tokens(output, [scored for scored, _ in found], values)

    def _score(self, group: RolloutGroup) -> Tensor | TokenAdvantages:
        """Return what the estimator says of a group; 0 for a whole group of which nothing trains."""
        if not self._estimator.by_rollout and not bool(group.mask.any()):
            zeros = torch.zeros(group.mask.shape)
            steps = torch.full(group.mask.shape, -1)
            return TokenAdvantages(zeros, zeros, zeros, steps) if self._estimator.needs_values else zeros[:, 0]
        scored = self._estimator.score(group)
        self._check(scored, group)
        return scored

    @contextmanager
    def _failing_everywhere(self) -> Iterator[None]:
        """Raise in every process what the estimator raises in one, so that none waits for another. Every process must
        enter this."""
        with raised_in_every_process():
            try:
                yield
            except ToolGRPOError:
                raise
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]  # what other processes raise has no traceback
                raise EstimatorError(
                    f"The advantage estimator {self._estimator.name} raised {type(error).__name__}: {error} (in "
                    f"{where.filename}, line {where.lineno}).",
                    remedy="Mend its `score` or `admit`; docs/estimators.md says what a group holds.",
                ) from error

    @contextmanager
    def without_empty_figures(self, mask: Tensor) -> Iterator[None]:
        """
        Keep figures over no token of any process out of the log while the loss of a micro-batch is computed: one whose
        groups were all left out would count as 0 in the mean over micro-batches. Every process must call this.

        Args:
            mask (`Tensor`):
                1 for tokens that train, shape (B, T).
        """
        run = self._run
        if not (run.training and self._estimator.may_leave_out):
            yield
            return
        metrics = run.training_metrics
        before = {name: len(values) for name, values in metrics.items()}
        yield
        if run.gather_sum(mask) == 0:
            for name in [name for name in metrics if name.startswith(_OF_TOKENS)]:
                del metrics[name][before.get(name, 0) :]
                if not metrics[name]:
                    del metrics[name]

    def _put_tokens(self, output: Batch, found: Sequence[Tensor | TokenAdvantages], values: Tensor | None) -> None:
        """Put advantages of tokens into a batch, and what the value loss needs."""
        width, device = output["completion_ids"].size(1), output["completion_ids"].device
        wide = widest(device)

        def whole(tensors: Sequence[Tensor], fill: int = 0) -> Tensor:
            # Estimators compute on the host; the device may have no float64
            fitting = [t.to(wide) if t.is_floating_point() else t for t in tensors]
            rows = [torch.nn.functional.pad(t, (0, width - t.size(1)), value=fill) for t in fitting]
            return torch.cat(rows).to(device)

        mask = (output["completion_mask"] * output.get("tool_mask", 1)).bool()
        if not all(isinstance(scored, TokenAdvantages) for scored in found):
            rows = [s.advantages if isinstance(s, TokenAdvantages) else s for s in found]
            rows = [s if s.dim() == 2 else s[:, None].expand(-1, width) for s in rows]
            output["advantages"] = (whole(rows) * mask).to(output["advantages"].dtype)
            return self._show(output["advantages"].sum(dim=1) / mask.sum(dim=1).clamp(min=1))
        advantages, returns, to_go, steps = (
            whole(list(part), fill) for part, fill in zip(zip(*found, strict=True), (0, 0, 0, -1), strict=True)
        )
        steps = steps.where(mask, -1)
        advantages = advantages.masked_fill(~mask, 0.0)
        if self._estimator.whitens:
            advantages = whiten(advantages, steps >= 0, self._summed(moments(advantages, steps >= 0)))
        output["advantages"] = advantages.to(output["advantages"].dtype)
        if values is not None:
            first = first_of_step(steps)
            self._log_explained_variance(to_go, values, first)
            output["old_values"], output["value_targets"] = values.float(), returns.float()
            output["value_mask"] = first.long()
            output["value_count"] = self._run.gather_sum(first)
        return self._show(output["advantages"].sum(dim=1) / (steps >= 0).sum(dim=1).clamp(min=1))

    def _show(self, advantages: Tensor) -> None:
        """Have TRL's table of completions show the mean over a rollout's tokens, shape (B,)."""
        logged = self._run.accelerator.gather(advantages).tolist()
        for place, value in enumerate(logged, start=-len(logged)):
            self._run.completions_table["advantages"][place] = value

    def _log_explained_variance(self, returns: Tensor, values: Tensor, first: Tensor) -> None:
        sums = torch.stack([moments(returns, first), moments(returns - values, first)])
        found = explained_variance(*self._summed(sums))
        if found is not None:
            self._run.training_metrics["value/explained_variance"].append(found)

    def _summed(self, sums: Tensor) -> Tensor:
        return self._run.accelerator.reduce(sums, reduction="sum")

    # Groups

    def _groups(
        self, output: Batch, batch: RolloutBatch, rewards: Rewards, values: Tensor | None, whole: bool
    ) -> Iterator[tuple[RolloutGroup, slice, slice]]:
        """
        Yield the groups that have rollouts of this process, the rows of those in the batch, and in the group.

        If `whole`, rollouts of a group that is spread over processes are gathered. Else all the rollouts of this
        process are one group.
        """
        run = self._run
        count, start = len(batch.rollouts), rewards.own.start
        mask = (output["completion_mask"] * output.get("tool_mask", 1)).bool().cpu()
        advantages = output["advantages"].cpu()
        known = [None] * count if values is None else list(values.cpu())
        records: list[tuple[Trajectory, Tensor, Tensor | None]] = [
            (t, own_mask[: len(t.completion_ids)], None if own is None else own[: len(t.completion_ids)])
            for t, own_mask, own in zip(batch.trajectories, mask, known, strict=True)
        ]
        first = start
        size = run.num_generations if whole else count
        if whole and count % size:
            records, first = gather_object(records), 0
            advantages = run.accelerator.gather(output["advantages"]).cpu()
        scores, totals = rewards.scores.cpu(), rewards.totals.cpu()
        for begin in range(start - start % size, start + count, size):
            rows = range(max(begin, first), min(begin + size, first + len(records)))
            own = range(max(begin, start), min(begin + size, start + count))
            places = [row - first for row in rows]
            chosen = [records[place] for place in places]
            width = max(len(found) for _, found, _ in chosen)
            group = RolloutGroup(
                trajectories=[t for t, _, _ in chosen],
                rewards=totals[rows.start : rows.stop],
                scores=scores[rows.start : rows.stop],
                advantages=advantages[places],
                mask=padded([found for _, found, _ in chosen], width).bool(),
                values=None if values is None else padded([v for _, _, v in chosen if v is not None], width),
            )
            in_batch = slice(own.start - start, own.stop - start)
            yield group, in_batch, slice(own.start - rows.start, own.stop - rows.start)

    def _admits(self, group: RolloutGroup) -> bool:
        """Return what the estimator says of a group; raise if it says nothing."""
        admitted = self._estimator.admit(group)
        if admitted is None:
            raise ConfigError(
                f"`admit` of the advantage estimator {self._estimator.name} returned None.",
                remedy="Return True for a group that takes part in the update, else False.",
            )
        return bool(admitted)

    def _check(self, scored: object, group: RolloutGroup) -> None:
        """Raise for advantages that no update could use."""
        name = self._estimator.name
        if self._estimator.needs_values != isinstance(scored, TokenAdvantages):
            wanted = "`TokenAdvantages`" if self._estimator.needs_values else "a tensor"
            raise ConfigError(
                f"The advantage estimator {name} returned a {type(scored).__name__} where `needs_values="
                f"{self._estimator.needs_values}` asks for {wanted}.",
                remedy="Return it, or set `needs_values` accordingly.",
            )
        shapes: list[tuple[int, ...]] = [(len(group),), tuple(group.mask.shape)]
        returned: dict[str, object] = {"advantages": scored}
        if isinstance(scored, TokenAdvantages):
            returned, shapes = scored._asdict(), shapes[1:]
        for part, tensor in returned.items():
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) not in shapes:
                shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ConfigError(
                    f"The advantage estimator {name} returned {part} of shape {shape} for a group of {len(group)} "
                    f"rollouts of at most {group.mask.size(1)} tokens.",
                    remedy=f"Return a tensor of shape {' or '.join(map(str, shapes))}.",
                )
            if tensor.dim() > 1 and self._run.args.loss_type == "vespo":
                raise ConfigError(
                    f"The advantage estimator {name} gave each token an advantage of its own. "
                    "`loss_type='vespo'` weighs a whole sequence by one.",
                    remedy="Return one for each rollout, or use another `loss_type`.",
                )
            if not bool(tensor.isfinite().all()):
                row = int((~tensor.isfinite()).reshape(len(group), -1).any(dim=1).nonzero()[0])
                raise TrajectoryError(
                    f"The advantage estimator {name} gave rollout {row} of a group {part} that are not finite; the "
                    f"rewards of the group are {group.rewards.tolist()}.",
                    remedy="Return 0 for a rollout that was not scored (`group.scored`) and where there is no spread.",
                )

    def _warn_of_turn_rewards(self, batch: RolloutBatch) -> None:
        """Warn once that a group advantage has no place for the rewards of turns."""
        if self._warned_of_turn_rewards or not self._estimator.ignores_turns:
            return
        if any(turn.total_reward for t in batch.trajectories for turn in t.turns):
            self._warned_of_turn_rewards = True
            logger.warning(
                "Tools gave rewards to turns (`ToolResult.reward` or `turn_reward`), which have no effect with "
                "`advantage_estimator=%r`. Set it to 'gae' or 'group_gae', or count them in a reward function.",
                estimator_name(self._run.args),
            )
