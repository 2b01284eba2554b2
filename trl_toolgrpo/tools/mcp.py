"""The MCP servers of a run, and their tools as `Tool`s.

Owns the event loop all connections live on, the names their tools go by, and which server a rollout's calls reach; fed
by the trainer's `mcp_servers`. The loop is not the executor's: a tool that blocks that one cannot hurt a connection.
"""

import asyncio
import contextlib
import importlib.util
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from ..errors import ToolNameError, ToolRuntimeError, ToolSchemaError
from ..redaction import redact_logs
from .arguments import check_schema
from .loops import LoopThread
from .mcp_config import MCPServer
from .mcp_connection import SDK_LOGGERS, Connection
from .mcp_names import ToolOrigin, choose_tools, name_tools, tools_left_out
from .mcp_pool import Pool
from .mcp_session import MCPSession
from .results import refused
from .types import Tool, ToolResult


logger = logging.getLogger(__name__)

_CLOSING = 15.0
_REWARD_TIMEOUT = 60.0


class MCPTools:
    """
    The servers of a run, started and kept up until `close`.

    Args:
        servers (`Sequence[MCPServer]`):
            The servers.
        taken (`Collection[str]`, *optional*, defaults to `()`):
            Names of the run's other tools.

    Raises:
        ImportError: if the `mcp` package is not installed.
        MCPServerError: if a server does not start.
        ToolSchemaError, ToolNameError: for a tool that cannot be described or told from another.
    """

    def __init__(self, servers: Sequence[MCPServer], taken: Collection[str] = ()) -> None:
        if importlib.util.find_spec("mcp") is None:
            raise ImportError(
                "You passed `mcp_servers`, which need the package mcp (2.0 or later), and it is not installed. Run "
                "`pip install 'trl_toolgrpo[mcp]'`."
            )
        self.servers = {server.name: server for server in servers}
        self._loop = LoopThread()
        self._folder = tempfile.TemporaryDirectory(prefix="trl_toolgrpo_mcp_")
        self._shared: dict[str, Connection] = {}
        self._pools: dict[str, Pool] = {}
        self._counted: Counter[str] = Counter()
        self._warned: set[str] = set()
        self._closed = False
        self._origins: dict[str, ToolOrigin] = {}
        self._for_rewards: dict[str, ToolOrigin] = {}  # tools the policy does not get
        for server in servers:
            redact_logs(SDK_LOGGERS, server.redactor)
        try:
            listed = self.wait(self._start())
            chosen = {server.name: choose_tools(server, listed[server.name]) for server in servers}
            self._origins = name_tools(chosen, taken)
            others = {name: set(tools) - {self.servers[name].reset_tool} for name, tools in listed.items()}
            self._for_rewards = tools_left_out(others, chosen, self._origins)
            self.tools = [self._tool(name, chosen[of.server][of.tool]) for name, of in self._origins.items()]
        except BaseException:
            self.close()
            raise

    def session(self) -> MCPSession:
        """The servers as one rollout has them."""
        return MCPSession(self.call)

    def of_rollout(self, tools: dict[str, Tool], session: MCPSession) -> tuple[dict[str, Tool], frozenset[str]]:
        """
        The tools of a rollout, those of servers with `per_rollout` bound to servers of its own.

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
        return {name: bound.get(name, tool) for name, tool in tools.items()}, frozenset(own)

    def call(self, name: str, arguments: dict[str, Any], session: MCPSession) -> ToolResult:
        """
        Calls a tool from a reward function, and waits for it.

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
        known = {**self._for_rewards, **self._origins}
        if name not in known:
            raise ToolNameError(f"No MCP server has a tool {name!r}. The tools are: {', '.join(known)}.")
        limit = self.servers[known[name].server].timeout or _REWARD_TIMEOUT
        try:
            return self.wait(asyncio.wait_for(self.answer(name, arguments, session), limit))
        except TimeoutError:
            return refused("timeout", f"Tool `{name}` did not return within {limit:g} seconds.")

    def take_back(self, sessions: Sequence[MCPSession]) -> None:
        """
        Ends rollouts: their own servers are made ready for others, while the run goes on.

        Args:
            sessions (`Sequence[MCPSession]`):
                The rollouts.
        """
        for session in sessions:
            self._loop.get().call_soon_threadsafe(session.give_back, self._pools)

    def prepare(self, rollouts: int) -> None:
        """
        Begins to start servers for rollouts that are about to begin.

        Args:
            rollouts (`int`):
                How many there are.
        """
        for pool in self._pools.values():
            self._loop.get().call_soon_threadsafe(pool.prepare, rollouts)

    def restarts(self) -> dict[str, int]:
        """How often each server has been started again since this was last asked."""
        found = Counter({name: shared.restarts for name, shared in self._shared.items()})
        found.update({name: pool.restarts for name, pool in self._pools.items()})
        since = {name: found[name] - self._counted[name] for name in self.servers}
        self._counted = found
        return since

    def close(self) -> None:
        """Ends every connection, and every server that was started; waits for them, but not for ever."""
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

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        """
        Runs a coroutine on the servers' loop and waits for it.

        Args:
            work (`Coroutine`):
                What to run.

        Raises:
            ToolRuntimeError: if the servers have been ended.
        """
        future = self._submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def answer(self, name: str, arguments: dict[str, Any], session: MCPSession | None = None) -> ToolResult:
        """
        Calls a tool; on the servers' loop.

        Args:
            name (`str`):
                Name of the tool in this run.
            arguments (`dict`):
                Its arguments.
            session ([`MCPSession`], *optional*):
                The rollout that calls it.
        """
        origin = self._origins.get(name) or self._for_rewards[name]
        shared = self._shared.get(origin.server)
        if shared is not None:
            return await shared.call(origin.tool, arguments)
        if session is None:
            raise ToolRuntimeError(
                f"You called the tool {name!r} outside of a rollout, and each rollout has an MCP server "
                f"{origin.server!r} of its own."
            )
        return await session.call_own(self._pools[origin.server], origin.tool, arguments)

    def _function(self, name: str, session: MCPSession | None = None) -> Callable[..., Any]:
        """What a tool calls: awaited on any loop, while the work is done on the servers'."""

        async def call(**arguments: Any) -> ToolResult:
            return await asyncio.wrap_future(self._submit(self.answer(name, arguments, session)))

        return call

    def _submit(self, work: Coroutine[Any, Any, Any]) -> "Future[Any]":
        if self._closed:
            work.close()
            raise ToolRuntimeError("You called an MCP server after the run had ended its servers.")
        return asyncio.run_coroutine_threadsafe(work, self._loop.get())

    async def _start(self) -> dict[str, dict[str, Any]]:
        """Starts the servers side by side; the tools of each by their names."""

        async def start(server: MCPServer) -> dict[str, Any]:
            on_tools = partial(self._notice, server)
            if server.per_rollout:
                pool = self._pools[server.name] = Pool(server, self._folder.name, on_tools)
                connection = await pool.first()
            else:
                connection = self._shared[server.name] = Connection(server, None, on_tools)
                await connection.start()
            return {tool.name: tool for tool in connection.tools}

        outcomes = await asyncio.gather(*map(start, self.servers.values()), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return dict(zip(self.servers, outcomes, strict=True))  # type: ignore[arg-type]

    async def _close(self) -> None:
        connections = [connection.close() for connection in self._shared.values()]
        await asyncio.gather(*connections, *(pool.close() for pool in self._pools.values()), return_exceptions=True)

    def _notice(self, server: MCPServer, names: set[str]) -> None:
        """Warns, once for each server, that tools the policy is shown are gone."""
        gone = {origin.tool for origin in self._origins.values() if origin.server == server.name} - names
        if gone and server.name not in self._warned:
            self._warned.add(server.name)
            logger.warning(
                "The MCP server %r has changed its tools, and no longer has: %s. Prompts show the tools it had at the "
                "start; calls of those that are gone are answered with an error.",
                server.name,
                ", ".join(sorted(gone)),
            )

    def _tool(self, name: str, listed: Any) -> Tool:
        server = self.servers[self._origins[name].server]
        description, parameters = server.redactor.data([listed.description or "", listed.input_schema])
        try:
            tool = Tool(name, description, parameters, self._function(name), timeout=server.timeout)
            check_schema(tool)
        except ToolSchemaError as error:
            raise ToolSchemaError(f"A tool of the MCP server {server.name!r} cannot be used: {error}") from None
        return tool
