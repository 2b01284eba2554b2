"""Assistant turns as text: which calls the policy wrote, and which of them cannot be read.

transformers' parser gives up on a whole turn at the first malformed call; here each call is read on its own. It keeps
only the last stretch of text; here all are kept. And it casts all texts to the types of the tool's schema; here only
those written in a notation without types.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import regex
from transformers.utils.chat_parsing.response_parser import ResponseParser
from transformers.utils.chat_parsing.response_templates import ResponseTemplateField

from ..tools.results import encodable
from ..tools.tool import ToolCall
from ..types import JSONObject, JSONSchema, JSONValue, Message
from .call_notation import as_plain_notation, end_of_call, notation_types_values, typed
from .response_templates import response_template_of


# What the response parser raises for text it cannot read; JSON nested too deep ends in a RecursionError
_UNREADABLE = (ValueError, TypeError, KeyError, RecursionError)


def add_missing_response_template(tokenizer: Any) -> None:
    """Give `tokenizer`, or the tokenizer of a processor, a response template if it has none and its chat template
    renders like one that TRL ships."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    has_template = getattr(tokenizer, "response_template", None) is not None
    if not has_template and isinstance(getattr(tokenizer, "chat_template", None), str):
        tokenizer.response_template = response_template_of(tokenizer)


@dataclass
class ParsedTurn:
    """
    An assistant turn.

    Args:
        message (`dict`):
            The turn as TRL gives it to reward functions; `tool_calls` holds the calls that can be tried, each with an
            `id`.
        calls (`list[ToolCall]`):
            Every call in the order it was written; malformed ones have an `error`.
    """

    message: Message
    calls: list[ToolCall]


class _TolerantParser(ResponseParser):
    """
    Reads a whole turn; a call that cannot be read is noted in its place, instead of failing the turn.

    A call ends where its arguments end. Every stretch of a text field is kept, in order, and so is text that belongs
    to no field.
    """

    def __init__(self, response_template: JSONObject, prefix: str):
        self.unreadable: list[tuple[int, str]] = []
        self._start = 0
        self._reading = False
        super().__init__(response_template, prefix=prefix)

    def read(self, text: str) -> Message:
        """Return the message of a turn."""
        self._reading = True
        self._buffer += text
        return self.finalize()[0]

    @property
    def call_field(self) -> ResponseTemplateField | None:
        """The field of tool calls, if the template has one."""
        return self._spec.fields.get("tool_calls")

    def _open_explicit(self, events: list[dict], field: ResponseTemplateField, m: regex.Match[str]) -> None:
        super()._open_explicit(events, field, m)
        self._start = m.end()

    def _scan(self, watch: list[Any], eos: bool) -> tuple[Any, int]:
        best, hold_start = super()._scan(watch, eos)
        if self._current == "tool_calls" and best is not None:
            kind, field, first = best
            best = (kind, field, end_of_call(field, self._buffer, self._start, first))
        return best, hold_start

    def _accumulate(self, events: list[dict], text: str) -> None:
        super()._accumulate(events, text)
        if self._current is None and self._reading and text.strip():
            self._output["content"] = _joined(self._output.get("content"), text.strip())

    def _close_current(self, events: list[dict]) -> None:
        name, body = self._current, self._body
        if name is None or not self._opened:
            return super()._close_current(events)
        field = self._spec.fields[name]
        keeps = field.repeats or field.join is not None
        before = None if keeps else self._output.pop(name, None)
        try:
            if name == "tool_calls":
                self._body = as_plain_notation(field, body)
            super()._close_current(events)
        except _UNREADABLE as error:
            if name != "tool_calls":
                raise
            calls = before if before is not None else self._output.get(name, [])
            self.unreadable.append((len(calls) + len(self.unreadable), _reason(error, body)))
            self._reset_to_implicit()
        if before is not None:
            self._output[name] = _joined(before, self._output.get(name))


def _joined(before: JSONValue, value: JSONValue) -> JSONValue:
    """Join what a field held before with what it holds now: texts by a newline, lists as one; else the later value."""
    if isinstance(before, str) and isinstance(value, str):
        return "\n".join(text for text in (before, value) if text)
    if isinstance(before, list) and isinstance(value, list):
        return before + value
    return before if value is None else value


def _reason(error: Exception, body: str) -> str:
    """Return why a call cannot be read, and its text."""
    lines = str(error).splitlines() or [type(error).__name__]
    reason = next((line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")), lines[0])
    return f"{reason} in {body.strip()[:200]!r}"


def parse_turn(
    text: str,
    response_template: JSONObject,
    prefix: str,
    tools: Sequence[JSONSchema],
    endings: Sequence[str],
    number: int,
) -> ParsedTurn | None:
    """
    Parse the text of one assistant turn.

    Args:
        text (`str`):
            Decoded turn, special tokens included.
        response_template (`dict`):
            How the chat template writes a turn.
        prefix (`str`):
            Decoded context before the turn, at least from the start of the assistant's header.
        tools (`Sequence[dict]`):
            Schemas the prompt was rendered with; they give arguments written as text their types.
        endings (`Sequence[str]`):
            Texts of the tokens that end a turn, dropped from the end of the content.
        number (`int`):
            Index of the turn in its rollout, which is part of the calls' ids.

    Returns:
        `ParsedTurn` or `None`: `None` if the turn as a whole cannot be read, so that it is plain text. `content` holds
        every stretch of text before, between and after the calls, in order, stripped and on lines of their own.
    """
    parser = _TolerantParser(response_template, prefix=prefix)
    try:
        message = parser.read(text)
    except _UNREADABLE:
        return None
    content = message.get("content") or ""
    if isinstance(content, str):
        ending = next((ending for ending in endings if ending and content.endswith(ending)), "")
        content = content.removesuffix(ending).rstrip() if ending else content
    message["content"] = content
    written: list[JSONValue] = list(message.pop("tool_calls", None) or [])
    for place, reason in parser.unreadable:
        written.insert(place, reason)
    calls = [_read_call(item, f"call_{number}_{index}") for index, item in enumerate(written)]
    field = parser.call_field
    if field is not None and not notation_types_values(field):
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        for call in calls:
            call.arguments = typed(call.arguments, schemas.get(call.name, {}))
    valid = [
        {"type": "function", "function": {"name": call.name, "arguments": call.arguments}, "id": call.id}
        for call in calls
        if call.error is None
    ]
    if valid:
        message["tool_calls"] = valid
    return ParsedTurn(message, calls)


def _read_call(item: JSONValue, identifier: str) -> ToolCall:
    """
    Return a call from what the response template made of it, or from the reason why it could make nothing of it.

    Escapes in JSON can write a lone surrogate, which is no character and which no later stage could encode.
    """
    if isinstance(item, str):
        return ToolCall(identifier, "", error=item)
    function = item.get("function", item) if isinstance(item, dict) else {}
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        return ToolCall(identifier, "", error=f'a call needs a "name", got {json.dumps(item, default=str)[:200]}')
    name, arguments = encodable(name), function.get("arguments")
    others = sorted(set(function) - {"name", "arguments", "type", "id"})
    if not arguments and others:  # they may be the arguments, and the tool must not run with its defaults
        return ToolCall(identifier, name, error=f'`{name}` needs "arguments", got {encodable(str(others))[:200]}')
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        kind = type(arguments).__name__
        return ToolCall(identifier, name, error=f'"arguments" of `{name}` must be an object, got {kind}')
    try:
        return ToolCall(identifier, name, encodable(arguments))
    except RecursionError:
        return ToolCall(identifier, name, error=f'"arguments" of `{name}` are nested too deep')
