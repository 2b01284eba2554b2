"""`log_completions`: the table holds whatever a policy, a data set or a reward function says; it never ends a run."""

import json
import logging
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import add, chat_tokenizer, config, prompts, script_ours, tiny_model, tool_call
from datasets import Dataset, IterableDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.redaction import Redactor
from trl_toolgrpo.run_folder.completions_table import storable_logs


TOKENIZER = chat_tokenizer("qwen3_instruct_2507")


def ping() -> str:
    """Ping."""
    return "pong"


def varied(completions, **kwargs):
    return [float(row % 2) for row in range(len(completions))]


def start(path, monkeypatch, script, rewards=varied, rows=None, tools=(add, ping), **changes):
    options = {
        "log_completions": True, "max_completion_length": 900, "logprob_check": "off", "health_checks": "off",
        **changes,
    }  # fmt: skip
    trainer = ToolGRPOTrainer(
        tiny_model(TOKENIZER), rewards, config(path, **options), rows or prompts(), eval_dataset=prompts(1),
        processing_class=TOKENIZER, tools=list(tools),
    )  # fmt: skip
    script_ours(monkeypatch, TOKENIZER, script)
    return trainer


def calling(*arguments):
    """A script whose rollouts call `add`, each with arguments of its own."""
    text = "<tool_call>\n{{\"name\": \"add\", \"arguments\": {}}}\n</tool_call><|im_end|>"
    return [[text.format(own), "x<|im_end|>"] for own in arguments]


def tables(path):
    return [pd.read_parquet(file) for file in sorted((Path(path) / "completions").glob("*.parquet"))]


def written(path):
    """Arguments of the first call of each rollout in the first table."""
    return [row[0]["tool_calls"][0]["function"]["arguments"] for row in tables(path)[0]["completion"]]


ARGUMENTS = {
    "none": ["{}"],
    "some have none": ["{}", '{"a": 1}'],
    "a number and a text": ['{"a": 1, "b": 2}', '{"a": "one", "b": 2}'],
    "a text and a list": ['{"a": "x"}', '{"a": ["x"]}'],
    "an object and a list": ['{"a": {"x": 1}}', '{"a": [1]}'],
    "an object without keys": ['{"a": {}}'],
    "objects in lists": ['{"a": [{"x": 1}, {"x": "y"}, 3, null, []]}'],
    "null and a number": ['{"a": null}', '{"a": 1.5}'],
    "beyond 64 bits": [f'{{"a": {10**30}}}', '{"a": -1}'],
    "half a character": [r'{"a": "\ud83d"}'],
    "deep": [f'{{"a": {"[" * 60}{"]" * 60}}}'],
    "other keys": ['{"a": 1}', '{"b": 1}', '{"": 1}', r'{"\n": true}'],
    "no finite number": ['{"a": NaN}', '{"a": 1e999}'],
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_of_any_type_are_stored_as_text(case, tmp_path, monkeypatch):
    given_arguments = ARGUMENTS[case]
    trainer = start(tmp_path, monkeypatch, calling(*given_arguments))
    trainer.train()
    assert trainer.state.global_step == 1
    found = written(tmp_path)
    expected = [given_arguments[row % len(given_arguments)] for row in range(4)]
    for text, own in zip(found, expected, strict=True):
        if case == "half a character":
            assert json.loads(text) == {"a": "\N{REPLACEMENT CHARACTER}"}
        else:
            assert repr(json.loads(text)) == repr(json.loads(own))


def test_evaluations_are_stored_too(tmp_path, monkeypatch, caplog):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "max_steps": 2}
    trainer = start(tmp_path, monkeypatch, calling('{"a": 1}', '{"a": {}}', "{}", '{"a": [[]]}'), **changes)
    trainer.train()
    assert trainer.state.global_step == 2 and len(tables(tmp_path)) == 2
    assert trainer.evaluate()["eval_tools/call_frequency"] == 1.0
    assert "failure" not in caplog.text


def test_trls_own_rollouts_are_stored_too(tmp_path):
    """Without recorded log-probs the rollouts are TRL's; nothing of them is stored otherwise."""
    trainer = ToolGRPOTrainer(
        tiny_model(TOKENIZER), varied, config(tmp_path, log_completions=True, record_sample_logprobs=False), prompts(),
        processing_class=TOKENIZER,
    )  # fmt: skip
    trainer.train()
    assert len(tables(tmp_path)[0]) == 4


def _conversation(arguments):
    call = {"id": "call_0", "type": "function", "function": {"name": "add", "arguments": arguments}}
    return [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "3", "tool_call_id": "call_0"},
        {"role": "user", "content": "go on"},
    ]


EARLIER = {
    "objects": [{"a": 1, "b": 2}, {"a": 2, "b": 3}],
    "nothing": [{}, {}],
    "other types": [{"a": 1, "b": 2}, {"a": "x", "b": [1]}],
    "JSON text": ['{"a": 1}', '{"b": [2]}'],
    "half of them text": ['{"a": 1}', {"b": 2}],
}


@pytest.mark.parametrize("case", EARLIER)
def test_prompts_whose_earlier_calls_differ(case, tmp_path, monkeypatch):
    rows = [{"prompt": _conversation(arguments)} for arguments in EARLIER[case]]
    dataset = IterableDataset.from_generator(lambda: iter(rows * 4))
    changes = {"num_generations": 2, "max_steps": 2}
    trainer = start(tmp_path, monkeypatch, [["x<|im_end|>"]], rows=dataset, **changes)
    trainer.train()
    shown = [row[1]["tool_calls"][0]["function"]["arguments"] for row in tables(tmp_path)[0]["prompt"]]
    known = [json.loads(own) if isinstance(own, str) else own for own in EARLIER[case]]
    assert all(json.loads(text) in known for text in shown)


def test_prompts_with_the_nulls_of_datasets(tmp_path, monkeypatch, caplog):
    rows = Dataset.from_list([{"prompt": _conversation({"a": 1, "b": 2})}, {"prompt": prompts()[0]["prompt"]}])
    assert rows[1]["prompt"][0]["tool_calls"] is None
    trainer = start(tmp_path, monkeypatch, [["x<|im_end|>"]], rows=rows, max_steps=2)
    trainer.train()
    assert len(tables(tmp_path)) == 2 and "could not" not in caplog.text


# What reward functions log

EXTRA = {
    "mixed": [1, "a", [2], None],
    "objects": [{}, {"a": 1}, {"a": "b"}, {}],
    "large": [10**30, 1, 2, 3],
    "sets": [{1}, {"a"}, set(), {None}],
    "no data": [object(), varied, torch.tensor([1.0]), b"\xff"],
    "half a character": ["\ud83d", "b", "c", "d"],
    "conversations": [[{"role": None, "content": 3}], [{"tool_calls": 5}], [{}], []],
    "a cycle": [(cycle := []).append(cycle) or cycle, 1, 2, 3],
    "keys": [{(1, 2): 3}, {1: 2}, {None: 0}, {}],
    "plain": [0.5, 1, 2, 3],
    "a generator": (value for value in range(4)),
}


@pytest.mark.parametrize("case", EXTRA)
def test_columns_of_any_type_are_stored(case, tmp_path, monkeypatch, caplog):
    def reward(completions, log_extra, **kwargs):
        log_extra("column", EXTRA[case])
        return varied(completions)

    trainer = start(tmp_path, monkeypatch, [["x<|im_end|>"]], reward)
    trainer.train()
    (table,) = tables(tmp_path)
    assert len(table["column"]) == 4 and "could not" not in caplog.text
    if case == "mixed":
        assert list(table["column"][:3]) == ["1", "a", "[2]"] and table["column"].isna()[3]
    if case == "plain":
        assert list(table["column"]) == [0.5, 1, 2, 3]


def test_a_column_logged_in_some_batches_has_nulls_in_the_others(tmp_path, monkeypatch, caplog):
    calls = []

    def reward(completions, log_extra, **kwargs):
        calls.append(len(completions))
        log_extra("always", [len(calls)] * 4)
        if len(calls) == 2:
            log_extra("once", ["here"] * 4)
        if len(calls) == 3:
            log_extra("short", ["a"])
        return varied(completions)

    changes = {"max_steps": 4, "gradient_accumulation_steps": 1, "steps_per_generation": 1, "logging_steps": 1}
    trainer = start(tmp_path, monkeypatch, [["x<|im_end|>"]], reward, **changes)
    trainer.train()
    found = tables(tmp_path)
    assert len(found) == 4 and all(list(table["always"]) == [step] * 4 for step, table in enumerate(found, 1))
    assert [list(table["once"]) for table in found[1:]] == [["here"] * 4, [None] * 4, [None] * 4]
    assert [list(table["short"]) for table in found[2:]] == [[None] * 4] * 2
    assert caplog.text.count("called with 1 values in all for a batch of 4 rollouts") == 1


def test_a_column_that_begins_later_begins_with_nulls():
    logs = {
        "prompt": ["a", "b"], "completion": ["c", "d"], "rewards": {}, "advantages": [0, 0], "images": [],
        "extra": {"late": ["x"], 3: [1, 2]},
    }  # fmt: skip
    assert storable_logs(logs, Redactor())["extra"] == {"late": [None, "x"], "3": [1, 2]}
    assert logs["extra"]["late"] == ["x"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(arguments=st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=3), min_size=2, max_size=2), extra=JSON)
def test_any_table_can_be_written_and_printed(tmp_path_factory, arguments, extra):
    from trl.trainer.utils import print_prompt_completions_sample

    logs = {
        "prompt": [_conversation(own) for own in arguments],
        "completion": [_conversation(own)[1:] for own in arguments],
        "rewards": {"r": [0.0, 1.0]}, "advantages": [0.0, 1.0], "extra": {"x": [extra, 1]}, "images": [],
    }  # fmt: skip
    shown = storable_logs(logs, Redactor(["hush-hush"]))
    table = {"prompt": shown["prompt"], "completion": shown["completion"], **shown["extra"]}
    pd.DataFrame(table).to_parquet(tmp_path_factory.mktemp("table") / "table.parquet")
    print_prompt_completions_sample(
        shown["prompt"], shown["completion"], shown["rewards"], shown["advantages"], 1, extra=shown["extra"]
    )
    for own, row in zip(arguments, shown["completion"], strict=True):
        assert repr(json.loads(row[0]["tool_calls"][0]["function"]["arguments"])) == repr(own)


@pytest.mark.parametrize("secret", ["hush-hush-hush", "100000", 'with "quotes"'])
def test_secrets_are_not_in_the_table(secret, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_TOKEN_READ", secret)

    def reward(completions, log_extra, **kwargs):
        log_extra("seen", [f"it is {secret}", (secret,), {secret: 1}, None])
        return varied(completions)

    text = tool_call("add", a=secret, b=2) + "<|im_end|>"
    trainer = start(tmp_path, monkeypatch, [[text, f"{secret}<|im_end|>"]], reward, prompts(4, secret))
    capsys.readouterr()
    trainer.train()
    table = tables(tmp_path)[0].to_json()
    assert "[secret]" in table and secret not in table and json.dumps(secret)[1:-1] not in table
    assert secret not in capsys.readouterr().out


# What goes wrong all the same


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a bug")])
def test_a_table_that_cannot_be_written_is_logged_once(error, tmp_path, monkeypatch, caplog):
    trainer = start(tmp_path, monkeypatch, [["x<|im_end|>"]], max_steps=3)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(pd.DataFrame, "to_parquet", fail)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 3 and len([e for e in trainer.state.log_history if "loss" in e]) == 3
    said = [record for record in caplog.records if "could not be shown or stored" in record.getMessage()]
    assert len(said) == 1 and str(error) in said[0].getMessage()
    assert bool(said[0].exc_info) == isinstance(error, RuntimeError), "a bug is seen with its traceback"
