"""Rollouts and micro-batches that are the same whatever the timing of tools or the number of processes.

This is what `deterministic_rollouts` changes in the trainer: which noise a rollout batch gets, and how it is split
over the optimizer steps. Rows are in TRL's order: the rollouts of process 0 come first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config.batch_position import batch_number
from ..sampling.noise import RolloutNoise
from ..types import Batch, Row
from .micro_batches import GroupedUpdates


class Determinism(GroupedUpdates):
    """Part of [`ToolGRPOTrainer`]; see `deterministic_rollouts` of [`ToolGRPOConfig`]."""

    model: PreTrainedModel
    _evaluated = 0  # rollouts of the evaluation in progress, so that each evaluation has the same noise

    def _rollout_noise(self, count: int) -> RolloutNoise | None:
        """Return noise for the next `count` rollouts of this process; `None` if they need not be reproducible."""
        if not self.args.deterministic_rollouts:
            return None
        own = self.accelerator.process_index * count
        if self.model.training:
            return RolloutNoise(self.args.seed, batch_number(self), own)
        first = self._evaluated + own
        self._evaluated += self.accelerator.num_processes * count
        return RolloutNoise(self.args.seed, self.state.global_step, first, "eval")

    def _generate_and_score_completions(self, inputs: list[Row]) -> Batch:
        output = super()._generate_and_score_completions(inputs)
        if self._recording and self.model.training:
            output["rollout"] = torch.arange(len(inputs), device=output["completion_ids"].device)
        return output

    def _new_split(self, batches: Sequence[Batch]) -> list[Tensor] | None:
        if not self.args.deterministic_rollouts or "rollout" not in batches[0]:
            return super()._new_split(batches)
        order = torch.cat([batch["rollout"] for batch in batches]).argsort()
        noise = self._rollout_noise(len(order))
        return None if noise is None else [order[part] for part in interleaved(len(order), len(batches), noise)]


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
