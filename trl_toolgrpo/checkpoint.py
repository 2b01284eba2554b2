"""Checkpoint folders that are whole or not there: how one is published, checked, found and cleared away.

Owns the folder, not what is in it. A checkpoint is written under `_unfinished`, flushed to disk, listed in a manifest
and renamed into place, so that a process killed at any moment leaves the checkpoint before valid. Fed by `resume.py`.
"""

import json
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError

from .errors import CheckpointError, CheckpointSaveError


logger = logging.getLogger(__name__)

UNFINISHED = "_unfinished"
"""Folder in the output folder for checkpoints that are being written or removed."""
EARLIER = "earlier-run-"
"""Folders in the output folder with checkpoints of runs before."""
MANIFEST = "manifest.json"
PREFIX = "checkpoint-"
PROGRESS = "progress_{}.safetensors"
"""What each process adds to a checkpoint."""

_CHUNK = 2**22
_REPLACED = "replaced-"
_REMOVED = "removed-"
_PROBE_SECONDS = 10  # a network file system may be slow to show what another machine wrote


def publish(folder: Path, target: Path) -> None:
    """
    Make a finished folder a checkpoint: list its files, flush them to disk, put it in its place.

    Args:
        folder (`Path`):
            Folder under `_unfinished`.
        target (`Path`):
            Where to. A checkpoint that is there already is replaced.

    Raises:
        OSError: if the disk does not take it.
    """
    files = {str(file.relative_to(folder)): _measured(file) for file in _files(folder)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    for path in (*folder.rglob("*"), folder):
        _flush(path)
    if target.exists():
        os.replace(target, folder.with_name(f"{_REPLACED}{target.name}"))  # a kill here: see `put_back`
    os.replace(folder, target)
    _flush(target.parent)
    shutil.rmtree(folder.parent, ignore_errors=True)


def put_back(output_dir: Path) -> None:
    """Put a checkpoint back in its place that was to be replaced when the run was killed."""
    for path in (output_dir / UNFINISHED).glob(f"{_REPLACED}{PREFIX}*"):
        target = output_dir / path.name.removeprefix(_REPLACED)
        if not target.exists():
            with suppress(FileNotFoundError):  # another process was faster
                os.replace(path, target)


def fault_of(folder: Path, thorough: bool = True) -> str | None:
    """
    Why a folder is no whole checkpoint; `None` if it is one.

    Args:
        folder (`Path`):
            The folder.
        thorough (`bool`, *optional*, defaults to `True`):
            Whether to read the files, and not their sizes alone. A checkpoint without a manifest, which others have
            written, is taken for whole if it has a readable `trainer_state.json`.
    """
    if not folder.is_dir():
        return "it is no folder"
    manifest = folder / MANIFEST
    try:
        if not manifest.is_file():
            if list(folder.glob(PROGRESS.format("*"))):
                return f"it has no {MANIFEST}"
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            return None
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, expected {expected['bytes']}"
            if thorough and _measured(folder / name) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders of a run, newest first, whole or not."""
    found = [
        path
        for path in Path(output_dir).glob(f"{PREFIX}*")
        if path.is_dir() and path.name.removeprefix(PREFIX).isdigit()
    ]
    return sorted(found, key=_step, reverse=True)


def find_checkpoint(output_dir: str | Path) -> Path | None:
    """
    The newest whole checkpoint of a run. Torn and unfinished ones are skipped, each with a warning that names it.

    Args:
        output_dir (`str` or `Path`):
            Output folder of the run.

    Returns:
        `Path` or `None`: the folder; `None` if there is no whole checkpoint.
    """
    put_back(Path(output_dir))
    for path in sorted((Path(output_dir) / UNFINISHED).glob(f"*{PREFIX}*")):
        if path.name.startswith(_REMOVED):
            continue
        logger.warning("Skipped %s: the run ended while it was written.", path)
    for path in checkpoints(output_dir):
        fault = fault_of(path)
        if fault is None:
            return path
        logger.warning("Skipped %s, which is no whole checkpoint: %s.", path, fault)
    return None


def check_whole(folder: str | Path) -> None:
    """
    Check a checkpoint that was named.

    Raises:
        CheckpointError: if it is not whole.
    """
    put_back(Path(folder).parent)
    fault = fault_of(Path(folder))
    if fault is not None:
        raise CheckpointError(
            f"You asked to resume from {folder}, which is no whole checkpoint: {fault}. Pass another one, or "
            f"`resume_from_checkpoint=True` for the newest that is whole."
        )


def why_not_writable(output_dir: Path) -> CheckpointSaveError | None:
    """
    What to raise before a run begins if nothing of it could be written; see [`same_error`].

    Args:
        output_dir (`Path`):
            Output folder of the run, made if it is not there.
    """
    folder = output_dir / UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return CheckpointSaveError(
            f"Nothing can be written to `output_dir` ({output_dir}): {error}. The run has not started, since what it "
            f"makes would be lost. Pass an `output_dir` that can be written to."
        )
    with suppress(OSError):  # what a killed run has left there stays, to be named
        os.rmdir(folder)
    return None


def check_shared(output_dir: Path, writes: bool) -> None:
    """
    Check that every process sees what the main process writes; all have to call this.

    Args:
        output_dir (`Path`):
            Output folder of the run.
        writes (`bool`):
            Whether this is the main process.

    Raises:
        CheckpointSaveError: if one does not, as on machines whose output folders are their own.
    """
    name = [f".shared-{uuid.uuid4().hex}"]
    if writes:
        with suppress(OSError):  # then it is seen by none
            (output_dir / name[0]).touch()
    probe = output_dir / broadcast_object_list(name)[0]
    seen = gather_object([_appears(probe)])
    if writes:
        probe.unlink(missing_ok=True)
    if not all(seen):
        raise CheckpointSaveError(
            f"You passed `output_dir` ({output_dir}) to a run of {len(seen)} processes, {seen.count(False)} of which "
            f"do not see what the first writes there. Each adds its own part to a checkpoint, so that none would be "
            f"whole. Pass a folder that all machines share, or `save_strategy='no'`."
        )


def check_parts(folder: Path, processes: int) -> None:
    """
    Check that the part of every process is there to be seen; a file system may be slow to show what another wrote.

    Args:
        folder (`Path`):
            A checkpoint that is not published yet.
        processes (`int`):
            How many write to it.

    Raises:
        OSError: if one is missing.
    """
    for index in range(processes):
        if not _appears(folder / PROGRESS.format(index)):
            raise OSError(f"the part of process {index} ({PROGRESS.format(index)}) is not to be seen")


def same_error(error: Exception | None) -> None:
    """
    Raise in every process what went wrong in one; all have to call this.

    Args:
        error (`Exception`, *optional*):
            What went wrong in this process.

    Raises:
        CheckpointSaveError: if something did.
    """
    problems = [problem for problem in gather_object([None if error is None else str(error)]) if problem is not None]
    if problems:
        raise CheckpointSaveError(problems[0]) from error


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + _PROBE_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def clear_away(output_dir: Path, limit: int | None, kept: set[Path]) -> None:
    """
    Remove checkpoints beyond a limit, torn ones first, then the oldest.

    Args:
        output_dir (`Path`):
            Output folder of the run.
        limit (`int`, *optional*):
            How many may stay; `None` or 0 for all.
        kept (`set[Path]`):
            Checkpoints that stay in any case.
    """
    found = checkpoints(output_dir)
    if not limit or limit < 0 or len(found) <= limit:
        return
    surplus = [path for path in found if path not in kept]
    surplus.sort(key=lambda path: (fault_of(path, thorough=False) is None, _step(path)))
    trash = output_dir / UNFINISHED
    for path in surplus[: len(found) - max(limit, len(kept))]:
        trash.mkdir(exist_ok=True)
        os.replace(path, trash / f"{_REMOVED}{path.name}")  # at once: a kill leaves no half of it in its place
    shutil.rmtree(trash, ignore_errors=True)


def set_aside(output_dir: Path, needed: Path | None = None) -> Path | None:
    """
    Move the checkpoints of an earlier run out of the way of a new one, which would take them for its own.

    Args:
        output_dir (`Path`):
            Output folder of both.
        needed (`Path`, *optional*):
            A checkpoint that stays, since the new run's adapter names it as its base model.

    Returns:
        `Path` or `None`: the folder in `output_dir` they are in now; `None` if there were none.
    """
    put_back(output_dir)
    found = [path for path in checkpoints(output_dir) if needed is None or path.resolve() != needed.resolve()]
    if not found:
        return None
    number = 1
    while (folder := output_dir / f"{EARLIER}{number}").exists():
        number += 1
    folder.mkdir()
    for path in found:
        os.replace(path, folder / path.name)
    return folder


def is_storage_failure(error: BaseException) -> bool:
    """Whether an exception says that the disk did not take what was written."""
    if isinstance(error, (OSError, SafetensorError)):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    # torch's writer turns every refusal into a plain RuntimeError, with a text that depends on where it was refused
    return isinstance(error, RuntimeError) and bool(frames) and frames[-1].filename == torch.serialization.__file__


_refused: list[str] | None = None  # what the disk refused in the attempt under way


def attempt(work: Callable[[], None]) -> list[str]:
    """
    Write something in every process; returns what the disk refused, over all of them.

    A process whose disk refuses goes on all the same wherever the others wait for it: see [`tolerated`], which what
    accelerate and DeepSpeed write with between two collectives is under as well.
    """
    global _refused
    _refused = []
    engine = sys.modules.get("deepspeed.runtime.engine")
    writers = [(torch, "save"), *([(shutil, "copytree"), (engine, "copyfile")] if engine is not None else [])]
    try:
        with ExitStack() as stack, tolerated():
            for module, name in writers:
                stack.enter_context(_tolerant(module, name))
            work()
        return gather_object(_refused)
    finally:
        _refused = None


@contextmanager
def _tolerant(module: Any, name: str) -> Iterator[None]:
    """Put a function of a module under [`tolerated`]."""
    write = getattr(module, name)

    def tolerant(*args: Any, **kwargs: Any) -> None:
        with tolerated():
            write(*args, **kwargs)

    setattr(module, name, tolerant)
    try:
        yield
    finally:
        setattr(module, name, write)


@contextmanager
def tolerated() -> Iterator[None]:
    """
    A part of an [`attempt`] that only writes, and waits for no other process: what the disk refuses is noted, and this
    process goes on to where the others wait for it. Outside an attempt the error propagates.
    """
    try:
        yield
    except Exception as error:
        if _refused is None or not is_storage_failure(error):
            raise
        _refused.append(f"{type(error).__name__}: {error}")


def _step(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)


def _measured(file: Path) -> dict[str, int]:
    about = file.stat()
    return {"bytes": about.st_size, "crc32": _checksum(file, about.st_size, about.st_mtime_ns)}


@lru_cache(maxsize=4096)  # a file that has not changed since is not read again
def _checksum(file: Path, size: int, changed: int) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
