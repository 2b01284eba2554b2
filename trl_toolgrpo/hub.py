"""What goes to the Hub, when, and what is done when the Hub or the disk refuses.

A mixin of the trainer: the folder of what is published, and the pushes. The folder holds the adapter (or the
model), the value head, the tokenizer and the model card, whose texts are those of `model_card.py`; nothing that only
this run needs, and nothing secret. It is written first and stays, so that a push that fails can be made up for.
"""

import errno
import logging
import shlex
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from socket import gaierror
from ssl import SSLError
from typing import Any

from accelerate.utils import broadcast_object_list
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress
from transformers.utils.hub import hf_api

from .checkpoint import attempt, find_checkpoint, is_storage_failure, move_aside, tolerated
from .errors import CheckpointSaveError, HubPushError
from .redaction import masked
from .run_card import RunCard
from .run_files import PUBLISHED


logger = logging.getLogger(__name__)

# What the client raises where the Hub cannot be reached or refuses, its HTTP library's errors among them
_FAILURES: tuple[Any, ...] = (
    *(HfHubHTTPError, HfHubHTTPError.__bases__[0], LocalTokenNotFoundError),
    *(ConnectionError, TimeoutError, SSLError, gaierror),
)
# What of a checkpoint is published
_PUBLIC = ("adapter_*", "model*", "*config.json", "value_head.safetensors", "*token*", "*.jinja")


class HubPush(RunCard):
    """Part of [`ToolGRPOTrainer`]; see `push_to_hub` and the other `hub_*` fields of TRL's configuration."""

    push_in_progress: Any = None
    _publishing = False  # the folder is written, and the push goes on from it
    _goes_on = False  # a run that was begun in this output folder
    _has_published = False
    _along = False  # a push that comes along with saving: the run goes on without it
    _upload: tuple[Path, Future] | None = None  # of the last checkpoint that was pushed

    # Pushing

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """TRL's; a run that cannot reach the Hub says so, and goes on without it until there is something to push."""
        try:
            super().init_hf_repo(token, private)
        except Exception as error:
            if not _is_refusal(error):
                raise
            logger.warning(
                "The Hub did not take the repository: %s. The run goes on, and tries again when there is something to "
                "push. What could not be pushed is kept in %s; `%s` pushes it later.",
                self._redacted(_words(error)),
                self._published,
                self._later(self._published),
            )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Push the adapter (or model), the value head, the tokenizer and a model card to `hub_model_id`.

        What is pushed is written to the folder `hub` in `output_dir` first and stays there.

        Args:
            commit_message, blocking, token, revision, private, kwargs:
                As in [`~transformers.Trainer.push_to_hub`]; `kwargs` go to the model card.

        Returns:
            `CommitInfo`, or a `Future` of one with `blocking=False`; `None` in other processes than the first.

        Raises:
            HubPushError: if the Hub refuses or cannot be reached; says where the work is and the command that pushes
                it later. A push that comes along with saving is logged instead, and the run goes on.
        """
        if self.args.should_save and kwargs.get("model_name") is None:
            kwargs["model_name"] = (self.args.hub_model_id or self._name_of_run).split("/")[-1]
        self._finish_current_push()  # it reads the folder that is written anew
        folder = self._publish(kwargs)
        found, problem = None, None
        try:
            if self.hub_model_id is None:
                super().init_hf_repo(token, private)
            with self._output_in(folder), self._written():
                found = super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        except Exception as error:
            if not _is_refusal(error):
                raise
            problem = self._redacted(_words(error))
        (problem,) = broadcast_object_list([problem])
        if problem is not None:
            self._report_unpushed(folder, problem)
        elif isinstance(found, Future):
            found.add_done_callback(lambda future: self._look_at(future, folder))
            jobs: Any = [found]
            self.push_in_progress = PushInProgress(jobs)
        return found

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """The push of a run under way, in the background; with the checkpoint, if `hub_strategy` asks for it."""
        strategy = HubStrategy(self.args.hub_strategy)
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        (busy,) = broadcast_object_list([busy])
        if strategy == HubStrategy.END or (busy and not self.args.hub_always_push):
            return
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._push_along(message, blocking=False)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS) and isinstance(jobs[0], Future):
            folder = Path(checkpoint_folder)
            place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
            job = hf_api().upload_folder(
                repo_id=str(self.hub_model_id),
                folder_path=folder,
                path_in_repo=place,
                commit_message=f"{message}, checkpoint",
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                run_as_future=True,
            )
            job.add_done_callback(lambda future: self._look_at(future, folder, place))
            jobs.append(job)
            self._upload = folder, job
        started: Any = [job for job in jobs if isinstance(job, Future)]
        self.push_in_progress = PushInProgress(started)

    @property
    def _uploading(self) -> set[Path]:
        """Checkpoint folders whose upload to the Hub has not ended: until then they have to stay."""
        return {self._upload[0]} if self._upload is not None and not self._upload[1].done() else set()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, which removes checkpoints beside the best one; first what is being uploaded arrives."""
        self._finish_current_push()
        return super()._finalize_training(*args, **kwargs)

    def _push_along(self, message: str, **options: Any) -> Any:
        self._along = True
        try:
            return self.push_to_hub(message, revision=self.args.hub_revision, **options)
        except CheckpointSaveError as error:
            logger.error("Nothing was pushed, and the run goes on. %s", error)
            return None
        finally:
            self._along = False

    def _report_unpushed(self, folder: Path, problem: str) -> None:
        name = self.args.hub_model_id or self._name_of_run
        message = (
            f"The Hub did not take {name}: {problem}. Nothing is lost: what was to be pushed is in {folder}. To push "
            f"it later, log in with `hf auth login`, or set HF_TOKEN to a token that may write, and run "
            f"`{self._later(folder)}`."
        )
        if not self._along:
            raise HubPushError(message)
        if self.is_world_process_zero():
            logger.error("%s The run goes on.", message)

    def _look_at(self, future: Future, folder: Path, place: str = ".") -> None:
        """Say what became of a push in the background, of a folder to a place in the repository."""
        error = future.exception() if not future.cancelled() else None
        if error is None:
            return
        problem = self._redacted(_words(error))
        if folder.is_dir():
            logger.error(
                "A push in the background failed: %s. What was to be pushed is in %s; `%s` pushes it later.",
                problem,
                folder,
                self._later(folder, place),
            )
        else:
            logger.error(
                "A push in the background failed: %s. %s, which was to be pushed, is no longer there: the next save "
                "pushes what the run has by then, `trainer.push_to_hub()` the model alone.",
                problem,
                folder,
            )

    def _later(self, folder: Path, place: str = ".") -> str:
        """The command that pushes a folder."""
        name = self.hub_model_id or self.args.hub_model_id or self._name_of_run
        command = ["hf", "upload", name, str(folder), place]
        command += ["--revision", str(self.args.hub_revision)] if self.args.hub_revision else []
        command += ["--private"] if self.args.hub_private_repo else []
        return shlex.join(command)

    # What is published

    @property
    def _published(self) -> Path:
        return Path(str(self.args.output_dir)).absolute() / PUBLISHED

    def _publish(self, card: dict[str, Any]) -> Path:
        """Write what is pushed, all processes together; elsewhere, if the output folder does not take it."""

        def write(folder: Path) -> None:
            if self.args.should_save:
                self._make_way(folder)
            with self._output_in(folder):
                self.save_model(_internal_call=True)
                with tolerated():
                    if self.args.should_save:
                        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, for nobody else
                    self.create_model_card(**card)

        return self._write_somewhere(write, self._published)

    def _make_way(self, folder: Path) -> None:
        """Remove what this run has published before; a folder of that name that is not its own is moved aside."""
        card = folder / "README.md"
        known = self._goes_on and card.is_file() and b"trl_toolgrpo" in card.read_bytes()
        if self._owns_folder() and (self._has_published or known):
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.exists():
            place = move_aside(folder.parent, [folder])
            logger.warning("%s was not written by this run: it was moved to %s.", folder, place)
        self._has_published = True

    def _write_somewhere(self, write: Callable[[Path], None], folder: Path) -> Path:
        """Write to a folder, or to a temporary one if the disk refuses; the folder it was."""
        problems = attempt(lambda: write(folder))
        if not problems:
            return folder
        refuge, more = self._write_elsewhere(write, folder.name)
        if more:
            raise CheckpointSaveError(
                f"Neither {folder} nor {refuge} takes the trained model: {problems[0]}; {more[0]}. It is in memory "
                f"still: free space, or call `trainer.save_model(folder)` with a folder on another disk."
                f"{self._last_checkpoint()}"
            )
        logger.warning("%s could not be written: %s. %s was written instead.", folder, problems[0], refuge)
        return refuge

    def _write_elsewhere(self, write: Callable[[Path], None], name: str) -> tuple[Path, list[str]]:
        """Write to a temporary folder; which it is, and what the disk refused."""
        refuge = Path(name)

        def write_there() -> None:
            nonlocal refuge
            try:
                refuge = Path(tempfile.gettempdir()) / name
                if self.args.should_save:
                    refuge = Path(tempfile.mkdtemp(prefix=f"{self._name_of_run}-")) / name
            except FileNotFoundError as error:  # no folder for temporary files can be written to
                raise OSError(errno.ENOSPC, str(error)) from error
            write(refuge)

        problems = attempt(write_there)
        return refuge, problems

    def _rescue(self) -> str:
        """Write the trained model where there is room for it, since no checkpoint could be; what came of it."""
        refuge, problems = self._write_elsewhere(lambda place: self._save_alone(str(place)), self._name_of_run)
        if problems:
            return "The trained model is in memory still: `trainer.save_model(folder)` writes it elsewhere."
        return f"The trained model was written to {refuge} instead; {self._how_to_push(refuge)}."

    def _last_checkpoint(self) -> str:
        """Where the model was last saved as a whole, and how it is pushed."""
        found = find_checkpoint(str(self.args.output_dir))
        if found is None:
            return ""
        included = " ".join(f"--include {shlex.quote(pattern)}" for pattern in _PUBLIC)
        return f" The last whole checkpoint is {found}; `{self._later(found)} {included}` pushes its model."

    @contextmanager
    def _output_in(self, folder: Path) -> Iterator[None]:
        self._home, self.args.output_dir = str(self.args.output_dir), str(folder)
        try:
            yield
        finally:
            self.args.output_dir, self._home = self._home, None

    @contextmanager
    def _written(self) -> Iterator[None]:
        """While TRL pushes: the model is in the folder already."""
        self._publishing = True
        try:
            yield
        finally:
            self._publishing = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        TRL's save, and the push that comes along with it under `push_to_hub`.

        Raises:
            CheckpointSaveError: if the folder does not take the model; it is then written to a temporary folder, which
                the message names.
        """
        if self._publishing:
            return
        if _internal_call:
            return super().save_model(output_dir, _internal_call)
        target = Path(output_dir or str(self.args.output_dir))
        folder = self._write_somewhere(lambda place: self._save_alone(str(place)), target)
        if self.args.push_to_hub:
            self._push_along("Model save")
        if folder != target:
            raise CheckpointSaveError(
                f"{target} does not take the trained model. Nothing is lost: it is in {folder}. Move it to where it "
                f"is to stay; {self._how_to_push(folder)}."
            )

    def _save_alone(self, folder: str) -> None:
        """TRL's save by a user, without the push."""
        push, self.args.push_to_hub = self.args.push_to_hub, False
        try:
            super().save_model(folder)
        finally:
            self.args.push_to_hub = push

    def _how_to_push(self, folder: Path) -> str:
        return f"`{self._later(folder)} --exclude {TRAINING_ARGS_NAME}` pushes it to the Hub"

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """TRL's, without secrets in the arguments that are pickled beside the model."""
        with self._public_arguments(), tolerated():
            super()._save(output_dir, state_dict)

    @contextmanager
    def _public_arguments(self) -> Iterator[None]:
        given = {field.name: getattr(self.args, field.name) for field in fields(self.args)}
        shown = {name: masked(value, name) for name, value in given.items()} | {"hub_token": None}
        changed = {name: value for name, value in given.items() if shown[name] is not value and shown[name] != value}
        try:
            for name in changed:
                setattr(self.args, name, shown[name])
            yield
        finally:
            for name, value in changed.items():
                setattr(self.args, name, value)


def _is_refusal(error: Exception) -> bool:
    """Whether the Hub did not take a push, or the disk what goes with it; anything else is a fault of the program."""
    if isinstance(error, _FAILURES) or is_storage_failure(error) or type(error).__module__.startswith("hf_xet"):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    # The client's storage backend raises a plain RuntimeError, and so does the client around it
    return isinstance(error, RuntimeError) and bool(frames) and "huggingface_hub" in Path(frames[-1].filename).parts


def _words(error: BaseException) -> str:
    """An error and its cause, on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if error.__cause__ is None else f"{text} ({_words(error.__cause__)})"
