"""Whether the chat template can carry a conversation with tools, token by token, and nothing a tool says can break it.

Owns the questions about template and tools; each is tried on the trainer's own chat handling.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from ..rollout.chat import ToolChat, tool_message
from ..tools.types import Tool, ToolCall
from .findings import FAULT, NOTE, OK, Finding


REMEDY = "Use a template TRL ships (trl/chat_templates), whose calls are known to be read."


def check_chat(chat: ToolChat, tools: list[Tool]) -> list[Finding]:
    """
    The questions about a template.

    Args:
        chat (`ToolChat`):
            The trainer's chat handling.
        tools (`list[Tool]`):
            Tools known before a rollout.
    """
    return [_check_prefix(chat), _check_calls(chat, tools), _check_output(chat)]


def _check_prefix(chat: ToolChat) -> Finding:
    subject = "template: prefixes"
    result = {"role": "tool", "name": "tool", "content": "result"}
    call, whole = (chat.render_call("tool", {"argument": "value"}, results) for results in ([], [result]))
    if whole.startswith(call):
        return Finding(subject, OK, "What is written stays as it is when a tool's result follows.")
    same = _shared(call, whole)
    words = f"A result changes the text before it: {call[same : same + 40]!r} becomes {whole[same : same + 40]!r}."
    return Finding(subject, FAULT, words, "Use a template that renders earlier messages alike whatever follows.")


def _check_calls(chat: ToolChat, tools: list[Tool]) -> Finding:
    subject = "template: calls"
    for tool in tools:
        given = example_arguments(tool.parameters)
        ids, opening = _turn(chat, tool.name, given)
        calls = chat.parse(ids, opening, [tool.schema], 0).calls
        if len(calls) != 1 or calls[0].error is not None or calls[0].name != tool.name or calls[0].arguments != given:
            read = "no call" if not calls else calls[0].error or f"{calls[0].name}({calls[0].arguments})"
            words = f"A call {tool.name}({given}), as the template writes it, is read as {read}."
            return Finding(subject, FAULT, words, REMEDY)
    count = len(tools)
    return Finding(
        subject, OK, f"Calls of {count} tool{'' if count == 1 else 's'} are read as the template writes them."
    )


def _turn(chat: ToolChat, name: str, arguments: dict[str, Any]) -> tuple[list[int], str]:
    """Tokens of an assistant turn that makes a call, and the text before it."""
    opening = chat.encode(chat.render([{"role": "user", "content": "dummy"}], add_generation_prompt=True))
    ids = chat.encode(chat.render_call(name, arguments))
    start = _shared(opening, ids)
    end = next((place + 1 for place in range(start, len(ids)) if ids[place] in chat.stop_ids), len(ids))
    return ids[start:end], chat.tokenizer.decode(ids[:start])


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Characters or tokens that two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def example_arguments(schema: dict[str, Any]) -> dict[str, Any]:
    """
    Arguments that fit a schema, for its properties of plain types.

    Args:
        schema (`dict`):
            JSON schema of a tool's parameters.
    """
    plain = {"string": "a word", "integer": 7, "number": 1.5, "boolean": True}
    found = {}
    for name, inner in (schema.get("properties") or {}).items():
        if isinstance(inner, dict) and inner.get("enum"):
            found[name] = inner["enum"][0]
        elif isinstance(inner, dict) and isinstance(inner.get("type"), str) and inner["type"] in plain:
            found[name] = plain[inner["type"]]
    return found


def _check_output(chat: ToolChat) -> Finding:
    """Whether a result made of every control token comes out as text."""
    subject = "template: tool output"
    hostile = "".join(chat.tokenizer.decode([id]) for id in sorted(chat.control_ids)) * 2
    call = ToolCall("call_0_0", "tool")
    last = min(chat.stop_ids)
    tame, wild = (chat.tool_suffix(last, [tool_message(call, text)])[0] for text in ("result", hostile))
    control = [[id for id in ids if id in chat.control_ids] for ids in (tame, wild)]
    if control[0] != control[1]:
        forged = chat.tokenizer.decode([id for id in control[1] if id not in control[0]][:4])
        words = f"A result that contains control tokens forges them: {forged!r}."
        return Finding(subject, FAULT, words, REMEDY)
    words = f"None of {len(chat.control_ids)} control tokens can come of what a tool returns."
    return Finding(subject, OK, words)


def check_tools(
    tools: list[Tool], at_reset: bool, prompt_tokens: int | None, suspicious: Sequence[str] = ()
) -> Finding:
    """
    What the policy may call.

    Args:
        tools (`list[Tool]`):
            Tools known before a rollout.
        at_reset (`bool`):
            Whether environments bring more.
        prompt_tokens (`int`, *optional*):
            Tokens their descriptions take.
        suspicious (`Sequence[str]`, *optional*, defaults to `()`):
            What was said of names in prompts that resemble a tool's.
    """
    if not tools and not at_reset:
        words = "The run has no tools, so every rollout is one turn."
        return Finding("tools", NOTE, words, "Pass `tools`, an `environment_factory` or `mcp_servers`.")
    names = ", ".join(tool.name for tool in tools[:8]) + (" and more" if len(tools) > 8 else "")
    more = ("; " if names else "") + "each environment brings its own at reset" if at_reset else ""
    cost = f" Their descriptions are {prompt_tokens} tokens of every prompt." if prompt_tokens else ""
    if suspicious:
        words = f"{names}{more}.{cost} {' '.join(suspicious)}"
        return Finding("tools", NOTE, words, "Correct the prompt where a tool is meant.")
    return Finding("tools", OK, f"{names}{more}.{cost}")
