"""What a run writes to its output folder while it goes on: its start, its metrics and its rollouts.

A rollout batch is written once its last update is over, on a thread of its own, so that training does not wait for
the disk.
"""

import logging
import os
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from ..config.batch_position import batch_in_use, batch_number
from ..config.fields import ToolGRPOConfig
from ..redaction import SECRET, Redactor, loggers_of, redact_logs, secret_variables
from ..rollout.engine import RolloutBatch, RolloutEngine
from ..tools.mcp.servers import MCPTools
from ..tools.toolset import ToolSet
from ..types import Batch, JSONObject, Message, Row
from .completions_table import align_columns, storable_logs
from .files import HEALTH, METRICS, RUN, add_line, cut_back, describe_start, run_redactor, write_json
from .lock import take_lock
from .log_failures import LogFailures
from .rollout_log import FOLDER, LoggedBatch, file_name, find_files, read_table, step_of, tabulate, with_ratios, write
from .storage_failures import raised_in_every_process


logger = logging.getLogger(__name__)

Ratios = list[tuple[Tensor, Tensor]]


class RolloutWriter:
    """
    Writes the rollout batches of one process in the background, and removes the oldest beyond a limit.

    Args:
        folder (`Path`):
            Folder of the log.
        process (`int`):
            Index of the process.
        limit (`float`):
            Most bytes that the files of this process may take.
        redactor ([`Redactor`]):
            Keeps secrets out of the texts.
        failures ([`LogFailures`]):
            Logs what could not be written.
    """

    def __init__(self, folder: Path, process: int, limit: float, redactor: Redactor, failures: LogFailures) -> None:
        self._folder, self._limit, self._redactor, self._failures = folder, limit, redactor, failures
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout-log")
        self._writing: Future | None = None
        self._failed = False
        self._sizes = {path: path.stat().st_size for path in find_files(folder, process)}

    def put(self, name: str, batch: LoggedBatch | pa.Table, ratios: Ratios) -> None:
        """
        Write a batch in the background, after the one before.

        Args:
            name (`str`):
                Name of its file.
            batch ([`LoggedBatch`] or `pa.Table`):
                The batch.
            ratios (`list[tuple[Tensor, Tensor]]`):
                For [`with_ratios`].
        """
        self.wait()
        if not self._failed:
            self._writing = self._thread.submit(self._write, name, batch, ratios)

    def table(self, batch: LoggedBatch | pa.Table, ratios: Ratios) -> pa.Table:
        """Return a batch as it is written."""
        table = batch if isinstance(batch, pa.Table) else tabulate(batch, self._redactor)
        return with_ratios(table, ratios)

    def wait(self) -> None:
        """Wait for what is being written. A failure there does not end the run; one of the disk ends the log."""
        writing, self._writing = self._writing, None
        error = None if writing is None else writing.exception()
        if isinstance(error, OSError):
            self._failed = True
            logger.warning("No rollouts are logged any more: %s could not be written to: %s.", self._folder, error)
        elif isinstance(error, Exception):
            self._failures.warn("A rollout batch could not be logged", error)

    def close(self) -> None:
        """Wait, and end the thread."""
        self.wait()
        self._thread.shutdown()

    def _write(self, name: str, batch: LoggedBatch | pa.Table, ratios: Ratios) -> None:
        path = self._folder / name
        self._sizes.pop(path, None)
        self._sizes[path] = write(self.table(batch, ratios), path)
        while sum(self._sizes.values()) > self._limit and len(self._sizes) > 1:
            oldest = next(iter(self._sizes))
            oldest.unlink(missing_ok=True)
            del self._sizes[oldest]


class RunLog(GRPOTrainer):
    """Part of [`ToolGRPOTrainer`]; see `rollout_log_limit` of [`ToolGRPOConfig`]."""

    args: ToolGRPOConfig
    model: Any
    num_generations: int
    _recording: bool
    _batch: RolloutBatch | None
    _engine: RolloutEngine
    _rewards: Tensor
    _toolset: ToolSet
    _mcp: MCPTools | None
    _run_folder: Path | None = None  # where this run is logged, once it has begun
    _run_file: os.stat_result | None = None  # the `run.json` it began with
    _full: set[str]  # files there that could not be written to
    _redactor = Redactor()
    _log_failures: LogFailures
    _logs: JSONObject  # TRL's, of `log_completions`
    _writer: RolloutWriter | None = None
    _started = 0.0  # by the monotonic clock
    _logged: LoggedBatch | pa.Table | None = None  # the batch in use
    _logged_name = ""  # of its file
    _begun: tuple[int, int] = (-1, 0)  # an optimizer step, and the number of rollout batches that have begun in it
    _logged_ratios: dict[int, tuple[Tensor, Tensor]]  # by micro-batch
    _texts: tuple[Sequence[str | list[Message]], Sequence[str | list[Message]]] = ([], [])  # prompts and completions
    _scores: Tensor | None = None

    def _prepare_run_log(self) -> None:
        self._logged_ratios, self._full, self._log_failures = {}, set(), LogFailures()
        self._update_redactor()
        for callback in self.callback_handler.callbacks:
            self._log_failures.guard(callback)
        self.add_callback(_RunLogCallback(self))

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """
        Add a callback as TRL does. A tracker that fails later does not end the run; a callback of a user does.

        Args:
            callback (`type` or `TrainerCallback`):
                A callback or its class.
        """
        super().add_callback(callback)
        if "_log_failures" in vars(self):
            self._log_failures.guard(self.callback_handler.callbacks[-1])

    def _current_redactor(self) -> Redactor:
        return run_redactor(self.args, self._mcp.servers.values() if self._mcp is not None else ())

    def _update_redactor(self) -> None:
        """Find the secrets of the run as they are now, and keep them out of the lines that this package logs."""
        self._redactor = self._current_redactor()
        redact_logs(loggers_of(__name__.partition(".")[0]), self._redactor)

    def _redacted(self, text: str) -> str:
        """Return a text without the secrets of the run as they are now."""
        return self._current_redactor().text(text)

    def _owns_folder(self) -> bool:
        """Return whether no other run has begun in the output folder since this one did, judging by `run.json`."""
        if self._run_folder is None or self._run_file is None:
            return True
        try:
            return os.path.samestat(self._run_file, os.stat(self._run_folder / RUN))
        except OSError:
            return True

    @property
    def _logs_rollouts(self) -> bool:
        return self._recording and self.args.rollout_log_limit > 0

    # A run from start to end

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        Train as TRL does; when training ends, in whatever way, what was logged is on disk.

        Raises:
            OutputFolderInUseError: if another run writes to `output_dir`.
        """
        with raised_in_every_process():
            lock = take_lock(Path(str(self.args.output_dir))) if self.args.should_save else None
        self._logged = self._run_folder = self._run_file = None
        self._full, self._begun, self._started = set(), (-1, 0), time.monotonic()
        with lock or nullcontext():
            try:
                with self._log_failures.of_profiling():
                    return super().train(*args, **kwargs)
            finally:
                self._put_logged()
                if self._writer is not None:
                    self._writer.close()
                    self._writer = None

    def _finalize_training(self, trial: object, num_train_samples: object, start_time: float) -> TrainOutput:
        """Give TRL the start by the monotonic clock, which nobody sets."""
        return super()._finalize_training(trial, num_train_samples, time.time() - (time.monotonic() - self._started))

    def _begin_run_log(self) -> None:
        """Start the log, or cut it back to where the run is resumed."""
        folder, step = Path(str(self.args.output_dir)), self.state.global_step
        self._update_redactor()
        if self._recording:
            self._engine.redactor = self._redactor
        try:
            if self.accelerator.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                if step > 0:  # what a resumed run will do again
                    for path in find_files(folder / FOLDER):
                        if step_of(path) >= step:
                            path.unlink()
                    for file in (METRICS, HEALTH):
                        cut_back(folder / file, step)
                name = get_config_model_id(self.accelerator.unwrap_model(self.model).config)
                tools = [tool.name for tool in self._toolset.known]
                start = describe_start(self.args, name, self.reward_func_names, tools, self._redactor)
                write_json(folder / RUN, start)
                if hidden := ", ".join(secret_variables(os.environ)):
                    logger.warning(
                        "The values of these environment variables are replaced by %s in logs: %s.", SECRET, hidden
                    )
                self._run_file = os.stat(folder / RUN)
            self._run_folder = folder
        except OSError as error:
            logger.warning("Nothing is logged in `output_dir` (%s): %s.", folder, error)
        self.accelerator.wait_for_everyone()
        if self._logs_rollouts and self._run_folder is not None:
            process, limit = self.accelerator.process_index, self.args.rollout_log_limit * 2**20
            limit /= self.accelerator.num_processes
            self._writer = RolloutWriter(folder / FOLDER, process, limit, self._redactor, self._log_failures)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        Log as TRL does; its table of completions holds only what can be stored, and no secret. If the table still
        cannot be printed, stored or sent, the run goes on.

        Args:
            logs, start_time:
                As in TRL.
        """
        kept, entries = self._logs, len(self.state.log_history)
        if self.log_completions and self.accelerator.is_main_process:
            with self._log_failures.tolerated("The completions of a step could not be prepared for their table"):
                self._logs = storable_logs(kept, self._redactor)
        try:
            super().log(logs, start_time)
        except Exception as error:
            inside = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
            if len(self.state.log_history) == entries or Trainer.log.__code__ in inside:  # of figures or a callback
                raise
            self._log_failures.warn("The completions of a step could not be shown or stored", error)
            if isinstance(error, OSError):
                table = f"completions_{self.state.global_step:05d}.parquet"
                _remove_torn(Path(str(self.args.output_dir)) / "completions" / table)
        finally:
            self._logs = kept
        if self._run_folder is not None and self.accelerator.is_main_process:
            entry = self.state.log_history[-1]
            self._add_line(METRICS, {"step": entry["step"], "time": time.time(), **entry})

    def _add_line(self, name: str, record: JSONObject) -> None:
        """Add a line to a file of the run. Where the disk refuses, the file ends there and the run goes on."""
        if self._run_folder is None or name in self._full or not self._owns_folder():
            return
        try:
            add_line(self._run_folder / name, record)
        except OSError as error:
            self._full.add(name)
            logger.warning("Nothing more is added to %s, which could not be written to: %s.", name, error)
        except Exception as error:
            self._log_failures.warn(f"A line could not be added to {name}", error)

    # Rollouts

    def _generate(self, prompts: list[list[Message]]) -> tuple:
        output = super()._generate(prompts)
        self._texts = prompts, output[3]
        return output

    def _calculate_rewards(self, inputs: list[Row], *args: list) -> Tensor:
        self._scores = super()._calculate_rewards(inputs, *args)
        align_columns(self._pending_extra_logs, self._logs["extra"], len(inputs), self._log_failures.warn_once)
        return self._scores

    def _prepare_inputs(self, generation_batch: Batch) -> Batch:
        before = self._buffered_inputs
        counts = {name: len(values) for name, values in self._metrics["train"].items()} | {"num_tokens": 0}  # a total
        inputs = super()._prepare_inputs(generation_batch)
        if self._writer is not None and self.model.training and self._buffered_inputs is not before:
            with self._log_failures.tolerated("A rollout batch could not be kept for the log"):
                self._keep_batch(counts)
        return inputs

    def _keep_batch(self, counts: dict[str, int]) -> None:
        """Keep what is logged of the rollout batch that was just made; `counts` metrics were there before it."""
        batches: Any = self._buffered_inputs
        name = self._name_of_batch()
        if self._batch is None or self._scores is None or "rollout" not in batches[0]:
            return
        trajectories = self._batch.trajectories
        first = self.accelerator.process_index * len(trajectories)
        own = slice(first, first + len(trajectories))
        metrics = {name: values[counts.get(name, 0) :] for name, values in self._metrics["train"].items()}
        self._logged_name, self._logged_ratios = name, {}
        self._logged = LoggedBatch(
            step=self.state.global_step,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            num_generations=self.num_generations,
            prompts=self._texts[0],
            completions=self._texts[1],
            trajectories=trajectories,
            rewards=[
                dict(zip(self.reward_func_names, _numbers(row), strict=True)) for row in self._scores[own].tolist()
            ],
            totals=_numbers(self._rewards[own].tolist()),
            batches=list(batches),
            metrics={name: values for name, values in metrics.items() if values},
            random=random_states(self.accelerator.device),
            number=batch_number(self),
        )

    def _name_of_batch(self) -> str:
        """Return the name of the file of the rollout batch that has just begun. Call this once for each of them."""
        step, (last, count) = self.state.global_step, self._begun
        nth = count if step == last else 0
        self._begun = step, nth + 1
        return file_name(step, self.accelerator.process_index, nth)

    def _note_ratios(self, inputs: Batch, logps: Tensor, mask: Tensor) -> None:
        """Keep the ratios of a micro-batch, shape (B, T): 1 at tokens that do not train."""
        if self._logged is not None and "rollout" in inputs:
            ratios = (logps - inputs["old_per_token_logps"]).masked_fill(mask == 0, 0.0).exp()
            self._logged_ratios[self._step % (self.args.steps_per_generation or 1)] = inputs["rollout"], ratios

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Take a step as TRL does, and log the rollout batch after its last update."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not batch_in_use(self):
            self._put_logged()
        return loss

    def _put_logged(self) -> None:
        """Write the batch whose last update is over."""
        if self._logged is not None and self._writer is not None:
            self._writer.put(self._logged_name, self._logged, list(self._logged_ratios.values()))
        self._logged, self._logged_ratios = None, {}

    # Checkpoints

    def _write_checkpoint(self, model: nn.Module, trial: object, staged: Path, target: Path) -> None:
        super()._write_checkpoint(model, trial, staged, target)  # type: ignore[misc]
        if self._logged is not None and self._writer is not None:
            with self._log_failures.tolerated("The rollout batch in use could not be kept in a checkpoint"):
                table = self._writer.table(self._logged, list(self._logged_ratios.values()))
                write(table, staged / FOLDER / self._logged_name)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self._buffered_inputs is None or not self._logs_rollouts:
            return
        for path in find_files(Path(checkpoint) / FOLDER, self.accelerator.process_index):
            self._logged, self._logged_name, self._logged_ratios = read_table(path), path.name, {}


class _RunLogCallback(TrainerCallback):
    """Starts the log once the step to resume from is known."""

    def __init__(self, trainer: RunLog) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self._trainer._begin_run_log()


def _remove_torn(table: Path) -> None:
    """Remove a table for which there was no room, so that the others can be read as one data set."""
    try:
        pq.read_schema(table)
    except (OSError, pa.ArrowException):
        with suppress(OSError):
            table.unlink(missing_ok=True)


def random_states(device: torch.device) -> dict[str, str]:
    """
    Return the state of the random number generators that an update draws from, by device, in hexadecimal.

    Args:
        device (`torch.device`):
            Where the policy is.
    """
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return {name: bytes(state.cpu().numpy()).hex() for name, state in found.items()}


def _numbers(values: list[float]) -> list[float | None]:
    """Return numbers with None for NaN."""
    return [None if value != value else value for value in values]
