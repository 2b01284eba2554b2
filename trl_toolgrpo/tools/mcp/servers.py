"""The MCP servers of a run, and their tools as `Tool`s.

The servers have an event loop of their own, not the executor's: a tool that blocks that one cannot hurt a connection.
"""

import asyncio
import contextlib
import importlib.util
import logging
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from ...errors import ToolNameError, ToolRuntimeError, ToolSchemaError
from ...redaction import redact_logs
from ...types import JSONObject
from ..arguments import check_schema
from ..results import failure
from ..runtime.worker_threads import LoopThread
from ..tool import Tool, ToolResult
from .config import MCPServer
from .pool import Pool
from .session import MCPSession
from .tool_names import ToolOrigin, choose_tools, name_tools, tools_left_out


if TYPE_CHECKING:
    import mcp_types

    from .connection import Connection


T = TypeVar("T")

logger = logging.getLogger(__name__)

_CLOSING = 15.0
_REWARD_TIMEOUT = 60.0


class MCPTools:
    """
    The servers of a run, started at once and kept running until `close`.

    Args:
        servers (`Sequence[MCPServer]`):
            The servers.
        taken (`Collection[str]`, *optional*, defaults to `()`):
            Names of the run's other tools.

    Raises:
        ImportError: if the `mcp` package is not installed.
        MCPServerError: if a server does not start.
        ToolSchemaError, ToolNameError: for a tool without a usable schema, or with another's name.
    """

    def __init__(self, servers: Sequence[MCPServer], taken: Collection[str] = ()) -> None:
        if importlib.util.find_spec("mcp") is None:
            raise ImportError(
                "You passed `mcp_servers`, which need the package mcp (2.0 or later), and it is not installed. Run "
                "`pip install 'trl_toolgrpo[mcp]'`."
            )
        from .connection import SDK_LOGGERS

        self.servers = {server.name: server for server in servers}
        self._loop = LoopThread()
        self._folder = tempfile.TemporaryDirectory(prefix="trl_toolgrpo_mcp_")
        self._shared: dict[str, Connection] = {}
        self._pools: dict[str, Pool] = {}
        self._restarts: Counter[str] = Counter()
        self._counted: Counter[str] = Counter()
        self._warned: set[str] = set()
        self._closed = False
        self._origins: dict[str, ToolOrigin] = {}
        for server in servers:
            redact_logs(SDK_LOGGERS, server.redactor)
        try:
            listed = self._submit(self._start()).result()
            chosen = {name: choose_tools(self.servers[name], tools) for name, tools in listed.items()}
            self._origins = name_tools(chosen, taken)
            others = {name: set(tools) - {self.servers[name].reset_tool} for name, tools in listed.items()}
            # What a reward function may call, which includes tools that the policy does not get
            self._callable = {**tools_left_out(others, chosen, self._origins), **self._origins}
            self.tools = [self._tool(name, chosen[of.server][of.tool]) for name, of in self._origins.items()]
        except BaseException:
            self.close()
            raise

    def session(self) -> MCPSession:
        """Return the servers as one rollout has them."""
        return MCPSession(self.call)

    def of_rollout(self, tools: dict[str, Tool], session: MCPSession) -> tuple[dict[str, Tool], frozenset[str]]:
        """
        Return the tools of a rollout, those of servers with `per_rollout` bound to servers of its own.

        Args:
            tools (`dict[str, Tool]`):
                Tools by name.
            session ([`MCPSession`]):
                The rollout's servers.

        Returns:
            `tuple[dict[str, Tool], frozenset[str]]`: the tools, and the names of those whose calls keep their order.
        """
        own = {name for name, origin in self._origins.items() if origin.server in self._pools}.intersection(tools)
        bound = {name: replace(tools[name], function=self._function(name, session)) for name in own}
        return {**tools, **bound}, frozenset(own)

    def call(self, name: str, arguments: JSONObject, session: MCPSession) -> ToolResult:
        """
        Call a tool from a reward function, and wait for it.

        Args:
            name (`str`):
                Name of the tool in this run, or of one that `tools` of its server leaves out.
            arguments (`dict`):
                Its arguments.
            session ([`MCPSession`]):
                The rollout.

        Raises:
            ToolNameError: if no server has the tool.
        """
        if name not in self._callable:
            remedy = f"The tools are: {', '.join(self._callable)}."
            raise ToolNameError(f"No MCP server has a tool {name!r}.", remedy=remedy)
        limit = self.servers[self._callable[name].server].timeout or _REWARD_TIMEOUT
        try:
            return self._submit(asyncio.wait_for(self.answer(name, arguments, session), limit)).result()
        except TimeoutError:
            return failure("timeout", f"Tool `{name}` did not return within {limit:g} seconds.")

    def take_back(self, sessions: Sequence[MCPSession]) -> None:
        """
        End rollouts: make their own servers ready for others, while the run goes on.

        Args:
            sessions (`Sequence[MCPSession]`):
                The rollouts.
        """
        for session in sessions:
            self._loop.get().call_soon_threadsafe(session.give_back, self._pools)

    def prepare(self, rollouts: int) -> None:
        """
        Begin to start servers for rollouts that are about to begin.

        Args:
            rollouts (`int`):
                How many rollouts there are.
        """
        for pool in self._pools.values():
            self._loop.get().call_soon_threadsafe(pool.prepare, rollouts)

    def restarts(self) -> dict[str, int]:
        """Return how often each server has been started again since the last time this was called."""
        total = Counter(self._restarts)
        since = {name: total[name] - self._counted[name] for name in self.servers}
        self._counted = total
        return since

    def close(self) -> None:
        """End every connection, and every server that was started; wait for them, within limits."""
        if self._closed:
            return
        self._closed = True
        loop = self._loop.get()
        done = asyncio.run_coroutine_threadsafe(self._close(), loop)
        done.add_done_callback(lambda _: self._loop.stop())
        # The garbage collector may call this on any thread, that of the loop included.
        if asyncio._get_running_loop() is not loop:
            with contextlib.suppress(Exception):
                done.result(_CLOSING)
        self._folder.cleanup()

    async def answer(self, name: str, arguments: JSONObject, session: MCPSession | None = None) -> ToolResult:
        """
        Call a tool; on the servers' loop.

        Args:
            name (`str`):
                Name of the tool in this run.
            arguments (`dict`):
                Its arguments.
            session ([`MCPSession`], *optional*):
                The rollout that calls it.
        """
        origin = self._callable[name]
        shared = self._shared.get(origin.server)
        if shared is not None:
            return await shared.call(origin.tool, arguments)
        if session is None:
            raise ToolRuntimeError(
                f"You called {name!r} outside of a rollout, and each rollout has its own server {origin.server!r}.",
                remedy="Call it from a rollout or a reward function.",
            )
        return await session.call_own(self._pools[origin.server], origin.tool, arguments)

    def _function(self, name: str, session: MCPSession | None = None) -> Callable[..., Awaitable[ToolResult]]:
        """Return what a tool calls: awaited on any loop, while the work is done on the servers'."""

        async def call(**arguments: object) -> ToolResult:
            return await asyncio.wrap_future(self._submit(self.answer(name, arguments, session)))

        return call

    def _submit(self, work: Coroutine[object, object, T]) -> Future[T]:
        if self._closed:
            work.close()
            raise ToolRuntimeError("You called an MCP server after the run had ended its servers.")
        return asyncio.run_coroutine_threadsafe(work, self._loop.get())

    async def _start(self) -> "dict[str, dict[str, mcp_types.Tool]]":
        """Start the servers side by side; return the tools of each by their names."""
        from .connection import Connection

        async def start(server: MCPServer) -> "dict[str, mcp_types.Tool]":
            connect = partial(Connection, server, self._warn_of_lost_tools, self._restarts)
            if server.per_rollout:
                pool = self._pools[server.name] = Pool(server, self._folder.name, connect)
                return (await pool.first()).tools
            connection = self._shared[server.name] = connect()
            await connection.start()
            return connection.tools

        return dict(zip(self.servers, await asyncio.gather(*map(start, self.servers.values())), strict=True))

    async def _close(self) -> None:
        connections = [connection.close() for connection in self._shared.values()]
        await asyncio.gather(*connections, *(pool.close() for pool in self._pools.values()), return_exceptions=True)

    def _warn_of_lost_tools(self, server: MCPServer, names: Collection[str]) -> None:
        """Warn, once for each server, that tools the policy is shown are gone."""
        gone = {origin.tool for origin in self._origins.values() if origin.server == server.name}.difference(names)
        if gone and server.name not in self._warned:
            self._warned.add(server.name)
            logger.warning(
                "The MCP server %r has changed its tools, and no longer has: %s. Prompts show the tools it had at the "
                "start; calls of those that are gone are answered with an error.",
                server.name,
                ", ".join(sorted(gone)),
            )

    def _tool(self, name: str, listed: "mcp_types.Tool") -> Tool:
        server = self.servers[self._origins[name].server]
        description, parameters = server.redactor.data([listed.description or "", listed.input_schema])
        try:
            tool = Tool(name, description, parameters, self._function(name), timeout=server.timeout)
            check_schema(tool)
        except ToolSchemaError as error:
            message = f"A tool of the MCP server {server.name!r} cannot be used: {error.message}"
            raise ToolSchemaError(message, remedy=error.remedy) from None
        return tool
