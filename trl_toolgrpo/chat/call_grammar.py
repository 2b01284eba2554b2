"""The grammar of a tool call's body: everything a template writes after the tool's name, to the end of the turn.

A chat template shows how it writes arguments: as one JSON object, or one by one with text between them. The grammars
are Lark grammars as llguidance reads them; `sampling/constraint.py` compiles them.
"""

import json
import math
from collections.abc import Callable, Iterable

import regex

from ..errors import ChatTemplateError, ToolSchemaError
from ..tools.schema_forms import constants, places, replaced_at
from ..tools.tool import Tool
from ..types import JSONObject, JSONSchema, JSONValue
from .tool_chat import ToolChat


_NAME, _KEYS, _VALUES = "grammar_name_7c1e", ("key_5b0d", "key_9e2f"), ("text_41aa", "text_8cc3")
_NUMBER, _NESTED = 70017, [True, {"key_5b0d": "text_41aa"}]
_SPACING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
_PLAIN_NUMBER = r"/-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,9})?/"
_CLOSABLE = {"properties", "$defs", "definitions", "anyOf", "oneOf", "prefixItems", "items", "additionalProperties"}
_NUMBER_KEYS = {"type", "title", "description", "default", "examples"}
_TEXT_KEYS = {*_NUMBER_KEYS, "minLength", "maxLength"}


class CallGrammar:
    """
    How a chat template writes the body of a call.

    Args:
        chat (`ToolChat`):
            Chat handling of the tokenizer and template.

    Raises:
        ChatTemplateError: if the template does not show how it writes arguments.
    """

    def __init__(self, chat: ToolChat):
        self._chat = chat
        json_object = regex.compile(rf'{{\s*"{_KEYS[0]}"\s*:\s*"{_VALUES[0]}"\s*}}')
        zone = self._call_end({_KEYS[0]: _VALUES[0]})
        found = json_object.search(zone)
        self._around = (zone[: found.start()], zone[found.end() :]) if found else None
        self._arguments = None if found else _WrittenOneByOne(self._call_end, self._literal)

    def of(self, tool: Tool) -> str:
        """
        Return the grammar of the body of a call of `tool`, from after its name through the token that ends the turn.

        Args:
            tool ([`Tool`]):
                What is called.

        Returns:
            `str`: a Lark grammar; every text it allows is a body with arguments that match the tool's schema.

        Raises:
            ToolSchemaError: if the template has no known way to write the arguments.
        """
        if self._arguments is not None:
            return self._arguments.grammar(tool)
        before, after = self._around or ("", "")
        body = {**_closed(tool.parameters), "x-guidance": _SPACING}
        start = _join(self._literal(before), "arguments", self._literal(after))
        return f"start: {start}\narguments: %json {json.dumps(body)}"

    def _call_end(self, arguments: JSONObject) -> str:
        """Return what the template writes after the name, through the first token that ends a turn."""
        rendered = self._chat.render_call(_NAME, arguments)
        zone = rendered[rendered.rindex(_NAME) + len(_NAME) :]
        stop = self._chat.first_stop(zone)
        if stop is not None:
            return zone[: stop.end()]
        # The turn ends with what opens the result: GLM writes `<|observation|>` there, and `<|user|>` stops a turn too
        result = {"role": "tool", "name": "tool", "content": "x", "tool_call_id": "call_0_0"}
        answered = self._chat.render_call(_NAME, arguments, [result])
        after = answered[len(rendered) :]
        stop = self._chat.first_stop(after)
        if not answered.startswith(rendered) or stop is None:
            raise ChatTemplateError(
                "You passed `force_level='schema'`, but the chat template does not show which token ends a turn that "
                "calls a tool.",
                remedy="Use `force_level='name'`, or a chat template TRL ships.",
            )
        return zone + after[: stop.end()]

    def _literal(self, text: str) -> str:
        """Return the expression of fixed text: control tokens by their ids, since no text may become one, and the rest
        as strings."""
        return " ".join(
            f"<[{piece}]>" if isinstance(piece, int) else json.dumps(piece) for piece in self._chat.pieces(text)
        )


class _WrittenOneByOne:
    """
    Arguments with text around each, such as `<parameter=city>\nRome\n</parameter>`.

    Everything is read from rendered examples: the text before the first key, between a key and its value, between an
    argument and the next one, after the last one; what surrounds a string; how the template writes constants.
    """

    def __init__(self, zone: Callable[[JSONObject], str], literal: Callable[[str], str]):
        self._call_end, self._literal = zone, literal
        key, other = _KEYS
        self.nothing = zone({})
        one, two = zone({key: _NUMBER}), zone({key: _NUMBER, other: _NUMBER})
        text = zone({key: _VALUES[0]})
        try:
            self.before, self.middle, self.after = _cut(one, key, str(_NUMBER))
            self.between = _cut(two, f"{self.middle}{_NUMBER}", other)[1]
            _, opening, closing = _cut(text, key, _VALUES[0])
            self.quotes = opening.removeprefix(self.middle), closing.removesuffix(self.after)
            mixed = self.before + key + opening + _VALUES[1] + self.quotes[1] + self.between
            if zone({key: _VALUES[1], other: _NUMBER}) != f"{mixed}{other}{self.middle}{_NUMBER}{self.after}":
                raise ValueError("arguments are not written independently of each other")
        except ValueError as error:
            raise ChatTemplateError(
                f"You passed `force_level='schema'`, but the chat template does not show how it writes arguments: "
                f"{error}.",
                remedy="Use `force_level='name'`, or a chat template TRL ships.",
            ) from error
        reverse = zone({other: _NUMBER, key: _NUMBER})
        self.sorts = reverse.index(key) < reverse.index(other)
        nested = zone({key: _NESTED})
        self.nested = nested == f"{self.before}{key}{self.middle}{json.dumps(_NESTED)}{self.after}"

    def grammar(self, tool: Tool) -> str:
        """Return the grammar of the arguments of `tool`."""
        literal = self._literal
        properties: JSONObject = tool.parameters.get("properties") or {}
        names = sorted(properties) if self.sorts else list(properties)
        required = [name in (tool.parameters.get("required") or ()) for name in names]
        rules = []
        for index, name in enumerate(names):
            value = self._value(properties[name], f"property `{name}` of the tool `{tool.name}`")
            rules.append(f"argument_{index}: {_join(literal(name + self.middle), value)}")
        later = [_join(literal(self.between), f"argument_{index}") for index in range(len(names))]
        later = [item if must else f"({item})?" for item, must in zip(later, required, strict=True)]
        sequences = []
        for first in range(required.index(True) + 1 if any(required) else len(names)):
            parts = [literal(self.before), f"argument_{first}", *later[first + 1 :], literal(self.after)]
            sequences.append(_join(*parts))
        if not any(required):
            sequences.append(literal(self.nothing))
        start = " | ".join(f"({sequence})" for sequence in sequences)
        return "\n".join([f"start: {start}", *rules])

    def _value(self, schema: JSONValue, where: str) -> str:
        """Return the expression of the values a schema allows, as the template writes them."""
        schema = schema if isinstance(schema, dict) else {}
        if "enum" in schema or "const" in schema:
            values = constants(schema)
            if not values:
                raise ToolSchemaError(f"{where} allows no value that this chat template can write")
            return _alternatives(self._constant(value, where) for value in values)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return _alternatives(self._value(choice, where) for choice in schema[key])
        kinds = schema.get("type", "string")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        return _alternatives(self._value_of(kind, schema, where) for kind in kinds)

    def _value_of(self, kind: str, schema: JSONSchema, where: str) -> str:
        """Return the expression of the values of one type."""
        if kind == "boolean":
            return _alternatives(self._constant(value, where) for value in (True, False))
        if kind == "null":
            return self._constant(None, where)
        if kind == "string":
            unknown = sorted(set(schema) - _TEXT_KEYS)
            if unknown:
                raise ToolSchemaError(f"{where} constrains a text by {unknown}, which this chat template cannot write")
            opening, closing = map(self._literal, self.quotes)
            return _join(opening, self._text(schema), closing)
        if (kind in ("array", "object") and not self.nested) or "$ref" in json.dumps(schema):
            raise ToolSchemaError(f"{where} is of type {kind}, which this chat template does not write as JSON")
        if kind == "number" and not set(schema) - _NUMBER_KEYS:
            return _PLAIN_NUMBER  # with exponents a value can pass the largest float, and be read as text
        return f"%json {json.dumps({**_closed(schema), 'type': kind, 'x-guidance': _SPACING})}"

    def _constant(self, value: JSONValue, where: str) -> str:
        """Return the expression of a constant, as the template writes it."""
        if isinstance(value, str):
            if not value or regex.search(self._forbidden(), value):
                raise ToolSchemaError(f"{where} allows {value!r}, which this template cannot tell from its markup")
            return self._literal(value.join(self.quotes))
        return self._literal(_cut(self._call_end({_KEYS[0]: value}), _KEYS[0] + self.middle, self.after, last=True)[1])

    def _forbidden(self) -> str:
        """Return the class of the characters no text may hold: the first one of what follows it, and escapes."""
        end = (self.quotes[1] + self.after).lstrip()[:1]
        return f"[{regex.escape(end)}\\\\\\p{{Cc}}]"

    def _text(self, schema: JSONSchema) -> str:
        """Return the expression of free text that neither ends early nor loses white space at its ends."""
        least, most = schema.get("minLength", 0), schema.get("maxLength", math.inf)
        inner = "[^" + self._forbidden()[1:]
        edge = "[^ " + self._forbidden()[1:]
        upper = "" if most == math.inf else max(most - 2, 0)
        forms = [edge] if least <= 1 <= most else []
        forms += [f"{edge}{inner}{{{max(least - 2, 0)},{upper}}}{edge}"] if most >= 2 else []
        optional = "?" if least == 0 else ""
        return f"/({'|'.join(forms)}){optional}/".replace("</", "<\\/") if forms else '""'


def _cut(text: str, first: str, second: str, last: bool = False) -> tuple[str, str, str]:
    """Return the text before `first`, between it and `second`, and after that."""
    start = text.index(first) + len(first)
    stop = text.rindex(second) if last else text.index(second, start)
    return text[: start - len(first)], text[start:stop], text[stop + len(second) :]


def _closed(schema: JSONValue) -> JSONValue:
    """Return the schema with no properties beyond those it names, wherever it leaves that open."""
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for path, inner in places(schema):
        if path[0] in _CLOSABLE:
            closed = replaced_at(closed, path, _closed(inner))
    if "properties" in schema and "allOf" not in schema and "patternProperties" not in schema:
        closed.setdefault("additionalProperties", False)
    return closed


def _alternatives(choices: Iterable[str]) -> str:
    return f"({' | '.join(choices)})"


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)
