"""When the reference follows the policy, how the trainer scores with it, and its place in logs and checkpoints.

TRL refuses to sync the reference of a PEFT run, so its callback is left out and replaced by one of this module.
"""

import functools
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from trl.trainer.callbacks import SyncRefModelCallback

from ..config.fields import ToolGRPOConfig
from ..errors import ConfigError, ReferenceSyncError
from ..models.rounding import widest
from ..run_folder.storage_failures import tolerated
from ..trl_hooks import Run
from ..types import Batch, JSONObject
from .adapter import ADAPTER, AdapterReference, Comparison, SyncReport, describe_adapter
from .checks import check_reference, reference_mode
from .merged import MergedReference, ModelReference


logger = logging.getLogger(__name__)

REFERENCE_FILE = "reference.safetensors"
Reference: TypeAlias = AdapterReference | MergedReference | ModelReference


class ReferencePolicy:
    """
    The reference of a run: what it is scored with, when it follows the policy, and its place in logs and files; see
    `ref_sync_mode` of [`ToolGRPOConfig`] and TRL's `sync_ref_model`.

    It is made before parameters are sharded, if it will be synced, or if TRL's own would be wrong.

    Args:
        run ([`Run`]):
            The run, its model made.
        given_adapter (`bool`):
            Whether the policy came with its adapter, whose state at that time is the reference.

    Raises:
        ConfigError: for a reference that cannot be kept.
    """

    def __init__(self, run: Run, given_adapter: bool) -> None:
        self._run = run
        self.synced: Reference | None = None  # one that is synced
        self.start: AdapterReference | None = None  # the policy as it began, if TRL's own would not be
        self._syncs = 0
        self._pending = False  # a sync is due, but the rollout batch in use was scored with the present reference
        self.report: SyncReport | None = None  # of the last sync
        self._unmoved = False  # the policy has not moved since the last sync
        self._saves_checkpoint = False
        run.beta = run.args.beta
        policy = run.bare_model
        adapter = adapter_of(policy) if run.beta != 0 else None
        if not run.args.sync_ref_model:
            if adapter is not None and (given_adapter or changes_base(policy.peft_config[adapter])):
                self.start = AdapterReference(policy, adapter)
            return
        separate = run.accelerator.unwrap_model(run.ref_model) if run.ref_model is not None else None
        if separate is not None:
            self.synced = ModelReference(separate, policy, adapter)
        elif adapter is None:
            raise ReferenceSyncError(
                "TRL made no reference model for `sync_ref_model`; this version of TRL is not supported.",
                remedy="Install a version of TRL that setup.cfg allows.",
            )
        elif reference_mode(run.args) == "adapter":
            self.synced = AdapterReference(policy, adapter)
        elif run.is_fsdp_enabled or run.is_deepspeed_enabled:
            raise ConfigError(
                "You passed `ref_model_mixup_alpha` below 1 or `ref_sync_mode='merged'` with FSDP or DeepSpeed, which "
                "own the base weights that a merged reference replaces.",
                remedy="Set `ref_model_mixup_alpha=1.0`, which keeps a second adapter, or train with DDP.",
            )
        else:
            self.synced = MergedReference(policy, adapter)
        if run.pop_callback(SyncRefModelCallback) is not None:
            logger.warning("TRL's `SyncRefModelCallback` was removed: this trainer syncs the reference by itself.")
        run.add_callback(_SyncCallback(self, run))

    # Syncs

    def sync(self) -> SyncReport | None:
        """
        Make the reference follow the policy, by `ref_model_mixup_alpha`, and verify it.

        Returns:
            [`SyncReport`] or `None`: what was done. `None` in the middle of a rollout batch, which was scored with the
            present reference: the sync then takes place right before the next batch is sampled.

        Raises:
            ConfigError: if the run was not made with `sync_ref_model=True`.
            ReferenceSyncError: if tensors differ after the sync; names them.
        """
        if self.synced is None:
            raise ConfigError(
                "`sync_reference()` was called, but this run has no reference to sync.",
                remedy="Pass `sync_ref_model=True` and a `beta` above 0.",
            )
        if self._run.batch_in_use:
            self._pending = True
            return None
        self._pending = False
        comparison = Comparison(self._run.accelerator.gather)
        report = self.synced.sync(self._run.args.ref_model_mixup_alpha, comparison)
        if report.differ:
            raise ReferenceSyncError(
                f"After the sync {len(report.differ)} of {report.tensors} tensors of the reference "
                f"({self.synced.mode}) are not what they should be, by up to {report.max_abs_diff:.3g}: "
                f"{', '.join(report.differ[:10])}.",
                remedy="Look for NaN in the policy, or code that writes to the reference.",
            )
        self._syncs += 1
        self.report, self._unmoved = report, True
        return report

    def before_rollouts(self) -> None:
        """Do the sync that is due, if any, before a rollout batch is sampled for training."""
        if self._run.training and self._pending:
            self.sync()

    def on_rollouts(self, output: Batch) -> None:
        """Log the KL of the policy to the reference right after a sync, on rollouts that it has just sampled."""
        if not (self._run.training and self._unmoved):
            return
        self._unmoved = False
        reference, policy = output.get("ref_per_token_logps"), output.get("sampling_per_token_logps")
        if reference is None or policy is None:
            return
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        difference = (reference - policy).to(widest(policy.device)).masked_fill(mask == 0, 0.0)
        found = torch.stack([((difference.exp() - 1) - difference).sum(), mask.sum().to(difference.dtype)])
        total, count = self._run.accelerator.reduce(found, reduction="sum").tolist()
        if count:
            self._run.training_metrics["ref/kl"].append(total / count)

    def on_replay(self) -> None:
        """Forget that the policy was synced last: rollouts of a log were sampled by another."""
        self._unmoved = False

    # Scoring

    @contextmanager
    def weights_for(self, model: nn.Module) -> Iterator[None]:
        """Put the reference's weights into the policy while open, where TRL is about to score with it as one."""
        reference = None if isinstance(self.synced, ModelReference) else self.synced or self.start
        if reference is None or model is not self._run.model or not reference.scoring():
            yield
            return
        with reference.weights():
            yield

    def on_log(self) -> None:
        """Add `ref/*` to what is logged of training."""
        if self.report is not None:
            found = {
                "ref/syncs": self._syncs,
                "ref/tensors": self.report.tensors,
                "ref/tensors_differ": len(self.report.differ),
                "ref/max_abs_diff": self.report.max_abs_diff,
                "ref/seconds": self.report.seconds,
            }
            self._run.training_metrics.update({name: [float(value)] for name, value in found.items()})

    # Files

    def state_dict(self) -> JSONObject:
        """Return what a checkpoint holds in addition to the reference's weights, which are a file of their own."""
        return {"unmoved": self._unmoved, "report": None if self.report is None else asdict(self.report)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        report = state["report"]
        self._unmoved = state["unmoved"]
        self.report = None if report is None else SyncReport(**report)

    @contextmanager
    def saving(self, checkpoint: bool) -> Iterator[None]:
        """Have a model saved while open: as a checkpoint, or to be used elsewhere."""
        self._saves_checkpoint = checkpoint
        try:
            yield
        finally:
            self._saves_checkpoint = False

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Leave the reference's adapter out of what is saved while open. A checkpoint keeps TRL's own, which is
        restored from there."""
        if self._saves_checkpoint and self.synced is None:
            yield
            return
        with _without_reference_adapter(self._run.bare_model):
            yield

    def save(self, folder: str | Path) -> None:
        """Write the weights of a synced reference into a checkpoint. Every process must call this."""
        if self.synced is None:
            return
        state = self.synced.state()
        if self._run.args.should_save:
            record = {"mode": self.synced.mode, "syncs": self._syncs, "pending": self._pending}
            with tolerated():
                Path(folder).mkdir(parents=True, exist_ok=True)
                save_file(state, Path(folder) / REFERENCE_FILE, {"reference": json.dumps(record)})

    def check_adapter(self, folder: str | Path) -> None:
        """Raise if the adapter of a checkpoint is not configured as that of this run, of which a reference is kept."""
        adapter = adapter_of(self._run.bare_model)
        if self.synced is not None and adapter is not None:
            _check_same_adapter(str(folder), self._run.bare_model.peft_config[adapter])

    def load(self, folder: str | Path) -> None:
        """
        Read the weights of a synced reference from a checkpoint.

        Raises:
            ReferenceSyncError: if it has none, or those of another reference.
        """
        reference = self.synced
        if reference is None:
            return
        file = Path(folder) / REFERENCE_FILE
        if not file.is_file():
            raise ReferenceSyncError(
                f"There is no {file}, so the reference cannot be restored. The checkpoint was written without "
                f"`sync_ref_model=True`.",
                remedy="Resume without it, or start a new run from the checkpoint's weights.",
            )
        with safe_open(file, "pt") as stored:
            record = json.loads((stored.metadata() or {}).get("reference", "{}"))
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        expected = {name: tuple(tensor.shape) for name, tensor in reference.state().items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if record.get("mode") != reference.mode or found != expected:
            wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            raise ReferenceSyncError(
                f"{file} holds a reference of the kind {record.get('mode')!r}, expected {reference.mode!r}; "
                f"{len(wrong)} tensors are missing, left over or of another shape: {', '.join(wrong[:5])}.",
                remedy="Resume with the `ref_sync_mode`, `ref_model_mixup_alpha` and adapter configuration that it "
                "was written with.",
            )
        with torch.no_grad():
            reference.load(state)
        self._syncs, self._pending = record["syncs"], record["pending"]


class _SyncCallback(TrainerCallback):
    """Replaces TRL's callback: syncs at the end of every `ref_model_sync_steps`-th optimizer step."""

    def __init__(self, reference: ReferencePolicy, run: Run) -> None:
        self._reference, self._run = reference, run

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if state.global_step % self._run.args.ref_model_sync_steps == 0:
            self._reference.sync()


def adapter_of(model: nn.Module) -> str | None:
    """Return the name of the adapter that a PEFT policy trains; `None` for other models."""
    return model.active_adapter if hasattr(model, "peft_config") else None  # type: ignore[return-value]


@contextmanager
def synced_by_us(
    args: ToolGRPOConfig, model: str | PreTrainedModel | PeftModel, peft_config: PeftConfig | None
) -> Iterator[None]:
    """
    Keep TRL's constructor from refusing to sync a PEFT run, adding its own callback, and copying a given adapter.

    What it would have checked is checked here.
    """
    check_reference(args, model, peft_config)
    kept = args.sync_ref_model, args.beta
    args.sync_ref_model = False
    if isinstance(model, PeftModel):
        args.beta = 0.0  # else TRL adds a copy by itself, whose initialization may change the base weights
    try:
        yield
    finally:
        args.sync_ref_model, args.beta = kept


def changes_base(config: PeftConfig) -> bool:
    """
    Return whether a new adapter changes the base weights, so that the model without it is another than before.

    Args:
        config (`PeftConfig`):
            The adapter's configuration. Initializations such as PiSSA and OLoRA subtract from a weight what they put
            into its factors, and `bias` trains the biases of the base.
    """
    start = getattr(config, "init_lora_weights", True)
    return getattr(config, "bias", "none") != "none" or (isinstance(start, str) and start not in ("gaussian", "eva"))


@contextmanager
def _without_reference_adapter(model: PreTrainedModel) -> Iterator[None]:
    """Have a PEFT model saved without the reference adapter, which is no part of what was trained."""
    adapters = list(getattr(model, "peft_config", None) or ())
    if ADAPTER not in adapters or adapters == [ADAPTER]:
        yield
        return
    selected = [name for name in adapters if name != ADAPTER]
    model.save_pretrained = functools.partial(  # type: ignore[method-assign]
        model.save_pretrained, selected_adapters=selected
    )
    try:
        yield
    finally:
        del model.save_pretrained


def _check_same_adapter(checkpoint: str, config: PeftConfig) -> None:
    file = Path(checkpoint) / "adapter_config.json"
    if not file.is_file():
        return  # a sharded checkpoint, whose loader compares shapes
    stored, own = (describe_adapter(c) for c in (json.loads(file.read_text(encoding="utf-8")), config.to_dict()))
    for name, ours in own.items():
        theirs = stored[name]
        if theirs != ours:
            raise ReferenceSyncError(
                f"The adapter in {checkpoint} has `{name}={theirs}`, the one of this run `{name}={ours}`.",
                remedy="Resume with the adapter configuration that the checkpoint was written with.",
            )
