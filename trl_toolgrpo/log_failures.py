"""Failures of logs, which end no run: each is said once."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from trl.extras import profiling
from trl.trainer.callbacks import LogCompletionsCallback, RichProgressCallback, WeaveCallback

from .progress import RolloutProgress


logger = logging.getLogger(__name__)

REPORTERS = (
    *INTEGRATION_TO_CALLBACK.values(), LogCompletionsCallback, WeaveCallback, PrinterCallback, ProgressCallback,
    DEFAULT_PROGRESS_CALLBACK, RichProgressCallback, RolloutProgress,
)  # fmt: skip
"""Callbacks that only tell of a run: those of `report_to`, TRL's trackers, and those that draw its progress."""

_GUARDED = "_toolgrpo_guarded"
"""Attribute of a callback whose failures are said."""
_EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


class LogFailures:
    """
    Keeps the failures of what only tells of a run from ending it, and says each once.

    What the disk or the network refuses is said in words. Anything else may be a fault of this package or of a
    tracker, and is said with its traceback.
    """

    def __init__(self) -> None:
        self._said: set[str] = set()

    @contextmanager
    def tolerated(self, what: str) -> Iterator[None]:
        """
        A part of a run that may fail; an exception in it ends the part.

        Args:
            what (`str`):
                What fails then, in a sentence: the run goes on without it, and it is tried again the next time.
        """
        try:
            yield
        except Exception as error:
            self.say(what, error)

    def say(self, what: str, error: Exception) -> None:
        """
        Say a failure, unless it was said.

        Args:
            what (`str`):
                What failed, in a sentence.
            error (`Exception`):
                How.
        """
        sentence = f"{what}, and the run goes on: {type(error).__name__}: {error}"
        self.say_once(what, sentence, None if isinstance(error, OSError) else error)

    def say_once(self, what: str, sentence: str, traceback_of: Exception | None = None) -> None:
        """
        Warn, unless it was said.

        Args:
            what (`str`):
                What is said once.
            sentence (`str`):
                The warning, without its full stop.
            traceback_of (`Exception`, *optional*):
                What is shown with it.
        """
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s. Later failures of this kind are not said again.", sentence, exc_info=traceback_of)

    @contextmanager
    def of_profiling(self) -> Iterator[None]:
        """While open, TRL's profiler, which sends each duration to trackers by itself, ends no run either."""
        hook: Any = profiling
        failures, kind = self, hook.ProfilingContext
        base: Any = kind

        class Tolerant(base):
            def _log_metrics(self, duration: float) -> None:
                with failures.tolerated("The duration of a part of a step could not be sent to a tracker"):
                    super()._log_metrics(duration)

        hook.ProfilingContext = Tolerant
        try:
            yield
        finally:
            hook.ProfilingContext = kind

    def guard(self, callback: Any) -> None:
        """
        Keep a callback that only tells of a run from ending it; callbacks of users stay as they are.

        A tracker that cannot begin is not asked again in that run.

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

    def _tolerant(self, callback: Any, event: str, muted: set[str]) -> Callable[..., Any]:
        own = vars(callback).get(event)

        @functools.wraps(getattr(callback, event))
        def tolerant(*args: Any, **kwargs: Any) -> Any:
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
                self.say(f"{type(callback).__name__} failed in `{event}`", error)
                return None

        return tolerant
