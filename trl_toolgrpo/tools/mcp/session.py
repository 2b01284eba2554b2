"""The MCP servers that one rollout has been lent, until it is over."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...types import JSONObject
from ..tool import ToolResult
from .pool import Pool
from .results import failed


if TYPE_CHECKING:  # it needs the extra `mcp`
    from .connection import Connection


class MCPSession:
    """
    The MCP servers of one rollout, as reward functions get them: its own servers, in the state in which the rollout
    has left them and until the next rollouts begin, and the shared ones.

    Args:
        call (`Callable`):
            `call(name, arguments, session)` calls a tool of the run and waits.
    """

    def __init__(self, call: Callable[[str, JSONObject, "MCPSession"], ToolResult]) -> None:
        self._call = call
        self._own: dict[str, asyncio.Task[Connection]] = {}
        self._unusable: set[str] = set()
        self._over = False

    def call(self, tool: str, /, **arguments: object) -> ToolResult:
        """
        Call a tool, for example to read the state that a rewarded rollout has brought about.

        Args:
            tool (`str`):
                Name of the tool in this run; or one that the policy does not get, since `tools` of its server leaves
                it out.
            arguments:
                Its arguments.

        Returns:
            [`ToolResult`]: what the server answered; an error is a result too.

        Raises:
            ToolNameError: if no server has the tool.
        """
        return self._call(tool, arguments, self)

    def folder(self, server: str) -> Path | None:
        """
        Return the working directory of one of the rollout's own servers.

        Args:
            server (`str`):
                Name of the server.

        Returns:
            `Path` or `None`: the folder; `None` if the rollout has not called the server.
        """
        task = self._own.get(server)
        if task is None or not task.done() or task.cancelled() or task.exception() is not None:
            return None
        folder = task.result().folder or task.result().server.cwd
        return None if folder is None else Path(folder)

    async def call_own(self, pool: Pool, tool: str, arguments: JSONObject) -> ToolResult:
        """
        Call a tool of one of the rollout's own servers; on the servers' loop.

        Args:
            pool ([`Pool`]):
                Where the server comes from.
            tool (`str`):
                Name of the tool on the server.
            arguments (`dict`):
                Its arguments.
        """
        server = pool.server
        if self._over:
            return failed("The rollout is over, and its server is no longer its own.", server.redactor)
        if server.name not in self._own:
            self._own[server.name] = pool.acquire()
        try:
            connection = await asyncio.shield(self._own[server.name])
        except Exception as error:
            self._own.pop(server.name, None)  # the next call tries again
            return failed(f"The tool is not available at the moment: {error}", server.redactor)
        try:
            return await connection.call(tool, arguments)
        except asyncio.CancelledError:
            self._unusable.add(server.name)  # what the call has done, or still does, is not known
            raise

    def give_back(self, pools: Mapping[str, Pool]) -> None:
        """
        Give the rollout's own servers back; on the servers' loop.

        Args:
            pools (`Mapping[str, Pool]`):
                Where they come from, by name.
        """
        self._over = True
        for name, task in self._own.items():
            pools[name].release(task, name not in self._unusable)
