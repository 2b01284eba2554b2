"""Whether a chat template shows what it is given: each tool with its schema, each kind of message with its content.

A part is shown if the prompt changes when the part does. That needs to know nothing of how a template writes it.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .tools.schema_forms import places, replaced


Render = Callable[[dict[str, Any]], str]

_CONSTRAINTS = (
    *("default", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("minLength", "maxLength", "pattern", "format", "minItems", "maxItems", "uniqueItems"),
    *("minProperties", "maxProperties", "required"),
)
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


def hidden_parts(schema: dict[str, Any], render: Render) -> list[Part]:
    """
    Parts of a tool that a chat template does not show.

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
            changed = render(replaced(schema, path, other)) != text
        except Exception:  # the template has read the part, and does not know the other value
            changed = True
        if not changed and part not in hidden:
            hidden.append(part)
    return hidden


def _is_printed(function: dict[str, Any], text: str) -> bool:
    """Whether the prompt holds the tool as JSON, as most templates write it, white space aside."""
    found = re.sub(r"\s", "", text)
    texts = [json.dumps(function[key], ensure_ascii=False) for key in ("name", "description", "parameters")]
    return all(re.sub(r"\s", "", part) in found for part in texts)


def _changes(schema: dict[str, Any]) -> Iterator[tuple[Part, tuple[str | int, ...], Any]]:
    """Each part of a tool, where it stands, and what may stand there instead."""
    function = schema["function"]
    yield Part("its name", True), ("function", "name"), _other_text(function["name"])
    if function["description"]:
        yield Part("its description", False), ("function", "description"), _other_text(function["description"])
    root = ("function", "parameters")
    for path, inner, name in _schemas(function["parameters"], root, ""):
        where = f" of {name!r}" if name else ""
        told = not _REFINES.intersection(path)
        yield from (
            (replace(part, needed=part.needed and told), (*path, key), other)
            for part, key, other in _keyword_changes(inner, where, bool(name))
        )
        properties = inner.get("properties")
        if not isinstance(properties, dict):
            continue
        for key in properties:
            renamed = {(_other_text(k) if k == key else k): value for k, value in properties.items()}
            yield Part(f"the property {_joined(name, key)!r}", True), (*path, "properties"), renamed


def _schemas(schema: Any, path: tuple[str | int, ...], name: str) -> Iterator[tuple[Any, dict[str, Any], str]]:
    """A schema and all within it, definitions aside, each with its path and the name of the property it belongs to."""
    if not isinstance(schema, dict):
        return
    yield path, schema, name
    for step, inner in places(schema):
        if step[0] not in ("$defs", "definitions"):
            inner_name = _joined(name, str(step[1])) if step[0] == "properties" else name
            yield from _schemas(inner, (*path, *step), inner_name)


def _keyword_changes(schema: dict[str, Any], where: str, inside: bool) -> Iterator[tuple[Part, str, Any]]:
    kind = schema.get("type")
    if inside and isinstance(kind, str):
        yield Part(f"the type {kind!r}{where}", True), "type", _OTHER_TYPES.get(kind, "string")
    elif inside and isinstance(kind, list) and kind:
        others = [_OTHER_TYPES.get(inner, "string") for inner in kind]
        yield Part(f"the types {kind}{where}", True), "type", others
    if schema.get("enum"):
        yield Part(f"the values {_short(schema['enum'])}{where}", True), "enum", [*map(_other_value, schema["enum"])]
    if "const" in schema:
        yield Part(f"the value {_short(schema['const'])}{where}", True), "const", _other_value(schema["const"])
    if isinstance(schema.get("$ref"), str):
        yield Part(f"the reference {schema['$ref']!r}{where}", True), "$ref", _other_text(schema["$ref"])
    if inside and schema.get("description"):
        yield Part(f"the description{where}", False), "description", _other_text(schema["description"])
    if schema.get("nullable") is True:
        yield Part(f"that null is allowed{where}", False), "nullable", False
    for keyword in _CONSTRAINTS:
        if keyword in schema:
            yield Part(f"`{keyword}`{where}", False), keyword, _other_value(schema[keyword])


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _other_text(text: Any) -> str:
    """Another text of the same length, as some templates show what is short and leave out what is long."""
    text = str(text)
    return text.translate({ord(letter): "q" if letter != "q" else "z" for letter in set(text) if letter.isalnum()})


def _other_value(value: Any) -> Any:
    if isinstance(value, str):
        return _other_text(value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, list):
        return [*map(_other_value, value)]
    if isinstance(value, dict):
        return {key: _other_value(inner) for key, inner in value.items()}
    return "qqqq"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:80]}..."


def message_kind(message: dict[str, Any]) -> tuple[Any, ...]:
    """
    What a template may treat a message by: role, form of the content, keys, and the forms of its calls.

    Args:
        message (`dict`):
            A message as it is rendered.
    """
    content, calls = message.get("content"), message.get("tool_calls") or ()
    form: Any = type(content)
    if isinstance(content, list):
        form = tuple(part.get("type") if isinstance(part, dict) else type(part) for part in content[:4])
    if not calls:
        return message.get("role"), form, frozenset(message)
    functions = [call.get("function") if isinstance(call, dict) else call for call in calls]
    given = [function.get("arguments") if isinstance(function, dict) else function for function in functions]
    values = frozenset(type(v) for a in given for v in (a.values() if isinstance(a, dict) else (a,)))
    return message.get("role"), form, frozenset(message), min(len(calls), 2), values


def hidden_messages(prompt: Sequence[dict[str, Any]], render: Callable[[list[dict[str, Any]]], str]) -> list[Part]:
    """
    Parts of the messages of a prompt that a chat template does not show.

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


def _marked(message: dict[str, Any], mark: str) -> tuple[dict[str, Any], list[tuple[str, str, bool]]]:
    """A message with a word of its own in each of its parts; each word, what it stands in, whether that is needed."""
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
