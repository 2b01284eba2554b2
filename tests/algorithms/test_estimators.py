"""Advantage estimators: how one is named, what it is asked, what becomes of its answer, and runs with one."""

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import add, chat_tokenizer, config, part_run, prompts, tiny_model
from peft import LoraConfig

from trl_toolgrpo import (
    AdvantageEstimator,
    ConfigError,
    EstimatorError,
    ToolGRPOConfig,
    ToolGRPOTrainer,
    ToolResult,
    Trajectory,
    TrajectoryError,
    Turn,
)
from trl_toolgrpo.algorithms.advantages import (
    explained_variance,
    first_of_step,
    generalized_advantages,
    moments,
    place_rewards,
    rewards_to_go,
    steps_of,
    whiten,
)
from trl_toolgrpo.algorithms.base import RolloutGroup, TokenAdvantages
from trl_toolgrpo.algorithms.batch_advantages import BatchAdvantages
from trl_toolgrpo.algorithms.gae import GeneralizedAdvantages
from trl_toolgrpo.algorithms.group import GroupRelative
from trl_toolgrpo.algorithms.group_gae import GroupBaselineAdvantages
from trl_toolgrpo.algorithms.registry import estimator_of
from trl_toolgrpo.config.checks import ESTIMATORS
from trl_toolgrpo.config.fields import estimator_name
from trl_toolgrpo.config.parser import ToolGRPOParser
from trl_toolgrpo.rollout.engine import RolloutBatch
from trl_toolgrpo.rollout.loop import Rollout, RolloutStats
from trl_toolgrpo.rollout.rewards import Rewards


TOKENIZER = chat_tokenizer("qwen3_instruct_2507")

LEAVE_ONE_OUT = '''
from trl_toolgrpo import AdvantageEstimator

made = []


class LeaveOneOut(AdvantageEstimator):
    def __init__(self, args):
        super().__init__(args)
        made.append(args)

    def score(self, group):
        rewards = group.rewards.nan_to_num(0.0)
        return rewards - (rewards.sum() - rewards) / (len(group) - 1)


class NoScore(AdvantageEstimator):
    pass


an_object = LeaveOneOut(None)
not_one = 3
'''


class LeaveOneOut(AdvantageEstimator):
    """The mean of the other rollouts is the baseline of each (arXiv 2402.14740)."""

    def score(self, group):
        rewards = group.rewards.nan_to_num(0.0)
        return rewards - (rewards.sum() - rewards) / (len(group) - 1)


class ByToken(LeaveOneOut):
    """Later tokens weigh less."""

    def score(self, group):
        return super().score(group)[:, None] * torch.linspace(1.0, 0.5, group.mask.size(1))


class Above(LeaveOneOut):
    """Only groups whose rollouts are worth something on average."""

    def __init__(self, least):
        super().__init__()
        self.least = least

    def admit(self, group):
        return group.rewards.nanmean() > self.least


# Names


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_estimators.py").write_text(LEAVE_ONE_OUT)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_estimators"
    sys.modules.pop("own_estimators", None)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_each_built_in_estimator_has_its_class(name):
    module, _, kind = ESTIMATORS[name].partition(":")
    assert issubclass(getattr(importlib.import_module(module), kind), AdvantageEstimator)


def test_built_in_names_resolve(tmp_path):
    expected = {"group": GroupRelative, "gae": GeneralizedAdvantages, "group_gae": GroupBaselineAdvantages}
    assert expected.keys() <= ESTIMATORS.keys()
    for name, kind in expected.items():
        args = config(tmp_path, advantage_estimator=name)
        found = estimator_of(args)
        assert type(found) is kind and found.args is args and estimator_name(args) == name


@pytest.mark.parametrize("name", ["LeaveOneOut", "an_object"])
def test_a_module_and_a_name_resolve(tmp_path, module, name):
    args = config(tmp_path, advantage_estimator=f"{module}:{name}")
    found = estimator_of(args)
    assert type(found).__name__ == found.name == "LeaveOneOut" and found.args is args
    assert estimator_name(args) == f"{module}:{name}"


def test_an_object_is_the_estimator_and_gets_the_configuration(tmp_path):
    given = LeaveOneOut()
    args = config(tmp_path, advantage_estimator=given)
    assert estimator_of(args) is given and given.args is args
    later = config(tmp_path, advantage_estimator=given)
    assert estimator_of(later).args is later
    assert estimator_name(args) == f"{LeaveOneOut.__module__}:LeaveOneOut"


def test_an_object_of_a_built_in_class_reads_the_configuration(tmp_path):
    args = config(tmp_path, advantage_estimator=GeneralizedAdvantages(), gae_gamma=0.5)
    assert estimator_of(args).args.gae_gamma == 0.5


def test_an_estimator_that_has_no_hash_is_taken(tmp_path):
    @dataclasses.dataclass
    class Weighted(LeaveOneOut):
        weight: float = 2.0

    assert estimator_of(config(tmp_path, advantage_estimator=Weighted(3.0))).weight == 3.0


def test_the_command_line_and_a_file_name_an_estimator(tmp_path, module):
    parser = ToolGRPOParser([ToolGRPOConfig])
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    (args,) = parser.parse_args_and_config([*flags, "--advantage_estimator", f"{module}:LeaveOneOut"])
    assert estimator_of(args).name == "LeaveOneOut"
    (tmp_path / "run.yaml").write_text(f"advantage_estimator: {module}:LeaveOneOut\n")
    (args,) = ToolGRPOParser([ToolGRPOConfig]).parse_args_and_config(["--config", str(tmp_path / "run.yaml"), *flags])
    assert estimator_of(args).name == "LeaveOneOut" and args.advantage_estimator == f"{module}:LeaveOneOut"


class Valued(LeaveOneOut):
    needs_values = True


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"advantage_estimator": "rloo"}, "`advantage_estimator='rloo'`.*group, gae, group_gae, or name a class"),
        ({"advantage_estimator": "no_such_module:Name"}, "'no_such_module:Name'`, which cannot be imported: No"),
        ({"advantage_estimator": ".relative:Name"}, "'.relative:Name'`, which cannot be imported"),
        ({"advantage_estimator": "own_estimators:Missing"}, "cannot be imported: .*has no attribute 'Missing'"),
        ({"advantage_estimator": "own_estimators:not_one"}, "an object of int as `advantage_estimator`"),
        ({"advantage_estimator": "own_estimators:NoScore"}, "estimator NoScore, which does not override `score`"),
        ({"advantage_estimator": LeaveOneOut}, "the class `LeaveOneOut` as `advantage_estimator`.*an object of it"),
        ({"advantage_estimator": len}, "an object of builtin_function_or_method as"),
        ({"advantage_estimator": AdvantageEstimator()}, "AdvantageEstimator, which does not override `score`"),
        ({"advantage_estimator": LeaveOneOut(), "value_epochs": 2}, "`value_epochs=2`.*LeaveOneOut, which asks for"),
        ({"advantage_estimator": Valued(), "loss_type": "vespo"}, "'vespo'.*Valued, which gives each token"),
        ({"advantage_estimator": LeaveOneOut(), "record_sample_logprobs": False}, "record_sample_logprobs=False"),
    ],
)
def test_what_is_no_estimator_is_refused_at_construction(tmp_path, module, changes, words):
    with pytest.raises(ConfigError, match=words):
        start(tmp_path, **changes)


# What becomes of its answer


def trajectory_of(draw, values=True):
    """Return a rollout of a few turns with tool results, forced tokens and rewards."""
    tool_mask, forced_mask, turns = [], [], []
    for _ in range(draw(1, 4)):
        start, forced, sampled, tool = len(tool_mask), draw(0, 3), draw(0, 5), draw(0, 4)
        tool_mask += [1] * (forced + sampled) + [0] * tool
        forced_mask += [1] * forced + [0] * (sampled + tool)
        results = [ToolResult("x", reward=draw(0, 9) / 7)] if tool and draw(0, 2) else []
        turns.append(Turn(start, start + forced + sampled, tool_results=results))
    count = len(tool_mask)
    given = [draw(-50, 50) / 31 for _ in range(count)] if values else None
    return Trajectory([1], [5] * count, [-0.5] * count, tool_mask, forced_mask, turns, "stop", given)


def batch_of(count, seed=0, unscored=(), values=True):
    """Return TRL's output for some random rollouts, the rollouts and their rewards."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    rollouts = [Rollout(trajectory_of(draw, values), []) for _ in range(count)]
    width = max(len(r.trajectory.completion_ids) for r in rollouts) + 1
    masks = torch.zeros(2, count, width, dtype=torch.long)
    for row, rollout in enumerate(rollouts):
        length = len(rollout.trajectory.completion_ids)
        masks[0, row, :length] = 1
        masks[1, row, :length] = torch.tensor(rollout.trajectory.trainable_mask)
    totals = torch.randn(count, generator=generator)
    for row in unscored:
        totals[row] = torch.nan
    output = {
        "completion_ids": torch.zeros(count, width, dtype=torch.long),
        "completion_mask": masks[0],
        "tool_mask": masks[1],
        "advantages": torch.randn(count, generator=generator),
    }
    rewards = Rewards(totals[:, None].clone(), totals, slice(0, count))
    return output, RolloutBatch(rollouts, RolloutStats(), [False] * count), rewards


def part_of(path, estimator, **changes):
    args = config(path, **{"per_device_train_batch_size": 12, "advantage_estimator": estimator, **changes})
    run = part_run(tiny_model(TOKENIZER), args)
    run.completions_table["advantages"].extend([0.0] * 12)
    return run, BatchAdvantages(run, estimator_of(args))


def recorded(output, batch):
    values = torch.zeros(output["completion_ids"].shape, dtype=torch.float64)
    for row, trajectory in enumerate(batch.trajectories):
        values[row, : len(trajectory.values)] = torch.tensor(trajectory.values, dtype=torch.float64)
    return values


def estimated_at_once(args, output, batch, rewards, values):
    """Estimate all rollouts of a batch in one go, padded to its width, without groups and objects."""
    output = dict(output)
    width = output["completion_ids"].size(1)
    terminal = rewards.totals if args.advantage_estimator == "gae" else output["advantages"]
    placed = place_rewards(terminal.nan_to_num(nan=0.0), batch.trajectories, width)
    taken = (output["completion_mask"] * output["tool_mask"]).bool() & ~rewards.totals.isnan()[:, None]
    steps = steps_of(batch.trajectories, width, args.gae_unit).where(taken, -1)
    advantages, returns = generalized_advantages(placed, values, steps, args.gae_gamma, args.gae_lambda)
    first, to_go = first_of_step(steps), rewards_to_go(placed, steps, args.gae_gamma)
    explained = explained_variance(moments(to_go, first), moments(to_go - values, first))
    if args.advantage_estimator == "gae":
        advantages = whiten(advantages, steps >= 0, moments(advantages, steps >= 0))
    output["advantages"] = advantages.to(output["advantages"].dtype)
    output["old_values"], output["value_targets"] = values.float(), returns.float()
    output["value_mask"], output["value_count"] = first.long(), first.sum()
    shown = output["advantages"].sum(dim=1) / (steps >= 0).sum(dim=1).clamp(min=1)
    return output, explained, shown.tolist()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("unit", ["token", "turn"])
@pytest.mark.parametrize("name", ["gae", "group_gae"])
def test_values_give_the_same_numbers_as_in_one_go(tmp_path, name, unit, seed):
    run, part = part_of(tmp_path, name, gae_unit=unit, gae_gamma=0.97, gae_lambda=0.9)
    output, batch, rewards = batch_of(12, seed, unscored=[3 * seed])
    values = recorded(output, batch)
    expected, explained, shown = estimated_at_once(run.args, output, batch, rewards, values)
    part.estimate(output, batch, rewards, values)
    assert set(output) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(output[key], tensor) and output[key].dtype == tensor.dtype, key
    assert run.training_metrics["value/explained_variance"] == [explained]
    assert list(run.completions_table["advantages"]) == shown


def test_the_group_advantage_is_trls_own(tmp_path):
    _, part = part_of(tmp_path, "group")
    output, batch, rewards = batch_of(12)
    before = output["advantages"].clone()
    part.estimate(output, batch, rewards, None)
    assert torch.equal(output["advantages"], before)


def test_a_group_holds_the_rollouts_of_one_prompt(tmp_path):
    seen = []

    class Watching(LeaveOneOut):
        def score(self, group):
            seen.append(group)
            return super().score(group)

    run, part = part_of(tmp_path, Watching())
    output, batch, rewards = batch_of(12, unscored=[5])
    given = output["advantages"].clone()
    part.estimate(output, batch, rewards, None)
    mask = (output["completion_mask"] * output["tool_mask"]).bool()
    for number, group in enumerate(seen):
        rows = slice(4 * number, 4 * number + 4)
        assert isinstance(group, RolloutGroup) and group.trajectories == batch.trajectories[rows]
        assert len(group) == 4 and group.values is None
        width = max(len(t.completion_ids) for t in group.trajectories)
        torch.testing.assert_close(group.rewards, rewards.totals[rows], equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(group.scores, rewards.scores[rows], equal_nan=True, rtol=0, atol=0)
        assert torch.equal(group.advantages, given[rows])
        assert torch.equal(group.mask, mask[rows, :width])
        assert group.scored.tolist() == (~rewards.totals[rows].isnan()).tolist()
        kept = rewards.totals[rows].nan_to_num(0.0).tolist()
        for row in range(4):
            others = [kept[other] for other in range(4) if other != row]
            found = output["advantages"][4 * number + row].item()
            assert found == pytest.approx(kept[row] - sum(others) / 3, abs=1e-6)
    assert len(seen) == 3
    assert list(run.completions_table["advantages"]) == output["advantages"].tolist()


def test_advantages_of_tokens_are_0_where_nothing_is_trained(tmp_path):
    _, part = part_of(tmp_path, ByToken())
    output, batch, rewards = batch_of(12)
    part.estimate(output, batch, rewards, None)
    mask = output["completion_mask"] * output["tool_mask"]
    width = output["completion_ids"].size(1)
    assert output["advantages"].shape == (12, width) and output["advantages"].dtype == torch.float32
    assert not output["advantages"][mask == 0].any() and output["advantages"][mask == 1].any()


def test_some_groups_by_token_and_others_by_rollout(tmp_path):
    class Mixed(ByToken):
        number = 0

        def score(self, group):
            self.number += 1
            return super().score(group) if self.number == 2 else LeaveOneOut.score(self, group)

    _, part = part_of(tmp_path, Mixed())
    output, batch, rewards = batch_of(12)
    expected = dict(output)
    part.estimate(output, batch, rewards, None)
    part_of(tmp_path, LeaveOneOut())[1].estimate(expected, batch, rewards, None)
    mask = output["completion_mask"] * output["tool_mask"]
    spread = expected["advantages"][:, None] * mask
    assert torch.equal(output["advantages"][:4], spread[:4]) and torch.equal(output["advantages"][8:], spread[8:])
    assert not torch.equal(output["advantages"][4:8], spread[4:8])


class Answer(AdvantageEstimator):
    """Gives what a function makes of a group."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def score(self, group):
        return self.answer(group)


class ValuedAnswer(Answer):
    needs_values = True


def tokens(group, **changes):
    zeros = torch.zeros(group.mask.shape)
    given = {"advantages": zeros, "returns": zeros, "rewards_to_go": zeros, "steps": zeros.long()}
    return TokenAdvantages(**{**given, **{name: change(zeros) for name, change in changes.items()}})


@pytest.mark.parametrize(
    ("kind", "answer", "error", "words"),
    [
        (Answer, lambda group: None, ConfigError, "advantages of shape NoneType for a group of 4 rollouts"),
        (Answer, lambda group: [0.0] * 4, ConfigError, "advantages of shape list"),
        (Answer, lambda group: torch.zeros(3), ConfigError, r"advantages of shape \(3,\).*\(4,\) or \(4, \d+\)"),
        (Answer, lambda group: torch.zeros(4, 1), ConfigError, r"advantages of shape \(4, 1\)"),
        (Answer, lambda group: tokens(group), ConfigError, "a TokenAdvantages where `needs_values=False`"),
        (Answer, lambda group: torch.tensor([0, 0, torch.nan, 0]), TrajectoryError, "rollout 2 of a group advantages"),
        (Answer, lambda group: group.mask / 0.0, TrajectoryError, "not finite; the rewards of the group are"),
        (ValuedAnswer, lambda group: torch.zeros(4), ConfigError, "a Tensor where `needs_values=True`"),
        (ValuedAnswer, lambda group: tokens(group, advantages=lambda x: x[:, 0]), ConfigError, r"of shape \(4,\)"),
        (ValuedAnswer, lambda group: tokens(group, returns=lambda x: x[:2]), ConfigError, r"returns of shape \(2, "),
        (ValuedAnswer, lambda group: tokens(group, steps=lambda x: None), ConfigError, "steps of shape NoneType"),
        (ValuedAnswer, lambda group: tokens(group, returns=lambda x: x / 0), TrajectoryError, "0 of a group returns"),
    ],
)
def test_answers_that_no_update_could_use_are_refused(tmp_path, kind, answer, error, words):
    _, part = part_of(tmp_path, kind(answer))
    output, batch, rewards = batch_of(12)
    with pytest.raises(error, match=f"estimator {kind.__name__} .*{words}"):
        part.estimate(output, batch, rewards, recorded(output, batch) if kind is ValuedAnswer else None)


def test_advantages_of_tokens_are_refused_with_vespo(tmp_path):
    _, part = part_of(tmp_path, ByToken(), loss_type="vespo")
    output, batch, rewards = batch_of(12)
    with pytest.raises(ConfigError, match=r"ByToken gave each token an advantage of its own\. `loss_type='vespo'`"):
        part.estimate(output, batch, rewards, None)


def test_values_are_learned_at_trained_tokens_only(tmp_path):
    """Whatever steps an estimator gives."""
    _, part = part_of(tmp_path, ValuedAnswer(lambda g: tokens(g, steps=lambda x: x.long() + torch.arange(x.size(1)))))
    output, batch, rewards = batch_of(12)
    part.estimate(output, batch, rewards, recorded(output, batch))
    mask = output["completion_mask"] * output["tool_mask"]
    assert torch.equal(output["value_mask"], mask) and output["value_count"] == mask.sum()


# Groups that are left out


@pytest.mark.parametrize("masks", ["both", "completion_mask"])
def test_a_group_that_is_left_out_has_no_token(tmp_path, masks):
    run, part = part_of(tmp_path, Above(0.0))
    output, batch, rewards = batch_of(12)
    if masks != "both":
        del output["tool_mask"]
    before = {name: tensor.clone() for name, tensor in output.items()}
    part.admit(output, batch, rewards)
    admitted = [rewards.totals[row : row + 4].mean() > 0 for row in (0, 4, 8)]
    assert 0 < sum(admitted) < 3
    for group, is_in in enumerate(admitted):
        rows = slice(4 * group, 4 * group + 4)
        for name in ("completion_mask", "tool_mask"):
            if name in output:
                assert torch.equal(output[name][rows], before[name][rows] * int(is_in))
    assert run.training_metrics["groups/admitted"] == [pytest.approx(sum(admitted) / 3)]


def test_all_groups_are_admitted_without_a_word(tmp_path):
    run, part = part_of(tmp_path, LeaveOneOut())
    output, batch, rewards = batch_of(12)
    before = output["completion_mask"].clone()
    part.admit(output, batch, rewards)
    assert torch.equal(output["completion_mask"], before) and "groups/admitted" not in run.training_metrics


def test_an_answer_that_is_missing_is_refused(tmp_path):
    class Silent(LeaveOneOut):
        def admit(self, group):
            pass

    _, part = part_of(tmp_path, Silent())
    with pytest.raises(ConfigError, match="`admit` of the advantage estimator Silent returned None"):
        part.admit(*batch_of(12))


# Runs


def reward(completion_ids, **kwargs):
    return [float((7 * len(ids) + sum(ids)) % 11) for ids in completion_ids]


def start(path, lora=False, rewards=reward, **changes):
    options = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4, "beta": 0.0,
        "learning_rate": 1e-2, "max_steps": 2, "max_completion_length": 24, **changes,
    }  # fmt: skip
    return ToolGRPOTrainer(
        tiny_model(TOKENIZER), rewards, config(path, **options), prompts(16), processing_class=TOKENIZER, tools=[add],
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1) if lora else None,
    )  # fmt: skip


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def of_steps(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


SPLITS = {
    "whole groups": {},
    "trl's": {"shared_prompt_updates": False},
    "deterministic": {"deterministic_rollouts": True},
}


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("estimator", [LeaveOneOut, ByToken])
def test_a_run_trains_with_an_estimator_of_ones_own(tmp_path, estimator, name):
    trainer = start(tmp_path, advantage_estimator=estimator(), **SPLITS[name])
    before = weights(trainer)
    seen = []
    part, put = trainer.advantages, trainer.advantages.estimate

    def watched(output, batch, rewards, values):
        put(output, batch, rewards, values)
        seen.append((output["advantages"].clone(), rewards.own_totals.clone()))

    part.estimate = watched
    trainer.train()
    assert trainer.critic is None and len(seen) == 2 and not torch.equal(before, weights(trainer))
    assert all(loss == loss for loss in of_steps(trainer, "loss"))
    for advantages, totals in seen:
        for group in range(2):
            kept = totals[4 * group : 4 * group + 4].tolist()
            for row in range(4):
                expected = kept[row] - sum(kept[:row] + kept[row + 1 :]) / 3
                found = advantages[4 * group + row]
                first = found if estimator is LeaveOneOut else found[0]
                assert first.item() == pytest.approx(expected, abs=1e-5)
    assert of_steps(trainer, "ratio/mean") == [pytest.approx(1.0, abs=1e-4)] * 2


def test_an_estimator_that_repeats_trls_advantages_trains_as_trl_does(tmp_path):
    class Same(AdvantageEstimator):
        def score(self, group):
            return group.advantages

    class SameByToken(AdvantageEstimator):
        def score(self, group):
            return group.advantages[:, None].expand(group.mask.shape)

    found = []
    for number, estimator in enumerate(["group", Same(), SameByToken()]):
        torch.manual_seed(0)
        trainer = start(tmp_path / str(number), advantage_estimator=estimator)
        trainer.train()
        found.append(weights(trainer))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("name", SPLITS)
def test_a_group_that_is_left_out_takes_no_part_in_the_update(tmp_path, name, loss_type):
    """The gradient is that of the other group alone; the count of tokens is that of the other group."""

    class First(LeaveOneOut):
        def admit(self, group):
            return bool(group.rewards.max() == 3)

    def rewards(completions, **kwargs):
        return [float(row % 4) if row < 4 else 9.0 + row % 3 for row in range(len(completions))]

    trainer = start(tmp_path, advantage_estimator=First(), rewards=rewards, max_steps=1, loss_type=loss_type,
                    **SPLITS[name])  # fmt: skip
    kept, on_batch = [], trainer.records.log.on_batch

    def watched(counts):
        kept.extend(dict(batch) for batch in trainer.run.micro_batches)
        return on_batch(counts)

    trainer.records.log.on_batch = watched
    trainer.train()
    assert of_steps(trainer, "groups/admitted") == [0.5]
    masks = torch.cat([batch["completion_mask"] * batch["tool_mask"] for batch in kept])
    order = torch.cat([batch["rollout"] for batch in kept]).argsort()
    masks = masks[order]
    assert masks[:4].any(dim=1).all() and not masks[4:].any()
    assert {int(batch["num_items_in_batch"]) for batch in kept} == {int(masks.sum())}
    trajectories = trainer.rollouts.batch.trajectories
    assert masks.sum() == sum(sum(t.trainable_mask) for t in trajectories[:4])


def test_no_group_at_all_leaves_the_policy_as_it_is(tmp_path):
    trainer = start(tmp_path, advantage_estimator=Above(1e9), max_steps=1, optim="sgd")
    before = weights(trainer)
    trainer.train()
    assert torch.equal(before, weights(trainer)) and of_steps(trainer, "groups/admitted") == [0.0]
    assert of_steps(trainer, "grad_norm") == [0.0]


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_figures_are_means_over_the_groups_that_take_part(tmp_path, name, loss_type):
    """A micro-batch without a token is no 0 in the mean, and a step without a token has none."""

    class Alternating(LeaveOneOut):
        asked = 0

        def admit(self, group):
            self.asked += 1
            return self.asked in (1, 5, 6)

    trainer = start(tmp_path, advantage_estimator=Alternating(), max_steps=3, learning_rate=1e-6, loss_type=loss_type,
                    mask_truncated_completions=False, **SPLITS[name])  # fmt: skip
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["groups/admitted"] for entry in log] == [0.5, 0.0, 1.0]
    figures = [name for name in log[2] if name == "entropy" or "clip_ratio/" in name or "cispo" in name]
    assert len(figures) > 1 and not any(name in log[1] for name in figures)
    assert log[0]["entropy"] == pytest.approx(log[2]["entropy"], rel=0.02)


def test_a_run_whose_groups_are_all_left_out_is_no_fault(tmp_path):
    options = {"max_steps": 5, "health_checks": "raise", "max_completion_length": 60}
    trainer = start(tmp_path, advantage_estimator=Above(1e9), **options)
    with torch.no_grad():  # so that rollouts end by themselves
        trainer.model.get_output_embeddings().weight[TOKENIZER.eos_token_id].add_(0.3)
    trainer.train()
    assert of_steps(trainer, "grad_norm") == [0.0] * 5


class AdmittedValues(GeneralizedAdvantages):
    def admit(self, group):
        return bool(group.rewards.max() > group.rewards.min())


def test_a_value_head_learns_nothing_from_groups_that_are_left_out(tmp_path):
    def rewards(completions, **kwargs):
        return [float(row % 4) if row < 4 else 1.0 for row in range(len(completions))]

    trainer = start(tmp_path, advantage_estimator=AdmittedValues(), rewards=rewards, max_steps=1)
    kept, estimate = [], trainer.advantages.estimate

    def watched(output, *given):
        estimate(output, *given)
        kept.append({name: output[name].clone() for name in ("value_mask", "value_count", "advantages")})

    trainer.advantages.estimate = watched
    trainer.train()
    assert trainer.critic is not None and of_steps(trainer, "value/loss")[0] > 0
    assert kept[0]["value_mask"][:4].any() and not kept[0]["value_mask"][4:].any()
    assert not kept[0]["advantages"][4:].any() and kept[0]["value_count"] == kept[0]["value_mask"].sum()


@pytest.mark.parametrize("kind", [LeaveOneOut, ByToken, Above, AdmittedValues])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, kind):
    """From the middle of a rollout batch; and a replay of its log gives the same weights."""

    class Local(kind):
        """A class that cannot be pickled."""

    def made():
        return Local(5.0) if kind is Above else Local()

    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "num_iterations": 2, "lora": True}
    whole = start(tmp_path / "whole", advantage_estimator=made(), **options)
    whole.train()
    torch.manual_seed(9)
    resumed = start(tmp_path / "resumed", advantage_estimator=made(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(weights(whole), weights(resumed))
    assert of_steps(resumed, "loss") == of_steps(whole, "loss")

    def never(**kwargs):
        raise AssertionError("scored again")

    again = start(tmp_path / "again", rewards=never, advantage_estimator=made(),
                  **{**options, "replay": str(tmp_path / "whole")})  # fmt: skip
    again.train()
    assert torch.equal(weights(whole), weights(again))


def test_an_estimator_stands_by_name_in_every_record(tmp_path):
    class Local(LeaveOneOut):
        methods: ClassVar = ()

    trainer = start(tmp_path, advantage_estimator=Local(), save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    trainer.create_model_card()
    name = f"{Local.__module__}:{Local.__qualname__}"
    assert trainer.args.to_dict()["advantage_estimator"] == estimator_name(trainer.args) == name
    assert json.loads(trainer.args.to_json_string())["advantage_estimator"] == name
    assert isinstance(trainer.args.advantage_estimator, Local)  # after the checkpoint, too
    stored = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert stored.advantage_estimator == name
    assert name in (tmp_path / "run.json").read_text()
    card = (tmp_path / "README.md").read_text()
    assert "advantages of `Local`" in card and " object at 0x" not in card


# The page


def test_the_examples_of_the_page_train(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "estimators.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    tiny_model(TOKENIZER).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    names = {"config": config}
    example = blocks[0].replace("Qwen/Qwen3-0.6B", str(tmp_path / "model"))
    exec(example.replace('ToolGRPOConfig("out"', f"config({str(tmp_path / 'out')!r}"), names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 1 and trainer.state.log_history[0]["ratio/mean"] == pytest.approx(1, abs=1e-4)
    exec(blocks[1], names)
    options = config(tmp_path / "left_out", advantage_estimator=names["Informative"]())
    other = ToolGRPOTrainer(str(tmp_path / "model"), reward, options, prompts(4), processing_class=TOKENIZER)
    other.train()
    assert of_steps(other, "groups/admitted") == [1.0]


def test_the_page_names_all_that_a_group_and_an_estimator_have():
    page = (Path(__file__).parents[2] / "docs" / "estimators.md").read_text(encoding="utf-8")
    of_group = [field.name for field in dataclasses.fields(RolloutGroup)] + ["scored"]
    of_class = [name for name in AdvantageEstimator.__annotations__ if not name.startswith("_") and name != "args"]
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted(["RolloutGroup", *of_group, *of_class])


class Failing(AdvantageEstimator):
    def score(self, group):
        raise KeyError("baseline")


class ScoresWhatTrains(AdvantageEstimator):
    """Cannot score a group of which nothing trains."""

    def admit(self, group):
        return bool(group.rewards.max() > group.rewards.mean())

    def score(self, group):
        return (group.rewards - group.rewards.mean()) / group.mask.sum()


class WithoutSuper(AdvantageEstimator):
    def __init__(self):
        self.seen = 0

    def score(self, group):
        self.seen += 1
        return group.advantages * self.args.temperature


class NeedsMore(AdvantageEstimator):
    def __init__(self, args, weight):
        super().__init__(args)

    def score(self, group):
        return group.advantages


def test_what_an_estimator_raises_is_said_with_its_name(tmp_path):
    words = r"estimator Failing raised KeyError: 'baseline' \(in .*test_estimators\.py, line \d+\)\. Mend"
    with pytest.raises(EstimatorError, match=words):
        start(tmp_path, advantage_estimator=Failing(), max_steps=1).train()


def test_a_group_that_is_left_out_is_not_scored(tmp_path):
    equal = lambda completion_ids, **kwargs: [1.0] * len(completion_ids)  # noqa: E731
    trainer = start(tmp_path, rewards=equal, advantage_estimator=ScoresWhatTrains(), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["groups/admitted"] == 0


def test_an_estimator_without_the_constructor_of_its_base_has_the_configuration(tmp_path):
    estimator = WithoutSuper()
    start(tmp_path, advantage_estimator=estimator, max_steps=1).train()
    assert estimator.seen and estimator.args.max_steps == 1


def test_classes_and_constructors_that_cannot_be_called_are_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"the class `Failing` as `advantage_estimator`.*object"):
        estimator_of(config(tmp_path, advantage_estimator=Failing))
    monkeypatch.setattr("trl_toolgrpo.algorithms.group.NeedsMore", NeedsMore, raising=False)
    with pytest.raises(ConfigError, match=r"NeedsMore'.*cannot be made.*configuration alone"):
        estimator_of(config(tmp_path, advantage_estimator="trl_toolgrpo.algorithms.group:NeedsMore"))


class Whitened(LeaveOneOut):
    whitens = True


def test_whitening_without_values_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Whitened sets `whitens` without `needs_values`"):
        estimator_of(config(tmp_path, advantage_estimator=Whitened()))
