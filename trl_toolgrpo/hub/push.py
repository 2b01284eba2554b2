"""What goes to the Hub, when, and what is done when the Hub or the disk refuses.

The adapter (or the model), the value head, the tokenizer and the model card are written to the folder `hub` in the
output folder first; nothing that only this run needs, and nothing secret. `huggingface_hub` uploads that folder. It
stays, so that a failed push can be repeated.
"""

import copy
import errno
import logging
import shlex
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from socket import gaierror
from ssl import SSLError
from typing import Any

from accelerate.utils import broadcast_object_list
from huggingface_hub import CommitInfo
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress
from transformers.utils.hub import hf_api

from ..algorithms.base import AdvantageEstimator
from ..checkpoints.folder import find_checkpoint, move_aside
from ..checkpoints.resume import Checkpoints
from ..config.fields import estimator_name
from ..errors import CheckpointSaveError, HubPushError
from ..monitoring.records import Records
from ..redaction import masked
from ..rollout.rollouts import Rollouts
from ..run_folder.files import CARD, PUBLISHED, other_page_aside
from ..run_folder.storage_failures import attempt, is_storage_failure, raised_in_every_process, tolerated
from ..trl_hooks import Run
from ..types import JSONObject
from .model_card import RunCard


logger = logging.getLogger(__name__)

# What the client raises where the Hub cannot be reached or refuses, its HTTP library's errors among them
_FAILURES: tuple[type[Exception], ...] = (
    *(HfHubHTTPError, HfHubHTTPError.__bases__[0], LocalTokenNotFoundError),
    *(ConnectionError, TimeoutError, SSLError, gaierror),
)
# The part of a checkpoint that is published
_PUBLIC = ("adapter_*", "model*", "*config.json", "value_head.safetensors", "*token*", "*.jinja")


class HubPublisher:
    """
    Pushes the model of a run, and saves it where the disk takes it; see `push_to_hub` and the other `hub_*` fields of
    TRL's configuration.

    Args:
        run ([`Run`]):
            The run.
        rollouts ([`Rollouts`]), records ([`Records`]), checkpoints ([`Checkpoints`]):
            What is said of it in its card and in messages.
        estimator ([`AdvantageEstimator`]):
            Where its advantages come from.
    """

    def __init__(
        self,
        run: Run,
        rollouts: Rollouts,
        records: Records,
        checkpoints: Checkpoints,
        estimator: AdvantageEstimator,
    ) -> None:
        self._run, self._records, self._checkpoints = run, records, checkpoints
        self.card = RunCard(run, rollouts, records, estimator)
        self._has_published = False
        self._upload: tuple[Path, Future] | None = None  # of the last checkpoint that was pushed

    # Pushing

    def create_repository(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository; where the Hub refuses or cannot be reached, log it and try again at the next push."""
        try:
            self._run.create_repository(token, private)
        except Exception as error:
            if not _is_refusal(error):
                raise
            logger.warning(
                "The Hub did not take the repository: %s. The run goes on, and tries again when there is something to "
                "push. What could not be pushed is kept in %s; `%s` pushes it later.",
                self._records.redacted(_error_text(error)),
                self._published,
                self._push_command(self._published),
            )

    def push(
        self,
        commit_message: str | None,
        blocking: bool,
        token: str | None,
        revision: str | None,
        private: bool | None,
        card: JSONObject,
    ) -> Any:
        """
        Push the adapter (or model), the value head, the tokenizer and a model card.

        What is pushed is written to the folder `hub` in `output_dir` first and stays there.

        Args:
            commit_message, blocking, token, revision, private:
                As in [`~transformers.Trainer.push_to_hub`].
            card (`dict`):
                Arguments of the model card.

        Returns:
            `CommitInfo`, or a `Future` of one with `blocking=False`; `None` in all processes but the first.

        Raises:
            HubPushError: if the Hub refuses or cannot be reached; says where the work is and the command that pushes
                it later.
        """
        run = self._run
        run.callback_handler.on_push_begin(run.args, run.state, run.control)
        run.finish_current_push()  # it reads the folder that is written anew
        folder = self._publish(card)
        found = None
        with raised_in_every_process():
            try:
                if run.hub_model_id is None:
                    run.create_repository(token, private)
                if run.is_main_process:
                    found = self._start_upload(folder, ".", commit_message, blocking, token, revision)
            except Exception as error:
                if not _is_refusal(error):
                    raise
                raise HubPushError(
                    f"The Hub did not take {self.card.repo_name}: {self._records.redacted(_error_text(error))}. "
                    f"Nothing is lost: what was to be pushed is in {folder}.",
                    remedy=f"To push it later, log in with `hf auth login`, or set HF_TOKEN to a token that may "
                    f"write, and run `{self._push_command(folder)}`.",
                ) from None  # its text may have secrets
        if isinstance(found, Future):
            run.push_in_progress = PushInProgress([found])  # type: ignore[arg-type]  # a list is meant there
        return found

    def _start_upload(
        self, folder: Path, place: str, message: str | None, blocking: bool, token: str | None, revision: str | None
    ) -> CommitInfo | Future:
        """Push a folder to a place in the repository; what becomes of it in the background is logged."""
        found: CommitInfo | Future = hf_api().upload_folder(  # type: ignore[call-overload]
            repo_id=str(self._run.hub_model_id),
            folder_path=folder,
            path_in_repo=place,
            commit_message=message,
            token=token or self._run.args.hub_token,
            revision=revision or self._run.args.hub_revision,
            run_as_future=not blocking,
        )
        if isinstance(found, Future):
            found.add_done_callback(lambda future: self._log_failure(future, folder, place))
        return found

    def push_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the model of a run under way in the background; with the checkpoint, if `hub_strategy` asks for it."""
        strategy = HubStrategy(self._run.args.hub_strategy)
        busy = self._run.push_in_progress is not None and not self._run.push_in_progress.is_done()
        (busy,) = broadcast_object_list([busy])
        if strategy == HubStrategy.END or (busy and not self._run.args.hub_always_push):
            return
        message = f"Training in progress, step {self._run.state.global_step}"
        job = self._push_or_log(message, blocking=False)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS) and isinstance(job, Future):
            folder = Path(checkpoint_folder)
            place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
            upload = self._start_upload(folder, place, f"{message}, checkpoint", False, None, None)
            self._upload = folder, upload  # type: ignore[assignment]  # in the background, so that it is a future
            self._run.push_in_progress.jobs.append(upload)

    @property
    def uploading(self) -> set[Path]:
        """Checkpoint folders whose upload to the Hub has not ended: until then they have to stay."""
        return {self._upload[0]} if self._upload is not None and not self._upload[1].done() else set()

    def _push_or_log(self, message: str, blocking: bool = True) -> CommitInfo | Future | None:
        """Push along with a save; if that fails, the run goes on."""
        try:
            return self._run.push_to_hub(message, blocking)
        except CheckpointSaveError as error:
            logger.error("Nothing was pushed, and the run goes on. %s", error)
        except HubPushError as error:
            if self._run.is_main_process:
                logger.error("%s The run goes on.", error)
        return None

    def _log_failure(self, future: Future, folder: Path, place: str) -> None:
        error = future.exception() if not future.cancelled() else None
        if error is not None:
            later = (
                f"What was to be pushed is in {folder}; `{self._push_command(folder, place)}` pushes it later."
                if folder.is_dir()
                else f"{folder}, which was to be pushed, is no longer there: the next save pushes what the run has by "
                f"then, `trainer.push_to_hub()` the model alone."
            )
            logger.error("A push in the background failed: %s. %s", self._records.redacted(_error_text(error)), later)

    def _push_command(self, folder: Path, place: str = ".") -> str:
        command = ["hf", "upload", self.card.repo_name, str(folder), place]
        command += ["--revision", str(self._run.args.hub_revision)] if self._run.args.hub_revision else []
        command += ["--private"] if self._run.args.hub_private_repo else []
        return shlex.join(command)

    # What is published

    @property
    def _published(self) -> Path:
        return Path(str(self._run.args.output_dir)).absolute() / PUBLISHED

    def _publish(self, card: JSONObject) -> Path:
        """Write what is pushed, all processes together; elsewhere, if the output folder does not take it."""

        def write(folder: Path) -> None:
            if self._run.args.should_save:
                self._make_way(folder)
            with self.card.output_in(folder, publishing=True):
                self._run.save_model()
                with tolerated():
                    if self._run.args.should_save:
                        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, of use to nobody else
                    self._run.create_model_card(**card)

        return self._write_somewhere(write, self._published)

    def _make_way(self, folder: Path) -> None:
        """Remove what this run has published before; a folder of that name that is not its own is moved aside."""
        card = folder / CARD
        known = self._checkpoints.continues_folder and card.is_file() and b"trl_toolgrpo" in card.read_bytes()
        if self._records.log.owns_folder() and (self._has_published or known):
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.exists():
            place = move_aside(folder.parent, [folder])
            logger.warning("%s was not written by this run: it was moved to %s.", folder, place)
        self._has_published = True

    def _write_somewhere(self, write: Callable[[Path], None], folder: Path) -> Path:
        """Write to a folder, or to a temporary one if the disk refuses, and return which it was."""
        problems = attempt(lambda: write(folder))
        if not problems:
            return folder
        refuge, more = self._write_elsewhere(write, folder.name)
        if more:
            raise CheckpointSaveError(
                f"Neither {folder} nor {refuge} takes the trained model: {problems[0]}; {more[0]}. It is in memory "
                f"still.",
                remedy=f"Free space, or call `trainer.save_model(folder)` with a folder on another disk."
                f"{self._last_checkpoint()}",
            )
        logger.warning("%s could not be written: %s. %s was written instead.", folder, problems[0], refuge)
        return refuge

    def _write_elsewhere(self, write: Callable[[Path], None], name: str) -> tuple[Path, list[str]]:
        """Write to a temporary folder; return which it is, and what the disk refused."""
        refuge = Path(name)

        def write_there() -> None:
            nonlocal refuge
            try:
                refuge = Path(tempfile.mkdtemp(prefix=f"{self.card.name_of_run}-")) / name
            except FileNotFoundError as error:  # no folder for temporary files can be written to
                raise OSError(errno.ENOSPC, str(error)) from error
            write(refuge)

        problems = attempt(write_there)
        return refuge, problems

    def rescue(self) -> str:
        """Write the trained model where there is room for it, since no checkpoint could be; return what came of it."""
        refuge, problems = self._write_elsewhere(self._save_with_card, self.card.name_of_run)
        if problems:
            return "The trained model is in memory still: `trainer.save_model(folder)` writes it elsewhere."
        return f"The trained model was written to {refuge} instead; {self._how_to_push(refuge)}."

    def _last_checkpoint(self) -> str:
        """Say where the model was last saved as a whole, and how it is pushed."""
        found = find_checkpoint(str(self._run.args.output_dir))
        if found is None:
            return ""
        included = " ".join(f"--include {shlex.quote(pattern)}" for pattern in _PUBLIC)
        return f" The last whole checkpoint is {found}; `{self._push_command(found)} {included}` pushes its model."

    def save(self, output_dir: str | None) -> None:
        """
        Save the model, and push it under `push_to_hub`.

        Args:
            output_dir (`str`, *optional*):
                Where; `output_dir` of the run by default.

        Raises:
            CheckpointSaveError: if the folder does not take the model; it is then written to a temporary folder, which
                the message names.
        """
        target = Path(output_dir or str(self._run.args.output_dir))
        folder = self._write_somewhere(self._save_with_card, target)
        if self._run.args.push_to_hub:
            self._push_or_log("Model save")
        if folder != target:
            raise CheckpointSaveError(
                f"{target} does not take the trained model. Nothing is lost: it is in {folder}.",
                remedy=f"Move it to where it is to stay; {self._how_to_push(folder)}.",
            )

    def _save_with_card(self, folder: Path) -> None:
        """
        Save without a push; after training the card of the run takes the place of the one that PEFT writes. A
        `README.md` that is no card, which PEFT would read and add to, stays as it is.
        """
        with self.card.output_in(folder):
            with other_page_aside(folder) if self._run.args.should_save else nullcontext():
                self._run.save_model()
            if self.card.is_due:
                self._run.create_model_card()

    def _how_to_push(self, folder: Path) -> str:
        return f"`{self._push_command(folder)} --exclude {TRAINING_ARGS_NAME}` pushes it to the Hub"

    @contextmanager
    def without_secrets(self) -> Iterator[None]:
        """While open, the arguments that are pickled next to a model hold no secrets, and what the disk refuses is
        noted."""
        given, args = vars(self._run.args), copy.copy(self._run.args)
        values = {name: masked(value, name) for name, value in given.items()} | {"hub_token": None}
        values["advantage_estimator"] = estimator_name(self._run.args)  # an object of any class cannot be pickled
        vars(args).update({name: value for name, value in values.items() if value != given[name]})
        with self._run.arguments(args), tolerated():
            yield


def _is_refusal(error: Exception) -> bool:
    """Return whether the Hub refused a push, or the disk what goes with it; anything else is a bug."""
    if isinstance(error, _FAILURES) or is_storage_failure(error) or type(error).__module__.startswith("hf_xet"):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    # The client's storage backend raises a plain RuntimeError, and so does the client around it
    return isinstance(error, RuntimeError) and bool(frames) and "huggingface_hub" in Path(frames[-1].filename).parts


def _error_text(error: BaseException) -> str:
    """Return an error and its cause, on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if error.__cause__ is None else f"{text} ({_error_text(error.__cause__)})"
