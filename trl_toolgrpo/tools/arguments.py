"""The arguments that the policy wrote, checked against the tool's JSON schema."""

import json
from collections.abc import Collection
from functools import lru_cache

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError, best_match
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from ..errors import ToolSchemaError
from ..types import JSONSchema, JSONValue
from .results import failure, malformed, unknown_tool
from .schema_forms import mapped, places
from .tool import Tool, ToolCall, ToolResult


# With one of these, adding "null" to `type` would not let null through.
_BLOCKS_NULL = frozenset({"anyOf", "oneOf", "allOf", "const", "not", "if", "$ref", "$dynamicRef"})

_SHOWN_ERRORS = 3
_SHOWN_CHARS = 80


def check_schema(tool: Tool) -> None:
    """
    Compile the schema of a tool, so that a broken one is found at construction and not in the middle of a run.

    Args:
        tool ([`Tool`]):
            The tool.

    Raises:
        ToolSchemaError: if the parameters are no valid JSON schema (draft 2020-12) or refer to a schema they do not
            hold; nothing is ever fetched.
    """
    _validator(tool)


def validate_arguments(tool: Tool, arguments: JSONValue) -> str | None:
    """
    Check what the policy wrote.

    Args:
        tool ([`Tool`]):
            The tool that is called.
        arguments (`dict`):
            The arguments as parsed from JSON. A whole float such as `3.0` is a valid integer, and is passed on as is.

    Returns:
        `str` or `None`: What is wrong, in words for the policy; `None` if the arguments fit.

    Raises:
        ToolSchemaError: if the schema of the tool is not valid.
    """
    if not isinstance(arguments, dict):
        return f"the arguments must be a JSON object, not {_short_json(arguments)}"
    validator = _validator(tool)
    try:
        errors = sorted(validator.iter_errors(arguments), key=lambda error: list(map(str, error.absolute_path)))
    except RecursionError:
        return "the arguments are nested too deeply"
    if not errors:
        return None
    sentences = list(dict.fromkeys(_sentence(best_match([error])) for error in errors))
    return "; ".join(sentences[:_SHOWN_ERRORS])


def allows_null(schema: JSONValue, tool: Tool) -> bool:
    """
    Return whether a part of a tool's schema allows null.

    Args:
        schema (`dict` or `bool`):
            The part.
        tool ([`Tool`]):
            The tool, whose definitions the part may refer to.
    """
    definitions = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
    try:
        return bool(_compiled(json.dumps({"properties": {"value": schema}, **definitions})).is_valid({"value": None}))
    except Unresolvable:  # it refers to the schema as a whole, which is an object
        return False


def refusal(call: ToolCall, tool: Tool | None, available: Collection[str]) -> ToolResult | None:
    """
    Return why a call cannot run, if it cannot.

    Args:
        call ([`ToolCall`]):
            The call.
        tool ([`Tool`], *optional*):
            The tool of that name; `None` if there is none.
        available (`Collection[str]`):
            Names of the tools the rollout has.

    Returns:
        [`ToolResult`] or `None`: The answer to a malformed call, an unknown tool or wrong arguments.
    """
    if call.error is not None:
        return malformed(call)
    if tool is None:
        return unknown_tool(call, available)
    problem = validate_arguments(tool, call.arguments)
    if problem is None:
        return None
    return failure("invalid_arguments", f"Invalid arguments for tool `{tool.name}`: {problem}.")


def _validator(tool: Tool) -> Draft202012Validator:
    try:
        return _compiled(json.dumps(tool.parameters))
    except SchemaError as error:
        reason = f"at {error.json_path}: {error.message}"
    except Unresolvable as error:
        reason = f"it refers to {error.ref!r}, which it does not hold, and references are never fetched"
    except (TypeError, ValueError, RecursionError) as error:
        reason = str(error)
    raise ToolSchemaError(
        f"The parameters of tool {tool.name!r} are not a valid JSON schema (draft 2020-12): {reason}.",
        remedy="Correct the schema.",
    )


@lru_cache(maxsize=1024)
def _compiled(text: str) -> Draft202012Validator:
    """Cached by text, since each environment instance brings its own `Tool` objects with equal schemas."""
    schema = json.loads(text)
    # Every schema is read as draft 2020-12, whatever dialect it claims, as chat templates render it regardless.
    schema.pop("$schema", None)
    schema.pop("nullable", None)
    Draft202012Validator.check_schema(schema)
    registry: Registry[JSONSchema] = Registry()
    _resolve_references(schema, registry)
    return Draft202012Validator(_without_nullable(schema), registry=registry)


def _resolve_references(schema: JSONSchema, registry: "Registry[JSONSchema]") -> None:
    """Look up every reference of a schema, which raises `Unresolvable` for what the schema does not hold."""
    found = [(schema, registry.resolver_with_root(DRAFT202012.create_resource(schema)))]
    for part, outer in found:
        resolver = outer.in_subresource(DRAFT202012.create_resource(part))
        for keyword in part.keys() & {"$ref", "$dynamicRef"}:
            resolver.lookup(part[keyword])
        found += [(inner, resolver) for _, inner in places(part) if isinstance(inner, dict)]


def _without_nullable(schema: JSONSchema) -> JSONSchema:
    """Return a schema with OpenAPI's `nullable`, which `transformers` writes for `X | None`, as a union with null."""
    schema = mapped(schema, _without_nullable)
    return _or_null(schema) if schema.pop("nullable", False) is True else schema


def _or_null(schema: JSONSchema) -> JSONSchema:
    if _BLOCKS_NULL.intersection(schema):
        return {"anyOf": [schema, {"type": "null"}]}
    if "type" in schema:
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        schema["type"] = types if "null" in types else [*types, "null"]
    if "enum" in schema:
        schema["enum"] = [*schema["enum"], None]
    return schema


def _sentence(error: ValidationError) -> str:
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path).lstrip(".")
    where = f"`{path}`: " if path else ""
    if error.validator == "required":
        # jsonschema reports each missing name on its own, and only its message says which.
        missing = next(name for name in error.validator_value if error.message.startswith(f"{name!r} is "))
        return f"`{path}.{missing}` is a required property" if path else f"`{missing}` is a required property"
    if error.validator == "type":
        types = error.validator_value if isinstance(error.validator_value, list) else [error.validator_value]
        return f"{where}{_short_json(error.instance)} is not of type {' or '.join(types)}"
    if error.validator == "enum":
        allowed = _short_json(error.validator_value, 4 * _SHOWN_CHARS)
        return f"{where}{_short_json(error.instance)} is not one of {allowed}"
    return where + _shortened(error.message, 4 * _SHOWN_CHARS)


def _short_json(value: JSONValue, limit: int = _SHOWN_CHARS) -> str:
    """Return the value as the policy wrote it, in JSON, and not so long that it fills the context."""
    return _shortened(json.dumps(value, ensure_ascii=False, default=str), limit)


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
