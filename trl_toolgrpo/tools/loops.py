"""Event loops for tools that are coroutines.

Owns `LoopThread` (a loop that survives its tools) and `LoopRun` (one coroutine on it); fed by `execute.py`.
"""

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any


class LoopThread:
    """
    An event loop for coroutines that are handed over from other threads.

    It runs on a daemon thread, started when first needed, which a tool's `SystemExit` does not end, also one in a task
    that a tool has spawned, and which is replaced when a coroutine blocks it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own: asyncio.AbstractEventLoop | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        """The loop to run on."""
        with self._lock:
            if self._own is None:
                self._own = asyncio.new_event_loop()
                threading.Thread(target=self._run, args=(self._own,), name="tool-loop", daemon=True).start()
            return self._own

    def replace(self, blocked: asyncio.AbstractEventLoop) -> None:
        """
        Gives up a loop of its own that no longer runs callbacks; later coroutines get a fresh one.

        Args:
            blocked (`asyncio.AbstractEventLoop`):
                The loop that is blocked.
        """
        with self._lock:
            if self._own is not blocked:
                return
            self._own = None
        # Whatever else runs on it may still finish, if the loop ever comes back.
        blocked.call_soon_threadsafe(lambda: blocked.create_task(_end(blocked, cancel=False)))

    def wait_for(self, awaitable: Awaitable[Any], started: Callable[["LoopRun"], object]) -> Any:
        """
        Runs an awaitable on the loop and waits on this thread until it ends, cancelled or not.

        Args:
            awaitable (`Awaitable`):
                What to run.
            started (`Callable`):
                Called at once with the run, which can be cancelled from other threads.

        Returns:
            Its result; whatever it raised is raised here.
        """
        waiter: Future[tuple[Any, BaseException | None]] = Future()

        def hand_over(task: "asyncio.Task[Any]") -> None:
            if inspect.iscoroutine(awaitable):
                awaitable.close()  # it has not begun if the task was cancelled before that
            waiter.set_result((None, asyncio.CancelledError()) if task.cancelled() else task.result())

        started(LoopRun(self.get(), _outcome(awaitable), hand_over))
        result, error = waiter.result()
        if error is not None:
            raise error
        return result

    def stop(self) -> None:
        """Cancels what runs on a loop of its own and ends its thread; never waits."""
        with self._lock:
            own, self._own = self._own, None
        if own is not None:
            own.call_soon_threadsafe(lambda: own.create_task(_end(own, cancel=True)))

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        stopped = False
        while not stopped:
            # The only exceptions asyncio lets out of a task; a tool's inner task may raise them.
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                loop.run_forever()
                stopped = True
        loop.close()


class LoopRun:
    """
    One coroutine on an event loop.

    Args:
        loop (`asyncio.AbstractEventLoop`):
            The loop.
        coroutine (`Coroutine`):
            What to run.
        done (`Callable`):
            Called on the loop with the finished task, cancelled or not.

    Raises:
        RuntimeError: if the loop is closed.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, Any],
        done: Callable[["asyncio.Task[Any]"], object],
    ) -> None:
        self.loop = loop
        self.responded = False
        self._task: asyncio.Task[Any] | None = None
        try:
            loop.call_soon_threadsafe(self._start, coroutine, done)
        except RuntimeError:
            coroutine.close()
            raise

    def cancel(self) -> None:
        """Asks the coroutine to end. `responded` becomes true when the loop takes notice."""
        self.loop.call_soon_threadsafe(self._cancel)

    def _start(self, coroutine: Coroutine[Any, Any, Any], done: Callable[["asyncio.Task[Any]"], object]) -> None:
        # Not run_coroutine_threadsafe: its future reads as cancelled while the coroutine still runs.
        self._task = self.loop.create_task(coroutine)
        self._task.add_done_callback(done)

    def _cancel(self) -> None:
        self.responded = True
        if self._task is not None:
            self._task.cancel()


async def _end(loop: asyncio.AbstractEventLoop, cancel: bool) -> None:
    others = asyncio.all_tasks(loop) - {asyncio.current_task(loop)}
    for task in others if cancel else ():
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=1.0 if cancel else None)
    loop.stop()


async def _outcome(awaitable: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    # SystemExit must not reach the task, which would end the loop's thread.
    try:
        return await awaitable, None
    except BaseException as error:
        return None, error
