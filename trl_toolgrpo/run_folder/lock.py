"""The lock of a run on its output folder, so that no second run moves its checkpoints or writes into its files."""

import json
import logging
import os
import socket
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from pathlib import Path

from ..errors import OutputFolderInUseError


logger = logging.getLogger(__name__)

LOCK = ".run-lock"
"""File in the output folder while a run is under way."""

_held: "weakref.WeakSet[RunLock]" = weakref.WeakSet()
_unlocked: set[Path] = set()  # folders that could not be locked, which was logged


class RunLock(AbstractContextManager["RunLock"]):
    """A lock that is held until it is released, or its process dies. Processes that are forked do not hold it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        _held.add(self)

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Free the folder."""
        if self._descriptor >= 0:
            with suppress(OSError):
                self._path.unlink()  # while it is held: a process that has this file open sees that it is gone
            self.forget()

    def forget(self) -> None:
        """Close the file."""
        with suppress(OSError):
            os.close(self._descriptor)
        self._descriptor = -1


def _forget_all() -> None:
    for lock in _held:
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def take_lock(folder: Path) -> RunLock | None:
    """
    Lock an output folder for a run. The main process of a run does so for all.

    The lock is one of the file system (`flock`), which ends with its process, however that ends. NFS has such locks
    since version 4, or with its lock daemon. Where there are none, a warning is logged once, and the run goes on
    without a lock.

    Args:
        folder (`Path`):
            The output folder, made if it is not there.

    Returns:
        `RunLock` or `None`: the lock; `None` if the folder cannot be locked, or if the launcher's job id says that
        the lock is held by this very job on another machine.

    Raises:
        OutputFolderInUseError: if another run holds it, which the message names.
    """
    try:
        descriptor = _locked_file(folder)
    except BlockingIOError:
        holder = _holder(folder / LOCK)
        job = job_id(os.environ)
        if job is not None and holder.get("job") == job and holder.get("host") != socket.gethostname():
            return None
        by = f"process {holder['pid']} on {holder['host']}, since {holder['since']}" if holder else "another process"
        raise OutputFolderInUseError(
            f"You passed `output_dir` ({folder}), which a run that is under way writes to: {by}. A second one would "
            f"move its checkpoints and write into its logs.",
            remedy="Wait for it to end, or end it, or pass another `output_dir`.",
        ) from None
    except (OSError, ImportError) as error:
        if folder.absolute() not in _unlocked:
            _unlocked.add(folder.absolute())
            logger.warning(
                "`output_dir` (%s) cannot be locked: %s: %s. Make sure that no other run writes to it.",
                *(folder, type(error).__name__, error),
            )
        return None
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    record = {"pid": str(os.getpid()), "host": socket.gethostname(), "since": since, "job": job_id(os.environ)}
    with suppress(OSError):  # on a full disk the lock still holds
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(record).encode())
    return RunLock(folder / LOCK, descriptor)


def job_id(variables: Mapping[str, str]) -> str | None:
    """
    Return the launcher's id of the job that this process belongs to, the same on all machines; `None` if it has none.

    Args:
        variables (`Mapping[str, str]`):
            Environment of the process.
    """
    elastic = variables.get("TORCHELASTIC_RUN_ID", "none")
    if elastic != "none":  # as torchrun says without `--rdzv-id`
        return f"torchrun {elastic}"
    if "SLURM_JOB_ID" in variables:
        return f"slurm {variables['SLURM_JOB_ID']}.{variables.get('SLURM_STEP_ID', '')}"
    address, port = variables.get("MASTER_ADDR", "localhost"), variables.get("MASTER_PORT")
    alone = address in ("localhost", "::1") or address.startswith("127.")
    return None if alone or port is None else f"{address}:{port}"


def _locked_file(folder: Path) -> int:
    """Open the lock file, lock it, and return its descriptor."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it was released, and its file removed, before it was locked here


def _holder(path: Path) -> dict[str, str]:
    """Return who holds a lock; nothing if the file does not tell."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: str(found[name]) for name in ("pid", "host", "since", "job")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
