"""Results of tools: as plain data, and as the text that the policy reads.

Logs, templates and other processes read results as JSON, and `json` does not write much of what tools return: neither
arrays nor dataclasses, nor keys other than strings.
"""

import ast
import contextlib
import dataclasses
import enum
import functools
import inspect
import json
import math
import re
from collections.abc import AsyncIterator, Awaitable, Collection, Iterator, Mapping, Sequence, Set, ValuesView
from typing import Any

from ..errors import TransientToolError
from ..redaction import Redactor
from ..types import JSONValue, map_texts
from .tool import ToolCall, ToolResult


_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+")
"""How Python writes an object that has no text of its own."""


def result_text(result: ToolResult) -> str:
    """
    Return the text of a tool message.

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


def without_secrets(result: ToolResult, redactor: Redactor) -> ToolResult:
    """
    Return a result that repeats no secret, since what the policy reads is logged as tokens and text.

    Args:
        result ([`ToolResult`]):
            What the tool gave back.
        redactor ([`Redactor`]):
            Knows the secrets of the run.
    """
    try:
        content = redactor.data(result.content)
    except RecursionError:
        content = redactor.text(_plain_text(result.content))
    return result if content == result.content else dataclasses.replace(result, content=content)


def as_result(value: object) -> ToolResult:
    """
    Return what a tool returned as a result of plain data.

    Args:
        value (`object`):
            A [`ToolResult`], or the content of one.

    Raises:
        TypeError: if the content has no text (see [`plain_content`]).
        ValueError: if the reward is no finite number.
    """
    given = value if isinstance(value, ToolResult) else ToolResult(value)
    failed = bool(given.is_error)
    kind = str(given.error_type or "error") if failed else None
    content, reward = plain_content(given.content), plain_reward(given.reward, "The tool")
    return ToolResult(content, failed, kind, reward, bool(given.transient), bool(given.truncated))


def failure(error_type: str, message: str, transient: bool = False) -> ToolResult:
    """
    Return the result of a call that failed, or was not run.

    Args:
        error_type (`str`):
            One of the types of [`ToolResult`].
        message (`str`):
            Why, and what to do.
        transient (`bool`, *optional*, defaults to `False`):
            Whether the same call may work if it is tried again.
    """
    return ToolResult({"error": message}, is_error=True, error_type=error_type, transient=transient)


def raised(error: BaseException) -> ToolResult:
    """
    Return the result of a call whose tool raised; it is transient for [`TransientToolError`].

    Args:
        error (`BaseException`):
            What it raised.
    """
    return failure("error", _exception_text(error), transient=isinstance(error, TransientToolError))


def _exception_text(error: BaseException) -> str:
    """Return what an exception says, with its type where that is a mere value: a KeyError's key, an exit code."""
    kind, text = type(error).__name__, _safe_str(error)
    if isinstance(error, BaseExceptionGroup):  # a task group of a tool: its own text only counts them
        return "; ".join([f"{kind}: {text}", *map(_exception_text, error.exceptions)])
    if not text.strip():
        return kind
    is_value = type(error).__str__ is KeyError.__str__ or (len(error.args) == 1 and not isinstance(error.args[0], str))
    return f"{kind}: {text}" if is_value or _is_literal(text) else text


def _is_literal(text: str) -> bool:
    """Return whether a text is a number, a quoted text or another plain value of Python."""
    with contextlib.suppress(Exception):
        ast.literal_eval(text if len(text) <= 1000 else "")
        return True
    return False


def unknown_tool(call: ToolCall, available: Collection[str]) -> ToolResult:
    """
    Return the result of a call of a tool that does not exist.

    Args:
        call ([`ToolCall`]):
            The call.
        available (`Collection[str]`):
            Names of the tools the rollout has.
    """
    names = ", ".join(f"`{name}`" for name in available)
    ending = f" Available tools: {names}." if names else ""
    return failure("unknown_tool", f"Tool `{call.name}` does not exist.{ending}")


def malformed(call: ToolCall) -> ToolResult:
    """
    Return the result of a call that could not be read.

    Args:
        call ([`ToolCall`]):
            The call, with its `error`.
    """
    reason = (call.error or "").strip().rstrip(".")
    return failure(
        "malformed",
        f"The tool call could not be read: {reason}. Nothing was run. Write the call again in the format given for "
        f"tool calls, with the tool's name and a JSON object of arguments.",
    )


def encodable(value: JSONValue) -> JSONValue:
    """
    Return JSON data whose texts can be encoded as UTF-8, keys included: a lone surrogate, as `json.loads` makes of an
    emoji that was cut in two, becomes U+FFFD.

    Args:
        value (`Any`):
            JSON data.

    Raises:
        RecursionError: if it is nested too deep.
    """
    # A surrogate pair is one character; a lone surrogate is none.
    return map_texts(lambda text: text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), value)


def plain_reward(reward: Any, giver: str) -> float | None:
    """
    Return a reward as a number.

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
            f"{giver} gave the reward {_safe_str(reward)[:200]!r}, which is not a finite number."
        )
    return number


def plain_content(content: object) -> JSONValue:
    """
    Return what a tool returned as plain data of its own: later changes to the tool's objects do not reach it.

    Args:
        content (`object`):
            Whatever a tool returned.

    Returns:
        `Any`: JSON scalars as they are. Mappings become dicts; keys that are not strings become the JSON text of the
        key (a tuple `(1, 2)` the key `"[1, 2]"`). Lists, tuples, sets (in the order of their JSON text), ranges,
        and arrays of numpy and torch become lists; dataclasses and pydantic models become dicts; members of an `Enum`
        become their values, and bytes their UTF-8 text. Anything else becomes its text, as `str` gives it.

    Raises:
        TypeError: for an iterator, a function or an object whose text is its address in memory: none of them says
            anything, and the address would differ from run to run.
    """
    try:
        return _plain(content)
    except RecursionError:  # cyclic, or nested too deep for JSON
        return _safe_str(content)


def _plain(value: Any) -> JSONValue:
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return _plain_dict(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).decode("utf-8", "replace")
    if type(value).__module__.partition(".")[0] in ("numpy", "torch") and callable(getattr(value, "tolist", None)):
        listed = value.tolist()  # numpy's wide floats stay what they are
        return _safe_str(value) if type(listed) is type(value) else _plain(listed)
    if isinstance(value, Set):
        return sorted(map(_plain, value), key=_json_text)
    if isinstance(value, (Sequence, ValuesView)):
        return [_plain(inner) for inner in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(type(value), "model_dump", None)):  # pydantic
        return _plain(value.model_dump(mode="json"))
    return _plain_object(value)


def _plain_dict(value: Mapping[object, object]) -> JSONValue:
    pairs = [(_key_text(key), _plain(inner)) for key, inner in value.items()]
    plain = dict(pairs)
    return plain if len(plain) == len(pairs) else [list(pair) for pair in pairs]  # as 1 and "1" have one text


def _key_text(key: object) -> str:
    plain = _plain(key)
    return plain if isinstance(plain, str) else _json_text(plain)


def _json_text(value: JSONValue) -> str:
    return json.dumps(value, ensure_ascii=False)


def _plain_object(value: object) -> str:
    text = _safe_str(value)
    iterates = isinstance(value, (Iterator, AsyncIterator, Awaitable))
    if iterates or inspect.isroutine(value) or isinstance(value, functools.partial) or _ADDRESS.search(text):
        kind = type(value).__name__
        advice = "a list of what it gives" if iterates else "text, or data that JSON can hold"
        raise TypeError(f"The tool returned an object of type {kind}, which has no text. It should return {advice}.")
    return text


def _plain_text(content: JSONValue) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(_is_text_block(block) for block in content):
        return "\n".join(block["text"] for block in content)
    if isinstance(content, (dict, list, tuple)):
        # Cyclic, too deep, exotic keys: content that no tool of a run has given
        with contextlib.suppress(BaseException):
            return json.dumps(content, ensure_ascii=False, default=_safe_str)
    return _safe_str(content)


def _is_text_block(block: JSONValue) -> bool:
    is_bare = isinstance(block, dict) and block.keys() == {"type", "text"}
    return is_bare and block["type"] == "text" and isinstance(block["text"], str)


def _safe_str(value: object) -> str:
    try:
        return str(value)
    except BaseException:  # this runs at the tool's boundary
        return f"<{type(value).__name__}>"
