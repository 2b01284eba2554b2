"""MCP servers of rollouts: one each, from a pool, without a trace of the rollout before.

Owns which server is free, lent or being made ready; fed by `mcp.py`. Runs on the event loop of the MCP servers.
"""

import asyncio
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from typing import Any

from ..errors import MCPServerError
from .mcp_config import MCPServer
from .mcp_connection import Connection


logger = logging.getLogger(__name__)

_RESET_TIMEOUT = 10.0


class Pool:
    """
    Instances of one server with `per_rollout`.

    Args:
        server ([`MCPServer`]):
            The server.
        root (`str`):
            Folder in which each instance gets one of its own.
        on_tools (`Callable`):
            Called with the names of an instance's tools each time they may have changed.
    """

    def __init__(self, server: MCPServer, root: str, on_tools: Callable[[set[str]], object]) -> None:
        self.server = server
        self._root = root
        self._on_tools = on_tools
        self._ready: list[asyncio.Task[Connection]] = []
        self._lent = 0
        self._ended_restarts = 0
        self._instances: set[Connection] = set()
        self._work: set[asyncio.Task[None]] = set()
        # Interpreters that start side by side on few cores would all miss their time limit.
        self._starts = asyncio.Semaphore(max(2, os.cpu_count() or 1))

    @property
    def restarts(self) -> int:
        """How often an instance has been started again after it had ended."""
        return self._ended_restarts + sum(instance.restarts for instance in list(self._instances))

    def prepare(self, count: int) -> None:
        """
        Begins to start instances, so many that there is one for each of a number of rollouts.

        Args:
            count (`int`):
                Rollouts in flight.
        """
        while len(self._ready) + self._lent < count:
            self._ready.append(self._begin(self._start()))

    async def first(self) -> Connection:
        """
        An instance to read the tools from, which is then the first to be lent.

        Raises:
            MCPServerError: if it does not start.
        """
        self.prepare(1)
        return await asyncio.shield(self._ready[0])

    async def acquire(self) -> Connection:
        """
        Lends an instance that nobody has used since it was started or reset.

        Raises:
            MCPServerError: if it does not start.
        """
        self._lent += 1
        # The first that is up, or else the first that will be
        up = [task for task in self._ready if task.done()]
        task = next(iter([*up, *self._ready]), None) or self._begin(self._start())
        if task in self._ready:
            self._ready.remove(task)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._lent -= 1
            self._ready.append(task)
            raise
        except MCPServerError:
            self._lent -= 1
            raise

    def release(self, instance: Connection, usable: bool = True) -> None:
        """
        Takes an instance back and makes it, or another one, ready for the next rollout; does not wait for that.

        Args:
            instance ([`Connection`]):
                The instance.
            usable (`bool`, *optional*, defaults to `True`):
                Whether all its calls came to an end.
        """
        self._lent -= 1
        if self.server.reset_tool is not None and usable:
            self._ready.append(self._begin(self._reset(instance)))
            return
        work = asyncio.create_task(self._end(instance))
        self._work.add(work)
        work.add_done_callback(self._work.discard)
        self._ready.append(self._begin(self._start()))

    async def close(self) -> None:
        """Ends every instance."""
        tasks = [*self._ready, *self._work]
        for task in list(self._ready):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await asyncio.gather(*(self._end(instance) for instance in list(self._instances)))

    def _begin(self, work: Coroutine[Any, Any, Connection]) -> "asyncio.Task[Connection]":
        task = asyncio.create_task(work)
        task.add_done_callback(self._drop_failed)
        return task

    def _drop_failed(self, task: "asyncio.Task[Connection]") -> None:
        """An instance that did not start is not lent; who waits for it is told why, and the next one tries again."""
        if (task.cancelled() or task.exception() is not None) and task in self._ready:
            self._ready.remove(task)

    async def _start(self) -> Connection:
        folder = None if self.server.cwd is not None else tempfile.mkdtemp(prefix="server-", dir=self._root)
        if folder is not None and self.server.files is not None:
            shutil.copytree(self.server.files, folder, dirs_exist_ok=True)
        instance = Connection(self.server, folder, self._on_tools)
        self._instances.add(instance)
        try:
            async with self._starts:
                await instance.start()
        except BaseException:
            await self._end(instance)
            raise
        return instance

    async def _reset(self, instance: Connection) -> Connection:
        reset = instance.call(str(self.server.reset_tool), {})
        try:
            result = await asyncio.wait_for(reset, self.server.timeout or _RESET_TIMEOUT)
            reason = str(result.content) if result.is_error else None
        except asyncio.TimeoutError:
            reason = "it did not return"
        if reason is None:
            return instance
        logger.warning(
            "The MCP server %r was not reset by its tool `%s` (%s); a new one takes its place.",
            self.server.name,
            self.server.reset_tool,
            reason,
        )
        await self._end(instance)
        return await self._start()

    async def _end(self, instance: Connection) -> None:
        if instance in self._instances:
            self._instances.remove(instance)
            self._ended_restarts += instance.restarts
            await instance.close()
            if instance.folder is not None:
                shutil.rmtree(instance.folder, ignore_errors=True)
