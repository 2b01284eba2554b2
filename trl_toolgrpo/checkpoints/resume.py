"""Exact resuming: what a checkpoint holds in addition to TRL's, when it is whole, and which run it belongs to.

A mixin of the trainer: the place in the rollout batch, the batch itself and the figures not yet logged. The folders
are those of `folder.py`, the description of a run is that of `run_identity.py`.
"""

import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, save_fsdp_model, save_fsdp_optimizer
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers.trainer import SCHEDULER_NAME, get_fsdp_ckpt_kwargs
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer

from ..config.batch_position import batch_in_use, micro_batches_of
from ..config.fields import ToolGRPOConfig
from ..errors import CheckpointError, CheckpointSaveError
from ..reference.adapter import SyncReport
from ..run_folder.files import RUN
from ..run_folder.storage_failures import attempt, raised_in_every_process, tolerated
from ..types import Batch, JSONObject
from ..update.ratio_statistics import RatioStatistics
from .folder import (
    PREFIX,
    PROGRESS,
    UNFINISHED,
    check_parts,
    check_shared,
    check_whole,
    check_writable,
    checkpoints,
    clear_away,
    find_checkpoint,
    publish,
    put_back,
    set_aside,
)
from .run_identity import IDENTITY, describe_run, differences, identity_file, matching_batch_sizes


logger = logging.getLogger(__name__)

# What is restored even if the rollout batch is divided over another number of processes
_ALWAYS_RESUMED = ("step", "carried", "packs", "unmoved")


class ExactResume(GRPOTrainer):
    """Part of [`ToolGRPOTrainer`]: whole checkpoints, from which a run resumes as if it had not been interrupted."""

    args: ToolGRPOConfig
    _ratio: RatioStatistics
    _carried: dict[str, float]
    _forced_shares: list[float]
    _packs: bool | None
    _unmoved: bool
    _sync_report: SyncReport | None
    _run: JSONObject  # description of this run
    _source: JSONObject | None = None  # that of the run that wrote the checkpoint
    _staging: Path | None = None  # where a checkpoint is being written
    _push_later = False
    _rescue: Callable[[], str]  # of `hub/push.py`
    _goes_on: bool  # of `hub/push.py`
    _uploading: set[Path]  # of `hub/push.py`
    _buffered_inputs: Any
    _train_sampler: Any = None
    _unlogged: tuple[Tensor, int] | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        Train as TRL does. A run that is resumed continues exactly where its checkpoint was written, in the middle of a
        rollout batch too; a new run first moves all that an earlier one has left in `output_dir` to a folder
        `earlier-run-1` there.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Checkpoint folder; `True` for the newest whole one in `output_dir`. Torn ones are skipped by name.
            args, kwargs:
                As in [`~transformers.Trainer.train`].

        Raises:
            CheckpointError: if there is no whole checkpoint, or it belongs to another model, adapter, data set or
                batch, or to another number of processes in the middle of a rollout batch; the message says what
                differs.
            CheckpointSaveError: if the output folder cannot be written to, is not shared by the machines that take
                part, or does not take the last checkpoint; if the files of an earlier run cannot be moved.
        """
        self._run = describe_run(self.args, self.accelerator.unwrap_model(self.model), self.train_dataset)
        self._source = self._unlogged = None
        output_dir = Path(str(self.args.output_dir))
        if self.args.save_strategy != "no":
            with raised_in_every_process():
                if self.args.should_save:
                    check_writable(output_dir)
            if self.accelerator.num_processes > 1:
                check_shared(output_dir, self.accelerator.is_main_process)
        if resume_from_checkpoint:
            resume_from_checkpoint = self._whole_checkpoint(resume_from_checkpoint)
            self._check_same_run(Path(resume_from_checkpoint))
            folder = Path(resume_from_checkpoint)
            # A checkpoint may be a link to another disk, or be given by one
            self._goes_on = output_dir.resolve() in (folder.parent.resolve(), folder.resolve().parent)
        else:  # a new run begins with a rollout batch, also where this trainer has trained before
            self._step, self._buffered_inputs, self._goes_on = 0, None, False
        if not self._goes_on:
            self._set_aside_earlier_run(resumed=bool(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _set_aside_earlier_run(self, resumed: bool) -> None:
        adapters = getattr(self.accelerator.unwrap_model(self.model), "peft_config", {}).values()
        base = next((str(adapter.base_model_name_or_path) for adapter in adapters), None)
        output_dir, folder = Path(str(self.args.output_dir)), None
        # Where a run is resumed from elsewhere, logs alone are those of its checkpoint, which it adds to
        another = not resumed or bool(checkpoints(output_dir)) or (output_dir / RUN).exists()
        with raised_in_every_process():
            try:
                if self.args.should_save and another:
                    folder = set_aside(output_dir, None if base is None else Path(base))
                    if self.log_completions:  # where TRL has made a folder for them
                        (output_dir / "completions").mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointSaveError(
                    f"`output_dir` ({self.args.output_dir}) has files of an earlier run, which cannot be moved out of "
                    f"the way: {error}.",
                    remedy="Pass another `output_dir`.",
                ) from error
        if folder is not None:
            logger.warning(
                "A new run begins: the files of an earlier one in `output_dir` are now in %s (%s). Remove that folder "
                "when it is not needed.",
                folder,
                ", ".join(sorted(path.name for path in folder.iterdir())),
            )

    # Which checkpoint

    def _whole_checkpoint(self, wanted: str | bool) -> str:
        """Return the checkpoint to resume from; the main process looks, so that all take the same."""
        folder = None
        with raised_in_every_process():
            if self.accelerator.is_main_process:
                folder = find_checkpoint(str(self.args.output_dir)) if isinstance(wanted, bool) else wanted
                if folder is None:
                    raise CheckpointError(
                        "You passed `resume_from_checkpoint=True`. No valid checkpoint found in output directory "
                        f"({self.args.output_dir}).",
                        remedy="Leave it out to start from the beginning.",
                    )
                check_whole(folder)
        return broadcast_object_list([str(folder)])[0]

    def _check_same_run(self, folder: Path) -> None:
        if not identity_file(folder).is_file():
            logger.warning(
                "%s was not written by this trainer: the rollout batch it was in the middle of, if any, is lost.",
                folder,
            )
            return
        source = self._source = json.loads(identity_file(folder).read_text(encoding="utf-8"))
        sections = ("model", "adapter", "dataset", "batch")
        pairs = ((section, source[section], self._run[section]) for section in sections)
        found = [f"{section}: {text}" for section, theirs, ours in pairs for text in differences(theirs, ours)]
        if found:
            same = [f"`{name}={value}`" for name, value in matching_batch_sizes(source, self.args).items()]
            hint = f" Here {', '.join(same)} make batches of its size." if same else ""
            raise CheckpointError(
                f"You resume from {folder}, which belongs to another run. {'; '.join(found)}.",
                remedy="Resume with what it was written with, or start a new run from its weights in another "
                f"`output_dir`.{hint}",
            )
        found = list(differences(source["layout"], self._run["layout"]))
        if self.is_deepspeed_enabled and source["layout"]["processes"] != self.args.world_size:
            raise CheckpointError(
                f"You resume from {folder} with DeepSpeed, whose optimizer states are divided over "
                f"{source['layout']['processes']} processes, in {self.args.world_size}.",
                remedy="Resume with as many, or start a new run from its weights in another `output_dir`.",
            )
        if source["only_model"]:
            logger.warning(
                "%s was written with `save_only_model=True`: optimizer, learning rate schedule and random numbers "
                "begin anew, so that the run is not resumed exactly.",
                folder,
            )
        if found and source["in_batch"]:
            steps = self._run["batch"]["optimizer steps per rollout batch"]
            raise CheckpointError(
                f"You resume from {folder}, which was written in the middle of a rollout batch, with another "
                f"division of it. {'; '.join(found)}.",
                remedy="Resume with the same, or from a checkpoint at the end of a rollout batch: their steps are "
                f"multiples of {steps:g}.",
            )
        if found:
            logger.warning("Resumed with another layout, which is not exact to the bit. %s.", "; ".join(found))

    # Saving

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Write TRL's checkpoint and what exact resuming needs, and publish it when all of it is on disk."""
        run_dir = Path(self._get_output_dir(trial))
        target = run_dir / f"{PREFIX}{self.state.global_step}"
        best = self.state.best_model_checkpoint
        self._staging, self._push_later = run_dir / UNFINISHED, False
        staged = self._staging / target.name
        parts = (
            lambda: self._make_room(run_dir),
            lambda: staged.mkdir(parents=True, exist_ok=True),
            lambda: self._write_checkpoint(model, trial, staged, target),
            lambda: self._publish_checkpoint(staged, target),
        )
        try:
            problems = next(filter(None, map(attempt, parts)), [])
        finally:
            self._staging = None
        if problems:
            self.state.best_model_checkpoint = best
            return self._report_unsaved(target, problems[0])
        if self.args.should_save:
            kept = {target, *([Path(self.state.best_model_checkpoint)] if self.state.best_model_checkpoint else [])}
            try:
                clear_away(run_dir, self.args.save_total_limit, kept | self._uploading)
            except OSError as error:
                logger.warning("Checkpoints beyond `save_total_limit` could not be removed: %s.", error)
        if self._push_later:
            super()._push_from_checkpoint(str(target))

    def _make_room(self, run_dir: Path) -> None:
        if self.args.should_save:
            put_back(run_dir)
            shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)

    def _publish_checkpoint(self, staged: Path, target: Path) -> None:
        if self.args.should_save:
            check_parts(staged, self.accelerator.num_processes)
            publish(staged, target)

    def _write_checkpoint(self, model: nn.Module, trial: object, staged: Path, target: Path) -> None:
        with self._deepspeed_tolerated(staged):
            super()._save_checkpoint(model, trial)
        tensors, record = self._progress()
        file = staged / PROGRESS.format(self.accelerator.process_index)
        save_file(tensors, file, {"progress": json.dumps(record)})
        if not self.args.should_save:
            return
        about = {**self._run, "in_batch": batch_in_use(self), "only_model": self.args.save_only_model}
        (staged / IDENTITY).write_text(json.dumps(about, indent=1), encoding="utf-8")
        if self.state.best_model_checkpoint == str(staged):  # TRL looked for it where it is written
            self.state.best_model_checkpoint = str(target)
            self.state.save_to_json(str(staged / "trainer_state.json"))

    @contextmanager
    def _deepspeed_tolerated(self, staged: Path) -> Iterator[None]:
        """
        Tolerate refused writes of DeepSpeed's engine, which writes between collectives, on this run's engine. The
        file `latest`, which its first process writes while the others wait, is written after all of that.
        """
        if not self.is_deepspeed_enabled:
            yield
            return
        engine: Any = self.model_wrapped
        writers = [(engine.checkpoint_engine, "save"), (engine.checkpoint_engine, "makedirs")]
        with ExitStack() as stack:
            engine.save_checkpoint = partial(engine.save_checkpoint, save_latest=False)
            stack.callback(delattr, engine, "save_checkpoint")
            for owner, name in [*writers, (engine, "_copy_recovery_script")]:
                setattr(owner, name, tolerated()(getattr(owner, name)))
                stack.callback(delattr, owner, name)
            yield
        if self.args.should_save and not self.args.save_only_model:
            (staged / "latest").write_text(f"global_step{engine.global_steps}", encoding="utf-8")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:  # see above
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if not self.is_fsdp_enabled:
            with tolerated():
                super()._save_optimizer_and_scheduler(output_dir)
            return
        # TRL's calls for FSDP: each gathers from all processes first, then writes
        plugin = self.accelerator.state.fsdp_plugin
        with tolerated():
            save_fsdp_model(plugin, self.accelerator, self.model, output_dir, **get_fsdp_ckpt_kwargs())
        with tolerated():
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        scheduler: Any = self.lr_scheduler
        if self.args.should_save:
            with tolerated():
                torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_scaler(self, output_dir: str) -> None:
        with tolerated():
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        with tolerated():
            super()._save_rng_state(output_dir)

    def _report_unsaved(self, target: Path, problem: str) -> None:
        """Log that a checkpoint could not be written; raise at the end of the run, when no later one can be."""
        if self.args.should_save:
            with suppress(OSError):
                put_back(target.parent)
            shutil.rmtree(target.parent / UNFINISHED, ignore_errors=True)
        free = shutil.disk_usage(target.parent).free / 2**20
        fault = f"{target} could not be written: {problem}. Checkpoints that were there before are still valid."
        remedy = f"Free space on the disk, which has {free:.0f} MiB left, or make {target.parent} writable."
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            again = "Run again with `resume_from_checkpoint=True`: the run resumes from its last checkpoint."
            raise CheckpointSaveError(fault, remedy=f"{remedy} {self._rescue()} {again}")
        logger.error("%s %s The run goes on, and tries again at the next checkpoint.", fault, remedy)

    def _get_output_dir(self, trial: object) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:  # it is uploaded in the background, from where it will stay
            self._push_later = True

    # Progress

    def _progress(self) -> tuple[dict[str, Tensor], JSONObject]:
        """Return tensors and plain values that say where this process is in the run."""
        tensors = {f"ratio/{name}": tensor for name, tensor in self._ratio.state().items()}
        tensors["loss"] = self._tr_loss
        batches: list[Batch] = []
        for index, batch in enumerate(self._buffered_inputs or () if batch_in_use(self) else ()):
            batches.append({name: value for name, value in batch.items() if not isinstance(value, Tensor)})
            tensors |= {f"batch/{index}/{name}": value for name, value in batch.items() if isinstance(value, Tensor)}
        record = {
            **{name: getattr(self, f"_{name}") for name in (*_ALWAYS_RESUMED, "forced_shares")},
            "batches": batches,
            "metrics": self._metrics["train"],
            "last_logged": self._globalstep_last_logged,
            "sync_report": asdict(self._sync_report) if self._sync_report is not None else None,
        }
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, record

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._buffered_inputs = None
        self._step = self.state.global_step * self.args.gradient_accumulation_steps  # TRL's checkpoints say no more
        if self._source is None:
            return
        same = self._source["layout"] == self._run["layout"]
        file = Path(checkpoint) / PROGRESS.format(self.accelerator.process_index if same else 0)
        with safe_open(file, "pt") as stored:
            record = json.loads((stored.metadata() or {})["progress"])
            tensors = {name: stored.get_tensor(name).to(self.accelerator.device) for name in stored.keys()}  # noqa: SIM118
        for name in _ALWAYS_RESUMED:
            setattr(self, f"_{name}", record[name])
        report = record["sync_report"]
        self._sync_report = None if report is None else SyncReport(**report)
        if not same:  # between two rollout batches, of which there were as many
            passes = (self._source["layout"]["steps_per_generation"] or 1) * self._source["batch"]["num_iterations"]
            self._step = self._step // passes * micro_batches_of(self.args)
            return
        self._metrics["train"] = defaultdict(list, record["metrics"])
        self._forced_shares = record["forced_shares"]
        self._ratio.load({n.removeprefix("ratio/"): t for n, t in tensors.items() if n.startswith("ratio/")})
        self._unlogged = tensors["loss"], record["last_logged"]
        if record["batches"]:
            self._buffered_inputs = record["batches"]
            for name, tensor in tensors.items():
                if name.startswith("batch/"):
                    _, index, key = name.split("/", 2)
                    self._buffered_inputs[int(index)][key] = tensor

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run TRL's epoch, with the loss that a resumed run had not logged yet; none where no step is left."""
        if self.state.global_step >= self.state.max_steps:  # transformers would make one step more
            logger.warning(
                "All %d steps of this run have been taken: nothing is trained. Raise `max_steps` or "
                "`num_train_epochs` to train further.",
                self.state.max_steps,
            )
            self.control.should_training_stop = True
            return
        if self._unlogged is not None:
            loss, self._globalstep_last_logged = self._unlogged
            self._tr_loss, self._unlogged = self._tr_loss + loss, None
        super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Return TRL's state, with the order of the data that of the resumed epoch: each epoch draws a new one."""
        epochs, micro_batches = super()._init_training_state(*args, **kwargs)
        generator = getattr(self._train_sampler, "generator", None)
        if generator is not None:
            for _ in range(epochs):
                torch.randperm(self._train_sampler.num_samples, generator=generator)
        return epochs, micro_batches
