"""Calls of tools, run off the decode path: many at a time, each within its time limit.

What a tool raises is that tool's failure, and comes back as data. All threads are daemons: a hung tool delays neither
the run nor its exit.
"""

import asyncio
import contextlib
import copy
import inspect
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar, cast

from ...errors import ConfigError, EnvironmentTimeoutError, ToolRuntimeError
from ..arguments import refusal as refusal_of
from ..results import as_result, failure, raised
from ..tool import Tool, ToolCall, ToolResult
from .process_pool import ProcessCall, ProcessPool
from .worker_threads import Lane, LoopRun, LoopThread, Outcome, Owners, Work, Worker, outcome_of


T = TypeVar("T")

# How long a cancelled call may take to end before it counts as stuck.
_GRACE = 1.0


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
    lane: Lane | None = None  # of the environment
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
        return [lane for lane in (self.lane, self.exclusive) if lane is not None]

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
        busy = "environment" if self.lane is not None and self.lane.abandoned else "tool"
        self._answer_failure("abandoned", reason or f"The {busy} is still busy with an earlier call.")

    def _answer_failure(self, kind: str, message: str) -> None:
        if self.tool is None:
            self.answer((None, EnvironmentTimeoutError(message, self.environment)))
        else:
            self.answer((failure(kind, message), None))


class ToolExecutor:
    """
    Runs tool calls concurrently and resolves each to a [`ToolResult`].

    A call waits for its environment, or for a tool that is not thread-safe, and then for a slot. It runs on the thread
    of its environment or on an idle one; that thread waits for what runs on the event loop of tools or in a process.
    `_serve` decides this on an event loop of its own, on which no tool runs, so it needs no locks.

    Args:
        max_concurrent (`int`, *optional*, defaults to `64`):
            How many calls may run at the same time; further calls wait, and their time limit starts when they run.
        timeout (`float`, *optional*, defaults to `30.0`):
            Time limit of one call in seconds, retries included; `None` for no limit. `Tool.timeout` comes first.
        retries (`int`, *optional*, defaults to `0`):
            How often a call that failed transiently is tried again.
        max_abandoned (`int`, *optional*, defaults to `64`):
            How many calls may be stuck past their limit at the same time before the run is stopped. Such a call has
            been answered and its thread replaced, but its function still runs, and nothing can end it.
        warm (`Iterable[Tool]`, *optional*, defaults to `()`):
            Tools that get a process at once, if they run in one: what cannot be loaded there is found before the run.
        environment_timeout (`float`, *optional*):
            Time limit in seconds of what is asked of an environment other than by a tool's call; `None` for no limit.

    Raises:
        ConfigError: if a limit is out of range.
        ToolSchemaError: if the function of a tool cannot be loaded in a process.
    """

    def __init__(
        self,
        max_concurrent: int = 64,
        timeout: float | None = 30.0,
        retries: int = 0,
        max_abandoned: int = 64,
        warm: Iterable[Tool] = (),
        environment_timeout: float | None = None,
    ) -> None:
        if max_concurrent < 1 or retries < 0 or max_abandoned < 0 or (timeout is not None and timeout <= 0):
            raise ConfigError(
                f"You passed max_concurrent={max_concurrent}, timeout={timeout}, retries={retries}, "
                f"max_abandoned={max_abandoned}.",
                remedy="Pass at least one slot, a positive time limit or None, and counts that are not negative.",
            )
        self.timeout = timeout
        self.environment_timeout = environment_timeout
        self.retries = retries
        self.max_abandoned = max_abandoned
        self.abandoned = 0  # calls given up so far because they ignored their time limit
        self.stuck: set[Job] = set()  # those of them that still run
        self._owners = Owners()
        self._processes = ProcessPool(warm, max_concurrent)
        self._loop = LoopThread()
        self._dispatcher = LoopThread("tool-dispatch")
        self._dispatcher.get()  # a thread cannot be started when the interpreter exits, and a loop is ended there
        self._lock = threading.RLock()
        self._closed = False
        # What follows, and the two attributes above, are changed on the dispatcher's thread alone.
        self._slots = asyncio.Semaphore(max_concurrent)
        self._jobs: dict[asyncio.Task[None], Job] = {}
        self._idle: list[Worker] = []
        self._exclusive: defaultdict[str, Lane] = defaultdict(Lane)

    def submit(
        self, call: ToolCall, tool: Tool | None, owner: object | None = None, *, available: Collection[str] = ()
    ) -> "Future[ToolResult]":
        """
        Start a call, or queue it.

        Args:
            call ([`ToolCall`]):
                What the policy wrote.
            tool ([`Tool`], *optional*):
                The tool of that name; `None` if there is none.
            owner (`object`, *optional*):
                Environment instance the tool belongs to. The calls on one owner run on that owner's own thread, one at
                a time and in the order submitted.
            available (`Collection[str]`, *optional*, defaults to `()`):
                Names of the rollout's tools, for the answer to a call of an unknown one.

        Returns:
            `Future[ToolResult]`: Always resolves to a result, never to an exception, and cannot be cancelled.
            Callbacks on it run on the runtime's threads and must be quick.

        Raises:
            ToolRuntimeError: if more than `max_abandoned` calls are stuck, or the executor is shut down.
            ToolSchemaError: if the tool's schema is not valid.
        """
        self._check_stuck()
        refusal = refusal_of(call, tool, available)
        if tool is None or refusal is not None:
            answered: Future[ToolResult] = Future()
            answered.set_result(cast(ToolResult, refusal))  # there is one if there is no tool
            return answered
        # A copy, so that a tool can change neither the record of the call nor the next attempt.
        job = Job(lambda: tool.function(**copy.deepcopy(call.arguments)), tool, owner, f"Tool `{tool.name}`")
        job.limit = tool.timeout or self.timeout
        job.lane = None if owner is None else self._owners.lane(owner)
        if tool.isolation == "process":
            job.function = partial(self._processes.run, tool, call.arguments, job.begin_in_process)
        self._enqueue(job)
        return cast("Future[ToolResult]", job.future)

    def start_on_owner(
        self, owner: object, work: Work, name: str = "", limit: float | None = None, *, on_other_thread: bool = False
    ) -> "Future[object]":
        """
        Start something on an owner's thread, or queue it after the calls submitted on it before.

        Args:
            owner (`object`):
                The environment instance.
            work (`Callable`):
                What to run, such as its `reset`; a coroutine is awaited on the event loop.
            name (`str`, *optional*, defaults to `""`):
                What it is, for messages.
            limit (`float`, *optional*):
                Seconds it has once it runs; an owner that takes longer is abandoned. `None` for no limit.
            on_other_thread (`bool`, *optional*, defaults to `False`):
                Whether to run it at once on another thread, since the owner's own hangs.

        Returns:
            `Future`: Has what it returns or raises, an [`EnvironmentTimeoutError`] at the limit.
        """
        job = Job(work, None, owner, f"`{name}` of the environment {type(owner).__name__}", limit)
        job.lane = None if on_other_thread else self._owners.lane(owner)
        if job.lane is not None and job.lane.is_current:
            job.answer(outcome_of(partial(self._run, job)))
        else:
            self._enqueue(job)
        return job.future

    def construct_on_own_thread(self, factory: Callable[[], T]) -> T:
        """
        Construct an environment on the thread that will own it, as `sqlite3` connections and browsers need. What a
        coroutine function makes is awaited.

        Args:
            factory (`Callable`):
                Makes the instance.

        Returns:
            `object`: The instance; all its calls run on that thread.

        Raises:
            EnvironmentTimeoutError: if it takes longer than `environment_timeout`.
        """

        lane = Lane(Worker("tool-owner"))
        job = Job(factory, limit=self.environment_timeout, lane=lane)
        try:
            self._enqueue(job)
            owner = cast("T", job.future.result())
        except BaseException:
            lane.stop()
            raise
        if self._owners.lane(owner, lane) is not lane:
            lane.stop()  # the factory gave out an instance that has a thread already
        return owner

    def is_abandoned(self, owner: object) -> bool:
        """
        Return whether an owner is lost, because a call on it did not keep its time limit.

        Args:
            owner (`object`):
                The environment instance.

        Returns:
            `bool`: True until the owner is released.
        """
        lane = self._owners.find(owner)
        return lane is not None and lane.abandoned

    def is_within_call(self, owner: object) -> bool:
        """
        Return whether the caller belongs to what runs on an owner's thread, coroutines that it waits for included.

        Args:
            owner (`object`):
                The environment instance.
        """
        lane = self._owners.find(owner)
        return lane is not None and lane.is_working

    def give_up(self, owner: object) -> None:
        """
        Abandon an owner that has failed: calls on it are answered as those after a time limit that was not kept.

        Args:
            owner (`object`):
                The environment instance.
        """
        self._owners.lane(owner).abandoned = True
        self._after_submitted(self._drop_waiting)

    def release(self, owner: object) -> None:
        """
        Forget an owner and end its thread after the call that runs; calls that wait are answered as abandoned.

        Args:
            owner (`object`):
                The environment instance.
        """
        lane = self._owners.remove(owner)
        if lane is not None and not self._after_submitted(self._end_lane, lane):
            lane.stop()

    def shutdown(self) -> None:
        """End idle threads and the event loops, and answer calls that wait as abandoned; wait for nothing."""
        with self._lock:
            if self._closed:
                return
            self._after_submitted(self._wind_down)
            self._closed = True
        self._dispatcher.stop(cancel=False)
        self._processes.close()

    def _check_stuck(self) -> None:
        names = [job.tool.name for job in list(self.stuck) if job.tool is not None]
        if len(names) > self.max_abandoned:
            raise ToolRuntimeError(
                f"{len(names)} tool calls are stuck past their time limit, more than "
                f"max_abandoned={self.max_abandoned}. The tools that hang: {', '.join(sorted(set(names)))}.",
                remedy="Make them give up by themselves, allow more time (`tool_timeout`, `Tool.timeout`), or run "
                "them where they can be killed: Tool(isolation='process').",
            )

    def _enqueue(self, job: Job) -> None:
        with self._lock:
            if self._closed:
                raise ToolRuntimeError("You used a `ToolExecutor` after its `shutdown`.", remedy="Make a new one.")
            self._dispatcher.get().call_soon_threadsafe(self._accept, job)

    def _after_submitted(self, function: Callable[..., object], *args: object) -> bool:
        """
        Call something on the dispatcher's thread when the jobs submitted before have started, if they can; return
        whether it will be called, which it is not after `shutdown`.
        """
        with self._lock:
            if not self._closed:
                loop = self._dispatcher.get()
                # The task of a job takes its first step one turn of the loop after it is made.
                loop.call_soon_threadsafe(loop.call_soon, function, *args)
            return not self._closed

    # What follows runs on the dispatcher's thread, except for `_run`.

    def _accept(self, job: Job) -> None:
        if job.tool is not None and not job.tool.thread_safe:
            job.exclusive = self._exclusive[job.tool.name]
        if job.is_lost:
            job.answer_unrun()
            return
        task = asyncio.get_running_loop().create_task(self._serve(job))
        self._jobs[task] = job
        task.add_done_callback(self._jobs.pop)

    async def _serve(self, job: Job) -> None:
        """Take a job from its turn to its answer, and hold what it holds until it has really ended."""
        async with contextlib.AsyncExitStack() as held:
            # Its turn. Lanes are first come, first served, so the calls on an environment keep their order.
            for lane in job.lanes:
                await held.enter_async_context(lane.turn)
            async with self._slots if job.tool is not None else contextlib.nullcontext():
                # Its run. The limit starts when there is a process, which may have to import the tool's module.
                ended = self._start(job)
                if job.tool is not None and job.tool.isolation == "process":
                    ready = asyncio.wrap_future(job.ready)
                    await asyncio.wait([ended, ready], return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait([ended], timeout=job.limit)
                if ended.done():
                    job.answer(ended.result())
                else:
                    self._expire(job)
            # Its end: what ignored the limit is cancelled if it can be, and holds its lanes as long as it runs.
            if job.expired:
                await self._end_expired(job, ended)
            if job.worker is not None:
                if job.expired or self._closed:
                    job.worker.stop()
                else:
                    self._idle.append(job.worker)

    def _start(self, job: Job) -> "asyncio.Future[Outcome]":
        job.waits = False
        job.started = time.monotonic()
        try:
            worker = job.lane.worker if job.lane is not None else None
            if worker is None:
                worker = job.worker = self._idle.pop() if self._idle else Worker("tool-worker")
            ended = worker.run(partial(self._run, job))
        except RuntimeError as error:  # the system has no more threads
            ended = Future()
            ended.set_result((None, ToolRuntimeError(str(error))))
        return asyncio.wrap_future(ended)

    def _run(self, job: Job) -> object:
        def resolve(value: object) -> object:
            return self._loop.run(value, job.begin) if inspect.isawaitable(value) else value

        return resolve(job.function()) if job.tool is None else job.run(self.retries, resolve)

    def _expire(self, job: Job) -> None:
        job.expired = True
        if job.lane is not None:
            job.lane.abandoned = True
        is_coroutine = job.tool is not None and job.tool.is_async  # which is cancelled as soon as it begins
        if job.cancellable is None and not is_coroutine:
            self._count_stuck(job)
        job.answer_late()
        self._drop_waiting()

    async def _end_expired(self, job: Job, ended: "asyncio.Future[Outcome]") -> None:
        if job not in self.stuck:
            if job.cancellable is not None:
                job.cancellable.cancel()
            await asyncio.wait([ended], timeout=_GRACE)
            if not ended.done():
                self._count_stuck(job)
                self._drop_waiting()
                if isinstance(job.cancellable, LoopRun) and not job.cancellable.responded:
                    self._loop.replace(job.cancellable.loop)
        await ended
        self.stuck.discard(job)
        if job.exclusive is not None:
            job.exclusive.abandoned = False

    def _count_stuck(self, job: Job) -> None:
        if job.tool is not None:
            self.stuck.add(job)
            self.abandoned += 1
        if job.exclusive is not None:
            job.exclusive.abandoned = True

    def _drop_waiting(self, reason: str | None = None, all_jobs: bool = False) -> None:
        """Answer the jobs that wait for something lost, or all that wait."""
        for task, job in list(self._jobs.items()):
            if job.waits and (all_jobs or job.is_lost):
                job.answer_unrun(reason)
                task.cancel()

    def _end_lane(self, lane: Lane) -> None:
        lane.abandoned = True  # also for calls that another thread submits at the same time
        self._drop_waiting("The environment was released before the call ran.")
        lane.stop()

    def _wind_down(self) -> None:
        self._drop_waiting("The tool runtime was shut down before the call ran.", all_jobs=True)
        for worker in self._idle:
            worker.stop()
        self._idle.clear()
        self._owners.clear()
        self._loop.stop()
