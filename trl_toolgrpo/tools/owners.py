"""Environments and the thread each of them lives on.

Owns which lane and thread an instance has; fed by `execute.py`. An instance is known by identity and is not kept
alive.
"""

import concurrent.futures
import math
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import EnvironmentTimeoutError
from .lanes import Lane
from .threads import Worker


T = TypeVar("T")


class Owners:
    """The environment instances that have a thread of their own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[int, tuple[Lane, Any]] = {}

    def lane(self, owner: object, worker: Worker | None = None) -> Lane:
        """
        The lane of an instance, made at first sight.

        Args:
            owner (`object`):
                The instance.
            worker (`Worker`, *optional*):
                Thread it was constructed on; by default a new one is started.

        Returns:
            [`Lane`]: Its lane.
        """
        with self._lock:
            entry = self._entries.get(id(owner))
            if entry is None:
                lane = Lane(worker or Worker("tool-owner"))
                entry = self._entries[id(owner)] = lane, self._reference(owner, lane)
            return entry[0]

    def find(self, owner: object) -> Lane | None:
        """
        The lane of an instance, if it has one.

        Args:
            owner (`object`):
                The instance.

        Returns:
            [`Lane`] or `None`: Its lane.
        """
        entry = self._entries.get(id(owner))
        return None if entry is None else entry[0]

    def remove(self, owner: object) -> Lane | None:
        """
        Forgets an instance and ends its thread after the job that runs.

        Args:
            owner (`object`):
                The instance.

        Returns:
            [`Lane`] or `None`: The lane it had.
        """
        entry = self._entries.pop(id(owner), None)
        if entry is None:
            return None
        _stop(entry[0])
        return entry[0]

    def clear(self) -> None:
        """Forgets every instance and ends their threads."""
        with self._lock:
            entries, self._entries = self._entries, {}
        for lane, _ in list(entries.values()):
            _stop(lane)

    def _reference(self, owner: object, lane: Lane) -> Any:
        entries, key = self._entries, id(owner)

        def forget(_: object) -> None:
            # May run in the middle of anything, on any thread, so it takes no lock.
            entries.pop(key, None)
            _stop(lane)

        try:
            return weakref.ref(owner, forget)
        except TypeError:
            return owner


def construct(factory: Callable[[], T], worker: Worker, limit: float | None = None) -> T:
    """
    Calls a factory on a thread and waits for what it makes.

    Args:
        factory (`Callable`):
            Makes the instance.
        worker (`Worker`):
            The thread, which is ended if the factory raises.
        limit (`float`, *optional*):
            Most seconds to wait; what the factory makes later is dropped.

    Returns:
        `object`: The instance.

    Raises:
        EnvironmentTimeoutError: if the factory has made nothing within the limit.
    """
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def job() -> None:
        try:
            future.set_result(factory())
        except BaseException as error:
            future.set_exception(error)

    worker.run(job)
    try:
        return wait(future, limit)
    except BaseException:
        worker.stop()
        raise


def wait(future: "concurrent.futures.Future[T]", limit: float | None = None) -> T:
    """
    Waits for a future so that Ctrl-C gets through on every platform.

    Args:
        future (`Future`):
            The future.
        limit (`float`, *optional*):
            Most seconds to wait.

    Returns:
        Its result; its exception is raised.

    Raises:
        EnvironmentTimeoutError: if there is none within the limit.
    """
    end = time.monotonic() + (math.inf if limit is None else limit)
    while not future.done():
        left = end - time.monotonic()
        if left <= 0:
            raise EnvironmentTimeoutError(f"It did not return within {limit:g} seconds.")
        concurrent.futures.wait([future], timeout=min(0.2, left))
    return future.result()


def _stop(lane: Lane) -> None:
    if lane.worker is not None:
        lane.worker.stop()
