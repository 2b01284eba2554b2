"""Calls of tools, run off the decode path: many at a time, each within its time limit.

Owns the order, the limits and the failures of calls; fed by the rollout loop. What a tool raises is that tool's
failure, and comes back as data. All threads are daemons: a hung tool delays neither the run nor its exit.
"""

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from ..errors import ConfigError, EnvironmentTimeoutError, ToolRuntimeError
from .arguments import refusal as refusal_of
from .attempts import answer_unrun, call_with_copy, run_on_loop, run_on_thread
from .lanes import Admission, Job, Lane
from .loops import LoopRun, LoopThread
from .owners import Owners, construct, wait
from .processes import ProcessCall, ProcessPool
from .results import raised, refused, unknown_tool
from .results import result_text as result_text
from .threads import Watchdog, Worker
from .types import Tool, ToolCall, ToolResult


T = TypeVar("T")

# How long a cancelled coroutine may take to end before it counts as stuck.
_GRACE = 1.0


class ToolExecutor:
    """
    Runs tool calls concurrently and resolves each to a [`ToolResult`].

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
                f"max_abandoned={max_abandoned}. Calls need at least one slot and a positive time limit (or None), "
                f"and the counts cannot be negative."
            )
        self.timeout = timeout
        self.environment_timeout = environment_timeout
        self.retries = retries
        self.max_abandoned = max_abandoned
        self._lock = threading.Lock()
        self._admission = Admission(max_concurrent)
        self._idle: list[Worker] = []
        self._owners = Owners()
        self._exclusive: dict[str, Lane] = {}
        self._stuck: set[Job] = set()
        self._abandoned = 0
        self._closed = False
        self._watchdog = Watchdog()
        self._loop = LoopThread()
        self._processes = ProcessPool(warm, max_concurrent)

    @property
    def abandoned(self) -> int:
        """How many calls have been given up so far because they ignored their time limit."""
        return self._abandoned

    @property
    def stuck(self) -> int:
        """How many of the tool calls that were given up still run."""
        return sum(job.tool is not None for job in self._stuck)

    def submit(
        self, call: ToolCall, tool: Tool | None, owner: object | None = None, *, available: Collection[str] = ()
    ) -> Future[ToolResult]:
        """
        Starts a call, or queues it.

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
        future: Future[ToolResult] = Future()
        future.set_running_or_notify_cancel()
        refusal = refusal_of(call, tool, available)
        if tool is None or refusal is not None:
            future.set_result(refusal or unknown_tool(call, available))
        else:
            job = Job(future, partial(call_with_copy, tool.function, call.arguments), tool, keep=owner)
            if tool.isolation == "process":
                job.function = partial(self._processes.run, tool, call.arguments, partial(self._begin_in_process, job))
            self._enqueue(job, owner)
        return future

    def run_on_owner(self, owner: object, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """
        Runs something on an owner's thread, after the calls submitted on it before, and waits.

        Args:
            owner (`object`):
                The environment instance.
            function (`Callable`):
                What to run, such as its `reset`; a coroutine is awaited on the event loop.
            args, kwargs:
                Its arguments.

        Returns:
            What the function returns.

        Raises:
            EnvironmentTimeoutError: if it, or an earlier call on the owner, ignored its time limit.
        """
        name = str(args[1] if function is getattr and len(args) > 1 else getattr(function, "__name__", function))
        return wait(self.start_on_owner(owner, partial(function, *args, **kwargs), name, self.environment_timeout))

    def start_on_owner(
        self, owner: object, work: "partial[Any]", name: str = "", limit: float | None = None
    ) -> "Future[Any]":
        """
        Starts something on an owner's thread, or queues it after the calls submitted on it before.

        Args:
            owner (`object`):
                The environment instance.
            work (`partial`):
                What to run, such as its `reset`; a coroutine is awaited on the event loop.
            name (`str`, *optional*, defaults to `""`):
                What it is, for messages.
            limit (`float`, *optional*):
                Seconds it has once it runs; an owner that takes longer is abandoned. `None` for no limit.

        Returns:
            `Future`: Has what it returns or raises, an [`EnvironmentTimeoutError`] at the limit.
        """
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        lane = self._owners.find(owner)
        if lane is not None and lane.worker is not None and lane.worker.is_current:
            try:
                future.set_result(self._resolved(work()))
            except BaseException as error:
                future.set_exception(error)
        else:
            self._enqueue(Job(future, work, keep=owner, name=name, limit=limit), owner)
        return future

    def run_beside_owner(self, owner: object, name: str) -> Any:
        """
        Reads an attribute of an owner whose own thread hangs, on another thread and within the limit.

        Args:
            owner (`object`):
                The environment instance.
            name (`str`):
                The attribute.

        Raises:
            EnvironmentTimeoutError: if that does not return either.
        """
        job = Job(Future(), partial(getattr, owner, name), keep=owner, name=name, limit=self.environment_timeout)
        self._enqueue(job, None)
        return wait(job.future)

    def construct_on_own_thread(self, factory: Callable[[], T]) -> T:
        """
        Constructs an environment on the thread that will own it, as `sqlite3` connections and browsers need. What a
        coroutine function makes is awaited.

        Args:
            factory (`Callable`):
                Makes the instance.

        Returns:
            `object`: The instance; all its calls run on that thread.

        Raises:
            EnvironmentTimeoutError: if it takes longer than `environment_timeout`.
        """
        worker = Worker("tool-owner")
        begun: list[LoopRun] = []

        def make() -> Any:
            made: Any = factory()
            return self._loop.wait_for(made, begun.append) if inspect.iscoroutine(made) else made

        try:
            owner: T = construct(make, worker, self.environment_timeout)
        except EnvironmentTimeoutError:
            for run in begun:
                run.cancel()
            raise
        if self._owners.lane(owner, worker).worker is not worker:
            # The factory gave out an instance that has a thread already.
            worker.stop()
        return owner

    def is_abandoned(self, owner: object) -> bool:
        """
        Whether an owner is lost, because a call on it did not keep its time limit.

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
        Whether the caller belongs to what runs on an owner's thread, coroutines that it waits for included.

        Args:
            owner (`object`):
                The environment instance.
        """
        lane = self._owners.find(owner)
        return lane is not None and lane.worker is not None and lane.worker.is_working

    def give_up(self, owner: object) -> None:
        """
        Abandons an owner that has failed: calls on it are answered as those after a time limit that was not kept.

        Args:
            owner (`object`):
                The environment instance.
        """
        lane = self._owners.lane(owner)
        with self._lock:
            lane.busy = lane.abandoned = True
            dropped = self._drop_lost()
        answer_unrun(dropped)

    def release(self, owner: object) -> None:
        """
        Forgets an owner and ends its thread after the call that runs; calls that wait are answered as abandoned.

        Args:
            owner (`object`):
                The environment instance.
        """
        lane = self._owners.remove(owner)
        with self._lock:
            dropped = self._admission.drop(lambda job: lane is not None and job.owner is lane)
        answer_unrun(dropped, "The environment was released before the call ran.")

    def shutdown(self) -> None:
        """Ends idle threads and the event loop, and answers calls that wait as abandoned; waits for nothing."""
        with self._lock:
            self._closed = True
            dropped = self._admission.drop(lambda job: True)
            workers, self._idle = self._idle, []
        for worker in workers:
            worker.stop()
        answer_unrun(dropped, "The tool runtime was shut down before the call ran.")
        self._owners.clear()
        self._loop.stop()
        self._processes.close()
        self._watchdog.stop()

    def _check_stuck(self) -> None:
        with self._lock:
            names = sorted({job.tool.name for job in self._stuck if job.tool is not None})
            count = self.stuck
        if count > self.max_abandoned:
            raise ToolRuntimeError(
                f"{count} tool calls are stuck past their time limit, more than max_abandoned={self.max_abandoned}. "
                f"The tools that hang: {', '.join(names)}. Make them give up by themselves, allow more time "
                f"(`tool_timeout`, `Tool.timeout`), or run them where they can be killed: Tool(isolation='process')."
            )

    def _enqueue(self, job: Job, owner: object | None) -> None:
        if self._closed:
            raise ToolRuntimeError("You used a `ToolExecutor` after its `shutdown`. Make a new one.")
        job.owner = None if owner is None else self._owners.lane(owner)
        with self._lock:
            if job.tool is not None and not job.tool.thread_safe:
                job.exclusive = self._exclusive.setdefault(job.tool.name, Lane())
            lost = any(lane.abandoned for lane in job.lanes)
            if not lost:
                self._admission.add(job)
        if lost:
            answer_unrun([job])
        else:
            self._dispatch()

    def _dispatch(self) -> None:
        with self._lock:
            jobs = self._admission.start()
        for job in jobs:
            self._start(job)

    def _start(self, job: Job) -> None:
        job.started = time.monotonic()
        try:
            if job.owner is not None and job.owner.worker is not None:
                job.owner.worker.run(partial(self._run, job))
            elif job.tool is not None and job.tool.is_async and job.tool.isolation == "thread":
                coroutine = run_on_loop(job, self.retries)
                job.cancellable = LoopRun(self._loop.get(), coroutine, partial(self._finish_task, job))
            else:
                with self._lock:
                    job.worker = self._idle.pop() if self._idle else None
                job.worker = job.worker or Worker("tool-worker")
                job.worker.run(partial(self._run, job))
        except RuntimeError as error:
            # The system has no more threads, or a shared event loop is closed.
            self._finish(job, raised(error))
            return
        if job.tool is None:
            self._set_alarm(job, job.limit)
        elif job.tool.isolation == "thread":
            self._set_alarm(job, job.tool.timeout or self.timeout)

    def _set_alarm(self, job: Job, limit: float | None) -> None:
        if limit is not None:
            alarm = job.alarm = self._watchdog.schedule(limit, partial(self._expire, job, limit))
            if job.settled:
                alarm.cancel()

    def _begin_in_process(self, job: Job, call: ProcessCall) -> None:
        """The limit starts when there is a process: it may have to be started, and to import the tool's module."""
        job.cancellable = call
        if job.expired:  # while the process of another attempt started
            call.cancel()
        if job.alarm is None and job.tool is not None:
            job.started = time.monotonic()
            self._set_alarm(job, job.tool.timeout or self.timeout)

    def _run(self, job: Job) -> None:
        if job.tool is not None:
            self._finish(job, run_on_thread(job, self.retries, partial(self._resolved, job=job)))
            return
        value, failure = None, None
        try:
            value = self._resolved(job.function(), job)
        except BaseException as error:
            failure = error  # not a tool's: it is raised again in the caller of `run_on_owner`
        if self._settle(job):
            if failure is None:
                job.future.set_result(value)
            else:
                job.future.set_exception(failure)
        self._release(job)

    def _resolved(self, value: Any, job: Job | None = None) -> Any:
        """Waits on this thread for a coroutine that runs on the event loop; other values are passed through."""
        if not inspect.isawaitable(value):
            return value

        def started(run: LoopRun) -> None:
            if job is not None:
                job.cancellable = run
                if job.expired:
                    run.cancel()

        return self._loop.wait_for(value, started)

    def _finish_task(self, job: Job, task: "asyncio.Task[ToolResult]") -> None:
        self._finish(job, raised(asyncio.CancelledError()) if task.cancelled() else task.result())

    def _finish(self, job: Job, result: ToolResult) -> None:
        if job.tool is None:  # it could not be started
            if self._settle(job):
                job.future.set_exception(ToolRuntimeError(result_text(result)))
        elif self._settle(job):
            job.future.set_result(replace(result, seconds=time.monotonic() - job.started))
        self._release(job)

    def _settle(self, job: Job) -> bool:
        """Whether a job has come to its end before its limit; its caller is then to be answered."""
        with self._lock:
            late, job.settled = job.settled, True
        if not late and job.alarm is not None:
            job.alarm.cancel()
        return not late

    def _release(self, job: Job) -> None:
        with self._lock:
            job.finished = True
            job.cancellable = None
            if job.expired:
                self._stuck.discard(job)
            else:
                self._admission.free_slot(job)
            if job.owner is not None:
                job.owner.busy = job.owner.abandoned
            if job.exclusive is not None:
                job.exclusive.busy = job.exclusive.abandoned = False
            if job.worker is not None:
                # A worker that was given up has been replaced.
                if job.expired or self._closed:
                    job.worker.stop()
                else:
                    self._idle.append(job.worker)
        self._dispatch()

    def _expire(self, job: Job, limit: float) -> None:
        with self._lock:
            if job.settled:
                return
            job.settled = job.expired = True
            self._admission.free_slot(job)
            if job.owner is not None:
                job.owner.abandoned = True
            run = job.cancellable
            dropped = self._give_up(job) if run is None else self._drop_lost()
        if job.tool is None:
            asked = f"`{job.name}` of the environment {type(job.keep).__name__}"
            message = f"{asked} did not return within {limit:g} seconds (`environment_timeout`)."
            job.future.set_exception(EnvironmentTimeoutError(message, job.keep))
        else:
            result = refused("timeout", f"Tool `{job.tool.name}` did not return within {limit:g} seconds.")
            job.future.set_result(replace(result, seconds=time.monotonic() - job.started))
        answer_unrun(dropped)
        if run is not None:
            run.cancel()
            self._watchdog.schedule(_GRACE, partial(self._check_cancelled, job, run))
        self._dispatch()

    def _check_cancelled(self, job: Job, run: LoopRun | ProcessCall) -> None:
        with self._lock:
            if job.finished:
                return
            dropped = self._give_up(job)
        answer_unrun(dropped)
        if isinstance(run, LoopRun) and not run.responded:
            self._loop.replace(run.loop)

    def _give_up(self, job: Job) -> list[Job]:
        self._stuck.add(job)
        self._abandoned += job.tool is not None
        if job.exclusive is not None:
            job.exclusive.abandoned = True
        return self._drop_lost()

    def _drop_lost(self) -> list[Job]:
        return self._admission.drop(lambda job: any(lane.abandoned for lane in job.lanes))
