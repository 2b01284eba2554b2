"""Training again from a rollout log: the batches of another run, without sampling, tools or rewards.

A batch is put back as it was when its run trained on it, with the state of the random number generators, so that the
same configuration gives the same weights to the bit.
"""

import math
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from ..errors import ConfigError, RolloutLogError
from ..trl_hooks import Run
from ..types import Batch
from .rollout_log import batch_files, check_rollouts, details, log_files, read_table, rows_of, step_of, tensors_of
from .writer import RunLog


class Replay:
    """
    The rollout batches of another run; see `replay` of [`ToolGRPOConfig`].

    Args:
        run ([`Run`]):
            The run that trains on them.
        log ([`RunLog`]):
            Its own log, which knows how files of batches are named.
        needs_values (`bool`):
            Whether the run has a critic, which learns from what the log holds.

    Raises:
        ConfigError: if the log is the one that this run is about to clear.
        RolloutLogError: if there is none.
    """

    def __init__(self, run: Run, log: RunLog, needs_values: bool) -> None:
        self._run, self._log, self._needs_values, args = run, log, needs_values, run.args
        self._folder = str(args.replay)
        self._numbered: dict[int, Path] | None = None  # files of the log by the number of their rollout batch
        files = log_files(self._folder)
        if Path(str(args.output_dir)).resolve() in (files[0].parent.resolve(), files[0].parent.parent.resolve()):
            raise ConfigError(
                f"You passed `replay={self._folder!r}`, which is `output_dir` itself: a new run clears what "
                f"an earlier one has left there.",
                remedy="Pass another `output_dir`.",
            )

    def next_batch(self) -> list[Batch]:
        """
        Return the micro-batches of the rollout batch that the logged run trained on here, and set the state of the
        random number generators. Every process must call this.

        Raises:
            RolloutLogError: if the log does not have it, or it is from a run of another shape.
            TrajectoryError: for a broken record, unless `strict_trajectories=False`.
        """
        args, accelerator = self._run.args, self._run.accelerator
        path = self._file_of_batch()
        table = read_table(path)
        table, invalid = check_rollouts(table, path, args.strict_trajectories)
        self._check_fits(table, path)
        self._log_again(table)
        place = torch.tensor(table["place"].to_pylist())
        tensors = tensors_of(table, path)
        self._check_values(tensors, path)
        if not args.strict_trajectories:
            self._mask_invalid(tensors, torch.tensor(invalid))
        batches, to = [], accelerator.device
        for rows in place.argsort().chunk(args.steps_per_generation or 1):
            batch = {name: (tensor if tensor.ndim == 0 else tensor[rows]).to(to) for name, tensor in tensors.items()}
            batches.append({**batch, "rollout": rows.to(to)})
        for device, state in details(table)["random"].items():
            found = torch.frombuffer(bytearray(bytes.fromhex(state)), dtype=torch.uint8)
            if device == "cpu":
                torch.set_rng_state(found)
            elif torch.cuda.is_available():
                torch.cuda.set_rng_state(found, accelerator.device)
        return batches

    def _mask_invalid(self, tensors: dict[str, Tensor], invalid: Tensor) -> None:
        """Take rollouts, bool, shape (N,), out of the update, and count them. Every process must call this."""

        def total(values: Tensor) -> Tensor:
            return self._run.gather_sum(values.to(self._run.accelerator.device)).cpu()

        count = total(invalid)
        if count == 0:
            return
        metrics = self._run.training_metrics["rollout/invalid"]
        metrics.append(float(count) + (metrics.pop() if metrics else 0.0))
        for name in ("completion_mask", "tool_mask", "assist_mask"):
            if name in tensors:
                tensors[name] = tensors[name].masked_fill(invalid[:, None], 0)
        mask = tensors["completion_mask"] * tensors.get("tool_mask", torch.ones((), dtype=torch.int64))
        counts = {"num_items_in_batch": mask, "assist_count": tensors.get("assist_mask", mask)}
        for name, values in counts.items():
            if name in tensors:
                tensors[name] = total(values).to(tensors[name].dtype)

    def _file_of_batch(self) -> Path:
        """Return the file of the rollout batch that begins now, by its number."""
        files = log_files(self._folder)
        path = files[0].with_name(self._log.name_of_batch())
        if self._numbered is None:
            self._numbered = batch_files(path.parent, self._run.accelerator.process_index)
        if (found := self._numbered.get(self._run.batch_number)) is not None:
            return found
        if path in files and path not in self._numbered.values():
            return path  # which cannot be read, and reading it says why
        steps = [step_of(file) for file in files]
        raise RolloutLogError(
            f"The rollout log in {path.parent} has no {path.name}, the batch of step {self._run.state.global_step}; "
            f"it holds the steps {steps[0]} to {steps[-1]}.",
            remedy="A log loses its oldest batches beyond `rollout_log_limit`; else set `max_steps`, "
            "`steps_per_generation`, `num_iterations` and the number of processes as in the run that wrote it "
            f"({path.parent.parent / 'run.json'}).",
        )

    def _check_fits(self, table: pa.Table, path: Path) -> None:
        """Raise where the batch is not from a run like this one."""
        found, micro_batches = details(table, path), self._run.args.steps_per_generation or 1
        vocabulary = self._run.bare_model.config.get_text_config().vocab_size
        largest = max((max(ids.as_py(), default=0) for ids in table["completion_ids"]), default=0)
        pairs = {
            "processes": (found["processes"], self._run.accelerator.num_processes),
            "micro-batches": (found["micro_batches"], micro_batches),
            "rollouts": (table.num_rows, self._run.args.per_device_train_batch_size * micro_batches),
        }
        wrong = [f"{name}: {theirs} there, {ours} here" for name, (theirs, ours) in pairs.items() if theirs != ours]
        if largest >= vocabulary:
            wrong.append(f"a token id of {largest} there, a vocabulary of {vocabulary} here")
        if wrong:
            raise RolloutLogError(
                f"{path} was written by a run of another shape ({'; '.join(wrong)}).",
                remedy=f"Replay with the model and the batch sizes it was written with; "
                f"{path.parent.parent / 'run.json'} names them.",
            )

    def _check_values(self, tensors: dict[str, Tensor], path: Path) -> None:
        """Raise where the advantages of a batch need a critic and this run has none, or the other way round."""
        if "assist_mask" not in tensors and ("value_targets" in tensors) != self._needs_values:
            theirs, ours = ("a critic", "none") if not self._needs_values else ("no critic", "one")
            raise RolloutLogError(
                f"{path} was written by a run with {theirs}, and this run has {ours}.",
                remedy="Replay with the `advantage_estimator` it was written with; "
                f"{path.parent.parent / 'run.json'} names it.",
            )

    def _log_again(self, table: pa.Table) -> None:
        """Log the metrics and conversations of the batch as its run did."""
        metrics = self._run.training_metrics
        for name, values in details(table)["metrics"].items():
            if name == "num_tokens":
                metrics[name] = values
                self._run.state.num_input_tokens_seen = int(values[-1])
            else:
                metrics[name].extend(values)
        if not self._run.log_completions:
            return
        logs = self._run.completions_table
        for row in rows_of(table):
            logs["prompt"].append(row["prompt"])
            logs["completion"].append(row["messages"])
            logs["advantages"].append(sum(row["advantages"]) / max(len(row["advantages"]), 1))
            for name in self._run.reward_func_names:
                reward = row["rewards"].get(name)
                logs["rewards"][name].append(math.nan if reward is None else reward)
