"""What MCP servers answer, as `ToolResult`s."""

import json
from typing import Any

from ..redaction import Redactor
from .types import ToolResult


def tool_result(result: Any, redactor: Redactor) -> ToolResult:
    """
    Return the result of a call.

    The text is what the policy reads. Structured content takes its place where there is none, or where it is the same
    as JSON; images, audio and resources are named in brackets.

    Args:
        result (`mcp.types.CallToolResult`):
            What the server sent.
        redactor ([`Redactor`]):
            Knows the server's secrets.
    """
    text = "\n".join(_block_text(block) for block in result.content)
    structured = result.structured_content
    content: Any = text
    if structured is not None and not result.is_error and (not result.content or _is_json_of(text, structured)):
        content = structured
    return ToolResult(
        redactor.data(content), is_error=bool(result.is_error), error_type="error" if result.is_error else None
    )


def failed(message: str, redactor: Redactor) -> ToolResult:
    """
    Return the result of a call that the server did not answer.

    Args:
        message (`str`):
            Why.
        redactor ([`Redactor`]):
            Knows the server's secrets.
    """
    return ToolResult({"error": redactor.text(message)}, is_error=True, error_type="error")


def innermost(error: BaseException) -> BaseException:
    """
    Return the first exception in a group of exceptions, however deeply the groups are nested.

    Args:
        error (`BaseException`):
            Any exception.
    """
    while getattr(error, "exceptions", None):
        error = error.exceptions[0]  # type: ignore[attr-defined]
    return error


def _block_text(block: Any) -> str:
    if block.type == "text":
        return block.text
    if block.type in ("image", "audio"):
        return f"[{block.type}: {block.mime_type}, {_size(_decoded_length(block.data))}]"
    if block.type == "resource_link":
        return f"[resource: {_joined(block.title or block.name, str(block.uri), block.mime_type)}]"
    resource = block.resource
    text = getattr(resource, "text", None)
    if text is not None:
        return text
    size = _size(_decoded_length(resource.blob))
    return f"[resource: {_joined(str(resource.uri), resource.mime_type, size)}]"


def _joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def _decoded_length(data: str) -> int:
    return len(data) * 3 // 4 - data[-2:].count("=")


def _size(count: int) -> str:
    """Return a number of bytes in the unit people would use."""
    if count < 1000:
        return f"{count} bytes"
    return f"{round(count / 1000)} kB" if count < 1_000_000 else f"{round(count / 1_000_000)} MB"


def _is_json_of(text: str, structured: Any) -> bool:
    try:
        return json.loads(text) == structured
    except (ValueError, RecursionError):
        return False
