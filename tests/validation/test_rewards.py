"""Reward functions that ask for what is not there or return what is no reward, and data too small for a batch."""

import functools
import logging
import math
from decimal import Decimal

import numpy
import pandas
import pytest
import torch
from conftest import config, prompts, tiny_model
from datasets import Dataset, IterableDataset

from trl_toolgrpo import ConfigError, DatasetError, RewardError, ToolGRPOTrainer


def construct(tokenizer, tmp_path, reward, data=None, evaluation=None, **changes):
    changes = {"num_generations_eval": 2, "per_device_eval_batch_size": 2, **changes}
    return ToolGRPOTrainer(
        tiny_model(tokenizer), reward, config(tmp_path, **changes), prompts() if data is None else data,
        eval_dataset=evaluation, processing_class=tokenizer,
    )  # fmt: skip


def returning(value, wrap=None):
    """A reward function of each kind that returns a value, or what a function makes of the completions."""

    def reward(completions, **kwargs):
        return value(completions) if callable(value) else value

    async def reward_async(completions, **kwargs):
        return reward(completions)

    class Judge:
        __name__ = "reward"

        def __call__(self, completions, **kwargs):
            return reward(completions)

    reward_async.__name__ = "reward"
    return {"async": reward_async, "object": Judge(), "partial": functools.partial(reward)}.get(wrap, reward)


@pytest.mark.parametrize("kind", ["function", "async", "object", "partial"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, r"`reward` returned None instead of a list of 4 rewards"),
        (1.0, r"returned 1.0 of type float instead of a list of 4 rewards"),
        ("good", r"returned 'good' of type str instead of a list"),
        ({"a": 1.0}, r"of type dict instead of a list"),
        ({0.0, 1.0, 2.0, 3.0}, r"of type set instead of a list"),
        ([0.0, 10**400, 0.0, 0.0], r"returned 1000.* of type int for rollout 1"),
        (torch.ones(4, 1), r"returned \[1.0\] of type list for rollout 0"),
        ([0.0, float("inf"), 1.0, 2.0], r"`reward` gave inf for rollout 1"),
        ([1.0, 2.0], r"returned 2 rewards for 4 completions"),
        ([1.0] * 5, r"returned 5 rewards for 4 completions"),
        ([1.0, "2", 3.0, 4.0], r"returned '2' of type str for rollout 1, which is no number"),
        ([1.0, 2.0, [3.0], 4.0], r"returned \[3.0\] of type list for rollout 2"),
        ([None] * 4, r"No rollout of the batch was scored: `reward` gave None or NaN for all 4"),
        ([float("nan")] * 4, r"No rollout of the batch was scored"),
    ],
)
def test_what_is_no_reward_is_refused_with_the_function_named(tokenizer, tmp_path, kind, value, words):
    trainer = construct(tokenizer, tmp_path, returning(value, kind))
    with pytest.raises(RewardError, match=words):
        trainer.train()


@pytest.mark.parametrize(
    "value",
    [
        lambda completions: [0, True, 0.5, None],
        lambda completions: (float(row) for row in range(4)),
        lambda completions: torch.arange(4.0),
        lambda completions: [torch.tensor(0.5)] * 4,
        lambda completions: numpy.arange(4),
        lambda completions: list(numpy.arange(4, dtype=numpy.float32)),
    ],
)
def test_rewards_of_every_form_are_taken(tokenizer, tmp_path, value):
    trainer = construct(tokenizer, tmp_path, returning(value))
    trainer.train()
    given = [number for number in value([]) if number is not None]
    assert trainer.state.log_history[0]["rewards/reward/mean"] == pytest.approx(sum(map(float, given)) / len(given))


def test_nan_counts_as_not_scored_and_warns_once(tokenizer, tmp_path, caplog):
    trainer = construct(tokenizer, tmp_path, returning([0.0, float("nan"), 1.0, None]), max_steps=2)
    with caplog.at_level(logging.WARNING, "trl_toolgrpo"):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "returned NaN" in record.getMessage()]
    assert len(said) == 1 and "`reward` returned NaN for rollout 1." in said[0]
    assert trainer.state.global_step == 2 and trainer.state.log_history[0]["rewards/reward/mean"] == 0.5


@pytest.mark.parametrize(
    ("name", "value", "logged"),
    [
        ("judged", True, 1.0), ("judged", numpy.float32(0.5), 0.5), ("judged", torch.tensor([0.5]), 0.5),
        ("judged", Decimal("0.5"), 0.5), ("judged", math.nan, None), (3, 1.0, 1.0), (None, 1.0, 1.0),
        (["a"], 1.0, 1.0), ("\ud800", 1.0, 1.0), ("\ud800", "0.5", "left out"), ("judged", None, "left out"),
        *(("judged", odd, "left out") for odd in ([1.0], {"a": 1}, torch.ones(2), numpy.ones(2), 1j, 10**400, b"1")),
    ],
    ids=repr,
)  # fmt: skip
def test_metrics_of_any_kind_end_no_run(tokenizer, tmp_path, caplog, name, value, logged):
    def reward(completions, log_metric, **kwargs):
        log_metric(name=name, value=value)
        log_metric("other", 1.0)
        return [1.0] * len(completions)

    trainer = construct(tokenizer, tmp_path, reward, evaluation=prompts(1), max_steps=2)
    trainer.train()
    trainer.evaluate()
    shown = str(name).replace("\ud800", "\ufffd")
    entries = [(e, "") for e in trainer.state.log_history if "loss" in e] + [(trainer.state.log_history[-1], "eval_")]
    assert len(entries) == 3 and all(entry[f"{prefix}other"] == 1.0 for entry, prefix in entries)
    if logged == "left out":
        said = f"The reward function `reward` logs {'None' if value is None else repr(value)[:80]}"
        assert caplog.text.count(said) == 1 and f"the metric `{shown}`, which is no number" in caplog.text
        assert all(prefix + shown not in entry for entry, prefix in entries)
    else:
        assert all(entry[prefix + shown] == logged for entry, prefix in entries)
        assert "which is no number" not in caplog.text and "run goes on" not in caplog.text


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4]), (torch.arange(4), [0, 1, 2, 3]), (numpy.arange(4.0), [0.0, 1.0, 2.0, 3.0]),
        (range(4), [0, 1, 2, 3]), *((odd, "left out") for odd in (5, None, "abcd", b"abcd", {1: 1, 2: 2, 3: 3, 4: 4})),
        (torch.tensor(1.0), "left out"), (object, "left out"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["function", "async"])
def test_columns_of_any_kind_end_no_run(tokenizer, tmp_path, caplog, value, kept, kind):
    def log(completions, log_extra):
        log_extra(column=7, values=value)
        log_extra("text", ["x"] * len(completions))
        return [1.0] * len(completions)

    def reward(completions, log_extra, **kwargs):
        return log(completions, log_extra)

    async def reward_async(completions, log_extra, **kwargs):
        return log(completions, log_extra)

    options = {"log_completions": True, "num_completions_to_print": 0, "max_steps": 2}
    construct(tokenizer, tmp_path, reward if kind == "function" else reward_async, **options).train()
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00002.parquet")
    assert list(table["text"]) == ["x"] * len(table)
    if kept == "left out":
        assert "7" not in table and caplog.text.count("in the column `7`, which is no list") == 1
    else:
        assert list(table["7"])[-4:] == kept


def test_later_batches_without_a_score_warn_and_do_not_end_the_run(tokenizer, tmp_path, caplog):
    asked = []

    def reward(completions, **kwargs):
        asked.append(len(completions))
        return [None] * 4 if len(asked) in (2, 3) else [0.0, 1.0, 0.0, 1.0]

    trainer = construct(tokenizer, tmp_path, reward, max_steps=4)
    with caplog.at_level(logging.WARNING, "trl_toolgrpo"):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "was scored" in record.getMessage()]
    assert trainer.state.global_step == 4 and len(said) == 1 and said[0].startswith("Step 1: No rollout of the batch")


def test_a_function_may_leave_rollouts_to_another(tokenizer, tmp_path):
    def first(completions, **kwargs):
        return [None] * len(completions)

    def second(completions, **kwargs):
        return [float(row) for row in range(len(completions))]

    trainer = construct(tokenizer, tmp_path, [first, second])
    trainer.train()
    assert trainer.state.global_step == 1


def with_answers(count=4):
    return prompts(count).add_column("answer", ["a"] * count)


def asks(completions, solution, **kwargs):
    return [0.0] * len(completions)


async def asks_async(completions, *, solution, **kwargs):
    return [0.0] * len(completions)


@pytest.mark.parametrize("reward", [asks, asks_async, functools.partial(asks), [returning([0.0] * 4), asks]])
def test_a_column_that_is_not_there_is_named_with_those_that_are(tokenizer, tmp_path, reward):
    words = "`asks.*` asks for `solution`, and `train_dataset` has no such column; its columns are `answer`, `prompt`"
    with pytest.raises(ConfigError, match=words):
        construct(tokenizer, tmp_path, reward, with_answers())
    right = with_answers().rename_column("answer", "solution")
    with pytest.raises(ConfigError, match="`eval_dataset` has no such column"):
        construct(tokenizer, tmp_path, reward, right, with_answers())
    construct(tokenizer, tmp_path, reward, right, right)


def test_columns_of_streams_and_transforms_are_seen(tokenizer, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(with_answers()))
    with pytest.raises(ConfigError, match="its columns are `answer`, `prompt`"):
        construct(tokenizer, tmp_path, asks, stream)
    made = with_answers().with_transform(lambda batch: {**batch, "solution": batch["answer"]})
    trainer = construct(tokenizer, tmp_path, asks, made)
    trainer.train()
    assert trainer.state.global_step == 1


def test_the_prompt_column_is_given_in_the_plural(tokenizer, tmp_path):
    def reward(prompt, completions):
        return [0.0] * len(completions)

    with pytest.raises(ConfigError, match="`prompt` is given as `prompts`"):
        construct(tokenizer, tmp_path, reward)


@pytest.mark.parametrize(
    ("asked", "changes"),
    [("environments", {}), ("mcp_sessions", {}), ("trajectories", {"record_sample_logprobs": False})],
)
def test_an_argument_this_run_lacks_is_named_at_construction(tokenizer, tmp_path, asked, changes):
    needs = eval(f"lambda completions, {asked}, **kwargs: [0.0] * len(completions)")
    can_do_without = eval(f"lambda completions, {asked}=None, **kwargs: [0.0] * len(completions)")
    with pytest.raises(ConfigError, match=f"asks for `{asked}`"):
        construct(tokenizer, tmp_path, needs, **changes)
    construct(tokenizer, tmp_path, can_do_without, **changes)


def takes_two(prompts, completions):
    return [0.0] * len(completions)


async def takes_two_async(prompts, completions):
    return [0.0] * len(completions)


def by_position(completions, /, **kwargs):
    return [0.0] * len(completions)


def names_what_is_always_given(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **kwargs):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (takes_two, "`takes_two` does not take `answer`, `completion_ids`, .*`trainer_state`"),
        (takes_two_async, "`takes_two_async` does not take `answer`"),
        (functools.partial(takes_two), "`takes_two` does not take `answer`"),
        ([returning([0.0] * 4), takes_two], "`takes_two` does not take `answer`"),
        (by_position, "`by_position` takes `completions` by position alone"),
    ],
)
def test_a_function_that_refuses_its_arguments_is_named_at_construction(tokenizer, tmp_path, reward, words):
    with pytest.raises(ConfigError, match=rf"The reward function {words}.*`\*\*kwargs`"):
        construct(tokenizer, tmp_path, reward, with_answers())


def test_a_decorator_may_leave_out_and_add_arguments(tokenizer, tmp_path):
    def named_alone(function):
        @functools.wraps(function)
        def reward(**kwargs):
            return function(kwargs["prompts"], kwargs["completions"])

        return reward

    @functools.wraps(asks)
    def with_solution(completions, **kwargs):
        return asks(completions, kwargs["answer"])

    functions = [named_alone(takes_two), with_solution, names_what_is_always_given]
    trainer = construct(tokenizer, tmp_path, functions, with_answers())
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_column_missing_in_a_row_is_named_in_training(tokenizer, tmp_path):
    given = {"solution": "a"}
    data = with_answers().with_transform(lambda batch: {**batch, **{k: [v] * 4 for k, v in given.items()}})
    trainer = construct(tokenizer, tmp_path, asks, data)
    given.clear()
    with pytest.raises(RewardError, match="asks for `solution`, and the data has no such column"):
        trainer.train()


# Too few rows


@pytest.mark.parametrize(
    ("rows", "needed", "changes"),
    [
        (3, 4, {"gradient_accumulation_steps": 4}),
        (3, 4, {"steps_per_generation": 4, "max_steps": -1, "num_train_epochs": 2}),
        (1, 2, {"per_device_train_batch_size": 8}),
        (1, 3, {"generation_batch_size": 12}),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_fewer_rows_than_a_rollout_batch_takes(tokenizer, tmp_path, rows, needed, changes, streamed):
    def data(count):
        held = prompts(count)
        return IterableDataset.from_generator(lambda: iter(held)) if streamed else held

    changes = {**changes, "max_steps": 1} if streamed else changes
    with pytest.raises(DatasetError, match=rf"has {rows} rows?, and a rollout batch takes {needed} prompts"):
        construct(tokenizer, tmp_path, returning([0.0] * 4), data(rows), **changes)
    construct(tokenizer, tmp_path, returning([0.0] * 4), data(needed), **changes)


def test_only_selected_rows_count(tokenizer, tmp_path):
    few = prompts(100).shuffle(seed=0).select(range(3))
    with pytest.raises(DatasetError, match="has 3 rows"):
        construct(tokenizer, tmp_path, returning([0.0] * 4), few, gradient_accumulation_steps=4)
    assert len(Dataset.from_list(few.to_list())) == 3
