"""What this process holds: threads, child processes, file descriptors, memory (on Linux)."""

import contextlib
import ctypes
import gc
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path


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
    deadline = time.monotonic() + patience
    while True:
        gc.collect()
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        found = Footprint(threading.active_count(), len(_below()), len(os.listdir("/proc/self/fd")), _resident())
        if settled is None or not found.grown(settled) or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def _below() -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(path.name))
    found = list(children.get(os.getpid(), ()))
    for process in found:
        found += children.get(process, ())
    return found
