"""Errors of a full or broken disk: recognized, recorded where a process must continue, and raised in all."""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from accelerate.utils import gather_object
from torch.distributed.checkpoint.api import CheckpointException

from ..errors import ToolGRPOError


# What says that the disk does not take what is written. The last is a limit on the size of a file
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}

# Rust's writers (safetensors, tokenizers) and torch's have no errno: they quote it, quote its text, or say that fewer
# bytes were written than were given
_STORAGE_TEXT = re.compile(
    "|".join(rf"\(os error {number}\)|{re.escape(os.strerror(number))}" for number in _STORAGE)
    + r"|inline_container\.cc.*unexpected pos|PytorchStreamWriter failed.*file write failed|iostream\S* error"
)


@contextmanager
def raised_in_every_process() -> Iterator[None]:
    """
    Raise in every process the [`ToolGRPOError`] that one of them raises within, so that no process waits
    for one that has failed. Every process must enter this.
    """
    own = None
    try:
        yield
    except ToolGRPOError as error:
        own = error
    for raised in gather_object([own]):
        if raised is not None:
            raise raised


def is_storage_failure(error: BaseException) -> bool:
    """Return whether an exception says that the disk, full, read-only or broken, did not take what was written."""
    if isinstance(error, CheckpointException):  # of torch's distributed checkpoints, the same in every process
        return any(is_storage_failure(failure) for failure, _ in error.failures.values())
    if isinstance(error, OSError):
        return error.errno in _STORAGE
    return isinstance(error, Exception) and _STORAGE_TEXT.search(str(error)) is not None


_refused: ContextVar[list[str] | None] = ContextVar("refused", default=None)  # in the attempt under way


def attempt(work: Callable[[], None]) -> list[str]:
    """
    Write something in every process, and return what the disk refused, over all of them.

    Use [`tolerated`] for the writes between two collectives, so that a process whose disk refuses still reaches the
    next one. Errors of any other kind propagate.
    """
    refused: list[str] = []
    token = _refused.set(refused)
    try:
        with tolerated():
            work()
    finally:
        _refused.reset(token)
    return gather_object(refused)


@contextmanager
def tolerated() -> Iterator[None]:
    """
    Record what the disk refuses within an [`attempt`] instead of raising it; outside an attempt, and in other threads,
    it is raised.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:
        refused = _refused.get()
        if refused is None or not is_storage_failure(error):
            raise
        refused.append(f"{type(error).__name__}: {error}")
