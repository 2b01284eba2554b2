"""One MCP server that is kept running: connected to, called, and started again when it ends.

Owns the life of a connection; fed by `mcp_pool.py` and `mcp.py`. Everything here runs on the event loop of the MCP
servers, where one task holds each connection from its beginning to its end.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from ..errors import MCPServerError
from ..redaction import masked_url
from ..version import __version__
from .mcp_config import MCPServer
from .mcp_results import failed, innermost, tool_result
from .mcp_stdio import LONGEST_MESSAGE, ServerProcess
from .types import ToolResult


logger = logging.getLogger(__name__)

SDK_LOGGERS = (
    *("client", "mcp.client.client", "mcp.client.streamable_http", "mcp.shared.jsonrpc_dispatcher"),
    *("httpx2", "httpcore2.connection", "httpcore2.http11", "httpcore2.http2", "httpcore2.proxy"),
)
"""Loggers of the SDK that may repeat what a server is sent or sends."""

_FIRST_DELAY = 0.25
_LONGEST_DELAY = 30.0
_MOST_PAGES = 100
_PROBE_TIMEOUT = 5.0
_SESSION_LOST = "Session terminated"  # what the SDK says when an HTTP server does not know the session any more


class Connection:
    """
    A server, as long as it is wanted.

    Args:
        server ([`MCPServer`]):
            The server.
        folder (`str`, *optional*):
            Working directory, where it is not to be the run's or the server's `cwd`.
        on_tools (`Callable`, *optional*):
            Called with the names of its tools each time they may have changed.
    """

    def __init__(
        self, server: MCPServer, folder: str | None = None, on_tools: Callable[[set[str]], object] | None = None
    ) -> None:
        self.server = server
        self.folder = folder
        self.redactor = server.redactor
        self.restarts = 0
        self.tools: list[Any] = []
        self._on_tools = on_tools
        self._names: set[str] = set()
        self._client: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._lost = asyncio.Event()  # the connection of now is of no more use
        self._was_up = False
        self._served = False  # whether it has answered a call since it was started
        self._task: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """
        Connects, and keeps the connection up from then on.

        Raises:
            MCPServerError: if the server does not start or answer, with its last words.
        """
        self._task = asyncio.create_task(self._keep_up())
        try:
            await asyncio.shield(self._client)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Ends the connection, and the server if it is a process of ours."""
        tasks = [task for task in (self._task, self._probing) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if not self._client.done():
            self._client.cancel()
        elif not self._client.cancelled():
            self._client.exception()  # seen

    async def call(self, tool: str, arguments: dict[str, Any]) -> ToolResult:
        """
        Calls a tool; while the server is started again, after that.

        Args:
            tool (`str`):
                Name of the tool on the server.
            arguments (`dict`):
                Its arguments.

        Returns:
            [`ToolResult`]: What the server answered, or why it did not. A cancelled call cancels the request.
        """
        if self._probing is not None:
            await asyncio.wait([self._probing])
        try:
            client = await asyncio.shield(self._client)
        except MCPServerError as error:
            return failed(f"The tool is not available at the moment: {error}", self.redactor)
        if tool not in self._names:
            return failed(f"The server no longer has the tool `{tool}`.", self.redactor)
        life = self._lost
        try:
            result = await client.call_tool(tool, arguments)
        except asyncio.CancelledError:
            if self._probing is None or self._probing.done():
                self._probing = asyncio.create_task(self._probe(client, life))
            raise
        except Exception as error:
            return self._unanswered(error, life)
        self._served = True
        return tool_result(result, self.redactor)

    def _unanswered(self, error: Exception, life: asyncio.Event) -> ToolResult:
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED

        if isinstance(error, MCPError):
            if error.code != CONNECTION_CLOSED and error.message != _SESSION_LOST and not life.is_set():
                self._served = True
                return failed(error.message, self.redactor)
        elif isinstance(error, (RuntimeError, ValueError)):  # it breaks the protocol or the tool's own schema
            return failed(f"The server's answer is not valid: {_shortened(str(error))}", self.redactor)
        self._lose(life)
        return failed("The server ended before it answered. It may have run the call or not.", self.redactor)

    async def _keep_up(self) -> None:
        futile = 0  # lives in a row that answered nothing
        while True:
            failure = await self._live()
            self._lose()
            if not self._was_up:
                self._client.set_exception(failure)
                return
            self.restarts += 1
            futile = 0 if self._served else futile + 1
            self._served = False
            delay = min(_FIRST_DELAY * 2 ** (futile - 2), _LONGEST_DELAY) if futile > 1 else 0.0
            logger.warning("%s It is started again%s.", failure, f" in {delay:g} seconds" if delay else "")
            if delay:
                self._client.set_exception(failure)
                await asyncio.sleep(delay)
                self._renew()

    def _lose(self, life: asyncio.Event | None = None) -> None:
        """The connection, if it is still that of a given life, is of no more use: calls wait for the next one."""
        if life in (None, self._lost):
            self._lost.set()
            if self._client.done():
                self._renew()

    async def _probe(self, client: Any, life: asyncio.Event) -> None:
        """Whether a server that let a call run out of time answers anything; if not, it is started again."""
        try:
            await asyncio.wait_for(client.list_tools(), _PROBE_TIMEOUT)
        except TimeoutError:
            logger.warning("The MCP server %r does not answer any more.", self.server.name)
            self._lose(life)
        except Exception:
            self._lose(life)

    def _renew(self) -> None:
        if not self._client.cancelled():
            self._client.exception()  # nobody need have seen it
        self._client = asyncio.get_running_loop().create_future()

    async def _live(self) -> MCPServerError:
        """One life of the connection, until it is lost; why it was."""
        import anyio
        from mcp import Client
        from mcp_types import Implementation

        server, self._lost, changed = self.server, asyncio.Event(), asyncio.Event()
        process = ServerProcess(server, self.folder, self.redactor, self._lose) if server.command else None
        reason, up = "was lost", False
        try:
            with anyio.CancelScope(deadline=anyio.current_time() + server.start_timeout) as scope:
                async with Client(
                    process.messages() if process is not None else _http_messages(server),
                    client_info=Implementation(name="trl_toolgrpo", version=__version__),
                    message_handler=partial(_notice, changed),
                    cache=None,
                ) as client:
                    await self._list(client)
                    scope.deadline = float("inf")
                    self._was_up = up = True
                    self._client.set_result(client)
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(self._follow, client, changed)
                        tasks.start_soon(_listen, client, changed)
                        await self._lost.wait()
                        tasks.cancel_scope.cancel()
            if scope.cancelled_caught:
                reason = f"did not answer within {server.start_timeout:g} seconds"
        except MCPServerError as error:
            return error
        except Exception as error:
            reason = f"{'was lost' if up else 'did not start'}: {_words(error)}"
        return self._failure(reason, process)

    def _failure(self, reason: str, process: ServerProcess | None) -> MCPServerError:
        name = self.server.name
        if process is None:
            url = masked_url(str(self.server.url))
            return MCPServerError(self.redactor.text(f"The MCP server {name!r} at {url} {reason}."))
        if process.returncode is not None and process.ended_by_itself:
            reason = f"ended with exit code {process.returncode}"
        words = f" Its error output ends with:\n{process.last_words}\n" if process.last_words else ""
        command = " ".join([str(self.server.command), *self.server.args])
        hint = self.folder is not None and not self._was_up
        where = " Relative paths are looked up in the folder that is made for it." if hint else ""
        return MCPServerError(self.redactor.text(f"The MCP server {name!r} ({command}) {reason}.{where}{words}"))

    async def _list(self, client: Any) -> None:
        tools, cursor = [], None
        for _ in range(_MOST_PAGES):
            page = await client.list_tools(cursor=cursor)
            tools += page.tools
            cursor = page.next_cursor
            if cursor is None:
                break
        self.tools, self._names = tools, {tool.name for tool in tools}
        if self._on_tools is not None:
            self._on_tools(self._names)

    async def _follow(self, client: Any, changed: asyncio.Event) -> None:
        while True:
            await changed.wait()
            changed.clear()
            with contextlib.suppress(Exception):  # a connection that is lost is noticed elsewhere
                await self._list(client)


async def _notice(changed: asyncio.Event, message: Any) -> None:
    if getattr(message, "method", None) == "notifications/tools/list_changed":
        changed.set()


async def _listen(client: Any, changed: asyncio.Event) -> None:
    """Asks servers of the newest protocol for news of their tools; older ones send it unasked."""
    with contextlib.suppress(Exception):
        async with client.listen(tools_list_changed=True) as events:
            async for _ in events:
                changed.set()


@contextlib.asynccontextmanager
async def _http_messages(server: MCPServer) -> AsyncIterator[Any]:
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    # Calls have time limits of their own; a stream for notifications is silent most of the time.
    timeout = httpx2.Timeout(server.start_timeout, read=None)

    async def bound(response: Any) -> None:
        response.stream = _bounded_stream(response.stream)

    async with (
        httpx2.AsyncClient(headers=server.headers, timeout=timeout, event_hooks={"response": [bound]}) as client,
        streamable_http_client(str(server.url), http_client=client) as streams,
    ):
        yield streams


def _bounded_stream(stream: Any) -> Any:
    """The body of a response, which ends with an error where one message of it is longer than any may be."""
    import httpx2

    class Bounded(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            since = 0  # bytes since the last empty line, which ends an event of a stream
            async for chunk in stream:
                end = max(chunk.rfind(b"\n\n"), chunk.rfind(b"\r\n\r\n"))
                since = since + len(chunk) if end < 0 else len(chunk) - end
                if since > LONGEST_MESSAGE:
                    raise httpx2.ReadError(f"A message of more than {LONGEST_MESSAGE} bytes")
                yield chunk

        async def aclose(self) -> None:
            await stream.aclose()

    return Bounded()


def _shortened(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."


def _words(error: BaseException) -> str:
    error = innermost(error)
    return str(error) or type(error).__name__
