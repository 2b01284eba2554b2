"""One MCP server that is kept running: connected to, called, and started again when it ends.

Everything here runs on the event loop of the MCP servers, where one task holds each connection from its beginning to
its end. The module needs the extra `mcp` and is imported once a server is configured.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection

import anyio
import httpx2
from mcp import Client, MCPError
from mcp.client._transport import TransportStreams
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CONNECTION_CLOSED, Implementation, Tool

from ...errors import MCPServerError
from ...redaction import masked_url
from ...types import JSONObject
from ...version import __version__
from ..results import encodable
from ..tool import ToolResult
from .config import MCPServer
from .results import failed, innermost, tool_result
from .stdio import LONGEST_MESSAGE, ServerProcess


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
_SESSION_LOST = "Session terminated"  # the SDK's message where an HTTP server has forgotten the session


class Connection:
    """
    A server, from its first start until it is closed.

    Args:
        server ([`MCPServer`]):
            The server.
        on_tools (`Callable`):
            Called with the server and the names of its tools each time they may have changed.
        restarts (`Counter[str]`):
            Counts, by the server's name, how often it is started again.
        folder (`str`, *optional*):
            Working directory, instead of the run's or the server's `cwd`.
    """

    def __init__(
        self,
        server: MCPServer,
        on_tools: Callable[[MCPServer, Collection[str]], object],
        restarts: Counter[str],
        folder: str | None = None,
    ) -> None:
        self.server = server
        self.folder = folder
        self.tools: dict[str, Tool] = {}
        self._on_tools = on_tools
        self._restarts = restarts
        self._client: Client | None = None  # of the current connection, once it is up
        self._failure: MCPServerError | None = None  # why there is none at the moment
        self._settled = asyncio.Event()  # there is a client, or a failure to answer calls with
        self._lost = asyncio.Event()  # the current connection can no longer be used
        self._changed = asyncio.Event()  # the tools may have changed
        self._was_up = False
        self._served = False  # it has answered a call since it was last started
        self._scope = anyio.CancelScope()
        self._task: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """
        Connect, and keep the connection up from then on.

        Raises:
            MCPServerError: if the server does not start or answer, with the end of its error output.
        """
        self._task = asyncio.create_task(self._keep_up())
        try:
            await self._settled.wait()
            if self._failure is not None and not self._was_up:
                raise self._failure
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End the connection, and the server if we have started it."""
        self._scope.cancel()
        if self._probing is not None:
            self._probing.cancel()
        if self._task is not None:
            await asyncio.wait([self._task])

    async def call(self, tool: str, arguments: JSONObject) -> ToolResult:
        """
        Call a tool; where the server is being started again, after that.

        Args:
            tool (`str`):
                Name of the tool on the server.
            arguments (`dict`):
                Its arguments.

        Returns:
            [`ToolResult`]: what the server answered, or why it did not. A cancelled call cancels the request.
        """
        if self._probing is not None:
            await asyncio.wait([self._probing])
        await self._settled.wait()
        client, redactor = self._client, self.server.redactor
        if client is None:
            return failed(f"The tool is not available at the moment: {self._failure}", redactor)
        if tool not in self.tools:
            return failed(f"The server no longer has the tool `{tool}`.", redactor)
        try:
            result = await client.call_tool(tool, encodable(arguments))
            self._served = True
            return tool_result(result, redactor)
        except asyncio.CancelledError:
            if self._probing is None or self._probing.done():
                self._probing = asyncio.create_task(self._probe(client))
            raise
        except MCPError as error:
            if error.code != CONNECTION_CLOSED and error.message != _SESSION_LOST and client is self._client:
                self._served = True
                return failed(error.message, redactor)
        except (RuntimeError, ValueError) as error:  # it breaks the protocol or the tool's own schema
            return failed(f"The server's answer is not valid: {error!s:.300}", redactor)
        except Exception as error:
            logger.debug("A call of the MCP server %r failed: %s", self.server.name, redactor.text(str(error)))
        self._drop_client(client)
        return failed("The server ended before it answered. It may have run the call or not.", redactor)

    async def _probe(self, client: Client) -> None:
        """Ask a server that let a call run out of time for its tools; start it again if it does not answer."""
        try:
            await asyncio.wait_for(client.list_tools(), _PROBE_TIMEOUT)
        except Exception as error:
            if isinstance(error, TimeoutError):
                logger.warning("The MCP server %r does not answer any more.", self.server.name)
            self._drop_client(client)

    def _drop_client(self, client: Client | None = None) -> None:
        """Give up the connection, if it is still that of the given client; calls then wait for the next one."""
        if client is None or client is self._client:
            self._client = None
            self._settled.clear()
            self._lost.set()

    async def _keep_up(self) -> None:
        futile = 0  # connections in a row on which no call was answered
        try:
            with self._scope:
                while True:
                    self._failure = await self._live()
                    self._drop_client()
                    if not self._was_up:
                        break
                    self._restarts[self.server.name] += 1
                    futile = 0 if self._served else futile + 1
                    self._served = False
                    delay = min(_FIRST_DELAY * 2 ** (futile - 2), _LONGEST_DELAY) if futile > 1 else 0.0
                    shown = f" in {delay:g} seconds" if delay else ""
                    logger.warning("%s It is started again%s.", self._failure, shown)
                    if delay:
                        self._settled.set()
                        await anyio.sleep(delay)
                        self._settled.clear()
        finally:
            self._client = None
            self._failure = self._failure or MCPServerError(f"The MCP server {self.server.name!r} was ended.")
            self._settled.set()

    async def _live(self) -> MCPServerError:
        """Hold one connection until it is lost; return why it was."""
        server = self.server
        self._lost.clear()
        process = ServerProcess(server, self.folder, self._drop_client) if server.command else None
        reason = "did not start"
        try:
            with anyio.move_on_after(server.start_timeout) as scope:
                async with Client(
                    process.transport() if process is not None else _http_transport(server),
                    client_info=Implementation(name="trl_toolgrpo", version=__version__),
                    message_handler=self._on_message,
                    cache=None,
                ) as client:
                    await self._list(client)
                    scope.deadline = float("inf")
                    reason = "was lost"
                    self._was_up, self._client, self._failure = True, client, None
                    self._settled.set()
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(self._follow, client)
                        tasks.start_soon(self._listen, client)
                        await self._lost.wait()
                        tasks.cancel_scope.cancel()
            if scope.cancelled_caught:
                reason = f"did not answer within {server.start_timeout:g} seconds"
        except MCPServerError as error:
            return error
        except Exception as error:
            cause = innermost(error)
            reason += f": {str(cause) or type(cause).__name__}"
        return MCPServerError(self.server.redactor.text(self._failure_text(reason, process)))

    def _failure_text(self, reason: str, process: ServerProcess | None) -> str:
        name = f"The MCP server {self.server.name!r}"
        if process is None:
            return f"{name} at {masked_url(str(self.server.url))} {reason}."
        if process.returncode is not None:
            reason = f"ended with exit code {process.returncode}"
        output = f" Its error output ends with:\n{process.error_output}\n" if process.error_output else ""
        command = " ".join([str(self.server.command), *self.server.args])
        hint = self.folder is not None and not self._was_up
        where = " Relative paths are looked up in the folder that is made for it." if hint else ""
        return f"{name} ({command}) {reason}.{where}{output}"

    async def _list(self, client: Client) -> None:
        tools, cursor = [], None
        for _ in range(_MOST_PAGES):
            page = await client.list_tools(cursor=cursor)
            tools += page.tools
            cursor = page.next_cursor
            if cursor is None:
                break
        self.tools = {tool.name: tool for tool in tools}
        self._on_tools(self.server, self.tools)

    async def _follow(self, client: Client) -> None:
        """Read the tools again whenever they may have changed."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            with contextlib.suppress(Exception):  # a connection that is lost is noticed elsewhere
                await self._list(client)

    async def _on_message(self, message: object) -> None:
        if getattr(message, "method", None) == "notifications/tools/list_changed":
            self._changed.set()

    async def _listen(self, client: Client) -> None:
        """Ask a server of the newest protocol for news of its tools; older ones send it unasked."""
        with contextlib.suppress(Exception):
            async with client.listen(tools_list_changed=True) as events:
                async for _ in events:
                    self._changed.set()


@contextlib.asynccontextmanager
async def _http_transport(server: MCPServer) -> AsyncIterator[TransportStreams]:
    # Calls have time limits of their own; a stream for notifications is silent most of the time.
    timeout, hooks = httpx2.Timeout(server.start_timeout, read=None), {"response": [_limit_body]}
    async with (
        httpx2.AsyncClient(headers=server.headers, timeout=timeout, event_hooks=hooks) as client,
        streamable_http_client(str(server.url), http_client=client, max_sse_event_size=LONGEST_MESSAGE) as streams,
    ):
        yield streams


async def _limit_body(response: httpx2.Response) -> None:
    """Refuse a body that is too long. The SDK bounds the events of a stream, and nothing else."""
    body, stream = bytearray(), response.stream
    of_events = response.headers.get("Content-Type", "").startswith("text/event-stream")
    if of_events or not isinstance(stream, httpx2.AsyncByteStream):
        return
    async for chunk in stream:
        body += chunk
        if len(body) > LONGEST_MESSAGE:
            raise httpx2.ReadError(f"A message of more than {LONGEST_MESSAGE} bytes")
    await stream.aclose()
    response.stream = httpx2.ByteStream(bytes(body))
