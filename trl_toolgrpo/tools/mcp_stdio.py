"""A server process that ends with the run, and the messages over its standard streams.

Owns the process, the last of what it wrote to its error output, and the lines in both directions; fed by
`mcp_connection.py`. The SDK's own transport is not used: it logs lines that are no messages as they are, secrets
included, keeps neither error output nor the process, and leaves a server alone when the run is killed.
"""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from ..errors import MCPServerError
from ..redaction import Redactor
from .guard import guarded
from .mcp_config import MCPServer
from .results import encodable


logger = logging.getLogger(__name__)

LONGEST_MESSAGE = 64 * 2**20
"""Bytes of one message of a server; a longer one ends the connection, before it takes all memory."""

_STDERR_KEPT = 64 * 2**10
_STDERR_SHOWN = 2000
_INTERNAL_ERROR = -32603  # of JSON-RPC
# How long a server may take to end after its input is closed, and after it was asked to.
_GRACE = 2.0
_TERMINATION = 1.0


def find_command(server: MCPServer) -> str:
    """
    The program of a server.

    Args:
        server ([`MCPServer`]):
            A server with a command.

    Returns:
        `str`: its path: as given, as found in `PATH`, or beside the running Python.

    Raises:
        MCPServerError: if there is none.
    """
    command = str(server.command)
    if os.path.dirname(command):
        return os.path.abspath(command) if server.cwd is None else command
    places = [server.env.get("PATH") or os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)]
    found = shutil.which(command, path=os.pathsep.join(places))
    if found is None:
        raise MCPServerError(
            f"The MCP server {server.name!r} cannot be started: its command {command!r} is neither in `PATH` nor "
            f"beside {sys.executable}. Install it, or give its path."
        )
    return found


class ServerProcess:
    """
    One life of a server.

    Args:
        server ([`MCPServer`]):
            What to start.
        folder (`str`, *optional*):
            Where, instead of its `cwd`.
        redactor ([`Redactor`]):
            Knows its secrets.
        on_end (`Callable`):
            Called when it has ended, or takes or gives no more messages.
    """

    def __init__(
        self, server: MCPServer, folder: str | None, redactor: Redactor, on_end: Callable[[], object]
    ) -> None:
        self.server = server
        self.folder = folder
        self.redactor = redactor
        self.ended_by_itself = False
        self._on_end = on_end
        self.returncode: int | None = None
        self._stderr: deque[bytes] = deque()
        self._kept = 0
        self._warned = False
        self._stopping = False

    @property
    def last_words(self) -> str:
        """The end of what the server wrote to its error output."""
        text = self.redactor.text(b"".join(self._stderr).decode(errors="replace")).strip()
        return text if len(text) <= _STDERR_SHOWN else f"...{text[-_STDERR_SHOWN:]}"

    @contextlib.asynccontextmanager
    async def messages(self) -> AsyncIterator[tuple[Any, Any]]:
        """The streams of messages from and to the server, as the SDK's client takes them."""
        import anyio
        from mcp.shared.message import SessionMessage

        process = await self._start()
        incoming, received = anyio.create_memory_object_stream[SessionMessage | Exception](0)
        sent, outgoing = anyio.create_memory_object_stream[SessionMessage](0)
        errors = asyncio.create_task(self._keep_stderr(process))
        tasks = [
            asyncio.create_task(self._read(process, incoming)),
            asyncio.create_task(self._write(process, outgoing, incoming)),
        ]
        try:
            yield received, sent
        finally:
            sent.close()
            received.close()
            await _without_cancellation(self._stop(process, [*tasks, errors]))
            for stream in (incoming, outgoing):
                stream.close()

    async def _start(self) -> Any:
        from mcp.client.stdio import get_default_environment

        server = self.server
        try:
            return await asyncio.create_subprocess_exec(
                *guarded([find_command(server), *server.args]),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={**get_default_environment(), **server.env},
                cwd=self.folder or server.cwd,
                start_new_session=True,
                limit=LONGEST_MESSAGE,
            )
        except (OSError, ValueError) as error:
            reason = self.redactor.text(str(error))
            raise MCPServerError(f"The MCP server {server.name!r} cannot be started: {reason}.") from None

    async def _read(self, process: Any, incoming: Any) -> None:
        """
        Hands over what the server writes. What is no message, such as a stray `print`, is passed over; what answers a
        request with something that is no answer fails that request, which would wait for another one in vain.
        """
        import anyio
        from mcp.shared.message import SessionMessage

        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, ValueError, ConnectionError):
            # ValueError: a line without end
            while line := await process.stdout.readline():
                try:
                    message = _message_of(line)
                except (ValueError, RecursionError):
                    self._warn_of(line)
                    message = _failure_in_place_of(line)
                if message is not None:
                    await incoming.send(SessionMessage(message))
        self._end(incoming)

    async def _write(self, process: Any, outgoing: Any, incoming: Any) -> None:
        try:
            async for session_message in outgoing:
                process.stdin.write(_line_of(session_message.message))
                await process.stdin.drain()
        except OSError:
            self._end(incoming)
        except Exception as error:  # else those who wait for an answer would wait for ever
            reason = self.redactor.text(str(error))
            logger.warning("A message to the MCP server %r could not be written: %s", self.server.name, reason)
            self._end(incoming)

    def _end(self, incoming: Any) -> None:
        self.ended_by_itself = not self._stopping
        incoming.close()
        self._on_end()

    async def _keep_stderr(self, process: Any) -> None:
        while chunk := await process.stderr.read(8192):
            self._stderr.append(chunk)
            self._kept += len(chunk)
            while self._kept - len(self._stderr[0]) > _STDERR_KEPT:
                self._kept -= len(self._stderr.popleft())

    def _warn_of(self, line: bytes) -> None:
        if not self._warned and line.strip():
            self._warned = True
            logger.warning(
                "The MCP server %r writes lines to its standard output that are no messages, the first: %r. They are "
                "passed over.",
                self.server.name,
                self.redactor.text(line.decode(errors="replace")).strip()[:200],
            )

    async def _stop(self, process: Any, tasks: list["asyncio.Task[None]"]) -> None:
        """Closes the server's input, then asks it to end, then ends it; what it wrote last is kept."""
        self._stopping = True
        process.stdin.close()
        for seconds, end in ((_GRACE, signal.SIGTERM), (_TERMINATION, signal.SIGKILL), (_TERMINATION, None)):
            if await _ends(process, seconds) or end is None:
                break
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, end)  # `terminate` polls first, and takes the return code from asyncio's watcher
        self.returncode = process.returncode
        await asyncio.wait(tasks, timeout=0.5)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        process._transport.close()  # or its pipes stay open until the garbage is collected


def _message_of(line: bytes) -> Any:
    """A message as a server wrote it; half an emoji in it, which the SDK's parser refuses, is replaced."""
    from mcp_types import jsonrpc_message_adapter as adapter

    try:
        return adapter.validate_json(line, by_name=False)
    except ValueError:
        return adapter.validate_python(encodable(json.loads(line)), by_name=False)


def _failure_in_place_of(line: bytes) -> Any:
    """The failure of the request that a line meant to answer; `None` if it was meant for none."""
    from mcp_types import jsonrpc_message_adapter as adapter

    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not {"result", "error"} & found.keys() or type(found.get("id")) is not int:
        return None
    error = {"code": _INTERNAL_ERROR, "message": "The server's answer is no valid message of the protocol."}
    return adapter.validate_python({"jsonrpc": "2.0", "id": found["id"], "error": error}, by_name=False)


def _line_of(message: Any) -> bytes:
    """A message as a server reads it."""
    try:
        text = message.model_dump_json(by_alias=True, exclude_unset=True)
    except ValueError:
        text = json.dumps(encodable(message.model_dump(by_alias=True, exclude_unset=True)))
    return f"{text}\n".encode()


async def _ends(process: Any, seconds: float) -> bool:
    # Not only `process.wait()`, which also waits for pipes that a descendant may hold open.
    deadline = asyncio.get_running_loop().time() + seconds
    while process.returncode is None and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.005)
    return process.returncode is not None


async def _without_cancellation(work: Any) -> None:
    """Waits for something to the end, whether a task or a scope of anyio is cancelled; that comes afterwards."""
    import anyio

    task = asyncio.ensure_future(work)
    cancelled = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        raise cancelled
