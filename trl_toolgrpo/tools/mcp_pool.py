"""MCP servers of rollouts: one each, from a pool, without a trace of the rollout before.

Owns which server is free, lent or being made ready; fed by `mcp.py`. Runs on the event loop of the MCP servers.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from typing import Any

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
        self._wanted = 0
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
        Begins to start instances, so many that there is one for each of a number of rollouts. What is more than that
        ends when the next one is taken back.

        Args:
            count (`int`):
                Rollouts in flight.
        """
        self._wanted = count
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
        self._wanted = max(self._wanted, self._lent)
        # The first that is up, or else the first that will be
        up = [task for task in self._ready if task.done()]
        task = next(iter([*up, *self._ready]), None) or self._begin(self._start())
        if task in self._ready:
            self._ready.remove(task)
        try:
            return await asyncio.shield(task)
        except BaseException as error:
            self._lent -= 1
            if isinstance(error, asyncio.CancelledError):
                self._ready.append(task)
            raise

    def release(self, instance: Connection, usable: bool = True) -> None:
        """
        Takes an instance back and makes it, or another one, ready for the next rollout, if there will be one; does not
        wait for that.

        Args:
            instance ([`Connection`]):
                The instance.
            usable (`bool`, *optional*, defaults to `True`):
                Whether all its calls came to an end.
        """
        self._lent -= 1
        wanted = len(self._ready) + self._lent < self._wanted
        if wanted and self.server.reset_tool is not None and usable:
            self._ready.append(self._begin(self._reset(instance)))
            return
        self._go_on(self._end(instance))
        if wanted:
            self._ready.append(self._begin(self._start()))
        while self._ready and len(self._ready) + self._lent > self._wanted:
            self._go_on(self._end_when_up(self._ready.pop()))

    async def close(self) -> None:
        """Ends every instance."""
        tasks = [*self._ready, *self._work]
        for task in list(self._ready):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await asyncio.gather(*(self._end(instance) for instance in list(self._instances)))

    def _go_on(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

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
        except TimeoutError:
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

    async def _end_when_up(self, task: "asyncio.Task[Connection]") -> None:
        with contextlib.suppress(Exception):  # one that did not start has ended
            await self._end(await task)

    async def _end(self, instance: Connection) -> None:
        if instance in self._instances:
            self._instances.remove(instance)
            self._ended_restarts += instance.restarts
            await instance.close()
            if instance.folder is not None:
                shutil.rmtree(instance.folder, ignore_errors=True)
