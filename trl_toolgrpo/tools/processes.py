"""Processes for the tools that run in one of their own: started when needed, used again, killed at a time limit.

Owns `ProcessPool`, `ProcessCall` and the check that a function can be sent to a process; fed by `execute.py`. What
runs in the process is `worker.py`.
"""

import contextlib
import functools
import json
import os
import pickle
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ToolRuntimeError, ToolSchemaError
from .guard import guarded
from .types import Tool, ToolResult
from .worker import write_frame


# How long the module of a tool may take to be imported.
_START_SECONDS = 60.0
_MOST_WARM = 8  # processes that are started before a run; each holds all that a tool's module imports
# Characters of one result; no chat shows as many, and a tool cannot fill the memory of the run.
_RESULT_LIMIT = 4 * 2**20
_FRAME_LIMIT = 12 * _RESULT_LIMIT + 2**16  # JSON writes a character in up to twelve bytes


class ToolProcess:
    """
    A process that serves one tool, one call at a time.

    Args:
        tool ([`Tool`]):
            The tool.

    Raises:
        ToolSchemaError: if the function cannot be loaded there.
        ToolRuntimeError: if the process does not start.
    """

    def __init__(self, tool: Tool) -> None:
        self.tool = tool
        there, mine = os.pipe(), os.pipe()
        script = str(Path(__file__).with_name("worker.py"))
        command = guarded([sys.executable, "-I", script, str(there[0]), str(mine[1])])
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(there[0], mine[1]))
        finally:
            os.close(there[0])
            os.close(mine[1])
        self._requests: BinaryIO = open(there[1], "wb")  # noqa: SIM115
        self._replies: BinaryIO = open(mine[0], "rb", buffering=0)  # noqa: SIM115
        try:
            self._load()
        except BaseException:
            self.end()
            raise

    def _load(self) -> None:
        path = [entry or os.getcwd() for entry in sys.path]
        setup = {"path": path, "function": pickle.dumps(self.tool.function), "limit": _RESULT_LIMIT}
        self._send(pickle.dumps(setup))
        in_time = select.select([self._replies], [], [], _START_SECONDS)[0]
        reply = self._receive() if in_time else {"failed": f"it took more than {_START_SECONDS:g} s"}
        if reply is None:
            raise ToolRuntimeError(f"The process of tool `{self.tool.name}` {self._end_in_words()} as it started.")
        if "failed" in reply:
            raise ToolSchemaError(
                f"The function of tool {self.tool.name!r} (isolation='process') cannot be loaded in a process of its "
                f"own: {reply['failed']}. It has to be in a module that can be imported there, with all it needs."
            )

    @property
    def alive(self) -> bool:
        """Whether the process can take a call."""
        return self._process.poll() is None

    def call(self, arguments: dict[str, Any]) -> tuple[ToolResult, bool]:
        """
        Calls the function and waits.

        Args:
            arguments (`dict`):
                Arguments by name.

        Returns:
            `tuple[ToolResult, bool]`: The result, an error if the process has come to an end; whether the process can
            take another call.
        """
        self._send(pickle.dumps(arguments))
        reply = self._receive()
        if reply is None:
            message = f"The process of tool `{self.tool.name}` {self._end_in_words()}."
            return ToolResult({"error": message}, is_error=True, error_type="error"), False
        reusable = reply.pop("reusable")
        return ToolResult(**reply), reusable

    def kill(self) -> None:
        """Ends the process and all it has started, at once; waits for nothing."""
        self._process.kill()

    def end(self) -> None:
        """Ends the process and takes leave of it."""
        self.kill()
        for stream in (self._requests, self._replies):
            with contextlib.suppress(OSError):
                stream.close()
        self._process.wait()

    def _send(self, message: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # what has become of the process is seen when its answer is read
            write_frame(self._requests, message)

    def _receive(self) -> dict[str, Any] | None:
        """A reply, or `None` if the process has ended or speaks nonsense."""
        head = self._read(8)
        if head is None or int.from_bytes(head, "big") > _FRAME_LIMIT:
            return None
        body = self._read(int.from_bytes(head, "big"))
        try:
            reply = None if body is None else json.loads(body)
        except ValueError:
            return None
        return reply if isinstance(reply, dict) else None

    def _read(self, count: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < count:
            part = self._replies.read(min(count - len(parts), 2**20))
            if not part:
                return None
            parts += part
        return bytes(parts)

    def _end_in_words(self) -> str:
        self._requests.close()
        try:
            code = self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            return "broke its protocol"
        return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _check_loading(tools: list[Tool]) -> None:
    """
    Check in one process that the functions of tools can be loaded; where they cannot, in one each, to name the tool.

    Raises:
        ToolSchemaError: if one cannot.
        ToolRuntimeError: if its process does not start.
    """
    if not tools:
        return
    together = replace(tools[0], function=functools.partial(print, *(tool.function for tool in tools)))
    try:
        ToolProcess(together).end()
    except (ToolSchemaError, ToolRuntimeError):
        for tool in tools:
            ToolProcess(tool).end()


class ProcessCall:
    """
    One call in a process, which can be cancelled from other threads.

    Args:
        process ([`ToolProcess`]):
            The process.
    """

    def __init__(self, process: ToolProcess) -> None:
        self._process = process
        self._lock = threading.Lock()
        self._over = False

    def cancel(self) -> None:
        """Kills the process, unless the call is over and the process may serve another."""
        with self._lock:
            if not self._over:
                self._process.kill()

    def run(self, arguments: dict[str, Any]) -> tuple[ToolResult, bool]:
        """Makes the call; see [`ToolProcess.call`]."""
        try:
            return self._process.call(arguments)
        finally:
            with self._lock:
                self._over = True


class ProcessPool:
    """
    The processes of a run: none serves two tools or two calls at once, and none outlives the run.

    Args:
        warm (`Iterable[Tool]`, *optional*, defaults to `()`):
            Tools that get a process at once, if they run in one. Of many, the first alone; that the others can be
            loaded is found out in one process.
        most_idle (`int`, *optional*, defaults to `64`):
            Most processes that are kept for later calls; beyond that, the one that waits longest is ended.

    Raises:
        ToolSchemaError: if the function of a tool cannot be loaded in a process.
    """

    def __init__(self, warm: Iterable[Tool] = (), most_idle: int = 64) -> None:
        self._lock = threading.Lock()
        self._most_idle = most_idle
        self._idle: list[ToolProcess] = []  # the one that waits longest first
        self._all: set[ToolProcess] = set()
        self._closed = False
        try:
            isolated = [tool for tool in warm if tool.isolation == "process"]
            for tool in isolated[:_MOST_WARM]:
                self._give_back(self._take(tool), True)
            _check_loading(isolated[_MOST_WARM:])
        except BaseException:
            self.close()
            raise

    def run(self, tool: Tool, arguments: dict[str, Any], begins: Callable[[ProcessCall], object]) -> ToolResult:
        """
        Runs a call on the current thread, in a process that is idle or in a new one.

        Args:
            tool ([`Tool`]):
                The tool.
            arguments (`dict`):
                Arguments by name.
            begins (`Callable`):
                Called when the process is ready, with what can be cancelled.

        Returns:
            [`ToolResult`]: The result.

        Raises:
            ToolSchemaError: if the function cannot be loaded in a process.
            ToolRuntimeError: if the process does not start, or the pool is closed.
        """
        process = self._take(tool)
        reusable = False
        try:
            call = ProcessCall(process)
            begins(call)
            result, reusable = call.run(arguments)
        finally:
            self._give_back(process, reusable)
        return result

    def close(self) -> None:
        """Kills every process, busy or not."""
        with self._lock:
            self._closed = True
            idle = list(self._idle)
            busy = self._all.difference(idle)
            self._idle.clear()
        for process in busy:
            process.kill()  # whoever waits for its answer takes leave of it
        for process in idle:
            self._retire(process)

    def _take(self, tool: Tool) -> ToolProcess:
        while True:
            with self._lock:
                if self._closed:
                    raise ToolRuntimeError("The tool runtime was shut down before the call ran.")
                fitting = [process for process in self._idle if process.tool.function is tool.function]
                process = fitting[-1] if fitting else None
                if process is not None:
                    self._idle.remove(process)
            if process is None:
                break
            if process.alive:
                return process
            self._retire(process)
        process = ToolProcess(tool)
        with self._lock:
            self._all.add(process)
            closed = self._closed
        if closed:  # in the meantime
            process.kill()
        return process

    def _give_back(self, process: ToolProcess, reusable: bool) -> None:
        with self._lock:
            retired = None if reusable and not self._closed else process
            if retired is None:
                self._idle.append(process)
                retired = self._idle.pop(0) if len(self._idle) > self._most_idle else None
        if retired is not None:
            self._retire(retired)

    def _retire(self, process: ToolProcess) -> None:
        process.end()
        with self._lock:
            self._all.discard(process)
