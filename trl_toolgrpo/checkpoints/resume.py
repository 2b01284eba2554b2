"""Exact resuming: what a checkpoint holds in addition to TRL's, when it is whole, and which run it belongs to.

Each part that must survive a restart has `state_dict` and `load_state_dict`; nothing here knows what is in them. The
folders are those of `folder.py`, the description of a run is that of `run_identity.py`.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate.utils import broadcast_object_list, save_fsdp_model, save_fsdp_optimizer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer import SCHEDULER_NAME, get_fsdp_ckpt_kwargs

from ..config.batch_position import micro_batches_of
from ..errors import CheckpointError, CheckpointSaveError, ConfigError
from ..run_folder.files import RUN
from ..run_folder.storage_failures import attempt, raised_in_every_process, tolerated
from ..trl_hooks import Run
from ..types import JSONObject
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


@runtime_checkable
class Stateful(Protocol):
    """A part with a state that a checkpoint keeps: tensors and JSON data, nested in dicts and lists."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Continue from a state."""
        ...


class Checkpoints:
    """
    The checkpoints of a run: whole ones, from which it resumes as if it had not been interrupted.

    Args:
        run ([`Run`]):
            The run, whose place in the rollout batch is one of the states kept.
        of_run (`Mapping[str, Stateful]`):
            Parts whose state is the same in every process, and is restored whatever their number.
        of_process (`Mapping[str, Stateful]`):
            Parts whose state belongs to one process, and is restored if the rollout batch is divided in the same way.
        given (`Mapping[str, object]`, *optional*):
            What the user has passed. Its state is one of a process, if it has any; it begins anew where a checkpoint
            has none of an object of its class. `nn.Module`s are left out.

    Raises:
        ConfigError: if a state is not made of dicts with text keys, lists, plain values and tensors.
    """

    def __init__(
        self,
        run: Run,
        of_run: Mapping[str, Stateful],
        of_process: Mapping[str, Stateful],
        given: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        self._run, self._of_run, self._of_process = run, dict(of_run), {"place": run, **of_process}
        # A model is no state of a run: it would be written by every process, in every checkpoint
        self._given: dict[str, Stateful] = {
            f"{name} {type(thing).__module__}:{type(thing).__qualname__}": thing
            for name, thing in given.items()
            if isinstance(thing, Stateful) and not isinstance(thing, nn.Module)
        }
        for name, thing in self._given.items():
            _without_tensors(thing.state_dict(), (name,), {})
        self.continues_folder = False  # the run was resumed from a checkpoint in this output folder
        self._identity: JSONObject = {}  # description of this run
        self._source: JSONObject | None = None  # that of the run that wrote the checkpoint
        self.staging: Path | None = None  # where a checkpoint is being written
        self._push_is_asked = False

    # The start of a training

    def begin(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """
        Begin a training; return the checkpoint that it is resumed from.

        A new run first moves all that an earlier one has left in `output_dir` to a folder `earlier-run-1` there.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Checkpoint folder; `True` for the newest whole one in `output_dir`. Torn ones are skipped by name.

        Raises:
            CheckpointError: if there is no whole checkpoint, or it belongs to another run, or another version of this
                package wrote it in another form; the message says what differs.
            CheckpointSaveError: if the output folder cannot be written to, or is not shared by the machines that take
                part; if the files of an earlier run cannot be moved.
        """
        run, args = self._run, self._run.args
        self._identity = describe_run(args, run.bare_model, run.train_dataset)
        self._source = None
        output_dir = Path(str(args.output_dir))
        if args.save_strategy != "no":
            with raised_in_every_process():
                if args.should_save:
                    check_writable(output_dir)
            if run.accelerator.num_processes > 1:
                check_shared(output_dir, run.is_main_process)
        folder = None
        run.forget_unlogged_loss()
        if resume_from_checkpoint:
            folder = self._whole_checkpoint(resume_from_checkpoint)
            self._check_same_run(folder)
            # A checkpoint may be a link to another disk, or be given by one
            self.continues_folder = output_dir.resolve() in (folder.parent.resolve(), folder.resolve().parent)
        else:
            run.forget_place()
            self.continues_folder = False
        if not self.continues_folder:
            self._set_aside_earlier_run(resumed=folder is not None)
        return None if folder is None else str(folder)

    def _set_aside_earlier_run(self, resumed: bool) -> None:
        adapters = getattr(self._run.bare_model, "peft_config", {}).values()
        base = next((str(adapter.base_model_name_or_path) for adapter in adapters), None)
        output_dir, folder = Path(str(self._run.args.output_dir)), None
        # Where a run is resumed from elsewhere, logs alone are those of its checkpoint, which it adds to
        another = not resumed or bool(checkpoints(output_dir)) or (output_dir / RUN).exists()
        with raised_in_every_process():
            try:
                if self._run.args.should_save and another:
                    folder = set_aside(output_dir, None if base is None else Path(base))
                    if self._run.log_completions:  # where TRL has made a folder for them
                        (output_dir / "completions").mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointSaveError(
                    f"`output_dir` ({self._run.args.output_dir}) has files of an earlier run, which cannot be moved "
                    f"out of the way: {error}.",
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

    def _whole_checkpoint(self, wanted: str | bool) -> Path:
        """Return the checkpoint to resume from; the main process looks, so that all take the same."""
        folder = None
        with raised_in_every_process():
            if self._run.is_main_process:
                folder = find_checkpoint(str(self._run.args.output_dir)) if isinstance(wanted, bool) else wanted
                if folder is None:
                    raise CheckpointError(
                        "You passed `resume_from_checkpoint=True`. No valid checkpoint found in output directory "
                        f"({self._run.args.output_dir}).",
                        remedy="Leave it out to start from the beginning.",
                    )
                check_whole(folder)
        return Path(broadcast_object_list([str(folder)])[0])

    def _check_same_run(self, folder: Path) -> None:
        if not identity_file(folder).is_file():
            logger.warning(
                "%s was not written by this trainer: the rollout batch it was in the middle of, if any, is lost.",
                folder,
            )
            return
        self._check_form(folder)
        source = self._source = json.loads(identity_file(folder).read_text(encoding="utf-8"))
        sections = ("model", "adapter", "dataset", "batch")
        pairs = ((section, source[section], self._identity[section]) for section in sections)
        found = [f"{section}: {text}" for section, theirs, ours in pairs for text in differences(theirs, ours)]
        if found:
            same = [f"`{name}={value}`" for name, value in matching_batch_sizes(source, self._run.args).items()]
            hint = f" Here {', '.join(same)} make batches of its size." if same else ""
            raise CheckpointError(
                f"You resume from {folder}, which belongs to another run. {'; '.join(found)}.",
                remedy="Resume with what it was written with, or start a new run from its weights in another "
                f"`output_dir`.{hint}",
            )
        found = list(differences(source["layout"], self._identity["layout"]))
        if self._run.is_deepspeed_enabled and source["layout"]["processes"] != self._run.args.world_size:
            raise CheckpointError(
                f"You resume from {folder} with DeepSpeed, whose optimizer states are divided over "
                f"{source['layout']['processes']} processes, in {self._run.args.world_size}.",
                remedy="Resume with as many, or start a new run from its weights in another `output_dir`.",
            )
        if source["only_model"]:
            logger.warning(
                "%s was written with `save_only_model=True`: optimizer, learning rate schedule and random numbers "
                "begin anew, so that the run is not resumed exactly.",
                folder,
            )
        if found and source["in_batch"]:
            steps = self._identity["batch"]["optimizer steps per rollout batch"]
            raise CheckpointError(
                f"You resume from {folder}, which was written in the middle of a rollout batch, with another "
                f"division of it. {'; '.join(found)}.",
                remedy="Resume with the same, or from a checkpoint at the end of a rollout batch: their steps are "
                f"multiples of {steps:g}.",
            )
        if found:
            logger.warning("Resumed with another layout, which is not exact to the bit. %s.", "; ".join(found))

    def _check_form(self, folder: Path) -> None:
        """Raise if a checkpoint does not hold a state for each part of this run."""
        file = folder / PROGRESS.format(0)
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata() or {}
        states = json.loads(metadata.get("states", "{}"))
        if json.loads(metadata.get("progress", "{}")).keys() >= _FLAT_FORM:
            states = dict.fromkeys(_PARTS_OF_FLAT_FORM)
        missing = [name for name in self._of_run | self._of_process if name not in states]
        if missing:
            raise CheckpointError(
                f"You resume from {folder}, which another version of trl_toolgrpo wrote in another form: {file.name} "
                f"has no state of {', '.join(missing)}.",
                remedy="Resume with that version, or start a new run from its weights in another `output_dir`.",
            )

    # Saving

    def save(
        self,
        write: Callable[[], None],
        trial: object,
        *,
        also: Callable[[Path], None],
        keep: set[Path],
        rescue: Callable[[], str],
    ) -> Path | None:
        """
        Write TRL's checkpoint and what exact resuming needs, and publish it when all of it is on disk.

        Args:
            write (`Callable`):
                Writes TRL's.
            trial (`object`):
                As in [`~transformers.Trainer`].
            also (`Callable`):
                Writes more into a folder.
            keep (`set[Path]`):
                Checkpoints that must not be removed now.
            rescue (`Callable`):
                Writes the model elsewhere where the last checkpoint cannot be, and says what came of it.

        Returns:
            `Path` or `None`: the checkpoint, if a push was asked for while it was written.

        Raises:
            CheckpointSaveError: if the last checkpoint of a run cannot be written.
        """
        run, args = self._run, self._run.args
        run_dir = Path(run.output_folder(trial))
        target = run_dir / f"{PREFIX}{run.state.global_step}"
        best = run.state.best_model_checkpoint
        self.staging, self._push_is_asked = run_dir / UNFINISHED, False
        staged = self.staging / target.name
        parts = (
            lambda: self._make_room(run_dir),
            lambda: staged.mkdir(parents=True, exist_ok=True),
            lambda: self._write(write, staged, target),
            lambda: also(staged),
            lambda: self._publish(staged, target),
        )
        try:
            problems = next(filter(None, map(attempt, parts)), [])
        finally:
            self.staging = None
        if problems:
            run.state.best_model_checkpoint = best
            self._report_unsaved(target, problems[0], rescue)
            return None
        if args.should_save:
            kept = {target, *([Path(run.state.best_model_checkpoint)] if run.state.best_model_checkpoint else [])}
            try:
                clear_away(run_dir, args.save_total_limit, kept | keep)
            except OSError as error:
                logger.warning("Checkpoints beyond `save_total_limit` could not be removed: %s.", error)
        return target if self._push_is_asked else None

    def ask_for_push(self) -> bool:
        """Return whether a push has to wait for the checkpoint being written, which it is uploaded from; note it."""
        self._push_is_asked |= self.staging is not None
        return self.staging is not None

    def _make_room(self, run_dir: Path) -> None:
        if self._run.args.should_save:
            put_back(run_dir)
            shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)

    def _publish(self, staged: Path, target: Path) -> None:
        if self._run.args.should_save:
            check_parts(staged, self._run.accelerator.num_processes)
            publish(staged, target)

    def _write(self, write: Callable[[], None], staged: Path, target: Path) -> None:
        run = self._run
        with self._deepspeed_tolerated(staged):
            write()
        parts = self._of_run | self._of_process | self._given
        states = {name: part.state_dict() for name, part in parts.items()}
        tensors: dict[str, Tensor] = {}
        record = _without_tensors(states, (), tensors)
        file = staged / PROGRESS.format(run.accelerator.process_index)
        save_file(tensors, file, {"states": json.dumps(record)})
        if not run.args.should_save:
            return
        about = {**self._identity, "in_batch": run.batch_in_use, "only_model": run.args.save_only_model}
        (staged / IDENTITY).write_text(json.dumps(about, indent=1), encoding="utf-8")
        if run.state.best_model_checkpoint == str(staged):  # TRL looked for it where it is written
            run.state.best_model_checkpoint = str(target)
            run.state.save_to_json(str(staged / "trainer_state.json"))

    @contextmanager
    def _deepspeed_tolerated(self, staged: Path) -> Iterator[None]:
        """
        Tolerate refused writes of DeepSpeed's engine, which writes between collectives, on this run's engine. The
        file `latest`, which its first process writes while the others wait, is written after all of that.
        """
        if not self._run.is_deepspeed_enabled:
            yield
            return
        engine: Any = self._run.model_wrapped
        writers = [(engine.checkpoint_engine, "save"), (engine.checkpoint_engine, "makedirs")]
        with ExitStack() as stack:
            engine.save_checkpoint = partial(engine.save_checkpoint, save_latest=False)
            stack.callback(delattr, engine, "save_checkpoint")
            for owner, name in [*writers, (engine, "_copy_recovery_script")]:
                setattr(owner, name, tolerated()(getattr(owner, name)))
                stack.callback(delattr, owner, name)
            yield
        if self._run.args.should_save and not self._run.args.save_only_model:
            (staged / "latest").write_text(f"global_step{engine.global_steps}", encoding="utf-8")

    def save_optimizer_and_scheduler(self, output_dir: str, write: Callable[[], None]) -> None:
        """
        Write the states of optimizer and schedule; what the disk refuses is noted, so that this process reaches the
        next collective.

        Args:
            output_dir (`str`):
                Where.
            write (`Callable`):
                Writes them as TRL does.
        """
        run = self._run
        if run.is_deepspeed_enabled:  # see above
            write()
            return
        if not run.is_fsdp_enabled:
            with tolerated():
                write()
            return
        # TRL's calls for FSDP: each gathers from all processes first, then writes
        plugin = run.accelerator.state.fsdp_plugin
        with tolerated():
            save_fsdp_model(plugin, run.accelerator, run.model, output_dir, **get_fsdp_ckpt_kwargs())
        with tolerated():
            save_fsdp_optimizer(plugin, run.accelerator, run.optimizer, run.model, output_dir)
        if run.args.should_save:
            with tolerated():
                torch.save(run.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _report_unsaved(self, target: Path, problem: str, rescue: Callable[[], str]) -> None:
        """Log that a checkpoint could not be written; raise at the end of the run, when no later one can be."""
        if self._run.args.should_save:
            with suppress(OSError):
                put_back(target.parent)
            shutil.rmtree(target.parent / UNFINISHED, ignore_errors=True)
        free = shutil.disk_usage(target.parent).free / 2**20
        fault = f"{target} could not be written: {problem}. Checkpoints that were there before are still valid."
        remedy = f"Free space on the disk, which has {free:.0f} MiB left, or make {target.parent} writable."
        if self._run.state.global_step >= self._run.state.max_steps or self._run.control.should_training_stop:
            again = "Run again with `resume_from_checkpoint=True`: the run resumes from its last checkpoint."
            raise CheckpointSaveError(fault, remedy=f"{remedy} {rescue()} {again}")
        logger.error("%s %s The run goes on, and tries again at the next checkpoint.", fault, remedy)

    # Resuming

    def load(self, checkpoint: str) -> None:
        """Continue from a checkpoint, after TRL has loaded its own part of it."""
        run = self._run
        run.micro_batches = None
        run.step = run.state.global_step * run.args.gradient_accumulation_steps  # TRL's checkpoints say no more
        if self._source is None:
            return
        same = self._source["layout"] == self._identity["layout"]
        file = Path(checkpoint) / PROGRESS.format(run.accelerator.process_index if same else 0)
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        moved = {name: tensor.to(run.accelerator.device) for name, tensor in tensors.items()}
        if "states" in metadata:  # what the user has passed gets its tensors on the CPU, whatever they were saved from
            record = json.loads(metadata["states"])
            states = {n: _with_tensors(state, tensors if n in self._given else moved) for n, state in record.items()}
        else:
            states = _states_of_flat_form(json.loads(metadata["progress"]), moved)
        for name, part in (self._of_run | (self._of_process if same else {})).items():
            part.load_state_dict(states[name])
        for name, part in self._given.items():
            if same and name in states:
                part.load_state_dict(states[name])
            else:
                logger.warning("The state of the %s is not in %s for this process, and begins anew.", name, checkpoint)
        if not same:  # between two rollout batches, of which there were as many
            passes = (self._source["layout"]["steps_per_generation"] or 1) * self._source["batch"]["num_iterations"]
            run.step = states["place"]["step"] // passes * micro_batches_of(run.args)

    def begin_epoch(self, data: DataLoader, skipped: int) -> bool:
        """
        Take up the loss that a resumed run had not logged yet, and bring the order of the data to that of the epoch.

        Args:
            data (`DataLoader`):
                That of training, as accelerate has prepared it.
            skipped (`int`):
                Epochs that this training does not go through; each would have drawn an order.

        Returns:
            `bool`: whether there is a step left to take.
        """
        run = self._run
        if run.state.global_step >= run.state.max_steps:  # transformers would make one step more
            logger.warning(
                "All %d steps of this run have been taken: nothing is trained. Raise `max_steps` or "
                "`num_train_epochs` to train further.",
                run.state.max_steps,
            )
            run.control.should_training_stop = True
            return False
        run.take_up_unlogged_loss()
        sampler = _order_of(data)
        generator = getattr(sampler, "generator", None)
        if generator is not None:
            for _ in range(skipped):
                torch.randperm(sampler.num_samples, generator=generator)
        return True


def _order_of(data: DataLoader) -> Any:
    """Return what orders the rows of a data set, within the batch samplers that accelerate has put around it; `None`
    for one that is iterated over."""
    batches: Any = getattr(data, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return getattr(batches, "sampler", None)


# Of version 0.1.0: the keys of its record, and the parts whose states they are
_FLAT_FORM = {"step", "batches", "metrics", "last_logged", "carried", "forced_shares"}
_FLAT_FORM |= {"packs", "unmoved", "sync_report"}
_PARTS_OF_FLAT_FORM = ("packing", "reference", "carried metrics", "ratios", "place")


def _states_of_flat_form(record: JSONObject, tensors: Mapping[str, Tensor]) -> JSONObject:
    """Return the states of the parts from the form that version 0.1.0 wrote: one record, and tensors by prefix."""
    batches: list[JSONObject] = [dict(batch) for batch in record["batches"]]
    for name, tensor in tensors.items():
        if name.startswith("batch/"):
            _, index, key = name.split("/", 2)
            batches[int(index)][key] = tensor
    return {
        "packing": {"active": record["packs"], "reason": None if record["packs"] else "version 0.1.0 decided so"},
        "reference": {"unmoved": record["unmoved"], "report": record["sync_report"]},
        "carried metrics": {"of_batch": record["carried"], "forced": record["forced_shares"]},
        "ratios": {name.removeprefix("ratio/"): t for name, t in tensors.items() if name.startswith("ratio/")},
        "place": {
            "step": record["step"],
            "batches": batches,
            "metrics": record["metrics"],
            "loss": tensors["loss"],
            "last_logged": record["last_logged"],
        },
    }


def _without_tensors(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """
    Return nested data with each tensor replaced by `{"tensor": name}`, and add it to `tensors`.

    Raises:
        ConfigError: for what JSON would not give back as it was, naming where it is.
    """
    name = "/".join(path)
    if isinstance(value, Tensor):
        name = name if name not in tensors else f"{name}#{len(tensors)}"  # `a/b` may be a key, or `b` in `a`
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        odd = next((key for key in value if not isinstance(key, str)), None)
        if odd is None:
            return {key: _without_tensors(inner, (*path, key), tensors) for key, inner in value.items()}
        value, name = odd, f"a key of {name}"
    elif isinstance(value, (list, tuple)):
        return [_without_tensors(inner, (*path, str(index)), tensors) for index, inner in enumerate(value)]
    elif value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(
        f"A checkpoint cannot keep {value!r}, a {type(value).__name__}, as {name} of a `state_dict()`.",
        remedy="Make states of dicts with text keys, lists, numbers, texts and tensors.",
    )


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return nested data with its tensors put back."""
    if isinstance(value, dict):
        if set(value) == {"tensor"} and isinstance(value["tensor"], str) and value["tensor"] in tensors:
            return tensors[value["tensor"]]
        return {key: _with_tensors(inner, tensors) for key, inner in value.items()}
    return [_with_tensors(inner, tensors) for inner in value] if isinstance(value, list) else value
