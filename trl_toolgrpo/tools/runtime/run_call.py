"""One call of the runtime: its attempts, its time limit and its answer. Whatever a tool raises becomes data here."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from ...errors import EnvironmentTimeoutError
from ..results import as_result, failure, raised
from ..tool import Tool, ToolResult
from .environment_threads import Lane, Worker
from .event_loop import LoopRun, Outcome, Work
from .process_pool import ProcessCall


@dataclass(eq=False)
class Job:
    """
    One call of a tool, or, with `tool=None`, another piece of work on an environment's thread.

    Args:
        function (`Callable`):
            The call, with its arguments.
        tool (`Tool`, *optional*):
            The tool that is called.
        environment (`object`, *optional*):
            The environment that the work belongs to, kept alive as long as the job is.
        title (`str`, *optional*, defaults to `"It"`):
            What runs, for messages.
        limit (`float`, *optional*):
            Seconds the job has once it runs; `None` for no limit.
    """

    function: Work
    tool: Tool | None = None
    environment: object = None
    title: str = "It"
    limit: float | None = None
    future: "Future[object]" = field(default_factory=Future)
    owner: Lane | None = None
    exclusive: Lane | None = None  # of a tool that is not thread-safe
    waits: bool = True
    ready: "Future[Outcome]" = field(default_factory=Future)  # done once there is a process, if it runs in one
    started: float | None = None
    expired: bool = False
    cancellable: LoopRun | ProcessCall | None = None
    worker: Worker | None = None  # one that belongs to no environment

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # callers cannot cancel it

    @property
    def lanes(self) -> list[Lane]:
        """What the job holds while it runs."""
        return [lane for lane in (self.owner, self.exclusive) if lane is not None]

    @property
    def is_lost(self) -> bool:
        """Whether what the job needs is held by a call that ignored its limit."""
        return any(lane.abandoned for lane in self.lanes)

    def begin(self, part: LoopRun | ProcessCall) -> None:
        """Note what can be cancelled at the limit, and cancel it if that has passed."""
        self.cancellable = part
        if self.expired:
            part.cancel()

    def begin_in_process(self, call: ProcessCall) -> None:
        """Note that the process is ready: the time limit starts now, and covers later attempts too."""
        self.begin(call)
        if not self.ready.done():
            self.started = time.monotonic()
            self.ready.set_result((None, None))

    def run(self, retries: int, resolve: Callable[[object], object]) -> ToolResult:
        """
        Call the tool on this thread, again while its failure is transient.

        Args:
            retries (`int`):
                How often a transient failure is tried again.
            resolve (`Callable`):
                Waits for the awaitable that a tool may have returned; other values it returns as they are.
        """
        while True:
            try:
                result = as_result(resolve(self.function()))
            except BaseException as error:
                result = raised(error)
            if not (result.is_error and result.transient) or retries == 0 or self.expired:
                return result
            retries -= 1

    def answer(self, outcome: Outcome) -> None:
        """Resolve the future with what the job returned or raised."""
        value, error = outcome
        if self.tool is not None:
            result = value if isinstance(value, ToolResult) else raised(error or TypeError(type(value).__name__))
            seconds = 0.0 if self.started is None else time.monotonic() - self.started
            self.future.set_result(replace(result, seconds=seconds))
        elif error is not None:  # raised again in the caller
            self.future.set_exception(error)
        else:
            self.future.set_result(value)

    def answer_late(self) -> None:
        """Resolve the future of a job that did not return within its limit."""
        option = " (`environment_timeout`)" if self.tool is None else ""
        self._answer_failure("timeout", f"{self.title} did not return within {self.limit:g} seconds{option}.")

    def answer_unrun(self, reason: str | None = None) -> None:
        """Resolve the future of a job that will not run, by default because what it waits for is abandoned."""
        self.waits = False
        busy = "environment" if self.owner is not None and self.owner.abandoned else "tool"
        self._answer_failure("abandoned", reason or f"The {busy} is still busy with an earlier call.")

    def _answer_failure(self, kind: str, message: str) -> None:
        if self.tool is None:
            self.answer((None, EnvironmentTimeoutError(message, self.environment)))
        else:
            self.answer((failure(kind, message), None))
