"""A server process that ends with the run, and the messages over its standard streams.

The SDK's own `stdio_client` is not used, since it does not withstand a hostile server: it reads a message of any
length, in time that grows with the square of the length; it logs every line that is not a message, secrets included;
and a call whose answer is not valid waits for its time limit. It gives neither the exit code nor the error output.
"""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio.lowlevel
from anyio.abc import ObjectReceiveStream, ObjectSendStream
from mcp.client.stdio import get_default_environment
from mcp.shared.message import SessionMessage
from mcp_types import INTERNAL_ERROR, ErrorData, JSONRPCError, JSONRPCMessage, jsonrpc_message_adapter

from ...errors import MCPServerError
from ..results import encodable
from ..runtime.supervisor import guarded
from .config import MCPServer


logger = logging.getLogger(__name__)

LONGEST_MESSAGE = 64 * 2**20
"""Bytes of one message of a server; a longer one ends the connection before it takes all memory."""

_STDERR_KEPT = 64 * 2**10
_STDERR_SHOWN = 2000
# Seconds a server may take to end after its input is closed, and after each signal.
_SHUTDOWN_SECONDS = 2.0
_SIGNAL_SECONDS = 1.0


class ServerProcess(ObjectReceiveStream[SessionMessage], ObjectSendStream[SessionMessage]):
    """
    A server's process, from its start to its end, as a stream of messages from it and to it.

    Args:
        server ([`MCPServer`]):
            What to start.
        folder (`str`, *optional*):
            Working directory, instead of the server's `cwd`.
        on_end (`Callable`):
            Called when the server gives no more messages.
    """

    def __init__(self, server: MCPServer, folder: str | None, on_end: Callable[[], object]) -> None:
        self.server = server
        self.folder = folder
        self.returncode: int | None = None  # of a server that has ended by itself
        self._on_end = on_end
        self._process: Any = None  # `Process` leaves open whether it has streams
        self._output_ended = False
        self._warned = False
        self._stderr = b""

    @property
    def error_output(self) -> str:
        """The end of what the server wrote to its error output."""
        text = self.server.redactor.text(self._stderr.decode(errors="replace")).strip()
        return text if len(text) <= _STDERR_SHOWN else f"...{text[-_STDERR_SHOWN:]}"

    @contextlib.asynccontextmanager
    async def transport(self) -> AsyncIterator[tuple["ServerProcess", "ServerProcess"]]:
        """
        Start the server, and end it at the end; a transport for the SDK's client.

        Raises:
            MCPServerError: if its command is not found.
            OSError, ValueError: if it cannot be started.
        """
        self._process = await asyncio.create_subprocess_exec(
            *guarded([_program(self.server), *self.server.args]),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            env={**get_default_environment(), **self.server.env},
            cwd=self.folder or self.server.cwd,
            start_new_session=True,
            limit=LONGEST_MESSAGE,
        )
        keeping = asyncio.create_task(self._keep_stderr())
        try:
            yield self, self
        finally:
            with anyio.CancelScope(shield=True):
                await self._stop()
                await asyncio.wait([keeping], timeout=0.5)
            self._process._transport.close()  # or its pipes stay open until it is collected
            keeping.cancel()

    async def receive(self) -> SessionMessage:
        """
        Return the next message; pass over lines that are none, such as a stray `print`.

        Raises:
            EndOfStream: if there is none, or the next line is too long.
        """
        with contextlib.suppress(ValueError, ConnectionError):
            while line := await self._process.stdout.readline():
                await anyio.lowlevel.checkpoint()  # a server that floods its output must not block the loop
                message = _parsed(line)
                if message is not None:
                    return SessionMessage(message)
                if line.strip() and not self._warned:
                    self._warned = True
                    text = self.server.redactor.text(line.decode(errors="replace")).strip()
                    logger.warning(
                        "The MCP server %r writes lines to its standard output that are no messages, the first: %r. "
                        "They are passed over.",
                        self.server.name,
                        text[:200],
                    )
            self._output_ended = True
        self._on_end()
        raise anyio.EndOfStream

    async def send(self, item: SessionMessage) -> None:
        """
        Send a message.

        Raises:
            BrokenResourceError: if it cannot be written.
        """
        try:
            line = item.message.model_dump_json(by_alias=True, exclude_unset=True)
            self._process.stdin.write(f"{line}\n".encode())
            await self._process.stdin.drain()
        except Exception as error:
            raise anyio.BrokenResourceError from error

    async def aclose(self) -> None:
        """Do nothing: the process ends with the transport."""

    async def _keep_stderr(self) -> None:
        while chunk := await self._process.stderr.read(_STDERR_KEPT):
            self._stderr = (self._stderr + chunk)[-_STDERR_KEPT:]

    async def _stop(self) -> None:
        """Close the server's input, then ask it to end, then end it."""
        process, ended_by_itself = self._process, self._output_ended
        process.stdin.close()
        for seconds, number in (
            (_SHUTDOWN_SECONDS, signal.SIGTERM),
            (_SIGNAL_SECONDS, signal.SIGKILL),
            (_SIGNAL_SECONDS, 0),
        ):
            with anyio.move_on_after(seconds):
                # Not `process.wait()`, which also waits for pipes that a descendant may hold open.
                while process.returncode is None:
                    await anyio.sleep(0.005)
                break
            # Not `process.terminate()`, which polls first and takes the return code from asyncio's watcher.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
        self.returncode = process.returncode if ended_by_itself else None


def _program(server: MCPServer) -> str:
    """Return the path of a server's command: as given, as found in `PATH`, or next to the running Python."""
    command = str(server.command)
    if os.path.dirname(command):
        return os.path.abspath(command) if server.cwd is None else command
    places = [server.env.get("PATH") or os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)]
    found = shutil.which(command, path=os.pathsep.join(places))
    if found is None:
        raise MCPServerError(
            f"The MCP server {server.name!r} cannot be started: its command {command!r} is neither in `PATH` nor next "
            f"to {sys.executable}.",
            remedy="Install it, or give its path.",
        )
    return found


def _parsed(line: bytes) -> JSONRPCMessage | None:
    """
    Return the message in a line, or `None` where there is none. Half an emoji, which the SDK's parser refuses, is
    replaced. An answer that is not valid becomes the failure of its request, which would otherwise wait in vain.
    """
    found = None
    try:
        found = encodable(json.loads(line))
        return jsonrpc_message_adapter.validate_python(found, by_name=False)
    except (ValueError, RecursionError):
        if not isinstance(found, dict) or not {"result", "error"} & found.keys() or type(found.get("id")) is not int:
            return None
        error = ErrorData(code=INTERNAL_ERROR, message="The server's answer is no valid message of the protocol.")
        return JSONRPCError(jsonrpc="2.0", id=found["id"], error=error)
