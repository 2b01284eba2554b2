"""How many micro-batches a rollout batch feeds, and how many optimizer steps take them.

`global_step` counts optimizer steps and identifies no rollout batch: with `num_iterations` or `steps_per_generation`
above `gradient_accumulation_steps` a batch feeds several steps, and below it a step takes several batches.
"""

import math
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from trl import GRPOConfig


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
