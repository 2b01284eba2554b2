"""Where training is in its rollout batches: how many micro-batches one feeds, and which one is in use.

`global_step` counts optimizer steps and identifies no rollout batch: with `num_iterations` or `steps_per_generation`
above `gradient_accumulation_steps` a batch feeds several of them, and below it a step takes several batches.
"""

import math
from typing import Any


def micro_batches_of(args: Any) -> int:
    """Micro-batches that a rollout batch feeds, each pass over it counted: `steps_per_generation * num_iterations`."""
    return (args.steps_per_generation or 1) * args.num_iterations


def optimizer_steps_of(args: Any) -> int:
    """
    Most optimizer steps that take micro-batches of one rollout batch.

    A batch that begins in the middle of a step, which happens where neither count of micro-batches divides the other,
    can reach into one step more than its size tells.
    """
    every, accumulated = micro_batches_of(args), args.gradient_accumulation_steps
    latest = accumulated - math.gcd(every, accumulated)  # micro-batch of a step that a rollout batch can begin with
    return math.ceil((latest + every) / accumulated)


def batch_number(trainer: Any) -> int:
    """Number of the rollout batch that the next micro-batch belongs to, counted from 0 over the whole run."""
    return trainer._step // micro_batches_of(trainer.args)


def batch_is_due(trainer: Any) -> bool:
    """Whether the next micro-batch is of a new rollout batch, as TRL decides it."""
    return trainer._step % micro_batches_of(trainer.args) == 0 or trainer._buffered_inputs is None


def batch_in_use(trainer: Any) -> bool:
    """Whether the present rollout batch has micro-batches left to feed."""
    return not batch_is_due(trainer)
