"""Processes for the tools that run in one of their own: started when needed, used again, killed at a time limit.

A pool such as `pebble.ProcessPool` or `anyio.to_process` does less than is needed here. Its workers import the main
script, and so torch. The children of a worker outlive it when it is killed, and workers outlive a run that is killed.
And it unpickles in the run whatever a tool's process sends. What runs in the process is `process_main.py`.
"""

import functools
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ...errors import ToolRuntimeError, ToolSchemaError
from ...types import JSONObject
from ..results import failure
from ..tool import Tool, ToolResult
from .supervisor import guarded


# How long the module of a tool may take to be imported.
_START_SECONDS = 60.0
_MOST_WARM = 8  # processes that are started before a run; each holds all that a tool's module imports
# Characters of one result; no chat shows as many, and a tool cannot fill the memory of the run.
_RESULT_LIMIT = 4 * 2**20
_REPLY_LIMIT = 12 * _RESULT_LIMIT + 2**16  # JSON writes a character in up to twelve bytes


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
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            script = str(Path(__file__).with_name("process_main.py"))
            command = guarded([sys.executable, "-I", script, str(theirs.fileno())])
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        try:
            self._load()
        except BaseException:
            self.end()
            raise

    def _load(self) -> None:
        path = [entry or os.getcwd() for entry in sys.path]
        self._send({"path": path, "function": pickle.dumps(self.tool.function), "limit": _RESULT_LIMIT})
        in_time = self._connection.poll(_START_SECONDS)
        reply = self._receive() if in_time else {"failed": f"it took more than {_START_SECONDS:g} s"}
        if reply is None:
            raise ToolRuntimeError(f"The process of tool `{self.tool.name}` {self._end_description()} as it started.")
        if "failed" in reply:
            raise ToolSchemaError(
                f"The function of tool {self.tool.name!r} (isolation='process') cannot be loaded in a process of its "
                f"own: {reply['failed']}.",
                remedy="It has to be in a module that can be imported there, with all it needs.",
            )

    @property
    def alive(self) -> bool:
        """Whether the process can take a call."""
        return self._process.poll() is None

    def call(self, arguments: JSONObject) -> tuple[ToolResult, bool]:
        """
        Call the function and wait.

        Args:
            arguments (`dict`):
                Arguments by name.

        Returns:
            `tuple[ToolResult, bool]`: The result, an error if the process has ended; whether the process can
            take another call.
        """
        self._send(arguments)
        reply = self._receive()
        if reply is None:
            message = f"The process of tool `{self.tool.name}` {self._end_description()}."
            return failure("error", message), False
        reusable = reply.pop("reusable")
        return ToolResult(**reply), reusable

    def kill(self) -> None:
        """End the process and all it has started, at once; wait for nothing."""
        self._process.kill()

    def end(self) -> None:
        """End the process and wait until it has ended."""
        self.kill()
        self._connection.close()
        self._process.wait()

    def _send(self, message: JSONObject) -> None:
        with suppress(OSError):  # a process that has ended is noticed when its answer is read
            self._connection.send(message)

    def _receive(self) -> JSONObject | None:
        """Return a reply, or `None` if the process has ended or does not keep to the protocol."""
        try:
            reply = json.loads(self._connection.recv_bytes(_REPLY_LIMIT))
        except (OSError, EOFError, ValueError):
            return None
        return reply if isinstance(reply, dict) else None

    def _end_description(self) -> str:
        self._connection.close()
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
        """Kill the process, unless the call is over and the process may serve another."""
        with self._lock:
            if not self._over:
                self._process.kill()

    def finish(self) -> None:
        """Note that the call is over."""
        with self._lock:
            self._over = True


class ProcessPool:
    """
    The processes of a run: none serves two tools or two calls at once, and none outlives the run.

    Args:
        warm (`Iterable[Tool]`, *optional*, defaults to `()`):
            Tools that get a process at once, if they run in one. Of many, only the first; whether the others can be
            loaded is checked in one process.
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
                self._give_back(self._take(tool))
            _check_loading(isolated[_MOST_WARM:])
        except BaseException:
            self.close()
            raise

    def run(self, tool: Tool, arguments: JSONObject, begins: Callable[[ProcessCall], object]) -> ToolResult:
        """
        Run a call on the current thread, in a process that is idle or in a new one.

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
        call, reusable = ProcessCall(process), False
        try:
            begins(call)
            result, reusable = process.call(arguments)
        finally:
            call.finish()
            self._give_back(process) if reusable else self._retire(process)
        return result

    def close(self) -> None:
        """Kill every process, busy or not."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            busy = self._all.difference(idle)
        for process in busy:
            process.kill()  # whoever waits for its answer retires it
        for process in idle:
            self._retire(process)

    def _take(self, tool: Tool) -> ToolProcess:
        with self._lock:
            if self._closed:
                raise ToolRuntimeError("The tool runtime was shut down before the call ran.")
            fitting = [p for p in self._idle if p.tool.function is tool.function and p.alive]
            if fitting:
                self._idle.remove(fitting[-1])
                return fitting[-1]
        process = ToolProcess(tool)
        with self._lock:
            self._all.add(process)
            if self._closed:  # in the meantime
                process.kill()
        return process

    def _give_back(self, process: ToolProcess) -> None:
        with self._lock:
            self._idle.append(process)
            retired = self._idle.pop(0) if self._closed or len(self._idle) > self._most_idle else None
        if retired is not None:
            self._retire(retired)

    def _retire(self, process: ToolProcess) -> None:
        process.end()
        with self._lock:
            self._all.discard(process)
