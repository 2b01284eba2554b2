"""Checks that the chat template can carry a conversation with tools, token by token, whatever a tool returns.

Each is tried on the trainer's own chat handling.
"""

from collections.abc import Sequence
from itertools import takewhile

from ..chat.tool_chat import ToolChat, tool_message
from ..tools.tool import Tool, ToolCall
from ..types import JSONObject, JSONSchema
from .result import FAULT, NOTE, OK, CheckResult


REMEDY = "Use a template TRL ships (trl/chat_templates), whose calls are known to be read."


def check_chat(chat: ToolChat, tools: list[Tool]) -> list[CheckResult]:
    """
    Check a template.

    Args:
        chat (`ToolChat`):
            The trainer's chat handling.
        tools (`list[Tool]`):
            Tools known before a rollout.
    """
    return [_check_prefix(chat), _check_calls(chat, tools), _check_output(chat)]


def _check_prefix(chat: ToolChat) -> CheckResult:
    subject = "template: prefixes"
    result = {"role": "tool", "name": "tool", "content": "result"}
    call, whole = (chat.render_call("tool", {"argument": "value"}, results) for results in ([], [result]))
    if whole.startswith(call):
        return CheckResult(subject, OK, "What is written stays as it is when a tool's result follows.")
    same = _shared_length(call, whole)
    message = f"A result changes the text before it: {call[same : same + 40]!r} becomes {whole[same : same + 40]!r}."
    return CheckResult(subject, FAULT, message, "Use a template that renders earlier messages alike whatever follows.")


def _check_calls(chat: ToolChat, tools: list[Tool]) -> CheckResult:
    subject = "template: calls"
    for tool in tools:
        given = example_arguments(tool.parameters)
        ids, opening = _calling_turn(chat, tool.name, given)
        calls = chat.parse(ids, opening, [tool.schema], 0).calls
        if len(calls) != 1 or calls[0].error is not None or calls[0].name != tool.name or calls[0].arguments != given:
            read = "no call" if not calls else calls[0].error or f"{calls[0].name}({calls[0].arguments})"
            message = f"A call {tool.name}({given}), as the template writes it, is read as {read}."
            return CheckResult(subject, FAULT, message, REMEDY)
    count = f"{len(tools)} tool{'' if len(tools) == 1 else 's'}"
    return CheckResult(subject, OK, f"Calls of {count} are read as the template writes them.")


def _calling_turn(chat: ToolChat, name: str, arguments: JSONObject) -> tuple[list[int], str]:
    """Return the tokens of an assistant turn that makes a call, and the text before it."""
    opening = chat.encode(chat.render([{"role": "user", "content": "dummy"}], add_generation_prompt=True))
    ids = chat.encode(chat.render_call(name, arguments))
    start = _shared_length(opening, ids)
    end = next((place + 1 for place in range(start, len(ids)) if ids[place] in chat.stop_ids), len(ids))
    return ids[start:end], chat.tokenizer.decode(ids[:start])


def _shared_length(first: Sequence[object], second: Sequence[object]) -> int:
    """Number of characters or tokens that two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def example_arguments(schema: JSONSchema) -> JSONObject:
    """
    Return arguments that fit a schema, for its properties of plain types.

    Args:
        schema (`dict`):
            JSON schema of a tool's parameters.
    """
    plain: JSONObject = {"string": "a word", "integer": 7, "number": 1.5, "boolean": True}
    properties = schema.get("properties") or {}
    inner = {name: part for name, part in properties.items() if isinstance(part, dict)}
    choices = {name: part.get("enum") or [plain.get(str(part.get("type")))] for name, part in inner.items()}
    return {name: values[0] for name, values in choices.items() if values[0] is not None}


def _check_output(chat: ToolChat) -> CheckResult:
    """Check that a result made of every control token comes out as text."""
    subject = "template: tool output"
    hostile = "".join(chat.tokenizer.decode([id]) for id in sorted(chat.control_ids)) * 2
    call = ToolCall("call_0_0", "tool")
    last = min(chat.stop_ids)
    tame, wild = (chat.tool_suffix(last, [tool_message(call, text)])[0] for text in ("result", hostile))
    control = [[id for id in ids if id in chat.control_ids] for ids in (tame, wild)]
    if control[0] != control[1]:
        forged = chat.tokenizer.decode([id for id in control[1] if id not in control[0]][:4])
        return CheckResult(subject, FAULT, f"A result that contains control tokens forges them: {forged!r}.", REMEDY)
    message = f"No tool result can contain any of the {len(chat.control_ids)} control tokens."
    return CheckResult(subject, OK, message)


def check_tools(
    tools: list[Tool], at_reset: bool, prompt_tokens: int | None, suspicious: Sequence[str] = ()
) -> CheckResult:
    """
    Check what the policy may call.

    Args:
        tools (`list[Tool]`):
            Tools known before a rollout.
        at_reset (`bool`):
            Whether environments bring more.
        prompt_tokens (`int`, *optional*):
            Tokens their descriptions take.
        suspicious (`Sequence[str]`, *optional*, defaults to `()`):
            Warnings about names in prompts that resemble a tool's.
    """
    if not tools and not at_reset:
        message = "The run has no tools, so every rollout is one turn."
        return CheckResult("tools", NOTE, message, "Pass `tools`, an `environment_factory` or `mcp_servers`.")
    names = ", ".join(tool.name for tool in tools[:8]) + (" and more" if len(tools) > 8 else "")
    more = ("; " if names else "") + "each environment brings its own at reset" if at_reset else ""
    cost = f" Their descriptions are {prompt_tokens} tokens of every prompt." if prompt_tokens else ""
    state, remedy = (NOTE, "Correct the prompt where a tool is meant.") if suspicious else (OK, "")
    return CheckResult("tools", state, " ".join([f"{names}{more}.{cost}", *suspicious]), remedy)
