"""The threads of the tool runtime, and which of them belongs to which environment.

All threads are daemons, so that a hung tool never delays the interpreter's exit. `ThreadPoolExecutor` does not do: its
threads are joined at exit. Nor does `anyio.to_thread`, which does not keep an environment on one thread.
"""

import asyncio
import queue
import threading
import weakref
from concurrent.futures import Future
from contextvars import ContextVar
from typing import TypeAlias

from .event_loop import Outcome, Work, outcome_of


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
