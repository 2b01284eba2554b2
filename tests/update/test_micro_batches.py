"""Groups stay whole when a rollout batch is split, and the update is the one of TRL's split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_options import LOSS_OPTIONS, run

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.update.micro_batches import whole_groups
from trl_toolgrpo.update.policy_update import regrouped


def test_a_split_by_hand():
    groups, lengths = [0, 0, 1, 1, 2, 2, 3, 3], [9, 2, 1, 1, 8, 7, 2, 1]
    parts = whole_groups(groups, lengths, 2)
    assert sorted(map(sorted, parts)) == [[0, 1, 4, 5], [2, 3, 6, 7]]  # short groups with short ones
    assert parts == [[2, 3, 7, 6], [1, 0, 5, 4]]  # in a group, too, short rows come first
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


def test_splitting_draws_no_random_numbers():
    before = torch.get_rng_state()
    whole_groups([0, 1, 2], [1, 2, 3], 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_regrouped_rows_keep_their_values():
    batches = [{"a": torch.tensor([[0], [1]]), "n": torch.tensor(7), "x": None}]
    batches.append({"a": torch.tensor([[2], [3]]), "n": torch.tensor(7), "x": None})
    one, other = regrouped(batches, [torch.tensor([3, 0]), torch.tensor([1, 2])])
    assert one["a"].tolist() == [[3], [0]] and other["a"].tolist() == [[1], [2]]
    assert one["n"] == 7 and one["x"] is None


def rewards(completions, completion_ids, **kwargs):
    """Differ within a group."""
    return [float((7 * len(ids) + sum(ids)) % 11) for ids in completion_ids]


def watched(shapes):
    """Record how many prompts there are in each micro-batch of a trainer."""

    def prepare(trainer, tokenizer):
        take = trainer._prepare_inputs

        def watch(batch):
            inputs = take(batch)
            shapes.append(len(inputs["prompt_ids"].unique(dim=0)))
            return inputs

        trainer._prepare_inputs = watch

    return prepare


LOGGED = ("loss", "policy_loss", "entropy_coef", "aux_loss", "reward")


@pytest.mark.parametrize("name", LOSS_OPTIONS)
def test_updates_are_those_of_trls_split(tmp_path, name):
    """Loss and gradients of every optimizer step are those of `shared_prompt_updates=False`, for every option."""
    options, whole, cut = LOSS_OPTIONS[name], [], []
    ours, found = run(ToolGRPOTrainer, tmp_path / "a", options, rewards, prepare=watched(whole))
    other, expected = run(
        ToolGRPOTrainer, tmp_path / "b", {**options, "shared_prompt_updates": False}, rewards, prepare=watched(cut)
    )
    assert other.update.scoring.packing.active is False and max(cut) > 1
    assert len(found) == len(expected) == options.get("max_steps", 1)
    for mine, plain in zip(found, expected, strict=True):
        assert plain.norm() > 0 and (mine - plain).norm() <= 1e-4 * plain.norm()
    for entry, plain in zip(ours.state.log_history[:-1], other.state.log_history[:-1], strict=True):
        for figure in LOGGED:
            if figure in plain:
                assert entry[figure] == pytest.approx(plain[figure], rel=1e-4, abs=1e-6), figure


@pytest.mark.parametrize("name", ["dapo", "grpo", "luspo, by sequence", "kl", "passes over a batch"])
def test_groups_stay_together(tmp_path, name):
    shapes = []
    trainer, _ = run(ToolGRPOTrainer, tmp_path, LOSS_OPTIONS[name], rewards, prepare=watched(shapes))
    assert trainer.update.scoring.packing.active is True and set(shapes) == {1}


def test_each_optimizer_step_keeps_its_rows(tmp_path):
    """If a batch feeds several steps, groups stay together as far as TRL has put their rows into one step."""
    shapes = {}
    for shared in (True, False):
        found = shapes[shared] = []
        options = {**LOSS_OPTIONS["steps on a batch"], "shared_prompt_updates": shared}
        run(ToolGRPOTrainer, tmp_path / str(shared), options, rewards, prepare=watched(found))
    assert sum(shapes[True]) < sum(shapes[False])


@pytest.mark.parametrize("changes", [{"loss_type": "bnpo"}, {"deterministic_rollouts": True}, {"entropy_coef": 0.1}])
def test_trls_split_stays_if_the_loss_depends_on_it(tmp_path, changes):
    found = []
    run(ToolGRPOTrainer, tmp_path, changes, rewards, prepare=watched(found))
    assert max(found) > 1
