"""Where training is in its rollout batches: how many micro-batches one feeds, and which one is in use.

`global_step` counts optimizer steps and identifies no rollout batch: with `num_iterations` or `steps_per_generation`
above `gradient_accumulation_steps` a batch feeds several steps, and below it a step takes several batches.
"""

import math
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from trl import GRPOConfig, GRPOTrainer


def micro_batches_of(args: "GRPOConfig") -> int:
    """Return how many micro-batches a rollout batch feeds: `steps_per_generation` times `num_iterations`."""
    return (args.steps_per_generation or 1) * args.num_iterations


def optimizer_steps_of(args: "GRPOConfig") -> int:
    """
    Return the largest number of optimizer steps that take micro-batches of one rollout batch.

    A batch that begins in the middle of a step, which happens if neither count of micro-batches divides the other, can
    reach into one step more than its size suggests.
    """
    every, accumulated = micro_batches_of(args), args.gradient_accumulation_steps
    latest = accumulated - math.gcd(every, accumulated)  # micro-batch of a step that a rollout batch can begin with
    return math.ceil((latest + every) / accumulated)


def batch_number(trainer: "GRPOTrainer") -> int:
    """Return the number of the rollout batch that the next micro-batch belongs to, from 0, over the whole run."""
    return trainer._step // micro_batches_of(trainer.args)  # type: ignore[arg-type]


def batch_is_due(trainer: "GRPOTrainer") -> bool:
    """Return whether the next micro-batch belongs to a new rollout batch, as TRL decides it."""
    every = micro_batches_of(trainer.args)  # type: ignore[arg-type]
    return trainer._step % every == 0 or trainer._buffered_inputs is None


def batch_in_use(trainer: "GRPOTrainer") -> bool:
    """Return whether the present rollout batch has micro-batches left to feed."""
    return not batch_is_due(trainer)
