"""Questions about a company, answered with tools over an SQLite database."""

from .environment import WorkspaceEnvironment
from .task import build_workspace


__all__ = ["WorkspaceEnvironment", "build_workspace"]
