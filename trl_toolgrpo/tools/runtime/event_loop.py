"""Event loops on daemon threads, for tools that are coroutines and for the bookkeeping of calls.

`anyio.from_thread.start_blocking_portal` would do, but for two things that tools do: a `SystemExit` in a task that a
tool has spawned ends its loop, and a coroutine that blocks holds it for good.
"""

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
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
