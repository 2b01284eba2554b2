"""Questions about a company and the time of day that two MCP servers answer."""

from .task import build_mcp


__all__ = ["build_mcp"]
