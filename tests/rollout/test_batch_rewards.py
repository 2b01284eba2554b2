"""The rewards of a rollout batch, from what reward functions gave, without a trainer."""

import logging
from types import SimpleNamespace

import pytest
import torch

from trl_toolgrpo.errors import RewardError
from trl_toolgrpo.rollout.rewards import RewardCheck
from trl_toolgrpo.trl_hooks import Run


NAN = float("nan")


def made(training=True, process=0, weights=(1.0, 2.0)):
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=training),
        accelerator=SimpleNamespace(process_index=process, is_main_process=True),
        reward_func_names=["first", "second"],
        reward_weights=torch.tensor(weights),
        state=SimpleNamespace(global_step=4),
    )
    return RewardCheck(Run(trainer))


def test_totals_are_weighted_and_leave_out_what_was_not_scored():
    scores = torch.tensor([[1.0, 2.0], [NAN, 3.0], [NAN, NAN], [0.0, 0.0]])
    rewards = made(process=1).rewards(scores, 2, None)
    assert rewards.scores is scores
    torch.testing.assert_close(rewards.totals, torch.tensor([5.0, 6.0, NAN, 0.0]), equal_nan=True)
    torch.testing.assert_close(rewards.own_totals, torch.tensor([NAN, 0.0]), equal_nan=True)


@pytest.mark.parametrize("training", [True, False])
def test_an_infinite_reward_is_an_error_that_names_rollout_and_function(training):
    scores = torch.tensor([[1.0, 2.0], [3.0, -torch.inf]])
    with pytest.raises(RewardError, match="`second` gave -inf for rollout 1"):
        made(training).rewards(scores, 2, None)


def test_a_first_batch_without_a_score_is_an_error():
    with pytest.raises(RewardError, match="`first` and `second` gave None or NaN for all 4"):
        made().rewards(torch.full((4, 2), NAN), 4, None)


def test_an_evaluation_without_a_score_is_none():
    check = made(training=False)
    assert check.rewards(torch.full((4, 2), NAN), 4, None).totals.isnan().all()


def test_a_later_batch_without_a_score_warns_once_until_there_is_one(caplog):
    check, scored, unscored = made(), torch.ones(4, 2), torch.full((4, 2), NAN)
    with caplog.at_level(logging.WARNING):
        for scores, warnings in ((scored, 0), (unscored, 1), (unscored, 1), (scored, 1), (unscored, 2)):
            check.rewards(scores, 4, None)
            assert len(caplog.records) == warnings
    assert "Step 4: No rollout of the batch was scored" in caplog.text


@pytest.mark.parametrize(("lost", "blamed"), [(2, True), (3, False)])
def test_rollouts_that_lost_their_environment_blame_no_function(lost, blamed):
    """Where fewer than half are left, nothing is said of the functions."""
    gone = torch.arange(4) < lost
    if not blamed:
        made().rewards(torch.full((4, 2), NAN), 4, gone)
        return
    with pytest.raises(RewardError, match="for all 2,"):
        made().rewards(torch.full((4, 2), NAN), 4, gone)
