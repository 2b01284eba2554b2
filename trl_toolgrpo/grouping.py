"""How a rollout batch is divided over micro-batches: groups stay whole, so that a prompt is scored once.

Owns the division, as a pure function and a mixin of the trainer. TRL shuffles the rows of a batch before it splits
them, which spreads a group over all micro-batches and leaves each of them little to share. Losses that are sums or
means over the rows of all micro-batches do not depend on the division.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from .config import ToolGRPOConfig


def whole_groups(groups: Sequence[int], lengths: Sequence[int], parts: int) -> list[list[int]]:
    """
    Divide rows over micro-batches of equal size so that as few groups as possible are cut.

    Groups of similar length come together, so that little of a micro-batch is padding, and the rows of a group are
    ordered by length. Which micro-batch comes when is drawn from torch's generator: optimizer steps on one rollout
    batch differ in nothing but chance.

    Args:
        groups (`Sequence[int]`):
            Group of each row.
        lengths (`Sequence[int]`):
            Tokens of each row's completion.
        parts (`int`):
            Micro-batches; divides the number of rows.

    Returns:
        `list[list[int]]`: rows of each micro-batch.
    """
    rows_of: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group, []).append(row)
    whole = sorted(rows_of.values(), key=lambda rows: sum(lengths[row] for row in rows))
    order = [row for rows in whole for row in sorted(rows, key=lambda row: lengths[row])]
    size = len(order) // parts
    return [order[place * size : (place + 1) * size] for place in torch.randperm(parts).tolist()]


def divided(batches: Sequence[dict[str, Any]], parts: Sequence[Tensor]) -> list[dict[str, Any]]:
    """
    The rows of some micro-batches, divided otherwise.

    Args:
        batches (`Sequence[dict]`):
            Micro-batches as TRL splits them: tensors with a row for each rollout, and values that all have alike.
        parts (`Sequence[Tensor]`):
            Rows of each new micro-batch, int64, counted through all of `batches`.
    """

    def pick(name: str, rows: Tensor) -> Any:
        values = [batch[name] for batch in batches]
        if not isinstance(values[0], Tensor) or values[0].ndim == 0:
            return values[0]
        return torch.cat(values)[rows]

    return [{name: pick(name, rows) for name in batches[0]} for rows in parts]


class GroupedUpdates(GRPOTrainer):
    """Part of [`ToolGRPOTrainer`]; see `shared_prompt_updates` of [`ToolGRPOConfig`]."""

    args: ToolGRPOConfig
    _recording = False
    _buffered_inputs: Any

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's micro-batch, of a division that keeps groups whole."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        batches: Any = self._buffered_inputs
        if batches is before or not self._groups_matter(batches):
            return inputs
        prompts = [torch.cat([batch[name] for batch in batches]) for name in ("prompt_ids", "prompt_mask")]
        # The mask goes along: a padding token can be one of the prompt's, too
        _, groups = torch.cat(prompts, dim=1).unique(dim=0, return_inverse=True)
        lengths = torch.cat([batch["completion_mask"].sum(dim=1) for batch in batches])
        parts = whole_groups(groups.tolist(), lengths.tolist(), len(batches))
        rows = [torch.tensor(part, device=groups.device) for part in parts]
        self._buffered_inputs = found = divided(batches, rows)
        return found[self._step % len(found)]

    def _groups_matter(self, batches: Sequence[dict[str, Any]]) -> bool:
        """Whether the batch may be divided anew. `"bnpo"` takes the mean over the tokens of a micro-batch, so that its
        loss depends on the division, and deterministic rollouts have one of their own."""
        args = self.args
        free = self._recording and args.shared_prompt_updates and not args.deterministic_rollouts
        return free and len(batches) > 1 and args.loss_type != "bnpo"
