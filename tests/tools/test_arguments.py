"""Arguments against schemas, in words the policy reads, without a network."""

from enum import Enum

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_toolgrpo.errors import ToolSchemaError
from trl_toolgrpo.tools.arguments import check_schema, validate_arguments
from trl_toolgrpo.tools.from_callable import as_tool
from trl_toolgrpo.tools.tool import Tool


class Color(Enum):
    RED = "red"
    BLUE = "blue"


def paint(
    color: Color,
    layers: int,
    note: str | None = None,
    tags: list[str | None] | None = None,
    shade: Color | None = None,
    size: int | list[int] | None = None,
) -> str:
    """Paints.

    Args:
        color: Color.
        layers: Layers.
        note: Note.
        tags: Tags.
        shade: Shade.
        size: Size.
    """
    return ""


PAINT = as_tool(paint)
GOOD = {"color": "red", "layers": 2}


def tool_with(**properties):
    return Tool("t", "d", {"type": "object", "properties": properties}, print)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"layers": 3.0},
        {"note": None},
        {"note": "x", "tags": None},
        {"tags": ["a", None]},
        {"shade": None},
        {"shade": "blue"},
        {"size": None},
        {"size": 3},
        {"size": [3]},
        {"unknown": 1},
    ],
)
def test_good_arguments(more):
    check_schema(PAINT)
    assert validate_arguments(PAINT, {**GOOD, **more}) is None


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"layers": "2"}, '`layers`: "2" is not of type integer'),
        ({"layers": 2.5}, "`layers`: 2.5 is not of type integer"),
        ({"layers": True}, "`layers`: true is not of type integer"),
        ({"layers": None}, "`layers`: null is not of type integer"),
        ({"color": "green"}, '`color`: "green" is not one of ["red", "blue"]'),
        ({"shade": "green"}, '`shade`: "green" is not one of ["red", "blue", null]'),
        ({"note": 1}, "`note`: 1 is not of type string or null"),
        ({"tags": ["a", 1]}, "`tags[1]`: 1 is not of type string or null"),
    ],
)
def test_errors_of_arguments_name_the_place_and_the_value(more, sentence):
    assert validate_arguments(PAINT, {**GOOD, **more}) == sentence


def test_all_missing_properties_are_named():
    assert validate_arguments(PAINT, {}) == "`color` is a required property; `layers` is a required property"
    inner = tool_with(point={"type": "object", "properties": {}, "required": ["x"]})
    assert validate_arguments(inner, {"point": {}}) == "`point.x` is a required property"


@pytest.mark.parametrize("arguments", [[1], "x", None, 3])
def test_arguments_must_be_an_object(arguments):
    assert "must be a JSON object" in validate_arguments(PAINT, arguments)


def test_long_values_are_cut():
    assert len(validate_arguments(PAINT, {**GOOD, "layers": "9" * 10_000})) < 200
    pattern = tool_with(code={"type": "string", "pattern": "^a$"})
    assert len(validate_arguments(pattern, {"code": "b" * 10_000})) < 500


def test_nullable_is_a_keyword_and_not_a_property_name():
    once = {"const": 1, "nullable": True}
    named = tool_with(nullable={"type": "boolean"}, x=once, y={"enum": [1], "nullable": False})
    assert validate_arguments(named, {"nullable": True, "x": None}) is None
    assert validate_arguments(named, {"nullable": None}) is not None
    assert validate_arguments(named, {"x": 2}) is not None
    assert validate_arguments(named, {"y": None}) is not None


def test_local_references_work_and_remote_ones_are_never_fetched(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("touched the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "definitions": {
            "tree": {"properties": {"left": {"$ref": "#/definitions/tree"}, "value": {"type": "integer"}}},
        },
        "properties": {"tree": {"$ref": "#/definitions/tree", "nullable": True}},
    }
    local = Tool("t", "d", schema, print)
    assert validate_arguments(local, {"tree": {"left": {"value": 1}}}) is None
    assert validate_arguments(local, {"tree": None}) is None
    assert "integer" in validate_arguments(local, {"tree": {"left": {"value": "x"}}})
    for reference in ("https://example.com/schema.json", "#/$defs/missing", "http://json-schema.org/draft-07/schema#"):
        with pytest.raises(ToolSchemaError, match="never fetched"):
            check_schema(tool_with(x={"$ref": reference}))


@pytest.mark.parametrize(
    "properties", [{"x": {"type": "image"}}, {"x": {"pattern": "("}}, {"x": 3}, {"x": {"enum": {1, 2}}}]
)
def test_invalid_schemas_are_refused_by_name(properties):
    tool = tool_with(**properties)
    with pytest.raises(ToolSchemaError, match=r"tool 't'.*Correct the schema"):
        check_schema(tool)
    with pytest.raises(ToolSchemaError):
        validate_arguments(tool, {"x": 1})


def test_a_changed_schema_is_compiled_again():
    tool = tool_with(x={"type": "integer"})
    assert validate_arguments(tool, {"x": "a"}) is not None
    tool.parameters["properties"]["x"]["type"] = "string"
    assert validate_arguments(tool, {"x": "a"}) is None


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(value=SCALARS | st.lists(SCALARS, max_size=2))
def test_an_optional_argument_takes_its_type_or_null(value):
    problem = validate_arguments(PAINT, {**GOOD, "note": value})
    assert (problem is None) == (value is None or isinstance(value, str))
    assert problem is None or problem.startswith("`note`: ")
