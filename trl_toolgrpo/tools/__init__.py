"""What a tool is and how a call of it is run."""

from .execute import ToolExecutor
from .functions import as_tool, environment_tools, index_tools
from .python import python_tool
from .results import result_text
from .types import Tool, ToolCall, ToolResult


__all__ = [
    "Tool",
    "ToolCall",
    "ToolExecutor",
    "ToolResult",
    "as_tool",
    "environment_tools",
    "index_tools",
    "python_tool",
    "result_text",
]
