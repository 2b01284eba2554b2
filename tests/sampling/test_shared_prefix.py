"""The key-value store keeps what it was given through growth and swaps."""

import pytest
import torch

from trl_toolgrpo.sampling.shared_prefix import KeyValueStore, Layout, Span


def _span(slots, lengths, query_length):
    count = len(lengths)
    layout = Layout(
        groups=torch.zeros(count, dtype=torch.long),
        ranks=torch.arange(count),
        width=count,
        order=torch.arange(count),
        places=None,
        members=[],
        batched=True,
    )
    return Span(layout, slots, torch.tensor(lengths), query_length, max(lengths), level=len(set(lengths)) == 1)


def test_store_keeps_its_contents_through_growth_and_swaps():
    store = KeyValueStore([0], rows=3, max_length=500)
    expected = [[], [], []]
    generator = torch.Generator().manual_seed(0)
    capacities = []
    for step in range(60):
        first = step % 3 if step % 7 == 0 else 0
        rows = list(range(first, 3))
        length = 1 + step % 4
        store.begin(_span(first, [len(expected[row]) for row in rows], length))
        for layer in (0, 1):
            key = torch.randn(len(rows), 2, length, 4, generator=generator)
            value = torch.randn(len(rows), 2, length, 5, generator=generator)
            keys, values = store.append(layer, key, value)
            if layer == 1:
                for place, row in enumerate(rows):
                    expected[row] += list(zip(key[place].unbind(1), value[place].unbind(1), strict=True))
                    assert torch.equal(
                        keys[place][:, : len(expected[row])], torch.stack([k for k, _ in expected[row]], 1)
                    )
                    assert torch.equal(
                        values[place][:, : len(expected[row])], torch.stack([v for _, v in expected[row]], 1)
                    )
        if step % 5 == 4:
            one, other = step % 3, (step + 1) % 3
            store.swap(one, other, max(len(expected[one]), len(expected[other])))
            expected[one], expected[other] = expected[other], expected[one]
        capacities.append(store.capacity)
    assert len(set(capacities)) >= 3 and capacities == sorted(capacities) and capacities[-1] <= 500
    for row in range(3):
        keys = torch.stack([k for k, _ in expected[row]], 1)
        assert torch.equal(store.own[1][0][row][:, : len(expected[row])], keys)


def test_store_refuses_a_pass_before_begin():
    store = KeyValueStore([0], rows=1, max_length=5)
    with pytest.raises(RuntimeError, match="begin"):
        store.append(0, torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
