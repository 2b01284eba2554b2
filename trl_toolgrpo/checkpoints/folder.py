"""Checkpoint folders that are whole or absent: how one is published, checked, found and removed.

A checkpoint is written under `_unfinished`, listed with its sizes in a manifest, flushed to disk and renamed into
place, so that a process killed at any moment leaves the checkpoint before valid.
"""

import errno
import itertools
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object

from ..errors import CheckpointError, CheckpointSaveError
from ..run_folder.files import CARD, HEALTH, METRICS, PUBLISHED, RUN, holds_other_page, write_json
from ..run_folder.rollout_log import FOLDER, find_files
from ..run_folder.storage_failures import is_storage_failure


logger = logging.getLogger(__name__)

UNFINISHED = "_unfinished"
"""Folder in the output folder for checkpoints that are being written or removed."""
EARLIER = "earlier-run-"
"""Folders in the output folder, each with all that a run before has left there."""
MANIFEST = "manifest.json"
PREFIX = "checkpoint-"
PROGRESS = "progress_{}.safetensors"
"""What each process adds to a checkpoint."""

# What says that there was a run in an output folder, and what it has left there in addition to checkpoints
_SIGNS = (RUN, METRICS, HEALTH, "completions/*.parquet", "trainer_state.json")
_LEFT = (
    *(RUN, METRICS, HEALTH, FOLDER, "completions", "runs", "trainer_state.json", "*_results.json", "report.html"),
    *(PUBLISHED, UNFINISHED),
)
_MODEL = (
    *("adapter_config.json", "adapter_model*", "model*.safetensors*", "pytorch_model*", "value_head.safetensors"),
    *("config.json", "generation_config.json", "*processor_config.json", "tokenizer.*", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*", "training_args.bin"),
)
_CHUNK = 2**22
_REPLACED = "replaced-"
_REMOVED = "removed-"
_MOVING = "_"  # before the name of a folder of an earlier run that is not all there
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
    _write_manifest(folder, checksums=False)
    for path in (*folder.rglob("*"), folder):
        _flush(path)
    if target.exists():
        os.replace(target, folder.with_name(f"{_REPLACED}{target.name}"))  # a kill here: see `put_back`
    os.replace(folder, target)
    _flush(target.parent)
    shutil.rmtree(folder.parent, ignore_errors=True)


def add_checksums(checkpoint: str | Path) -> None:
    """
    List the checksums of a checkpoint's files in its manifest, for `find_checkpoint(output_dir, checksums=True)`:
    before it is copied, or kept for long. They are not listed when it is written, which would read all of it back.

    Args:
        checkpoint (`str` or `Path`):
            A whole checkpoint.

    Raises:
        CheckpointError: if it is not whole.
    """
    check_whole(checkpoint, checksums=True)
    _write_manifest(Path(checkpoint), checksums=True)


def _write_manifest(folder: Path, checksums: bool) -> None:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    measured = {file.relative_to(folder).as_posix(): _measured(file, checksums) for file in files}
    write_json(folder / MANIFEST, {"files": measured})


def put_back(output_dir: Path) -> None:
    """Put back what a killed run was moving: a checkpoint to be replaced, the files of an earlier run."""
    for moving in output_dir.glob(f"{_MOVING}{EARLIER}*"):
        _move_back(moving)
    for path in (output_dir / UNFINISHED).glob(f"{_REPLACED}{PREFIX}*"):
        target = output_dir / path.name.removeprefix(_REPLACED)
        if not target.exists():
            with suppress(FileNotFoundError):  # another process was faster
                os.replace(path, target)


def fault_of(folder: Path, checksums: bool = False) -> str | None:
    """
    Return why a folder is not a whole checkpoint; `None` if it is one.

    Args:
        folder (`Path`):
            The folder.
        checksums (`bool`, *optional*, defaults to `False`):
            Whether to read the files whose checksums are listed, in addition to the sizes of all. A checkpoint
            without a manifest, which others have written, is taken for whole if it has a readable
            `trainer_state.json`.
    """
    if not folder.is_dir():
        return "it is not a folder"
    manifest = folder / MANIFEST
    try:
        if not manifest.is_file():
            if list(folder.glob(PROGRESS.format("*"))):
                return f"it has no {MANIFEST}"
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            return None
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            found = _measured(folder / name, checksums and "crc32" in expected)
            if found["bytes"] != expected["bytes"]:
                return f"{name} has {found['bytes']} bytes, expected {expected['bytes']}"
            if "crc32" in found and found != expected:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoint folders of a run, newest first, whole or not."""
    named = [path for path in Path(output_dir).glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(filter(Path.is_dir, named), key=_step, reverse=True)


def find_checkpoint(output_dir: str | Path, checksums: bool = False) -> Path | None:
    """
    Return the newest whole checkpoint of a run. Torn and unfinished ones are skipped, with a warning that names each.

    Args:
        output_dir (`str` or `Path`):
            Output folder of the run.
        checksums (`bool`, *optional*, defaults to `False`):
            Whether to read the files whose checksums are known (see [`add_checksums`]). Otherwise their sizes tell a
            whole checkpoint from a torn one.

    Returns:
        `Path` or `None`: the folder; `None` if there is no whole checkpoint.
    """
    put_back(Path(output_dir))
    for path in sorted((Path(output_dir) / UNFINISHED).glob(f"*{PREFIX}*")):
        if not path.name.startswith(_REMOVED):
            logger.warning("Skipped %s: the run ended while it was written.", path)
    for path in checkpoints(output_dir):
        fault = fault_of(path, checksums)
        if fault is None:
            return path
        logger.warning("Skipped %s, which is not a whole checkpoint: %s.", path, fault)
    return None


def check_whole(folder: str | Path, checksums: bool = False) -> None:
    """
    Check a checkpoint that was named; `checksums` as in [`find_checkpoint`].

    Raises:
        CheckpointError: if it is not whole.
    """
    put_back(Path(folder).parent)
    fault = fault_of(Path(folder), checksums)
    if fault is not None:
        raise CheckpointError(
            f"You asked to resume from {folder}, which is not a whole checkpoint: {fault}.",
            remedy="Pass another one, or `resume_from_checkpoint=True` for the newest that is whole.",
        )


def check_writable(output_dir: Path) -> None:
    """
    Check before a run begins that it can be written to disk.

    Args:
        output_dir (`Path`):
            Output folder of the run, made if it is not there.

    Raises:
        CheckpointSaveError: if nothing can be written there.
    """
    folder = output_dir / UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))  # a full disk still takes an empty file
            probe.flush()
    except OSError as error:
        raise CheckpointSaveError(
            f"Nothing can be written to `output_dir` ({output_dir}): {error}. The run has not started, since what it "
            "makes would be lost.",
            remedy="Pass an `output_dir` that can be written to.",
        ) from error
    with suppress(OSError):  # what a killed run has left there stays, to be named
        os.rmdir(folder)


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
            "do not see what the first writes there. Each adds its own part to a checkpoint, so that none would be "
            "whole.",
            remedy="Pass a folder that all machines share, or `save_strategy='no'`.",
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
            raise OSError(errno.EIO, f"the part of process {index} ({PROGRESS.format(index)}) cannot be seen")


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
    surplus.sort(key=lambda path: (fault_of(path) is None, _step(path)))
    trash = output_dir / UNFINISHED
    for path in surplus[: len(found) - max(limit, len(kept))]:
        trash.mkdir(exist_ok=True)
        os.replace(path, trash / f"{_REMOVED}{path.name}")  # at once: a kill leaves no half of it in its place
    shutil.rmtree(trash, ignore_errors=True)


def set_aside(output_dir: Path, needed: Path | None = None) -> Path | None:
    """
    Move what an earlier run has left out of the way of a new one, which would write over it, or take it for its own.

    Args:
        output_dir (`Path`):
            Output folder of both.
        needed (`Path`, *optional*):
            A model that stays, since the new run's adapter names it as its base model.

    Returns:
        `Path` or `None`: the folder in `output_dir` it is in now; `None` if there was nothing.
    """
    put_back(output_dir)
    kept = None if needed is None else needed.resolve()
    found = [path for path in checkpoints(output_dir) if path.resolve() != kept]
    signs = [path for sign in _SIGNS for path in output_dir.glob(sign)]
    if not (found or signs or find_files(output_dir / FOLDER)):
        return None
    patterns = _LEFT if output_dir.resolve() == kept else (*_LEFT, *_MODEL)
    patterns = patterns if holds_other_page(output_dir) else (*patterns, CARD)
    found += [path for pattern in patterns for path in output_dir.glob(pattern) if path.resolve() != kept]
    return move_aside(output_dir, dict.fromkeys(found))


def move_aside(output_dir: Path, paths: Iterable[Path]) -> Path:
    """
    Move files and folders of an output folder to a new folder of an earlier run in it, which is returned: all of them,
    or none where the disk refuses. What a kill leaves half moved is put back by the next run, see [`put_back`].
    """
    taken = {path.name.removeprefix(_MOVING) for path in output_dir.iterdir()}
    name = next(name for number in itertools.count(1) if (name := f"{EARLIER}{number}") not in taken)
    folder, moving = output_dir / name, output_dir / f"{_MOVING}{name}"
    moving.mkdir()
    try:
        for path in paths:
            os.replace(path, moving / path.name)
        os.replace(moving, folder)
    except OSError:
        _move_back(moving)
        raise
    return folder


def _move_back(moving: Path) -> None:
    """Undo a move that was not finished; finish it if others have written anew what was moved."""
    with suppress(OSError):
        targets = {path: moving.parent / path.name for path in moving.iterdir()}
        if any(os.path.lexists(path) and not _is_empty(path) for path in targets.values()):
            os.replace(moving, moving.with_name(moving.name.removeprefix(_MOVING)))
            return
        for path, target in targets.items():
            os.replace(path, target)
        moving.rmdir()


def _is_empty(path: Path) -> bool:
    """Return whether a path is an empty folder, such as TRL makes for completions."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _step(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def _measured(file: Path, checksum: bool) -> dict[str, int]:
    found = {"bytes": file.stat().st_size}
    if checksum:
        found["crc32"] = 0
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                found["crc32"] = zlib.crc32(chunk, found["crc32"])
    return found


def _flush(path: Path) -> None:
    """Flush a file or folder to disk. Windows opens no folders, and some file systems flush none."""
    try:
        # Windows flushes only what may be written to
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" and path.is_file() else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if is_storage_failure(error) or not path.is_dir():
            raise
