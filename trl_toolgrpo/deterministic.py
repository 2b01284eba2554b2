"""Rollouts and micro-batches that are the same whatever the timing of tools or the number of processes.

Owns what `deterministic_rollouts` changes in the trainer, as a mixin of it: which noise a rollout batch gets, and how
the batch is divided over the optimizer steps. Fed by TRL's order of rows: the rollouts of process 0 come first.
"""

from typing import Any

import torch
from trl import GRPOTrainer

from .batch_position import batch_number
from .config import ToolGRPOConfig
from .grouping import divided
from .rollout.noise import RolloutNoise


class Determinism(GRPOTrainer):
    """Part of [`ToolGRPOTrainer`]; see `deterministic_rollouts` of [`ToolGRPOConfig`]."""

    args: ToolGRPOConfig
    model: Any
    _recording: bool
    _evaluated = 0  # rollouts of the evaluation in progress

    def _rollout_noise(self, count: int) -> RolloutNoise | None:
        """Noise for the next `count` rollouts of this process; `None` where it need not be the same again."""
        if not self.args.deterministic_rollouts:
            return None
        own = self.accelerator.process_index * count
        if self.model.training:
            return RolloutNoise(self.args.seed, batch_number(self), own)
        first = self._evaluated + own
        self._evaluated += self.accelerator.num_processes * count
        return RolloutNoise(self.args.seed, self.state.global_step, first, "eval")

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's evaluation; at the same weights it gives the same rollouts again."""
        self._evaluated = 0
        return super().evaluate(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self._recording and self.model.training:
            output["rollout"] = torch.arange(len(inputs), device=output["completion_ids"].device)
        return output

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's micro-batch, of a division that does not depend on the process's own random numbers."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before or "rollout" not in inputs:
            return inputs
        batches: Any = self._buffered_inputs
        noise = self._rollout_noise(sum(len(batch["rollout"]) for batch in batches))
        if noise is not None:
            self._buffered_inputs = batches = redivide(batches, noise)
        return batches[self._step % len(batches)]


def division(count: int, parts: int, noise: RolloutNoise) -> list[list[int]]:
    """
    Divide rows over micro-batches. Each micro-batch takes one of every `parts` neighbours, so that the rows of several
    processes together are divided as those of one process would be.

    Args:
        count (`int`):
            Rows of this process, a multiple of `parts`.
        parts (`int`):
            Micro-batches.
        noise ([`RolloutNoise`]):
            Decides which takes which.

    Returns:
        `list[list[int]]`: rows of each micro-batch, in order.
    """
    chosen: list[list[int]] = [[] for _ in range(parts)]
    for start in range(0, count, parts):
        places = noise.other("division", start).sample(range(parts), parts)
        for part, place in zip(chosen, places, strict=True):
            part.append(start + place)
    return chosen


def redivide(batches: list[dict[str, Any]], noise: RolloutNoise) -> list[dict[str, Any]]:
    """Micro-batches of the same rows, divided by [`division`]; `rollout` of each says which rows those are."""
    order = torch.cat([batch["rollout"] for batch in batches]).argsort()
    return divided(batches, [order[part] for part in division(len(order), len(batches), noise)])
