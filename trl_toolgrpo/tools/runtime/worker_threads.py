"""The threads that tools run on: workers, of which an environment has one to itself, and event loops for coroutines.

All threads are daemons, so that a hung tool never delays the interpreter's exit. `ThreadPoolExecutor` does not do: its
threads are joined at exit. Nor does `anyio.to_thread`, which does not keep an environment on one thread.
`anyio.from_thread.start_blocking_portal` would do for coroutines, but for two things that tools do: a `SystemExit` in
a task that a tool has spawned ends its loop, and a coroutine that blocks holds it for good.
"""

import asyncio
import contextlib
import inspect
import queue
import threading
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextvars import ContextVar
from typing import TypeAlias


Work: TypeAlias = Callable[[], object]

Outcome: TypeAlias = tuple[object, BaseException | None]
"""What a piece of work returned, and what it raised instead, as a value: `SystemExit` must reach no loop or thread."""


def outcome_of(work: Work) -> Outcome:
    """Call something and return its outcome, whatever it raises."""
    try:
        return work(), None
    except BaseException as error:
        return None, error


_Queue: TypeAlias = "queue.SimpleQueue[tuple[Work, Future[Outcome]] | None]"

_WORKING: ContextVar[object] = ContextVar("working", default=None)  # the queue of the worker whose work runs


class Worker:
    """
    A daemon thread that runs work in the order in which it is given.

    Args:
        name (`str`):
            Name of the thread, for debuggers.
    """

    def __init__(self, name: str) -> None:
        # SimpleQueue.put may be called from a weakref callback in the middle of anything.
        self.queue: _Queue = queue.SimpleQueue()
        self.thread = threading.Thread(target=_work, args=(self.queue,), name=name, daemon=True)
        self.thread.start()

    def run(self, work: Work) -> "Future[Outcome]":
        """Queue work and return a future of its outcome; the future never raises."""
        future: Future[Outcome] = Future()
        self.queue.put((work, future))
        return future

    def stop(self) -> None:
        """End the thread after the work that is queued; never wait."""
        self.queue.put(None)


def _work(works: "_Queue") -> None:
    _WORKING.set(works)
    while (given := works.get()) is not None:
        work, future = given
        future.set_result(outcome_of(work))
        # An idle thread must not keep an environment alive.
        del given, work, future


class Lane:
    """
    Something that takes one call at a time: an environment, or a tool that is not thread-safe.

    Args:
        worker ([`Worker`], *optional*):
            The thread of an environment; `None` for a tool.
    """

    def __init__(self, worker: Worker | None = None) -> None:
        self.worker = worker
        self.turn = asyncio.Lock()
        self.abandoned = False  # whether a call is past its time limit and still holds it
        self.kept: object = None  # an environment that cannot be referred to weakly

    @property
    def is_current(self) -> bool:
        """Whether the caller is on the thread of the environment."""
        return self.worker is not None and threading.get_ident() == self.worker.thread.ident

    @property
    def is_working(self) -> bool:
        """Whether the caller belongs to work of that thread: runs on it, or in a coroutine that it has started."""
        return self.worker is not None and _WORKING.get() is self.worker.queue

    def stop(self) -> None:
        """End the thread of the environment after the work that is queued; never wait."""
        if self.worker is not None:
            self.worker.stop()


class Owners:
    """The lanes of environments, by identity. An environment is kept alive only if it has no weak references."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lanes: dict[int, Lane] = {}

    def lane(self, owner: object, lane: Lane | None = None) -> Lane:
        """
        Return the lane of an environment, and make one if it has none.

        Args:
            owner (`object`):
                The environment.
            lane ([`Lane`], *optional*):
                The lane it was constructed on; by default a new thread is started.
        """
        with self._lock:
            found = self._lanes.get(id(owner))
            if found is None:
                found = self._lanes[id(owner)] = lane or Lane(Worker("tool-owner"))
                try:
                    # Called in the middle of anything, on any thread, so it takes no lock.
                    weakref.finalize(owner, self._forget, id(owner)).atexit = False
                except TypeError:
                    found.kept = owner
            return found

    def find(self, owner: object) -> Lane | None:
        """Return the lane of an environment, if it has one."""
        return self._lanes.get(id(owner))

    def remove(self, owner: object) -> Lane | None:
        """Forget an environment and return the lane it had; its thread runs on."""
        return self._lanes.pop(id(owner), None)

    def clear(self) -> None:
        """Forget every environment, and end their threads."""
        for key in list(self._lanes):
            self._forget(key)

    def _forget(self, key: int) -> None:
        lane = self._lanes.pop(key, None)
        if lane is not None:
            lane.stop()


class LoopThread:
    """
    An event loop on a daemon thread, started when first needed, that survives what runs on it.

    Args:
        name (`str`, *optional*, defaults to `"tool-loop"`):
            Name of the thread, for debuggers.
    """

    def __init__(self, name: str = "tool-loop") -> None:
        self._name = name
        self._lock = threading.RLock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        """Return the loop to run on."""
        with self._lock:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                threading.Thread(target=_run_forever, args=(loop,), name=self._name, daemon=True).start()
                self._loop = loop
            return self._loop

    def run(self, awaitable: Awaitable[object], started: Callable[["LoopRun"], object]) -> object:
        """
        Run an awaitable on the loop and wait on this thread until it ends, cancelled or not.

        Args:
            awaitable (`Awaitable`):
                What to run.
            started (`Callable`):
                Called at once with the [`LoopRun`], which can be cancelled from other threads.

        Returns:
            Its result; whatever it raised is raised here.
        """
        with self._lock:  # so that the loop is not ended before it has begun
            run = LoopRun(self.get(), awaitable)
        started(run)
        value, error = run.outcome.result()
        if error is not None:
            raise error
        return value

    def replace(self, blocked: asyncio.AbstractEventLoop) -> None:
        """
        Give up a loop that a coroutine blocks; later coroutines get a fresh one.

        Args:
            blocked (`asyncio.AbstractEventLoop`):
                The loop. What else runs on it may still finish, if it ever comes back.
        """
        if self._loop is blocked:
            self.stop(cancel=False)

    def stop(self, cancel: bool = True) -> None:
        """
        End the loop and its thread; never wait.

        Args:
            cancel (`bool`, *optional*, defaults to `True`):
                Whether to cancel what still runs. Otherwise the loop ends after it.
        """
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            loop.call_soon_threadsafe(lambda: loop.create_task(_end(loop, cancel)))


class LoopRun:
    """
    An awaitable that runs on an event loop, seen from other threads.

    Args:
        loop (`asyncio.AbstractEventLoop`):
            The loop.
        awaitable (`Awaitable`):
            What to run.
    """

    # Not `asyncio.run_coroutine_threadsafe`: its future reads as cancelled while the coroutine still runs.

    def __init__(self, loop: asyncio.AbstractEventLoop, awaitable: Awaitable[object]) -> None:
        self.loop = loop
        self.outcome: Future[Outcome] = Future()
        self.responded = False
        self._awaitable = awaitable
        self._task: asyncio.Task[Outcome] | None = None
        loop.call_soon_threadsafe(self._start)

    def cancel(self) -> None:
        """Ask the awaitable to end. `responded` becomes true when the loop takes notice."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and has cancelled what ran on it
            self.loop.call_soon_threadsafe(self._cancel)

    def _start(self) -> None:
        self._task = self.loop.create_task(_awaited_outcome(self._awaitable))
        self._task.add_done_callback(self._finish)

    def _cancel(self) -> None:
        self.responded = True
        if self._task is not None:
            self._task.cancel()

    def _finish(self, task: "asyncio.Task[Outcome]") -> None:
        if inspect.iscoroutine(self._awaitable):
            self._awaitable.close()  # it has not begun if the task was cancelled before that
        self.outcome.set_result((None, asyncio.CancelledError()) if task.cancelled() else task.result())


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    stopped = False
    while not stopped:
        # The only exceptions that asyncio lets out of a task; one that a tool has spawned may raise them.
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()
            stopped = True
    loop.close()


async def _end(loop: asyncio.AbstractEventLoop, cancel: bool) -> None:
    others = asyncio.all_tasks(loop) - {asyncio.current_task(loop)}
    for task in others if cancel else ():
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=1.0 if cancel else None)
    await asyncio.sleep(0)  # callbacks of tasks that have just ended come first
    loop.stop()


async def _awaited_outcome(awaitable: Awaitable[object]) -> Outcome:
    try:
        return await awaitable, None
    except BaseException as error:
        return None, error
