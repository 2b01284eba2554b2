"""How a rollout batch is split into micro-batches: groups stay together, so that a prompt is scored once.

TRL shuffles the rows of a batch before it splits them, which spreads a group over all micro-batches and leaves them
little to share. Here each optimizer step keeps the rows that TRL gave it, and they are split anew into its
micro-batches. A loss that is a sum over rows stays the same. Where TRL averages per micro-batch, its split is kept.
Deterministic rollouts have a split that is the same whatever the number of processes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..rollout.batch_noise import BatchNoise
from ..sampling.noise import RolloutNoise
from ..trl_hooks import Run
from ..types import Batch


def whole_groups(groups: Sequence[int], lengths: Sequence[int], parts: int) -> list[list[int]]:
    """
    Split rows into micro-batches of equal size so that as few groups as possible are cut.

    Groups of similar length come together, so that little of a micro-batch is padding, and the rows of a group are
    ordered by length. Nothing is drawn from a random number generator, so that the rollouts of a run stay the same.

    Args:
        groups (`Sequence[int]`):
            Group of each row.
        lengths (`Sequence[int]`):
            Tokens of each row's completion.
        parts (`int`):
            Number of micro-batches; divides the number of rows.

    Returns:
        `list[list[int]]`: rows of each micro-batch.
    """
    rows_of: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group, []).append(row)
    whole = sorted(rows_of.values(), key=lambda rows: sum(lengths[row] for row in rows))
    order = [row for rows in whole for row in sorted(rows, key=lambda row: lengths[row])]
    size = len(order) // parts
    return [order[place * size : (place + 1) * size] for place in range(parts)]


def interleaved(count: int, parts: int, noise: RolloutNoise) -> list[list[int]]:
    """
    Split rows into micro-batches that each take one of every `parts` neighbours.

    The rows of several processes together are then split as those of one process would be.

    Args:
        count (`int`):
            Rows of this process, a multiple of `parts`.
        parts (`int`):
            Number of micro-batches.
        noise ([`RolloutNoise`]):
            Decides which micro-batch takes which row.

    Returns:
        `list[list[int]]`: rows of each micro-batch, in order.
    """
    chosen: list[list[int]] = [[] for _ in range(parts)]
    for start in range(0, count, parts):
        places = noise.other("division", start).sample(range(parts), parts)
        for part, place in zip(chosen, places, strict=True):
            part.append(start + place)
    return chosen


class MicroBatchSplit:
    """
    How the rollout batches of a run are split into micro-batches; see `shared_prompt_updates` and
    `deterministic_rollouts` of [`ToolGRPOConfig`].

    Args:
        run ([`Run`]):
            The run.
        noise ([`BatchNoise`]):
            That of its rollouts.
    """

    def __init__(self, run: Run, noise: BatchNoise) -> None:
        self._run, self._noise = run, noise

    def rows_of_parts(self, batches: Sequence[Batch]) -> list[Tensor] | None:
        """
        Return which rows each micro-batch of a new rollout batch takes, int64; `None` keeps TRL's.

        Args:
            batches (`Sequence[Batch]`):
                Micro-batches as TRL splits them; rows are counted through all of them.
        """
        if self._run.args.deterministic_rollouts and "rollout" in batches[0]:
            order = torch.cat([batch["rollout"] for batch in batches]).argsort()
            noise = self._noise.next_noise(len(order))
            return None if noise is None else [order[part] for part in interleaved(len(order), len(batches), noise)]
        if not self._may_group():
            return None
        prompts = [torch.cat([batch[name] for batch in batches]) for name in ("prompt_ids", "prompt_mask")]
        # With the mask, since a padding token can also be one of the prompt's tokens
        _, groups = torch.cat(prompts, dim=1).unique(dim=0, return_inverse=True)
        lengths = torch.cat([batch["completion_mask"].sum(dim=1) for batch in batches])
        rows = torch.arange(len(groups), device=groups.device)
        parts: list[Tensor] = []
        steps = max(1, len(batches) // self._run.args.gradient_accumulation_steps)
        for own in rows.chunk(steps):  # the rows that TRL gave an optimizer step
            whole = whole_groups(groups[own].tolist(), lengths[own].tolist(), len(batches) // steps)
            parts += [own[part] for part in whole]
        return parts

    def _may_group(self) -> bool:
        """
        Return whether the rows of an optimizer step may be split into other micro-batches than TRL's.

        TRL takes these over a micro-batch, so that the loss depends on the split: the mean over tokens of `"bnpo"`,
        the quantile of `top_entropy_quantile`, the mean entropy of `entropy_coef` and `use_adaptive_entropy`, and the
        router loss of a mixture of experts. Deterministic rollouts have a split of their own. If a rollout batch ends
        in the middle of an optimizer step, there are no rows of a step to split.
        """
        run, args = self._run, self._run.args
        if not run.recording or not args.shared_prompt_updates or args.deterministic_rollouts:
            return False
        per_micro_batch = args.loss_type == "bnpo" or run.top_entropy_quantile < 1.0
        if per_micro_batch or run.has_entropy_bonus or run.aux_loss_enabled:
            return False
        batch, step = args.steps_per_generation or 1, args.gradient_accumulation_steps
        return batch > 1 and step > 1 and (batch % step == 0 or step % batch == 0)
