"""Failures of what only reports on a run: they do not end it, and each is logged once."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from trl.trainer.callbacks import LogCompletionsCallback, RichProgressCallback, WeaveCallback

from ..trl_hooks import profiler_reporting_within


logger = logging.getLogger(__name__)


class Reporter(TrainerCallback):
    """A callback that only reports on a run, whose failures end nothing."""


REPORTERS = (
    *INTEGRATION_TO_CALLBACK.values(), LogCompletionsCallback, WeaveCallback, PrinterCallback, ProgressCallback,
    DEFAULT_PROGRESS_CALLBACK, RichProgressCallback, Reporter,
)  # fmt: skip
"""Callbacks that only report on a run: those of `report_to`, TRL's trackers, and those that draw its progress."""

_GUARDED = "_toolgrpo_guarded"
"""Attribute of a callback whose failures are tolerated."""
_EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


class LogFailures:
    """
    Keeps the failures of what only reports on a run from ending it, and logs each once.

    What the disk or the network refuses is logged as a sentence. Anything else may be a fault of this package or of a
    tracker, and is logged with its traceback.
    """

    def __init__(self) -> None:
        self._warned: set[str] = set()

    @contextmanager
    def tolerated(self, what: str) -> Iterator[None]:
        """
        Run a part of the run that may fail; an exception in it ends the part, and the next time it is tried again.

        Args:
            what (`str`):
                What failed if it does, in a sentence.
        """
        try:
            yield
        except Exception as error:
            self.warn(what, error)

    def warn(self, what: str, error: Exception) -> None:
        """
        Log a failure, unless it was logged before.

        Args:
            what (`str`):
                What failed, in a sentence.
            error (`Exception`):
                How.
        """
        sentence = f"{what}, and the run goes on: {type(error).__name__}: {error}"
        self.warn_once(what, sentence, None if isinstance(error, OSError) else error)

    def warn_once(self, what: str, sentence: str, traceback_of: Exception | None = None) -> None:
        """
        Log a warning, unless it was logged before.

        Args:
            what (`str`):
                What is logged once.
            sentence (`str`):
                The warning, without its full stop.
            traceback_of (`Exception`, *optional*):
                Whose traceback is logged with it.
        """
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("%s. Later failures of this kind are not logged again.", sentence, exc_info=traceback_of)

    @contextmanager
    def of_profiling(self) -> Iterator[None]:
        """Tolerate failures of TRL's profiler while open, which sends each duration to trackers by itself."""
        what = "The duration of a part of a step could not be sent to a tracker"
        with profiler_reporting_within(lambda: self.tolerated(what)):
            yield

    def guard(self, callback: TrainerCallback) -> None:
        """
        Keep a callback that only reports on a run from ending it; callbacks of users stay as they are.

        A tracker that cannot start is not called again in that run.

        Args:
            callback (`TrainerCallback`):
                Any callback.
        """
        if not isinstance(callback, REPORTERS) or hasattr(callback, _GUARDED):
            return
        setattr(callback, _GUARDED, True)
        muted: set[str] = set()
        for event in _EVENTS:
            setattr(callback, event, self._tolerant(callback, event, muted))

    def _tolerant(self, callback: TrainerCallback, event: str, muted: set[str]) -> Callable[..., object]:
        own = vars(callback).get(event)

        @functools.wraps(getattr(callback, event))
        def tolerant(*args: Any, **kwargs: Any) -> object:
            # Looked up at each call, since a tracker may change its class after it was added
            method = own or functools.partial(getattr(type(callback), event), callback)
            if event == "on_train_begin":
                muted.clear()
            if muted:
                return None
            try:
                return method(*args, **kwargs)
            except Exception as error:
                if event == "on_train_begin":
                    muted.add(event)
                self.warn(f"{type(callback).__name__} failed in `{event}`", error)
                return None

        return tolerant
