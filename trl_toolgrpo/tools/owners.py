"""The threads of the tool runtime, and which of them belongs to which environment.

All threads are daemons, so that a hung tool never delays the interpreter's exit; the interpreter joins those of a
`ThreadPoolExecutor` there, and `anyio.to_thread` keeps no environment on one thread.
"""

import asyncio
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar

from .loops import Outcome, outcome_of


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
        self._queue: queue.SimpleQueue[tuple[Callable[[], object], Future[Outcome]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._queue,), name=name, daemon=True)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Whether the caller is on this thread."""
        return threading.get_ident() == self._thread.ident

    @property
    def is_working(self) -> bool:
        """Whether the caller belongs to work of this thread: runs on it, or in a coroutine that it has started."""
        return _WORKING.get() is self._queue

    def run(self, work: Callable[[], object]) -> "Future[Outcome]":
        """Queue work and return a future of its outcome; the future never raises."""
        future: Future[Outcome] = Future()
        self._queue.put((work, future))
        return future

    def stop(self) -> None:
        """End the thread after the work that is queued; never wait."""
        self._queue.put(None)


def _work(works: "queue.SimpleQueue[tuple[Callable[[], object], Future[Outcome]] | None]") -> None:
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
            The thread that owns an environment; `None` for a tool.
    """

    def __init__(self, worker: Worker | None = None) -> None:
        self.worker = worker
        self.turn = asyncio.Lock()
        self.abandoned = False  # whether a call is past its time limit and still holds it
        self.kept: object = None  # an environment that cannot be referred to weakly


class Owners:
    """The lanes of environments. An environment is known by identity, and is not kept alive where that can be."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lanes: dict[int, Lane] = {}

    def lane(self, owner: object, worker: Worker | None = None) -> Lane:
        """
        Return the lane of an environment, made at first sight.

        Args:
            owner (`object`):
                The environment.
            worker ([`Worker`], *optional*):
                Thread it was constructed on; by default a new one is started.
        """
        with self._lock:
            lane = self._lanes.get(id(owner))
            if lane is None:
                lane = self._lanes[id(owner)] = Lane(worker or Worker("tool-owner"))
                try:
                    # Called in the middle of anything, on any thread, so it takes no lock.
                    weakref.finalize(owner, self._forget, id(owner)).atexit = False
                except TypeError:
                    lane.kept = owner
            return lane

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
        if lane is not None and lane.worker is not None:
            lane.worker.stop()
