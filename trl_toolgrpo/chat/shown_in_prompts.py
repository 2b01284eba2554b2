"""Whether a chat template shows what it is given: each tool with its schema, each kind of message with its content.

A part is shown if the prompt changes when the part does. This works however a template writes it.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..tools.schema_forms import places, replaced_at
from ..types import JSONSchema, JSONValue, Message


SchemaPath: TypeAlias = tuple[str | int, ...]
Render: TypeAlias = Callable[[JSONSchema], str]

_CONSTRAINTS = (
    *("default", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("minLength", "maxLength", "pattern", "format", "minItems", "maxItems", "uniqueItems"),
    *("minProperties", "maxProperties", "required"),
)
_NEEDED = {"type": "the type", "enum": "the values", "const": "the value", "$ref": "the reference"}
_KEYWORDS = {
    **_NEEDED,
    "description": "the description",
    "nullable": "that null is allowed",
    **{keyword: f"`{keyword}`" for keyword in _CONSTRAINTS},
}
_REFINES = frozenset({"additionalProperties", "patternProperties", "propertyNames", "contains", "not", "if", "then"})
_OTHER_TYPES = {"string": "boolean", "integer": "string", "number": "string", "boolean": "string"}


@dataclass(frozen=True)
class Part:
    """
    A part of a tool that its prompt should show.

    Args:
        words (`str`):
            What it is, for messages.
        needed (`bool`):
            Whether a policy that does not read it cannot know how to call the tool.
    """

    words: str
    needed: bool


def hidden_parts(schema: JSONSchema, render: Render) -> list[Part]:
    """
    Return the parts of a tool that a chat template does not show.

    Args:
        schema (`dict`):
            The tool as templates get it: `{"type": "function", "function": {...}}`.
        render (`Callable`):
            Gives the text of a prompt with such a tool.
    """
    text = render(schema)
    if _is_printed(schema["function"], text):
        return []
    hidden = []
    for part, path, other in _changes(schema):
        try:
            changed = render(replaced_at(schema, path, other)) != text
        except Exception:  # the template has read the part, and does not know the other value
            changed = True
        if not changed and part not in hidden:
            hidden.append(part)
    return hidden


def _is_printed(function: JSONSchema, text: str) -> bool:
    """Return whether the prompt holds the tool as JSON, as most templates write it, white space aside."""
    found = re.sub(r"\s", "", text)
    texts = [json.dumps(function[key], ensure_ascii=False) for key in ("name", "description", "parameters")]
    return all(re.sub(r"\s", "", part) in found for part in texts)


def _changes(schema: JSONSchema) -> Iterator[tuple[Part, SchemaPath, JSONValue]]:
    """Yield each part of a tool, where it stands, and what may stand there instead."""
    function = schema["function"]
    yield Part("its name", True), ("function", "name"), _other_value(function["name"])
    if function["description"]:
        yield Part("its description", False), ("function", "description"), _other_value(function["description"])
    yield from _schema_changes(function["parameters"], ("function", "parameters"), "", True)


def _schema_changes(
    schema: JSONValue, path: SchemaPath, name: str, needed: bool
) -> Iterator[tuple[Part, SchemaPath, JSONValue]]:
    """Yield the same for a schema and all within it, definitions aside; `name` is the property it belongs to."""
    if not isinstance(schema, dict):
        return
    for keyword, label in _KEYWORDS.items():
        value = schema.get(keyword)
        is_empty = not value and keyword not in ("const", *_CONSTRAINTS)
        if keyword not in schema or is_empty or (not name and keyword in ("type", "description")):
            continue
        if keyword == "type" and isinstance(value, list):
            label = f"the types {value}"
        elif keyword in _NEEDED:
            label += f" {_short(value) if keyword in ('enum', 'const') else repr(value)}"
        part = Part(f"{label} of {name!r}" if name else label, needed and keyword in _NEEDED)
        yield part, (*path, keyword), _other_type(value) if keyword == "type" else _other_value(value)
    properties = schema["properties"] if isinstance(schema.get("properties"), dict) else {}
    for key in properties:
        renamed = {(_other_value(k) if k == key else k): value for k, value in properties.items()}
        yield Part(f"the property {_property_path(name, key)!r}", True), (*path, "properties"), renamed
    for step, inner in places(schema):
        if step[0] not in ("$defs", "definitions"):
            inner_name = _property_path(name, str(step[1])) if step[0] == "properties" else name
            yield from _schema_changes(inner, (*path, *step), inner_name, needed and step[0] not in _REFINES)


def _property_path(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _other_type(kind: JSONValue) -> JSONValue:
    return _OTHER_TYPES.get(kind, "string") if isinstance(kind, str) else [_OTHER_TYPES.get(k, "string") for k in kind]


def _other_value(value: JSONValue) -> JSONValue:
    if isinstance(value, str):  # of the same length, as some templates show what is short and leave out what is long
        return "".join(letter if not letter.isalnum() else "z" if letter == "q" else "q" for letter in value)
    if isinstance(value, (bool, int, float)):
        return not value if isinstance(value, bool) else value + 1
    if isinstance(value, list):
        return [*map(_other_value, value)]
    return {key: _other_value(inner) for key, inner in value.items()} if isinstance(value, dict) else "qqqq"


def _short(value: JSONValue) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:80]}..."


def message_kind(message: Message) -> tuple[object, ...]:
    """
    Return what a template may treat a message by: role, form of the content, keys, and forms of its calls.

    Args:
        message (`dict`):
            A message as it is rendered.
    """
    content, calls = message.get("content"), message.get("tool_calls") or ()
    form: object = type(content)
    if isinstance(content, list):
        form = tuple(part.get("type") if isinstance(part, dict) else type(part) for part in content[:4])
    if not calls:
        return message.get("role"), form, frozenset(message)
    functions = [call.get("function") if isinstance(call, dict) else call for call in calls]
    given = [function.get("arguments") if isinstance(function, dict) else function for function in functions]
    values = frozenset(type(v) for a in given for v in (a.values() if isinstance(a, dict) else (a,)))
    return message.get("role"), form, frozenset(message), min(len(calls), 2), values


def hidden_messages(prompt: Sequence[Message], render: Callable[[list[Message]], str]) -> list[Part]:
    """
    Return the parts of the messages of a prompt that a chat template does not show.

    Args:
        prompt (`Sequence[dict]`):
            Messages that the template renders.
        render (`Callable`):
            Gives the text of a prompt.

    Returns:
        `list[Part]`: `needed` for the text of a message and for its calls; not for text next to a call, for which
        some formats have no place, and the name of a speaker.
    """
    marked, parts = [], []
    for number, message in enumerate(prompt):
        copied, found = _marked(message, f"zq{number}q")
        marked.append(copied)
        where = f"of message {number} ({message.get('role')!r})"
        parts += [(mark, Part(f"{words} {where}", needed)) for mark, words, needed in found]
    text = render(marked)
    return [part for mark, part in parts if mark not in text]


def _marked(message: Message, mark: str) -> tuple[Message, list[tuple[str, str, bool]]]:
    """Return a message with a word of its own in each part, and for each word its part and whether that is needed."""
    copied, found = dict(message), []
    content, calls, role = message.get("content"), message.get("tool_calls") or (), message.get("role")
    if isinstance(content, str) and content.strip():
        copied["content"] = f"{content} {mark}c"
        found.append((f"{mark}c", "the text", not calls))
    elif isinstance(content, list):
        texts = [place for place, part in enumerate(content) if isinstance(part, dict) and part.get("text")]
        copied["content"] = list(content)
        for place in texts:
            copied["content"][place] = {**content[place], "text": f"{content[place]['text']} {mark}p{place}p"}
            found.append((f"{mark}p{place}p", "the text", not calls))
    if role == "user" and isinstance(message.get("name"), str):
        copied["name"] = f"{mark}n"
        found.append((f"{mark}n", "the name", False))
    copied_calls = []
    for place, call in enumerate(calls):
        function = dict(call["function"])
        as_text = isinstance(function["arguments"], str)
        arguments = json.loads(function["arguments"]) if as_text else function["arguments"]
        arguments = {**arguments, f"{mark}k{place}k": f"{mark}v{place}v"}
        function["arguments"] = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
        words = f"the call of {function.get('name')!r}"
        found += [(f"{mark}{kind}{place}{kind}", words, True) for kind in "kv"]
        copied_calls.append({**call, "function": function})
    if copied_calls:
        copied["tool_calls"] = copied_calls
    return copied, found
