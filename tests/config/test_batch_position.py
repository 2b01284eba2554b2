"""Where training is in its rollout batches, against a count of micro-batches by hand."""

from types import SimpleNamespace

import pytest

from trl_toolgrpo.config.batch_position import (
    batch_in_use,
    batch_is_due,
    batch_number,
    micro_batches_of,
    optimizer_steps_of,
)


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("per_batch", range(1, 6))
@pytest.mark.parametrize("accumulated", range(1, 7))
def test_positions_agree_with_a_count(accumulated, per_batch, passes):
    args = SimpleNamespace(
        gradient_accumulation_steps=accumulated, steps_per_generation=per_batch, num_iterations=passes
    )
    micro_batches = [(batch, place) for batch in range(60) for place in range(per_batch * passes)]
    steps = {}
    for count, (batch, place) in enumerate(micro_batches):
        trainer = SimpleNamespace(args=args, _step=count, _buffered_inputs=[])
        assert batch_number(trainer) == batch
        assert batch_is_due(trainer) == (place == 0) and batch_in_use(trainer) == (place > 0)
        steps.setdefault(batch, set()).add(count // accumulated)
    assert micro_batches_of(args) == per_batch * passes
    assert optimizer_steps_of(args) == max(map(len, steps.values()))


def test_a_lost_batch_is_due_again():
    """A checkpoint of TRL's does not hold the batch."""
    args = SimpleNamespace(gradient_accumulation_steps=1, steps_per_generation=4, num_iterations=1)
    trainer = SimpleNamespace(args=args, _step=6, _buffered_inputs=None)
    assert batch_is_due(trainer) and not batch_in_use(trainer) and batch_number(trainer) == 1
