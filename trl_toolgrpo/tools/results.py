"""Results in the words the policy reads.

Owns the text of a result and of every failure of the runtime; fed by what tools return and raise.
"""

import json
import math
from collections.abc import Collection
from typing import Any

from ..errors import TransientToolError
from .types import ToolCall, ToolResult


def result_text(result: ToolResult) -> str:
    """
    The text of a tool message.

    Strings stay as they are, dicts and lists become JSON, a list of text blocks the blocks' lines, and an error a JSON
    object `{"error": ...}`. Whatever a tool returned has a text that can be encoded as UTF-8; nothing is raised.

    Args:
        result ([`ToolResult`]):
            What the tool gave back.

    Returns:
        `str`: The text.
    """
    content = result.content
    if result.is_error and not isinstance(content, dict):
        content = {"error": _plain_text(content)}
    return encodable(_plain_text(content))


def refused(error_type: str, message: str) -> ToolResult:
    """
    A call that was not run.

    Args:
        error_type (`str`):
            One of the types of [`ToolResult`].
        message (`str`):
            Why, and what to do.

    Returns:
        [`ToolResult`]: The result.
    """
    return ToolResult({"error": message}, is_error=True, error_type=error_type)


def raised(error: BaseException) -> ToolResult:
    """
    A call whose tool raised.

    Args:
        error (`BaseException`):
            What it raised.

    Returns:
        [`ToolResult`]: The result; transient for [`TransientToolError`].
    """
    message = _safe_str(error) or type(error).__name__
    transient = isinstance(error, TransientToolError)
    return ToolResult({"error": message}, is_error=True, error_type="error", transient=transient)


def unknown_tool(call: ToolCall, available: Collection[str]) -> ToolResult:
    """
    A call of a tool that does not exist.

    Args:
        call ([`ToolCall`]):
            The call.
        available (`Collection[str]`):
            Names of the tools the rollout has.

    Returns:
        [`ToolResult`]: The result.
    """
    names = ", ".join(f"`{name}`" for name in available)
    ending = f" Available tools: {names}." if names else ""
    return refused("unknown_tool", f"Tool `{call.name}` does not exist.{ending}")


def malformed(call: ToolCall) -> ToolResult:
    """
    A call that could not be read.

    Args:
        call ([`ToolCall`]):
            The call, with its `error`.

    Returns:
        [`ToolResult`]: The result.
    """
    reason = (call.error or "").strip().rstrip(".")
    return refused(
        "malformed",
        f"The tool call could not be read: {reason}. Nothing was run. Write the call again in the format given for "
        f"tool calls, with the tool's name and a JSON object of arguments.",
    )


def encodable(value: Any) -> Any:
    """
    JSON data whose texts can be encoded as UTF-8, keys included: a lone surrogate, as `json.loads` makes of an emoji
    that was cut in two, becomes U+FFFD.

    Args:
        value (`Any`):
            Strings, dicts and lists are gone through; anything else is returned as it is.

    Raises:
        RecursionError: if it is nested too deep.
    """
    if isinstance(value, dict):
        return {encodable(key): encodable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [encodable(inner) for inner in value]
    if not isinstance(value, str):
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        # A surrogate pair is one character; a lone surrogate is none.
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def plain_reward(reward: Any, giver: str) -> float | None:
    """
    A reward as a number.

    Args:
        reward (`Any`):
            A number, also one of numpy or torch; or `None`.
        giver (`str`):
            Who gave it, for the message.

    Raises:
        ValueError: if it is anything else, or not finite.
    """
    if reward is None:
        return None
    try:
        number = math.nan if isinstance(reward, (str, bytes)) else float(reward)
    except Exception:  # whatever the object raises
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{giver} gave the reward {_safe_str(reward)[:200]!r}, which is no finite number. Give a float, or None "
            f"for no reward."
        )
    return number


def plain_content(content: Any) -> Any:
    """
    What a tool returned as plain data of its own: later changes to the tool's objects do not reach it.

    Args:
        content (`Any`):
            Whatever a tool returned.

    Returns:
        `Any`: JSON scalars as they are, dicts and lists as JSON holds them, anything else as its text. Nothing is
        raised.
    """
    if content is None or isinstance(content, (str, bool, int, float)):
        return content
    if isinstance(content, (dict, list, tuple)):
        try:
            return json.loads(json.dumps(content, ensure_ascii=False, default=_safe_str))
        except BaseException:
            return _safe_str(content)
    return _safe_str(content)


def _plain_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(_is_text_block(block) for block in content):
        return "\n".join(block["text"] for block in content)
    if isinstance(content, (dict, list, tuple)):
        try:
            return json.dumps(content, ensure_ascii=False, default=str)
        except BaseException:
            # Cyclic, too deep, exotic keys, or an object inside whose `str` fails.
            return _safe_str(content)
    return _safe_str(content)


def _is_text_block(block: Any) -> bool:
    return (
        isinstance(block, dict)
        and block.keys() == {"type", "text"}
        and block["type"] == "text"
        and isinstance(block["text"], str)
    )


def _safe_str(value: Any) -> str:
    try:
        return str(value)
    except BaseException:  # this runs at the tool's boundary
        return f"<{type(value).__name__}>"
