"""What this process holds: threads, child processes, file descriptors, memory (on Linux)."""

import contextlib
import ctypes
import gc
import threading
import time
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Footprint:
    """Counts, and resident memory in bytes."""

    threads: int
    processes: int
    files: int
    memory: int

    def __str__(self):
        return (
            f"{self.threads} threads, {self.processes} processes, {self.files} file descriptors, "
            f"{self.memory / 2**20:.1f} MiB"
        )

    def grown(self, before: "Footprint", share: float = 0.02) -> list[str]:
        """Return what has grown since `before`; memory only if by more than a share."""
        more = [name for name in ("threads", "processes", "files") if getattr(self, name) > getattr(before, name)]
        return more + ["memory"] * (self.memory > before.memory * (1 + share))


def footprint(settled: Footprint | None = None, patience: float = 5.0) -> Footprint:
    """
    Measure this process, after garbage and free memory are given back.

    Args:
        settled: what it should fall back to; abandoned calls may take a moment to end.
        patience: how many seconds to wait for that.
    """
    process = psutil.Process()
    deadline = time.monotonic() + patience
    while True:
        gc.collect()
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        below, memory = process.children(recursive=True), process.memory_info().rss
        found = Footprint(threading.active_count(), len(below), process.num_fds(), memory)
        if settled is None or not found.grown(settled) or time.monotonic() > deadline:
            return found
        time.sleep(0.05)
