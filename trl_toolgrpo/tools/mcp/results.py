"""What MCP servers answer, as `ToolResult`s."""

import json
from typing import TYPE_CHECKING

from ...redaction import Redactor
from ...types import JSONObject, JSONValue
from ..results import failure
from ..tool import ToolResult


if TYPE_CHECKING:
    from mcp_types import CallToolResult, ContentBlock


def tool_result(result: "CallToolResult", redactor: Redactor) -> ToolResult:
    """
    Return the result of a call.

    The text is what the policy reads. Structured content takes its place where there is none, or where it is the same
    as JSON; images, audio and resources are named in brackets.

    Args:
        result (`mcp_types.CallToolResult`):
            What the server sent.
        redactor ([`Redactor`]):
            Knows the server's secrets.
    """
    text = "\n".join(_block_text(block) for block in result.content)
    structured = result.structured_content
    content: JSONValue = text
    if structured is not None and not result.is_error and (not result.content or _is_json_of(text, structured)):
        content = structured
    is_error = bool(result.is_error)
    return ToolResult(redactor.data(content), is_error, error_type="error" if is_error else None)


def failed(message: str, redactor: Redactor) -> ToolResult:
    """
    Return the result of a call that the server did not answer.

    Args:
        message (`str`):
            Why.
        redactor ([`Redactor`]):
            Knows the server's secrets.
    """
    return failure("error", redactor.text(message))


def innermost(error: BaseException) -> BaseException:
    """
    Return the first exception in a group of exceptions, however deeply the groups are nested.

    Args:
        error (`BaseException`):
            An exception, or a group of them.
    """
    while getattr(error, "exceptions", None):
        error = error.exceptions[0]  # type: ignore[attr-defined]
    return error


def _block_text(block: "ContentBlock") -> str:
    if block.type == "text":
        return block.text
    if block.type == "image" or block.type == "audio":
        return f"[{block.type}: {block.mime_type}, {_size(block.data)}]"
    if block.type == "resource_link":
        return f"[resource: {_comma_separated(block.title or block.name, str(block.uri), block.mime_type)}]"
    resource = block.resource
    blob = getattr(resource, "blob", None)
    if blob is None:
        return getattr(resource, "text", "")
    return f"[resource: {_comma_separated(str(resource.uri), resource.mime_type, _size(blob))}]"


def _comma_separated(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def _size(base64: str) -> str:
    """Return the size of encoded bytes in the unit people would use."""
    count = len(base64) * 3 // 4 - base64[-2:].count("=")
    if count < 1000:
        return f"{count} bytes"
    return f"{round(count / 1000)} kB" if count < 1_000_000 else f"{round(count / 1_000_000)} MB"


def _is_json_of(text: str, structured: JSONObject) -> bool:
    try:
        return json.loads(text) == structured
    except (ValueError, RecursionError):
        return False
