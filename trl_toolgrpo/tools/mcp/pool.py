"""MCP servers for single rollouts: each rollout gets one from a pool, in its first state."""

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING

from .config import MCPServer


if TYPE_CHECKING:  # it needs the extra `mcp`
    from .connection import Connection


logger = logging.getLogger(__name__)

_RESET_TIMEOUT = 10.0


class Pool:
    """
    Instances of one server with `per_rollout`. All methods run on the event loop of the MCP servers.

    Args:
        server ([`MCPServer`]):
            The server.
        root (`str`):
            Folder in which each instance gets one of its own.
        connect (`Callable`):
            `connect(folder=folder)` makes the [`Connection`] of an instance, not yet started.
    """

    def __init__(self, server: MCPServer, root: str, connect: Callable[..., "Connection"]) -> None:
        self.server = server
        self._root = root
        self._connect = connect
        self._ready: list[asyncio.Task[Connection]] = []  # started, reset, or about to be
        self._wanted = 0
        self._instances: set[Connection] = set()
        self._ending: set[asyncio.Task[None]] = set()
        # Interpreters that start side by side on few cores would all miss their time limit.
        self._starts = asyncio.Semaphore(max(2, os.cpu_count() or 1))

    def prepare(self, count: int) -> None:
        """
        Begin to start instances, so that there is one for each of a number of rollouts, and end the surplus.

        Args:
            count (`int`):
                Rollouts that are about to begin.
        """
        self._wanted = count
        while len(self._ready) < count:
            self._begin(self._start())
        while len(self._ready) > count:
            self._end_later(self._ready.pop())

    async def first(self) -> "Connection":
        """
        Return an instance to read the tools from, which is then the first to be lent.

        Raises:
            MCPServerError: if it does not start.
        """
        self.prepare(1)
        return await asyncio.shield(self._ready[0])

    def acquire(self) -> "asyncio.Task[Connection]":
        """Lend an instance that is unused since its start or reset, which may still be under way and may fail."""
        if not self._ready:
            self._begin(self._start())
        task = next((task for task in self._ready if task.done()), self._ready[0])
        self._ready.remove(task)
        return task

    def release(self, task: "asyncio.Task[Connection]", usable: bool) -> None:
        """
        Take an instance back and make it, or another one, ready for the next rollout, unless there are enough; do not
        wait for that.

        Args:
            task (`asyncio.Task`):
                What `acquire` returned.
            usable (`bool`):
                Whether all its calls came to an end.
        """
        wanted = len(self._ready) < self._wanted
        reset = wanted and usable and self.server.reset_tool is not None
        if not reset:
            self._end_later(task)
        if wanted:
            self._begin(self._reset(task) if reset else self._start())

    async def close(self) -> None:
        """End every instance."""
        for task in self._ready:
            task.cancel()
        await asyncio.gather(*self._ready, *self._ending, return_exceptions=True)
        await asyncio.gather(*map(self._end, list(self._instances)))

    def _begin(self, work: Coroutine[object, object, "Connection"]) -> None:
        task = asyncio.create_task(work)
        self._ready.append(task)
        task.add_done_callback(self._drop_failed)

    def _drop_failed(self, task: "asyncio.Task[Connection]") -> None:
        """Lend no instance that did not start: whoever waits for it gets the error; the next call starts another."""
        if (task.cancelled() or task.exception() is not None) and task in self._ready:
            self._ready.remove(task)

    def _end_later(self, task: "asyncio.Task[Connection]") -> None:
        async def end() -> None:
            with contextlib.suppress(Exception):  # one that did not start has ended
                await self._end(await task)

        ending = asyncio.create_task(end())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def _start(self) -> "Connection":
        folder = None if self.server.cwd is not None else tempfile.mkdtemp(prefix="server-", dir=self._root)
        if folder is not None and self.server.files is not None:
            shutil.copytree(self.server.files, folder, dirs_exist_ok=True)
        instance = self._connect(folder=folder)
        self._instances.add(instance)
        try:
            async with self._starts:
                await instance.start()
        except BaseException:
            await self._end(instance)
            raise
        return instance

    async def _reset(self, task: "asyncio.Task[Connection]") -> "Connection":
        instance = await task
        reset = instance.call(str(self.server.reset_tool), {})
        try:
            result = await asyncio.wait_for(reset, self.server.timeout or _RESET_TIMEOUT)
            if not result.is_error:
                return instance
            reason = str(result.content)
        except TimeoutError:
            reason = "it did not return"
        logger.warning(
            "The MCP server %r was not reset by its tool `%s` (%s); a new one takes its place.",
            self.server.name,
            self.server.reset_tool,
            reason,
        )
        await self._end(instance)
        return await self._start()

    async def _end(self, instance: "Connection") -> None:
        if instance in self._instances:
            self._instances.remove(instance)
            await instance.close()
            if instance.folder is not None:
                shutil.rmtree(instance.folder, ignore_errors=True)
