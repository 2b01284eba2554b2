"""When the reference follows the policy, how the trainer scores with it, and its place in logs and checkpoints.

TRL refuses to sync the reference of a PEFT run, so its callback is left out and replaced by one of this module.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from trl import GRPOTrainer

from ..config.batch_position import batch_in_use
from ..config.fields import ToolGRPOConfig
from ..errors import ConfigError, ReferenceSyncError
from ..models.rounding import widest
from ..run_folder.storage_failures import tolerated
from ..types import Batch, Row
from ..update.scoring import Scores
from .adapter import ADAPTER, AdapterReference, Comparison, SyncReport, describe_adapter, same_parameters_trained
from .checks import check_reference, reference_mode
from .merged import MergedReference, ModelReference


REFERENCE_FILE = "reference.safetensors"
Reference: TypeAlias = AdapterReference | MergedReference | ModelReference


class ReferenceSync(GRPOTrainer):
    """Part of [`ToolGRPOTrainer`]; see `ref_sync_mode` of [`ToolGRPOConfig`] and TRL's `sync_ref_model`."""

    args: ToolGRPOConfig
    model: PreTrainedModel
    _reference: Reference | None = None  # one that is synced
    _start: AdapterReference | None = None  # the policy as it began, if TRL's own would not be
    _syncs = 0
    _sync_pending = False  # one is due, but the rollout batch in use was scored with the present reference
    _sync_report: SyncReport | None = None
    _saving_checkpoint = False
    _unmoved = False  # the policy has not moved since the last sync

    def _prepare_reference(self, given_adapter: bool) -> None:
        """
        Make the reference, before parameters are sharded, if it will be synced, or if TRL's own would be wrong.

        Args:
            given_adapter (`bool`):
                Whether the policy came with its adapter, whose state at that time is the reference.
        """
        self.beta = self.args.beta
        policy = self.accelerator.unwrap_model(self.model)
        adapter = adapter_of(policy) if self.beta != 0 else None
        if not self.args.sync_ref_model:
            if adapter is not None and (given_adapter or changes_base(policy.peft_config[adapter])):
                self._start = AdapterReference(policy, adapter)
            return
        separate = self.accelerator.unwrap_model(self.ref_model) if self.ref_model is not None else None
        if separate is not None:
            self._reference = ModelReference(separate, policy, adapter)
        elif adapter is None:
            raise ReferenceSyncError(
                "TRL made no reference model for `sync_ref_model`; this version of TRL is not supported.",
                remedy="Install a version of TRL that setup.cfg allows.",
            )
        elif reference_mode(self.args) == "adapter":
            self._reference = AdapterReference(policy, adapter)
        elif self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(
                "You passed `ref_model_mixup_alpha` below 1 or `ref_sync_mode='merged'` with FSDP or DeepSpeed, which "
                "own the base weights that a merged reference replaces.",
                remedy="Set `ref_model_mixup_alpha=1.0`, which keeps a second adapter, or train with DDP.",
            )
        else:
            self._reference = MergedReference(policy, adapter)
        self.add_callback(_SyncCallback(self))

    # Syncs

    def sync_reference(self) -> SyncReport | None:
        """
        Make the reference follow the policy, by `ref_model_mixup_alpha`, and verify it.

        Returns:
            [`SyncReport`] or `None`: what was done. `None` in the middle of a rollout batch, which was scored with the
            present reference: the sync then takes place right before the next batch is sampled.

        Raises:
            ConfigError: if the run was not made with `sync_ref_model=True`.
            ReferenceSyncError: if tensors differ after the sync; names them.
        """
        if self._reference is None:
            raise ConfigError(
                "`sync_reference()` was called, but this run has no reference to sync.",
                remedy="Pass `sync_ref_model=True` and a `beta` above 0.",
            )
        if batch_in_use(self):
            self._sync_pending = True
            return None
        self._sync_pending = False
        comparison = Comparison(self.accelerator.gather)
        report = self._reference.sync(self.args.ref_model_mixup_alpha, comparison)
        if report.differ:
            raise ReferenceSyncError(
                f"After the sync {len(report.differ)} of {report.tensors} tensors of the reference "
                f"({self._reference.mode}) are not what they should be, by up to {report.max_abs_diff:.3g}: "
                f"{', '.join(report.differ[:10])}.",
                remedy="Look for NaN in the policy, or code that writes to the reference.",
            )
        self._syncs += 1
        self._sync_report, self._unmoved = report, True
        return report

    def _generate_and_score_completions(self, inputs: list[Row]) -> Batch:
        training = self.model.training
        if training and self._sync_pending:
            self.sync_reference()
        with same_parameters_trained(self.model):
            output = super()._generate_and_score_completions(inputs)
        if training and self._unmoved:
            self._unmoved = False
            self._log_divergence(output)
        return output

    def _log_divergence(self, output: Batch) -> None:
        """Log the KL of the policy to the reference right after a sync, on rollouts that it has just sampled."""
        reference, policy = output.get("ref_per_token_logps"), output.get("sampling_per_token_logps")
        if reference is None or policy is None:
            return
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        difference = (reference - policy).to(widest(policy.device)).masked_fill(mask == 0, 0.0)
        found = torch.stack([((difference.exp() - 1) - difference).sum(), mask.sum().to(difference.dtype)])
        total, count = self.accelerator.reduce(found, reduction="sum").tolist()
        if count:
            self._metrics["train"]["ref/kl"].append(total / count)

    def _get_per_token_logps_and_entropies(self, model: nn.Module, *args: Any, **kwargs: Any) -> Scores:
        reference = None if isinstance(self._reference, ModelReference) else self._reference or self._start
        if reference is None or model is not self.model or not reference.scoring():
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        with reference.weights():
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._sync_report is not None and self.model.training:
            report = self._sync_report
            found = {
                "ref/syncs": self._syncs,
                "ref/tensors": report.tensors,
                "ref/tensors_differ": len(report.differ),
                "ref/max_abs_diff": report.max_abs_diff,
                "ref/seconds": report.seconds,
            }
            self._metrics["train"].update({name: [float(value)] for name, value in found.items()})
        super().log(logs, start_time)

    # Files

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as TRL does; a checkpoint, and nothing else, also gets the reference."""
        self._saving_checkpoint = _internal_call and output_dir is not None
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            checkpoint, self._saving_checkpoint = self._saving_checkpoint, False
        if self._reference is None or not checkpoint or output_dir is None:
            return
        state = self._reference.state()
        if self.args.should_save:
            record = {"mode": self._reference.mode, "syncs": self._syncs, "pending": self._sync_pending}
            with tolerated():
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                save_file(state, Path(output_dir) / REFERENCE_FILE, {"reference": json.dumps(record)})

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self._saving_checkpoint and self._reference is None:
            return super()._save(output_dir, state_dict)  # TRL's own reference adapter is restored from there
        with _without_reference_adapter(self.accelerator.unwrap_model(self.model)):
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._reference is None:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        policy = self.accelerator.unwrap_model(self.model)
        adapter = adapter_of(policy)
        if adapter is not None:
            _check_same_adapter(resume_from_checkpoint, policy.peft_config[adapter])
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_reference(self._reference, Path(resume_from_checkpoint) / REFERENCE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load as TRL does, and the reference if DeepSpeed has bypassed `_load_from_checkpoint`."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._reference is not None and self.is_deepspeed_enabled:
            self._load_reference(self._reference, Path(checkpoint) / REFERENCE_FILE)

    def _load_reference(self, reference: Reference, file: Path) -> None:
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
        self._syncs, self._sync_pending = record["syncs"], record["pending"]


class _SyncCallback(TrainerCallback):
    """Replaces TRL's callback: syncs at the end of every `ref_model_sync_steps`-th optimizer step."""

    def __init__(self, trainer: ReferenceSync) -> None:
        self._trainer = trainer

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if state.global_step % self._trainer.args.ref_model_sync_steps == 0:
            self._trainer.sync_reference()


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
