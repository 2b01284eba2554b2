"""The threads of the tool runtime, all of them daemons, so that a hung tool never delays the interpreter's exit.

Owns `Worker` (runs jobs in order) and `Watchdog` (time limits); fed by `execute.py`. `ThreadPoolExecutor` is not used,
since the interpreter joins its threads at exit.
"""

import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar


_WORKING: ContextVar[object] = ContextVar("working", default=None)  # jobs of the worker whose job runs


class Worker:
    """
    One daemon thread that runs jobs in the order they are given.

    Args:
        name (`str`):
            Name of the thread, for debuggers.
    """

    def __init__(self, name: str) -> None:
        # SimpleQueue.put may be called from a weakref callback in the middle of anything.
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(self._jobs,), name=name, daemon=True)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Whether the caller is on this thread."""
        return threading.get_ident() == self._thread.ident

    @property
    def is_working(self) -> bool:
        """Whether the caller belongs to a job of this thread: runs on it, or in a coroutine that it has started."""
        return _WORKING.get() is self._jobs

    def run(self, job: Callable[[], object]) -> None:
        """
        Queues a job.

        Args:
            job (`Callable`):
                Called on the thread, after all earlier jobs. It must not raise.
        """
        self._jobs.put(job)

    def stop(self) -> None:
        """Ends the thread after the jobs that are queued; never waits."""
        self._jobs.put(None)

    @staticmethod
    def _run(jobs: "queue.SimpleQueue[Callable[[], object] | None]") -> None:
        _WORKING.set(jobs)
        while True:
            job = jobs.get()
            if job is None:
                return
            job()
            # An idle thread must not keep an environment alive.
            del job


class Alarm:
    """
    A callback that is due at a deadline, until it is cancelled.

    Args:
        callback (`Callable`):
            Called on the watchdog's thread.
    """

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        """Drops the callback, and what it refers to, at once."""
        self.callback = None


class Watchdog:
    """One daemon thread, started when first needed, that calls back at deadlines."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._heap: list[tuple[float, int, Alarm]] = []
        self._order = itertools.count()
        self._thread: threading.Thread | None = None
        self._stopping = False

    def schedule(self, seconds: float, callback: Callable[[], object]) -> Alarm:
        """
        Calls back later.

        Args:
            seconds (`float`):
                Delay from now.
            callback (`Callable`):
                What to call on the watchdog's thread; it must be quick and must not raise.

        Returns:
            [`Alarm`]: Handle that cancels the call.
        """
        alarm = Alarm(callback)
        with self._condition:
            heapq.heappush(self._heap, (time.monotonic() + seconds, next(self._order), alarm))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tool-watchdog", daemon=True)
                self._thread.start()
            elif self._heap[0][2] is alarm:
                self._condition.notify()
        return alarm

    def stop(self) -> None:
        """Ends the thread once no alarm is pending; never waits."""
        with self._condition:
            self._stopping = True
            self._condition.notify()

    def _run(self) -> None:
        while (alarm := self._next()) is not None:
            callback = alarm.callback
            if callback is not None:
                callback()
            del alarm, callback

    def _next(self) -> Alarm | None:
        with self._condition:
            while True:
                while self._heap and self._heap[0][2].callback is None:
                    heapq.heappop(self._heap)
                if not self._heap and self._stopping:
                    self._thread = None
                    return None
                wait = self._heap[0][0] - time.monotonic() if self._heap else None
                if wait is not None and wait <= 0:
                    return heapq.heappop(self._heap)[2]
                self._condition.wait(wait)
