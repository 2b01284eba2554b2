"""The MCP task: questions about a company and about the time of day, which two MCP servers answer."""

from .task import build_mcp


__all__ = ["build_mcp"]
