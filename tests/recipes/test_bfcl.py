"""The leaderboard task: schemas, rewards, and the check of answers, also compared with the leaderboard's own."""

import importlib
import json
import random
import sys
import types

import pytest
from jsonschema import Draft202012Validator

from trl_toolgrpo.recipes.bfcl.answers import matches, share_matched, value_matches
from trl_toolgrpo.recipes.bfcl.task import (
    BFCLEnvironment,
    build_bfcl,
    identifier,
    judge,
    read_questions,
    to_json_schema,
)
from trl_toolgrpo.tools.arguments import validate_arguments


@pytest.fixture(scope="module")
def questions():
    pytest.importorskip("bfcl_eval")
    return read_questions()


def plain(accepted):
    """Return a published answer as the value of an argument; in a dict, the first accepted value of each field."""
    if isinstance(accepted, dict):
        return {name: plain(values[0]) for name, values in accepted.items() if values[0] != ""}
    if isinstance(accepted, list):
        return [plain(item) for item in accepted]
    return accepted


def published_call(question, answer):
    """Return the arguments of a right call: for each parameter the first accepted value that fits the schema."""
    properties = to_json_schema(question["function"][0]["parameters"])["properties"]
    required = question["function"][0]["parameters"].get("required", [])
    ((_, accepted),) = answer["ground_truth"][0].items()
    call = {}
    for name, values in accepted.items():
        fitting = [plain(v) for v in values if v != "" and Draft202012Validator(properties[name]).is_valid(plain(v))]
        if "" not in values or name in required or fitting:
            call[name] = fitting[0]
    return call


def test_all_schemas_map_to_valid_json_schema(questions):
    assert len(questions) == 400
    for question, _ in questions:
        (function,) = question["function"]
        schema = to_json_schema(function["parameters"])
        Draft202012Validator.check_schema(schema)
        assert set(_types(schema)) <= {"object", "array", "string", "integer", "number", "boolean"}
        assert identifier(function["name"]).isidentifier()


def _types(schema):
    if "type" in schema:
        yield schema["type"]
    for inner in [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]:
        yield from _types(inner)


def test_schema_mapping_by_hand():
    schema = {
        "type": "dict",
        "properties": {
            "point": {"type": "tuple", "items": {"type": "float"}, "description": "(x, y)"},
            "data": {"type": "any", "description": "Anything."},
            "options": {"type": "dict", "properties": {"n": {"type": "integer", "optional": True, "default": 3}}},
            "type": {"type": "string", "enum": ["a", "b"]},
        },
        "required": ["point"],
    }
    assert to_json_schema(schema) == {
        "type": "object",
        "properties": {
            "point": {"type": "array", "items": {"type": "number"}, "description": "(x, y)"},
            "data": {"description": "Anything."},
            "options": {"type": "object", "properties": {"n": {"type": "integer", "default": 3}}},
            "type": {"type": "string", "enum": ["a", "b"]},
        },
        "required": ["point"],
    }


def test_every_published_answer_earns_the_full_reward(questions):
    task = build_bfcl(300, 100, seed=0)
    rows = {row["row_id"]: row for split in (task.train, task.held_out) for row in split}
    assert len(rows) == 400
    environment = BFCLEnvironment()
    for question, answer in questions:
        row = rows[question["id"]]
        assert environment.reset(**row) is None
        (tool,) = environment.tools
        arguments = published_call(question, answer)
        assert validate_arguments(tool, arguments) is None, row["row_id"]
        tool.function(**arguments)
        call = {"type": "function", "function": {"name": tool.name, "arguments": arguments}}
        answered = {"role": "assistant", "content": "ok"}
        completion = [{"role": "assistant", "content": "", "tool_calls": [call]}, answered]
        verdict = judge(completion, environment, row)
        assert verdict.success and verdict.reward == 1.0, row["row_id"]


@pytest.mark.parametrize(
    ("value", "accepted", "schema", "expected"),
    [
        (5, [5], {"type": "integer"}, True),
        (5.0, [5], {"type": "integer"}, False),
        (True, [1], {"type": "integer"}, False),
        (5, [5.0], {"type": "float"}, True),
        (5.5, [5.0], {"type": "float"}, False),
        ("5", [5.0], {"type": "float"}, False),
        (True, [True], {"type": "boolean"}, True),
        ("new york, NY", ["New York NY"], {"type": "string"}, True),
        ("it's", ['it"s'], {"type": "string"}, True),
        ("Boston", ["New York NY"], {"type": "string"}, False),
        (["a b", "C"], [["A-B", "c"]], {"type": "array", "items": {"type": "string"}}, True),
        (["c", "a b"], [["A-B", "c"]], {"type": "array", "items": {"type": "string"}}, False),
        ([1, 2], [[1.0, 2.0]], {"type": "array", "items": {"type": "float"}}, False),
        ([[1, 2], [3]], [[[1, 2], [3]]], {"type": "array", "items": {"type": "array"}}, True),
        ({"a": "X", "b": 2}, [{"a": ["x", "y"], "b": [1, 2]}], {"type": "dict"}, True),
        ({"a": "X"}, [{"a": ["x"], "b": [1, ""]}], {"type": "dict"}, True),
        ({"a": "X"}, [{"a": ["x"], "b": [1]}], {"type": "dict"}, False),
        ({"a": "X", "c": 1}, [{"a": ["x"]}], {"type": "dict"}, False),
        ([{"a": 1}, {"a": 2}], [[{"a": [1]}, {"a": [2]}]], {"type": "array", "items": {"type": "dict"}}, True),
        ([{"a": 1}], [[{"a": [1]}, {"a": [2]}]], {"type": "array", "items": {"type": "dict"}}, False),
        ("my_data", ["my_data"], {"type": "integer"}, True),
        ("my_dat", ["my_data"], {"type": "integer"}, False),
    ],
)
def test_value_check_by_hand(value, accepted, schema, expected):
    assert value_matches(value, accepted, schema) is expected


def test_arguments_check_by_hand():
    parameters = {
        "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}, "unit": {"type": "string"}},
        "required": ["x"],
    }
    accepted = {"x": [4], "y": [5], "unit": ["cm", ""]}
    assert matches({"x": 4, "y": 5}, accepted, parameters)
    assert matches({"x": 4, "y": 5, "unit": "CM"}, accepted, parameters)
    assert not matches({"x": 4}, accepted, parameters)  # y is required, though the schema does not say so
    assert not matches({"y": 5}, accepted, parameters)
    assert not matches({"x": 4, "y": 5, "z": 1}, accepted, parameters)
    assert share_matched({"x": 4}, accepted, parameters) == 1 / 2
    assert share_matched({"x": 4, "y": 6, "unit": "m"}, accepted, parameters) == 1 / 3
    assert share_matched({}, {}, {"properties": {}}) == 1.0


def leaderboard_checker(monkeypatch):
    """Return the leaderboard's own checker, without what it imports for other languages and for names of models."""
    pytest.importorskip("bfcl_eval")
    root = "bfcl_eval.eval_checker.ast_eval.type_convertor"
    for name, attributes in {
        "bfcl_eval.constants.model_config": {
            "MODEL_CONFIG_MAPPING": {"model": types.SimpleNamespace(underscore_to_dot=False)}
        },
        f"{root}.java_type_converter": {"java_type_converter": None},
        f"{root}.js_type_converter": {"js_type_converter": None},
    }.items():
        stub = types.ModuleType(name)
        vars(stub).update(attributes)
        monkeypatch.setitem(sys.modules, name, stub)
    checker = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
    return checker.simple_function_checker, checker.Language.PYTHON


def variations(arguments, randomness):
    """Yield the call itself and calls that differ from it in one argument."""
    yield dict(arguments)
    for name, value in arguments.items():
        yield {key: entry for key, entry in arguments.items() if key != name}
        replacements = [0, 1.5, "x", True, [], {}, [value], str(value), value]
        if isinstance(value, str):
            replacements += [value.upper(), value.replace(" ", "-"), value + "?"]
        if isinstance(value, (int, float)):
            replacements += [float(value), int(value), value + 1]
        if isinstance(value, list):
            replacements += [value[::-1], value[:1], [str(item) for item in value], [*value, *value]]
        if isinstance(value, dict):
            replacements += [dict(list(value.items())[:1]), {**value, "extra": 1}]
        for replacement in randomness.sample(replacements, min(6, len(replacements))):
            yield {**arguments, name: replacement}
    yield {**arguments, "extra": 1}


def test_answer_check_agrees_with_the_leaderboards_own(questions, monkeypatch):
    check, python = leaderboard_checker(monkeypatch)
    randomness, outcomes = random.Random(0), []
    for question, answer in questions:
        (function,) = question["function"]
        (truth,) = answer["ground_truth"]
        ((name, accepted),) = truth.items()
        for arguments in variations(published_call(question, answer), randomness):
            theirs = check(function, {name: arguments}, truth, python, "model")["valid"]
            assert matches(arguments, accepted, function["parameters"]) is theirs, (question["id"], arguments)
            outcomes.append(theirs)
    assert 1000 < sum(outcomes) < len(outcomes) - 3000


def rollout(environment, row, *calls):
    """Judge a rollout that makes these calls; as in the trainer, only those that fit the schema run."""
    environment.reset(**row)
    (tool,) = environment.tools
    for arguments in calls:
        if validate_arguments(tool, arguments) is None:
            assert tool.function(**arguments) == "Done."
    tool_calls = [{"type": "function", "function": {"name": tool.name, "arguments": a}} for a in calls]
    completion = [{"role": "assistant", "content": "", "tool_calls": [call]} for call in tool_calls]
    return judge([*completion, {"role": "assistant", "content": "x"}], environment, row)


def test_rewards_by_hand():
    function = {
        "name": "geometry.area",
        "description": "Area of a rectangle.",
        "parameters": {
            "type": "dict",
            "properties": {"width": {"type": "integer"}, "height": {"type": "float"}},
            "required": ["width", "height"],
        },
    }
    row = {
        "function": json.dumps(function),
        "answer": json.dumps({"geometry.area": {"width": [2], "height": [3.0]}}),
    }
    environment = BFCLEnvironment()
    assert environment.tools == []
    right = {"width": 2, "height": 3}
    assert rollout(environment, row, right).reward == 1.0
    assert environment.tools[0].name == "geometry_area"
    assert rollout(environment, row) == rollout(environment, row, {"width": "2", "height": 3})
    assert rollout(environment, row).reward == 0.0
    assert rollout(environment, row, {"width": 2, "height": 4}).reward == pytest.approx(0.2 + 0.4 / 2)
    twice = rollout(environment, row, right, right)
    assert not twice.success and twice.reward == pytest.approx(0.6)


def test_splits_are_seeded_and_disjoint(questions):
    task, again, other = build_bfcl(320, 80, 0), build_bfcl(320, 80, 0), build_bfcl(320, 80, 1)
    assert task.held_out["row_id"] == again.held_out["row_id"] != other.held_out["row_id"]
    assert not set(task.train["row_id"]) & set(task.held_out["row_id"])
    assert set(task.train["difficulty"]) == {1, 2, 3}
    with pytest.raises(ValueError, match="there are 400"):
        build_bfcl(400, 1)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps bfcl-eval"):
        read_questions()


def test_without_the_package_the_hub_is_read(questions, monkeypatch, tmp_path):
    from trl_toolgrpo.recipes.bfcl import task as bfcl

    files = {"": [q for q, _ in questions[:3]], "possible_answer/": [a for _, a in questions[:3]]}

    def load(kind, data_files, split):
        part = data_files.removeprefix("hf://datasets/some/name/").removesuffix("BFCL_v3_simple.json")
        return {"text": [json.dumps(record) for record in files[part]]}

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bfcl, "load_dataset", load)
    assert bfcl.read_questions("some/name") == questions[:3]
