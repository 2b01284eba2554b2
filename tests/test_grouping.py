"""Groups stay whole when a rollout batch is divided, and the update is the one TRL's division gives."""

import pytest
import torch
from conftest import chat_tokenizer, config, prompts, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.grouping import divided, whole_groups


def test_a_division_by_hand():
    groups, lengths = [0, 0, 1, 1, 2, 2, 3, 3], [9, 2, 1, 1, 8, 7, 2, 1]
    parts = whole_groups(groups, lengths, 2)
    assert sorted(map(sorted, parts)) == [[0, 1, 4, 5], [2, 3, 6, 7]]  # short groups with short ones
    assert [1, 0, 5, 4] in parts and [2, 3, 7, 6] in parts  # in a group, too, short rows come first
    assert sorted(whole_groups(groups, lengths, 8)) == [[row] for row in range(8)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=12, max_size=12), st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 9))
def test_every_row_has_one_place(groups, parts, seed):
    torch.manual_seed(seed)
    found = whole_groups(groups, [(7 * row) % 5 for row in range(12)], parts)
    assert sorted(row for part in found for row in part) == list(range(12))
    assert {len(part) for part in found} == {12 // parts}
    for group in set(groups):  # a group is cut no more often than its size and its place make necessary
        rows = groups.count(group)
        assert sum(any(groups[row] == group for row in part) for part in found) <= (rows - 1) // (12 // parts) + 2


def test_micro_batches_come_in_any_order():
    orders = {tuple(part[0] for part in whole_groups([0, 1, 2], [1, 2, 3], 3)) for _ in range(100)}
    assert len(orders) == 6


def test_rows_move_as_a_whole():
    batches = [{"a": torch.tensor([[0], [1]]), "n": torch.tensor(7), "x": None}]
    batches.append({"a": torch.tensor([[2], [3]]), "n": torch.tensor(7), "x": None})
    one, other = divided(batches, [torch.tensor([3, 0]), torch.tensor([1, 2])])
    assert one["a"].tolist() == [[3], [0]] and other["a"].tolist() == [[1], [2]]
    assert one["n"] == 7 and one["x"] is None


class _Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = torch.cat([p.grad.flatten() for p in model.parameters()])


def first_step(path, shapes, **changes):
    """Gradients of one optimizer step over four micro-batches, its logs, and the groups in each micro-batch."""
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    rewards = lambda completions, **kwargs: [float(len(str(c)) % 5) for c in completions]  # noqa: E731
    options = {"gradient_accumulation_steps": 4, "beta": 0.0, "max_grad_norm": 0.0, "logprob_check": "off", **changes}
    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer), rewards, config(path, **options), prompts(4), processing_class=tokenizer
    )
    keep = _Gradients()
    trainer.add_callback(keep)
    prepare = trainer._prepare_inputs

    def watch(batch):
        inputs = prepare(batch)
        shapes.append(len(inputs["prompt_ids"].unique(dim=0)))
        return inputs

    trainer._prepare_inputs = watch
    trainer.train()
    return keep.found, trainer.state.log_history[0], trainer


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_loss_and_gradients_are_those_of_shuffled_rows(tmp_path, loss_type):
    whole, cut = [], []
    ours, logs, trainer = first_step(tmp_path, whole, loss_type=loss_type)
    plain, expected, other = first_step(tmp_path, cut, loss_type=loss_type, shared_prompt_updates=False)
    assert trainer._packs is True and other._packs is False
    assert whole == [1, 1, 1, 1] and max(cut) > 1
    assert (ours - plain).norm() <= 1e-5 * plain.norm() and plain.norm() > 0
    assert logs["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-7)
    assert logs["reward"] == expected["reward"]  # the same rollouts


@pytest.mark.parametrize("changes", [{"loss_type": "bnpo"}, {"deterministic_rollouts": True}])
def test_where_the_division_matters_it_is_left_alone(tmp_path, changes):
    found = []
    first_step(tmp_path, found, **changes)
    assert max(found) > 1
