"""Assistant turns as text: which calls the policy wrote, and which of them cannot be read.

Owns the tolerant parser and response templates for chat templates that TRL renders but cannot parse. transformers'
parser gives up on a whole turn at the first malformed call; here each call stands for itself. Fed by `chat.py`.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_parsing.response_parser import ResponseParser
from trl.chat_template_utils import (
    deepseekv3_chat_template,
    deepseekv3_training_chat_template,
    diffusion_gemma_chat_template,
    diffusion_gemma_training_chat_template,
    gemma4_template,
    muse_glimmer_chat_template,
    muse_glimmer_training_chat_template,
)

from ..tools.results import encodable
from ..tools.types import ToolCall


# What the response parser raises for text it cannot read; JSON nested too deep ends in a RecursionError
_UNREADABLE = (ValueError, TypeError, KeyError, RecursionError)

_FUNCTION = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}

_DEEPSEEKV3_RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor_pattern": r"<｜Assistant｜>|<｜tool▁outputs▁end｜>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"},
        "tool_calls": {
            "open_pattern": r"(?:<｜tool▁calls▁begin｜>)?<｜tool▁call▁begin｜>function<｜tool▁sep｜>"
            r"(?P<name>[^\n]+)\n```json\n",
            "close_pattern": r"\n```<｜tool▁call▁end｜>\s*(?:<｜tool▁calls▁end｜>)?",
            "repeats": True,
            "content": "json",
            "transform": _FUNCTION,
        },
        "content": {"close_pattern": r"<｜end▁of▁sentence｜>\s*", "content": "text"},
    },
}

_MUSE_GLIMMER_RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|start|>assistant",
    "fields": {
        "reasoning_content": {
            "open": " to=self<|message|>",
            "close_pattern": r"<\|eom\|>(?:<\|start\|>assistant)?",
            "content": "text",
        },
        "tool_calls": {
            "open_pattern": r"(?: to=[^<\s]+<\|message\|>)?(?:<atem:function_calls>\s*)?"
            r'<atem:invoke name="(?P<name>[^"]+)">',
            "close_pattern": r"</atem:invoke>\s*(?:</atem:function_calls>)?(?:<\|eom\|><\|start\|>assistant)?",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r'<atem:parameter name="(?P<key>[^"]+)">(?P<value>.*?)</atem:parameter>',
                "value_parser": {"name": "text"},
            },
            "transform": _FUNCTION,
        },
        "content": {"open_pattern": r"(?: to=user)?<\|message\|>", "close_pattern": r"<\|eot\|>|$", "content": "text"},
    },
}

_RESPONSE_TEMPLATES = {
    deepseekv3_chat_template: _DEEPSEEKV3_RESPONSE,
    deepseekv3_training_chat_template: _DEEPSEEKV3_RESPONSE,
    diffusion_gemma_chat_template: gemma4_template,
    diffusion_gemma_training_chat_template: gemma4_template,
    muse_glimmer_chat_template: _MUSE_GLIMMER_RESPONSE,
    muse_glimmer_training_chat_template: _MUSE_GLIMMER_RESPONSE,
}


def add_missing_response_template(tokenizer: Any) -> None:
    """Give `tokenizer` a response template if it has none and its chat template is one TRL renders but cannot
    parse."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if tokenizer is None or not isinstance(tokenizer.chat_template, str):
        return
    if getattr(tokenizer, "response_template", None) is None:
        template = _RESPONSE_TEMPLATES.get(tokenizer.chat_template)
        if template is not None:
            tokenizer.response_template = copy.deepcopy(template)


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

    message: dict[str, Any]
    calls: list[ToolCall]


class _TolerantParser(ResponseParser):
    """Keeps calls that cannot be read as text, in their place, instead of failing the whole turn."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.unreadable: list[tuple[int, str]] = []
        super().__init__(*args, **kwargs)

    def _close_current(self, events: list[dict]) -> None:
        body = self._body
        field = self._current
        try:
            super()._close_current(events)
        except _UNREADABLE as error:
            if field != "tool_calls":
                raise
            reason = str(error).splitlines()[-1].removeprefix("Error: ")
            place = len(self._output.get("tool_calls", [])) + len(self.unreadable)
            self.unreadable.append((place, f"{reason} in {body.strip()[:200]!r}"))
            self._reset_to_implicit()


def parse_turn(text: str, response_template: dict, prefix: str, tools: Sequence[dict], eos_token: str, number: int):
    """
    Parse the text of one assistant turn.

    Args:
        text (`str`):
            Decoded turn, special tokens included.
        response_template (`dict`):
            The tokenizer's response template.
        prefix (`str`):
            Decoded context before the turn, at least from the start of the assistant's header.
        tools (`Sequence[dict]`):
            Schemas the prompt was rendered with; arguments written as text are typed with them.
        eos_token (`str`):
            Text of the end-of-sequence token, dropped from the end of the content.
        number (`int`):
            Index of the turn in its rollout, from which call identifiers are made.

    Returns:
        `ParsedTurn` or `None`: `None` if the turn as a whole cannot be read, so that it is plain text.
    """
    parser = _TolerantParser(response_template, prefix=prefix, tools=list(tools))
    try:
        parser.feed(text)
        message, _ = parser.finalize()
    except _UNREADABLE:
        return None
    if isinstance(message.get("content"), str):
        message["content"] = message["content"].removesuffix(eos_token)
    if not message.get("content"):
        message["content"] = ""
    written: list[Any] = list(message.pop("tool_calls", None) or [])
    for place, reason in parser.unreadable:
        written.insert(place, reason)
    calls = [_read_call(item, f"call_{number}_{index}") for index, item in enumerate(written)]
    valid = [
        {"type": "function", "function": {"name": call.name, "arguments": call.arguments}, "id": call.id}
        for call in calls
        if call.error is None
    ]
    if valid:
        message["tool_calls"] = valid
    return ParsedTurn(message, calls)


def _read_call(item: Any, identifier: str) -> ToolCall:
    """
    A call from what the response template made of it, or from the reason why it could make nothing of it.

    Escapes in JSON can write a lone surrogate, which is no character and which nothing behind here could encode.
    """
    if isinstance(item, str):
        return ToolCall(identifier, "", error=item)
    function: Any = item.get("function", item) if isinstance(item, dict) else {}
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        return ToolCall(identifier, "", error=f'a call needs a "name", got {json.dumps(item, default=str)[:200]}')
    name, arguments = encodable(name), function.get("arguments")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        kind = type(arguments).__name__
        return ToolCall(identifier, name, error=f'"arguments" of `{name}` must be an object, got {kind}')
    try:
        return ToolCall(identifier, name, encodable(arguments))
    except RecursionError:
        return ToolCall(identifier, name, error=f'"arguments" of `{name}` are nested too deep')
