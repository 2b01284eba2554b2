"""Other ways to write a JSON schema that mean the same, for chat templates that read only some of them.

`referencing` follows references. No library puts what they lead to in their place where a schema refers to itself, or
writes unions in the form that templates read.
"""

from collections.abc import Callable, Iterator

from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from ..types import JSONSchema, JSONValue


# Where JSON Schema 2020-12 (and the older `definitions`) keeps schemas; anything else in a schema is data.
_HOLDS_ONE = (
    *("items", "contains", "unevaluatedItems"),
    *("additionalProperties", "unevaluatedProperties", "propertyNames"),
    *("not", "if", "then", "else", "contentSchema"),
)
_HOLDS_LIST = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_HOLDS_NAMED = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})

_DEFINITIONS = ("$defs", "definitions")
_NOTES = frozenset({"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"})
_MOST_SCHEMAS = 2000
"""Schemas that references may grow into; those of a schema that would be larger stay as they are."""


def places(schema: JSONSchema) -> Iterator[tuple[tuple[str | int, ...], JSONValue]]:
    """
    Yield the schemas directly inside a schema, each with the path to it.

    Args:
        schema (`dict`):
            JSON schema.
    """
    for keyword, value in schema.items():
        if keyword in _HOLDS_ONE:
            yield (keyword,), value
        elif keyword in _HOLDS_LIST and isinstance(value, list):
            yield from (((keyword, index), inner) for index, inner in enumerate(value))
        elif keyword in _HOLDS_NAMED and isinstance(value, dict):
            yield from (((keyword, name), inner) for name, inner in value.items())


def replaced_at(schema: JSONValue, path: tuple[str | int, ...], value: JSONValue) -> JSONValue:
    """
    Return a copy of nested dicts and lists with another value at a path; what is not on the path is shared.

    Args:
        schema (`dict` or `list`):
            What is copied.
        path (`tuple[str | int, ...]`):
            Keys and indices.
        value (`object`):
            The new value.
    """
    if not path:
        return value
    copied = schema.copy()
    copied[path[0]] = replaced_at(schema[path[0]], path[1:], value)
    return copied


def mapped(schema: JSONSchema, change: Callable[[JSONSchema], JSONSchema]) -> JSONSchema:
    """
    Return a copy of a schema in which each schema directly inside is changed.

    Args:
        schema (`dict`):
            JSON schema.
        change (`Callable`):
            Gets a schema, and returns the one for its place. Those that are `true` or `false` are left as they are.
    """
    for path, inner in places(schema):
        if isinstance(inner, dict):
            schema = replaced_at(schema, path, change(inner))
    return dict(schema)


def inline_references(schema: JSONSchema) -> JSONSchema:
    """
    Return a schema with what its local references (`"#/$defs/..."`) point to in their place.

    pydantic and MCP servers write nested objects as references, which only templates that print the schema as JSON
    show. A reference that leads back to itself, or to another document, stays, and so do the definitions then.

    Args:
        schema (`dict`):
            JSON schema of a tool's parameters.

    Returns:
        `dict`: the same object where nothing refers to anything.
    """
    if not _has_reference(schema):
        return schema
    try:
        inlined = _inlined(schema, schema, (), iter(range(_MOST_SCHEMAS)))
    except StopIteration:  # it would be larger
        return schema
    body = {keyword: value for keyword, value in inlined.items() if keyword not in _DEFINITIONS}
    return inlined if _has_reference(body) else body


def plain_form(schema: JSONSchema) -> JSONSchema:
    """
    Return a schema with one `type` for each property where it can be written so: a union with null as `nullable`, as
    `transformers` writes `X | None`; a union or intersection of one schema as that schema; a union of bare types as a
    list of types; `const` as an `enum` of one; the type of an `enum` whose values have one.

    Args:
        schema (`dict`):
            JSON schema, without references.
    """
    plain = mapped(schema, plain_form)
    for keyword in ("anyOf", "oneOf"):
        plain = _without_union(plain, keyword)
    parts = plain.get("allOf")
    if isinstance(parts, list) and all(isinstance(part, dict) for part in parts):
        merged = _merged({key: value for key, value in plain.items() if key != "allOf"}, *parts)
        plain = plain if merged is None else merged
    if "const" in plain and "enum" not in plain:
        plain["enum"] = [plain.pop("const")]
    types = {_json_type(value) for value in plain.get("enum") or ()}
    if "type" not in plain and len(types) == 1:
        plain["type"] = types.pop()
    if isinstance(plain.get("type"), list):
        rest = [kind for kind in plain["type"] if kind != "null"]
        if len(rest) == 1:
            nullable = {"nullable": True} if len(rest) < len(plain["type"]) else {}
            plain = {**plain, "type": rest[0], **nullable}
    return plain


def alternatives(schema: JSONValue, root: JSONSchema, seen: frozenset[str] = frozenset()) -> Iterator[JSONSchema]:
    """
    Yield a schema, what it refers to, and the parts of its unions and intersections, each with theirs.

    Args:
        schema (`dict` or `bool`):
            JSON schema.
        root (`dict`):
            The schema that local references point into.
        seen (`frozenset[str]`, *optional*):
            References that have been followed.
    """
    if not isinstance(schema, dict):
        return
    yield schema
    for keyword in ("anyOf", "oneOf", "allOf"):
        for part in schema.get(keyword) or ():
            yield from alternatives(part, root, seen)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in seen:
        yield from alternatives(_target(root, reference), root, seen | {reference})


def constants(schema: JSONSchema) -> list[JSONValue]:
    """Return the values that a schema names, by `enum` or `const`."""
    return [*(schema.get("enum") or ()), *([schema["const"]] if "const" in schema else ())]


def type_names(schema: JSONValue, root: JSONSchema) -> list[str]:
    """
    Return the names of the types a schema allows, in its order; those of its constants where it declares none.

    Args:
        schema, root:
            As in [`alternatives`].
    """
    names: list[str] = []
    for part in alternatives(schema, root):
        declared = part.get("type")
        if declared is None:
            names += map(_json_type, constants(part))
        else:
            names += declared if isinstance(declared, list) else [declared]
        names += ["null"] if part.get("nullable") else []  # as transformers' get_json_schema marks what may be None
    return [name for name in dict.fromkeys(names) if isinstance(name, str)]


def _has_reference(schema: JSONValue) -> bool:
    return isinstance(schema, dict) and ("$ref" in schema or any(_has_reference(inner) for _, inner in places(schema)))


def _inlined(schema: JSONValue, root: JSONSchema, seen: tuple[str, ...], budget: Iterator[int]) -> JSONValue:
    """Return a schema with its references followed; each schema within takes one from the budget."""
    if not isinstance(schema, dict):
        return schema
    next(budget)
    reference = schema.get("$ref")
    if isinstance(reference, str):
        target = _target(root, reference)
        if not isinstance(target, dict) or reference in seen:
            return schema
        inlined = _inlined(target, root, (*seen, reference), budget)
        others = {key: value for key, value in schema.items() if key != "$ref"}
        merged = _merged(_inlined(others, root, seen, budget), inlined) if others else inlined
        return schema if merged is None else merged
    copied = schema
    for path, inner in places(schema):
        if path[0] not in _DEFINITIONS:
            copied = replaced_at(copied, path, _inlined(inner, root, seen, budget))
    return copied


def _target(root: JSONSchema, reference: str) -> JSONValue:
    """Return what a JSON pointer leads to; `None` for the root itself, other documents and anchors."""
    if not reference.startswith("#/"):
        return None
    resource = DRAFT202012.create_resource(root)
    try:
        return resource.pointer(reference[1:], Registry().resolver_with_root(resource)).contents
    except (Unresolvable, ValueError, TypeError):
        return None


def _merged(first: JSONSchema, *others: JSONSchema) -> JSONSchema | None:
    """Return schemas in one, with the notes of the first; `None` where they say different things under a keyword."""
    merged = dict(first)
    for other in others:
        if any(merged[key] != other[key] and key not in _NOTES for key in merged.keys() & other.keys()):
            return None
        merged = {**other, **merged}
    return merged


def _without_union(schema: JSONSchema, keyword: str) -> JSONSchema:
    variants = schema.get(keyword)
    if not isinstance(variants, list) or not all(isinstance(variant, dict) for variant in variants):
        return schema
    rest = [variant for variant in variants if not _is_null(variant)]
    outer = {key: value for key, value in schema.items() if key != keyword}
    nullable = {"nullable": True} if len(rest) < len(variants) else {}
    if len(rest) == 1:
        merged = _merged(outer, rest[0])
        return schema if merged is None else {**merged, **nullable}
    if rest and "type" not in outer and all(set(v) == {"type"} and isinstance(v["type"], str) for v in rest):
        return {**outer, "type": [*dict.fromkeys(v["type"] for v in rest), *(["null"] if nullable else [])]}
    return schema


def _is_null(schema: JSONSchema) -> bool:
    bare = {key: value for key, value in schema.items() if key not in _NOTES}
    return bare in ({"type": "null"}, {"const": None}, {"enum": [None]})


def _json_type(value: JSONValue) -> str:
    """Return the name of the JSON type of a value."""
    kinds: dict[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    return kinds.get(type(value), "array" if isinstance(value, list) else "object")
