"""What a run writes to its output folder while it goes on: its start, its metrics and its rollouts.

A rollout batch is written once its last update is over, on a thread of its own, so that training does not wait for
the disk.
"""

import logging
import os
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import Trainer
from trl.trainer.utils import get_config_model_id

from ..redaction import SECRET, Redactor, loggers_of, redact_logs, secret_variables
from ..rollout.rollouts import Rollouts
from ..trl_hooks import Run
from ..types import Batch, JSONObject
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


class RunLog:
    """
    What a run writes to its output folder; see `rollout_log_limit` of [`ToolGRPOConfig`].

    Args:
        run ([`Run`]):
            The run.
        rollouts ([`Rollouts`]):
            Its rollouts, which get the run's [`Redactor`], too.
        failures ([`LogFailures`]):
            Keeps what cannot be written from ending the run.
    """

    def __init__(self, run: Run, rollouts: Rollouts, failures: LogFailures) -> None:
        self._run, self._rollouts, self._failures = run, rollouts, failures
        self.folder: Path | None = None  # where this run is logged, once it has begun
        self._run_file: os.stat_result | None = None  # the `run.json` it began with
        self._full: set[str] = set()  # files there that could not be written to
        self._writer: RolloutWriter | None = None
        self._started = 0.0  # by the monotonic clock
        self._logged: LoggedBatch | pa.Table | None = None  # the batch in use
        self._name = ""  # of its file
        self._begun = (-1, 0)  # an optimizer step, and the number of rollout batches that have begun in it
        self._ratios: dict[int, tuple[Tensor, Tensor]] = {}  # by micro-batch
        self.redactor = Redactor()
        self._update_redactor()

    # Secrets

    def current_redactor(self) -> Redactor:
        """Return what keeps out the secrets of the run as they are now."""
        return run_redactor(self._run.args, self._rollouts.tools.servers.values())

    def _update_redactor(self) -> None:
        """Find the secrets of the run as they are now, and keep them out of the lines that this package logs."""
        self.redactor = self.current_redactor()
        redact_logs(loggers_of(__name__.partition(".")[0]), self.redactor)
        self._rollouts.redactor = self.redactor

    # A run from start to end

    def owns_folder(self) -> bool:
        """Return whether no other run has begun in the output folder since this one did, judging by `run.json`."""
        if self.folder is None or self._run_file is None:
            return True
        try:
            return os.path.samestat(self._run_file, os.stat(self.folder / RUN))
        except OSError:
            return True

    @property
    def logs_rollouts(self) -> bool:
        """Whether rollout batches are written; those that are replayed are logged already."""
        args = self._run.args
        return self._run.recording and args.rollout_log_limit > 0 and args.replay is None

    @contextmanager
    def of_training(self) -> Iterator[None]:
        """
        Log a training while open; when it ends, in whatever way, what was logged is on disk.

        Raises:
            OutputFolderInUseError: if another run writes to `output_dir`.
        """
        args = self._run.args
        with raised_in_every_process():
            lock = take_lock(Path(str(args.output_dir))) if args.should_save else None
        self._logged = self.folder = self._run_file = None
        self._full, self._begun, self._started = set(), (-1, 0), time.monotonic()
        with lock or nullcontext():
            try:
                yield
            finally:
                self._put_logged()
                if self._writer is not None:
                    self._writer.close()
                    self._writer = None

    def start_time(self) -> float:
        """Return when training began, as `time.time` would have it by the monotonic clock, which nobody sets."""
        return time.time() - (time.monotonic() - self._started)

    def on_train_begin(self) -> None:
        """Start the log, or cut it back to where the run is resumed."""
        run, args = self._run, self._run.args
        folder, step = Path(str(args.output_dir)), run.state.global_step
        self._update_redactor()
        try:
            if run.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                if step > 0:  # what a resumed run will do again
                    for path in find_files(folder / FOLDER):
                        if step_of(path) >= step:
                            path.unlink()
                    for file in (METRICS, HEALTH):
                        cut_back(folder / file, step)
                name = get_config_model_id(run.bare_model.config)
                tools = [tool.name for tool in self._rollouts.tools.toolset.known]
                write_json(folder / RUN, describe_start(args, name, run.reward_func_names, tools, self.redactor))
                if hidden := ", ".join(secret_variables(os.environ)):
                    logger.warning(
                        "The values of these environment variables are replaced by %s in logs: %s.", SECRET, hidden
                    )
                self._run_file = os.stat(folder / RUN)
            self.folder = folder
        except OSError as error:
            logger.warning("Nothing is logged in `output_dir` (%s): %s.", folder, error)
        run.accelerator.wait_for_everyone()
        if self.logs_rollouts and self.folder is not None:
            process, limit = run.accelerator.process_index, args.rollout_log_limit * 2**20
            limit /= run.accelerator.num_processes
            self._writer = RolloutWriter(folder / FOLDER, process, limit, self.redactor, self._failures)

    # Metrics

    @contextmanager
    def of_log(self) -> Iterator[None]:
        """
        Have TRL log while open; its table of completions holds only what can be stored, and no secret. If the table
        still cannot be printed, stored or sent, the run goes on.
        """
        run = self._run
        kept, entries = run.completions_table, len(run.state.log_history)
        if run.log_completions and run.is_main_process:
            with self._failures.tolerated("The completions of a step could not be prepared for their table"):
                run.completions_table = storable_logs(kept, self.redactor)
        try:
            yield
        except Exception as error:
            inside = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
            if len(run.state.log_history) == entries or Trainer.log.__code__ in inside:  # of figures or a callback
                raise
            self._failures.warn("The completions of a step could not be shown or stored", error)
            if isinstance(error, OSError):
                table = f"completions_{run.state.global_step:05d}.parquet"
                _remove_torn(Path(str(run.args.output_dir)) / "completions" / table)
        finally:
            run.completions_table = kept
        if self.folder is not None and run.is_main_process:
            entry = run.state.log_history[-1]
            self.add_line(METRICS, {"step": entry["step"], "time": time.time(), **entry})

    def add_line(self, name: str, record: JSONObject) -> None:
        """Add a line to a file of the run. Where the disk refuses, the file ends there and the run goes on."""
        if self.folder is None or name in self._full or not self.owns_folder():
            return
        try:
            add_line(self.folder / name, record)
        except OSError as error:
            self._full.add(name)
            logger.warning("Nothing more is added to %s, which could not be written to: %s.", name, error)
        except Exception as error:
            self._failures.warn(f"A line could not be added to {name}", error)

    # Rollouts

    def counts(self) -> dict[str, int]:
        """Return how many values of each metric there are, before a rollout batch is made."""
        found = {name: len(values) for name, values in self._run.training_metrics.items()}
        return found | {"num_tokens": 0}  # a total

    def on_rewards(self, count: int) -> None:
        """Align the columns that reward functions have added to the table of `count` completions."""
        run = self._run
        align_columns(run.pending_columns, run.completions_table["extra"], count, self._failures.warn_once)

    def on_batch(self, counts: dict[str, int]) -> None:
        """Keep what is logged of the rollout batch that was just split; `counts` metrics were there before it."""
        if self._writer is not None:
            with self._failures.tolerated("A rollout batch could not be kept for the log"):
                self._keep_batch(counts)

    def _keep_batch(self, counts: dict[str, int]) -> None:
        run, batch = self._run, self._rollouts.batch
        micro_batches = list(run.micro_batches or ())
        name = self.name_of_batch()
        if batch is None or batch.rewards is None or "rollout" not in micro_batches[0]:
            return
        metrics = {name: values[counts.get(name, 0) :] for name, values in run.training_metrics.items()}
        self._name, self._ratios = name, {}
        scores = batch.rewards.scores[batch.rewards.own].tolist()
        self._logged = LoggedBatch(
            step=run.state.global_step,
            process=run.accelerator.process_index,
            processes=run.accelerator.num_processes,
            num_generations=run.num_generations,
            prompts=batch.prompts,
            completions=batch.completions,
            trajectories=batch.trajectories,
            rewards=[dict(zip(run.reward_func_names, _numbers(row), strict=True)) for row in scores],
            totals=_numbers(batch.rewards.own_totals.tolist()),
            batches=micro_batches,
            metrics={name: values for name, values in metrics.items() if values},
            random=random_states(run.accelerator.device),
            number=run.batch_number,
        )

    def name_of_batch(self) -> str:
        """Return the name of the file of the rollout batch that has just begun. Call this once for each of them."""
        step, (last, count) = self._run.state.global_step, self._begun
        nth = count if step == last else 0
        self._begun = step, nth + 1
        return file_name(step, self._run.accelerator.process_index, nth)

    def on_update(self, inputs: Batch, logps: Tensor, mask: Tensor) -> None:
        """Keep the ratios of a micro-batch, shape (B, T): 1 at tokens that do not train."""
        if self._logged is not None and "rollout" in inputs:
            ratios = (logps - inputs["old_per_token_logps"]).masked_fill(mask == 0, 0.0).exp()
            self._ratios[self._run.micro_batch_index] = inputs["rollout"], ratios

    def after_micro_batch(self) -> None:
        """Write the rollout batch if its last update is over."""
        if not self._run.batch_in_use:
            self._put_logged()

    def _put_logged(self) -> None:
        if self._logged is not None and self._writer is not None:
            self._writer.put(self._name, self._logged, list(self._ratios.values()))
        self._logged, self._ratios = None, {}

    # Checkpoints

    def save(self, folder: Path) -> None:
        """Write the rollout batch in use into a checkpoint."""
        if self._logged is not None and self._writer is not None:
            with self._failures.tolerated("The rollout batch in use could not be kept in a checkpoint"):
                table = self._writer.table(self._logged, list(self._ratios.values()))
                write(table, folder / FOLDER / self._name)

    def load(self, folder: str | Path) -> None:
        """Read the rollout batch in use from a checkpoint."""
        if self._run.micro_batches is None or not self.logs_rollouts:
            return
        for path in find_files(Path(folder) / FOLDER, self._run.accelerator.process_index):
            self._logged, self._name, self._ratios = read_table(path), path.name, {}


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
