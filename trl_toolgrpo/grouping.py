"""How a rollout batch is divided over micro-batches: groups stay together, so that a prompt is scored once.

TRL shuffles the rows of a batch before it splits them, which spreads a group over all micro-batches and leaves each of
them little to share. The rows that TRL gave an optimizer step stay those of that step and are divided anew over its
micro-batches. A loss that adds up over rows is the same then; what TRL takes per micro-batch would not be, and keeps
TRL's division.
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
    ordered by length. Nothing is drawn from a random number generator: a run that divides its batches so samples what
    one that does not samples.

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
    return [order[place * size : (place + 1) * size] for place in range(parts)]


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
        """TRL's micro-batch, of a division that keeps the groups of an optimizer step together."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        batches: Any = self._buffered_inputs
        if batches is before or not self._divides_anew():
            return inputs
        prompts = [torch.cat([batch[name] for batch in batches]) for name in ("prompt_ids", "prompt_mask")]
        # The mask goes along: a padding token can be one of the prompt's, too
        _, groups = torch.cat(prompts, dim=1).unique(dim=0, return_inverse=True)
        lengths = torch.cat([batch["completion_mask"].sum(dim=1) for batch in batches])
        rows = torch.arange(len(groups), device=groups.device)
        parts: list[Tensor] = []
        steps = max(1, len(batches) // self.args.gradient_accumulation_steps)
        for own in rows.chunk(steps):  # the rows that TRL gave an optimizer step
            whole = whole_groups(groups[own].tolist(), lengths[own].tolist(), len(batches) // steps)
            parts += [own[part] for part in whole]
        self._buffered_inputs = found = divided(batches, parts)
        return found[self._step % len(found)]

    def _divides_anew(self) -> bool:
        """
        Whether the rows of an optimizer step may be divided over its micro-batches otherwise than TRL did.

        TRL takes these over a micro-batch, so that the loss depends on the division: the mean over tokens of `"bnpo"`,
        the quantile of `top_entropy_quantile`, the mean entropy of `entropy_coef` and `use_adaptive_entropy`, and the
        router loss of a mixture of experts. Deterministic rollouts have a division of their own. Where a rollout batch
        ends in the middle of an optimizer step, there are no rows of a step to divide.
        """
        args = self.args
        if not self._recording or not args.shared_prompt_updates or args.deterministic_rollouts:
            return False
        per_micro_batch = args.loss_type == "bnpo" or self.top_entropy_quantile < 1.0
        if per_micro_batch or self._entropy_bonus_enabled or self.aux_loss_enabled:
            return False
        batch, step = args.steps_per_generation or 1, args.gradient_accumulation_steps
        return batch > 1 and step > 1 and (batch % step == 0 or step % batch == 0)
