"""`strict_trajectories` where a rollout enters from outside: a record, a rollout log, a sampler, a `rollout_func`."""

import logging
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import MAKE_SAMPLER, ScriptedSampler, add, chat_tokenizer, config, prompts, tiny_model, tool_call

from trl_toolgrpo import RolloutLogError, ToolGRPOTrainer, Trajectory, TrajectoryError, read_rollouts
from trl_toolgrpo.run_folder.rollout_log import log_files
from trl_toolgrpo.sampling.protocol import SampledTokens


TOKENIZER = chat_tokenizer("qwen3_instruct_2507")
END = "<|im_end|>"


def reward(completion_ids, **kwargs):
    return [float((7 * len(ids) + sum(ids)) % 11) for ids in completion_ids]


def start(path, **changes):
    options = {"max_completion_length": 400, "logprob_check": "off", **changes}
    extra = {name: options.pop(name) for name in ("rollout_func", "tools") if name in options}
    return ToolGRPOTrainer(
        tiny_model(TOKENIZER), reward, config(path, **options), prompts(4), processing_class=TOKENIZER, **extra
    )


# Records


RECORD = {
    "prompt_ids": [1, 2], "completion_ids": [3, 4, 5], "logprobs": [-0.1, -0.2, -0.3], "tool_mask": [1, 1, 1],
    "forced_mask": [0, 0, 0], "turns": [{"start": 0, "end": 3}], "stop_reason": "stop",
}  # fmt: skip
BROKEN = {
    "a missing field": ({"logprobs": None}, [3, 4, 5]),
    "a short field": ({"logprobs": [-0.1, -0.2]}, [3, 4, 5]),
    "a number that is not finite": ({"logprobs": [-0.1, math.nan, -0.3]}, [3, 4, 5]),
    "a short mask": ({"tool_mask": [1, 1]}, [3, 4, 5]),
    "a misnamed field": ({"old_logprobs": [-0.1, -0.2, -0.3]}, [3, 4, 5]),
    "tokens that are none": ({"completion_ids": [3, 4.5, 5]}, []),
    "turns that do not fit": ({"turns": [{"start": 0, "end": 30}]}, [3, 4, 5]),
    "values that are too few": ({"values": [0.5]}, [3, 4, 5]),
    "values that are no list": ({"values": 3.0}, [3, 4, 5]),
    "an unknown reason": ({"stop_reason": "eos"}, [3, 4, 5]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record_is_an_error_or_trains_nothing(name, caplog):
    changes, ids = BROKEN[name]
    record = {key: value for key, value in {**RECORD, **changes}.items() if value is not None}
    with pytest.raises(TrajectoryError):
        Trajectory.from_dict(record, 7)
    with caplog.at_level(logging.WARNING):
        found = Trajectory.from_dict(record, 7, strict=False)
    assert "Masked out: Rollout 7: " in caplog.text
    assert found.completion_ids == ids and not any(found.tool_mask) and not any(found.logprobs)
    found.validate()


def test_without_strictness_a_sound_record_is_read_as_with_it():
    assert Trajectory.from_dict(RECORD, strict=False) == Trajectory.from_dict(RECORD)
    assert not any(Trajectory.from_dict("no record", strict=False).tool_mask)


# Samplers


def short(sampled):
    sampled.logprobs = sampled.logprobs[:-1]


def moved(sampled, kept=[]):  # noqa: B006
    """One log-prob too few in the first turn of a row, and one too many in the next: the sums agree."""
    if sampled.row in kept:
        sampled.logprobs = [*sampled.logprobs, -0.5]
        kept.remove(sampled.row)
    else:
        sampled.logprobs = sampled.logprobs[:-1]
        kept.append(sampled.row)


def not_finite(sampled):
    sampled.logprobs[0] = math.nan


def positive(sampled):
    sampled.logprobs[0] = 0.5


def a_tensor(sampled):
    sampled.logprobs = torch.tensor(sampled.logprobs)


def no_tokens(sampled):
    sampled.token_ids[0] = 1.5


def short_entropies(sampled):
    sampled.entropies = [0.5]


def endless_values(sampled):
    sampled.values = [math.inf] * len(sampled.token_ids)


def misnamed(sampled):
    sampled.log_probs = sampled.logprobs
    del sampled.logprobs


FAULTS = {
    short: r"field `logprobs` of a turn has \d+ values, expected \d+",
    moved: r"field `logprobs` of a turn has \d+ values, expected \d+",
    not_finite: "field `logprobs` of a turn expected finite values of at most 0, got nan at position 0",
    positive: "field `logprobs` of a turn expected finite values of at most 0, got 0.5 at position 0",
    a_tensor: "field `logprobs` of a turn expected a list, got Tensor",
    no_tokens: r"field `token_ids` of a turn expected token ids, got 1.5",
    short_entropies: r"field `entropies` of a turn has 1 values, expected \d+",
    endless_values: "field `values` of a turn expected finite values, got inf",
    misnamed: "field `logprobs` of a turn is missing.*`log_probs` is not read: name it `logprobs`",
}


def sample_with(monkeypatch, fault, rows=(0,), script=None):
    """A sampler of somebody's own, whose records of some rows have a fault."""

    class Sampler(ScriptedSampler):
        def step(self):
            found = super().step()
            for number, sampled in enumerate(found):
                if sampled.row in rows:
                    found[number] = sampled = SimpleNamespace(**vars(sampled)) if fault is misnamed else sampled
                    fault(sampled)
            return found

    script = script or [[tool_call("add", a=1, b=2) + END, f"{word}{END}"] for word in ("one", "two", "three", "four")]
    monkeypatch.setattr(
        MAKE_SAMPLER, lambda *args, **kwargs: Sampler(TOKENIZER, script, [TOKENIZER.eos_token_id])
    )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_sampler_that_breaks_its_contract_is_an_error_by_name(tmp_path, monkeypatch, fault):
    sample_with(monkeypatch, fault, rows=(2,))
    with pytest.raises(TrajectoryError, match=f"Rollout 2: {FAULTS[fault]}"):
        start(tmp_path, tools=[add]).train()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_without_strictness_its_rollouts_are_masked_out_and_counted(tmp_path, monkeypatch, fault, caplog):
    sample_with(monkeypatch, fault, rows=(0, 2))
    trainer = start(tmp_path, tools=[add], strict_trajectories=False)
    kept, score = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: kept.append(score(inputs)) or kept[-1]
    with caplog.at_level(logging.WARNING):
        trainer.train()
    mask = kept[0]["completion_mask"] * kept[0]["tool_mask"]
    assert mask.any(dim=1).tolist() == [False, True, False, True]
    assert kept[0]["num_items_in_batch"] == mask.sum()
    logged = trainer.state.log_history[0]
    assert logged["rollout/invalid"] == 2.0 and math.isfinite(logged["loss"]) and math.isfinite(logged["grad_norm"])
    assert "Masked out of the update: Rollout 0: " in caplog.text
    [trajectory.validate() for trajectory in trainer.rollouts.batch.trajectories]


@pytest.mark.parametrize("row", [None, -1, 4, "0", "twice"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_turn_of_an_unrequested_row_is_an_error(tmp_path, monkeypatch, row, strict):
    class Sampler(ScriptedSampler):
        def step(self):
            found = super().step()
            again = SampledTokens(0, [5], [-0.1], True)
            return [*found, again] if row == "twice" else [*found[1:], SampledTokens(row, [5], [-0.1], True)]

    monkeypatch.setattr(
        MAKE_SAMPLER, lambda *args, **kwargs: Sampler(TOKENIZER, [["one" + END]], [TOKENIZER.eos_token_id])
    )
    with pytest.raises(TrajectoryError, match=r"a turn of row .*, expected one of the rows it was asked to extend"):
        start(tmp_path, strict_trajectories=strict).train()


# Rollout logs


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A run of two rollout batches."""
    folder = tmp_path_factory.mktemp("logged")
    start(folder, max_steps=2, max_completion_length=12, learning_rate=1e-2, tools=[add]).train()
    return folder


def cut(values):
    return values[:-1]


LOGGED = {
    "short log-probs": ("logprobs", cut, "field `logprobs` has"),
    "short masks": ("tool_mask", cut, "field `tool_mask` has"),
    "short advantages": ("advantages", cut, "field `advantages` has"),
    "log-probs that are NaN": ("logprobs", lambda values: [math.nan, *values[1:]], "expected finite values"),
    "log-probs that are null": ("logprobs", lambda values: [None, *values[1:]], "expected finite values"),
    "no log-probs": ("logprobs", lambda values: None, "expected a list, got NoneType"),
    "turns of another shape": ("turns", lambda text: text.replace('"start"', '"begin"'), "unknown field"),
    "turns that are no JSON": ("turns", lambda text: text[:-3], "cannot be read as JSON"),
    "a stop reason there is not": ("stop_reason", lambda text: "eos", "field `stop_reason` expected one of"),
}


def damaged(logged, folder, column, change, row=1):
    """A copy of the log in which a column of one rollout of the first batch is changed."""
    shutil.copytree(logged, folder)
    path = log_files(folder)[0]
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[row] = change(values[row])
    place = table.column_names.index(column)
    field = table.schema.field(column)
    pq.write_table(table.set_column(place, field, pa.array(values, type=field.type)), path)
    return folder


def replay(path, log, **changes):
    options = {"max_steps": 2, "max_completion_length": 12, "learning_rate": 1e-2, "tools": [add], **changes}
    trainer = start(path, replay=str(log), **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", LOGGED)
def test_a_log_with_a_broken_rollout_is_not_replayed(logged, tmp_path, name):
    column, change, said = LOGGED[name]
    log = damaged(logged, tmp_path / "log", column, change)
    with pytest.raises(TrajectoryError, match=f"Rollout 1 of .*000000-000.parquet: .*{said}"):
        replay(tmp_path / "again", log)
    with pytest.raises(TrajectoryError, match=said):
        list(read_rollouts(log))


@pytest.mark.parametrize("name", LOGGED)
def test_without_strictness_a_broken_rollout_of_a_log_trains_nothing(logged, tmp_path, name, caplog):
    column, change, said = LOGGED[name]
    log = damaged(logged, tmp_path / "log", column, change)
    with caplog.at_level(logging.WARNING):
        found, whole = replay(tmp_path / "again", log, strict_trajectories=False), list(read_rollouts(logged))
        rows = list(read_rollouts(log, strict=False))
    assert said in caplog.text and "Rollout 1 of" in caplog.text
    counts = [entry.get("rollout/invalid") for entry in found.state.log_history[:2]]
    assert counts == [1.0, None]
    assert [any(row["tool_mask"]) for row in rows[:4]] == [True, False, True, True]
    assert rows[0] == whole[0] and rows[1]["completion_ids"] == whole[1]["completion_ids"]


def test_a_replay_leaves_out_masked_rollouts(logged, tmp_path):
    """The weights are those of a log in which nobody sampled the tokens of that rollout."""
    log = damaged(logged, tmp_path / "broken", "logprobs", cut)
    found = replay(tmp_path / "first", log, strict_trajectories=False, max_steps=1)
    other = damaged(logged, tmp_path / "other", "logprobs", lambda values: [math.inf] * len(values))
    same = replay(tmp_path / "second", other, strict_trajectories=False, max_steps=1)
    whole = replay(tmp_path / "third", logged, strict_trajectories=False, max_steps=1)
    pairs = list(zip(found.model.parameters(), same.model.parameters(), strict=True))
    assert all(torch.equal(*pair) for pair in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(found.model.parameters(), whole.model.parameters(), strict=True))


def test_a_sound_log_is_replayed_the_same_with_and_without_strictness(logged, tmp_path):
    strict, lax = (replay(tmp_path / str(s), logged, strict_trajectories=s) for s in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(strict.model.parameters(), lax.model.parameters(), strict=True))


@pytest.mark.parametrize("strict", [True, False])
def test_a_misnamed_column_of_a_log_is_named(logged, tmp_path, strict):
    log = Path(shutil.copytree(logged, tmp_path / "log"))
    path = log_files(log)[0]
    table = pq.read_table(path)
    names = ["old_logprobs" if name == "logprobs" else name for name in table.column_names]
    pq.write_table(table.rename_columns(names).replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(RolloutLogError, match=r"columns logprobs are missing\. Is `old_logprobs` meant to be"):
        replay(tmp_path / "again", log, strict_trajectories=strict)


# Rollout functions


def given_rollouts(prompts, **changes):
    count = len(prompts)
    output = {
        "prompt_ids": [[5, 6]] * count,
        "completion_ids": [[7, 8, 9 + row] for row in range(count)],
        "logprobs": [[-0.1, -0.2, -0.3]] * count,
        "extra": list(range(count)),
    }
    output |= {name: change(output.get(name)) for name, change in changes.items()}
    return {name: rows for name, rows in output.items() if rows is not None}


def at_row_1(value):
    return lambda rows: [value if row == 1 else old for row, old in enumerate(rows or [[1, 1, 1]] * 4)]


FUNCTIONS = {
    "short log-probs": ({"logprobs": at_row_1([-0.1])}, "Rollout 1: field `logprobs` has 1 values, expected 3"),
    "log-probs that are NaN": ({"logprobs": at_row_1([-0.1, math.nan, -0.1])}, "got nan at position 1"),
    "positive log-probs": ({"logprobs": at_row_1([-0.1, 0.3, -0.1])}, "got 0.3 at position 1"),
    "tokens that are none": ({"completion_ids": at_row_1([7, "8", 9])}, "expected token ids, got '8'"),
    "a short mask": ({"env_mask": at_row_1([1])}, "field `tool_mask` has 1 values"),
    "a mask of other numbers": ({"env_mask": at_row_1([1, 2, 0])}, "expected 0 or 1, got 2"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rollouts_of_a_function_are_checked(tmp_path, name):
    changes, said = FUNCTIONS[name]
    run = start(tmp_path, rollout_func=lambda prompts, trainer: given_rollouts(prompts, **changes))
    with pytest.raises(TrajectoryError, match=said):
        run.train()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_strictness_broken_rollouts_of_a_function_are_masked_out(tmp_path, name):
    changes, _ = FUNCTIONS[name]
    seen = []

    def function(prompts, trainer):
        return given_rollouts(prompts, **changes)

    trainer = start(tmp_path, rollout_func=function, strict_trajectories=False)
    score = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: seen.append(score(inputs)) or seen[-1]
    trainer.train()
    mask = seen[0]["completion_mask"] * seen[0]["tool_mask"]
    assert mask.any(dim=1).tolist() == [True, False, True, True]
    assert trainer.state.log_history[0]["rollout/invalid"] == 1.0
    assert math.isfinite(trainer.state.log_history[0]["loss"]) and trainer.rollout_func is function


def renamed(old, new):
    def function(prompts, trainer):
        output = given_rollouts(prompts, env_mask=at_row_1([1, 0, 1]))
        output[new] = output.pop(old)
        return output

    return function


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("logprobs", "old_logprobs", "no `logprobs`.*Did you mean `logprobs` by `old_logprobs`"),
        ("completion_ids", "response_ids", "no `completion_ids`.*Did you mean `completion_ids` by `response_ids`"),
        ("env_mask", "tool_mask", "`tool_mask`, which TRL does not read. Did you mean `env_mask`"),
    ],
)
def test_misnamed_fields_of_a_rollout_function_are_named(tmp_path, old, new, said):
    with pytest.raises(TrajectoryError, match=said):
        start(tmp_path, rollout_func=renamed(old, new)).train()
    lax = start(tmp_path / "lax", rollout_func=renamed(old, new), strict_trajectories=False)
    if old == "completion_ids":  # nothing is left that could be masked out
        with pytest.raises(TrajectoryError, match=said):
            lax.train()
    else:
        lax.train()
        assert lax.state.log_history[0]["rollout/invalid"] == 4.0


def test_a_rollout_function_may_return_tensors_fields_of_its_own_and_no_logprobs(tmp_path):
    seen = []

    def look(completions, extra, tool_calls, **kwargs):
        seen.append((extra, tool_calls))
        return [0.0, 1.0, 2.0, 3.0]

    def function(prompts, trainer):
        output = given_rollouts(prompts, completion_ids=lambda rows: [torch.tensor(ids) for ids in rows])
        return {**output, "logprobs": None, "tool_calls": ["a"] * len(prompts)}

    trainer = start(tmp_path, rollout_func=function)
    trainer.reward_funcs = [look]
    trainer.train()
    assert seen[0] == ([0, 1, 2, 3], ["a"] * 4)
    wrong = start(tmp_path / "wrong", rollout_func=lambda prompts, trainer: given_rollouts(prompts[1:]))
    with pytest.raises(TrajectoryError, match="returned 3 entries in `prompt_ids` for 4 prompts"):
        wrong.train()
