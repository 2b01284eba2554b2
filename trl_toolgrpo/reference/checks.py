"""Checks that the reference of a run can be kept and synced, before TRL builds it."""

from peft import PeftConfig, PeftModel
from torch import nn

from ..config.fields import ToolGRPOConfig
from ..errors import ConfigError


# Tuners whose second adapter is a plain copy of the first; merged weights also need a difference to add to the base
COPIED = ("LORA", "LOHA", "LOKR", "IA3")
MERGED = ("LORA", "LOHA", "LOKR")


def reference_mode(args: ToolGRPOConfig) -> str:
    """Return the `ref_sync_mode` that "auto" stands for in a PEFT run."""
    if args.ref_sync_mode == "auto":
        return "adapter" if args.ref_model_mixup_alpha == 1 else "merged"
    return args.ref_sync_mode


def check_reference(args: ToolGRPOConfig, model: str | nn.Module, peft_config: PeftConfig | None) -> None:
    """
    Check that the reference of a run can be kept, and synced where that is asked for, before TRL builds it.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration.
        model (`str`, `PreTrainedModel` or `PeftModel`), peft_config (`PeftConfig`, *optional*):
            As passed to the trainer.

    Raises:
        ConfigError: for adapters of which no reference can be kept, by name, and an adapter mode without an adapter.
    """
    adapters: dict[str, PeftConfig] = getattr(model, "peft_config", None) or {}
    if args.beta != 0 and adapters:
        _check_given_adapters(args.beta, model, adapters)
    if not args.sync_ref_model:
        return
    config: PeftConfig | None = peft_config or adapters.get("default")
    if config is None:
        if args.ref_sync_mode != "auto":
            raise ConfigError(
                f"You passed `ref_sync_mode={args.ref_sync_mode!r}` for a model without an adapter, whose reference "
                "is a second model.",
                remedy="Leave it at 'auto', or pass a `peft_config`.",
            )
        return
    mode, kind = reference_mode(args), str(getattr(config.peft_type, "value", config.peft_type))
    supported = COPIED if mode == "adapter" else MERGED
    if kind not in supported:
        raise ConfigError(
            f"You passed `sync_ref_model=True` with an adapter of type {kind}, which a reference of the kind "
            f"{mode!r} cannot follow.",
            remedy=f"Use LoRA (`LoraConfig`); supported are {', '.join(supported)}.",
        )


def _check_given_adapters(beta: float, model: object, adapters: dict[str, PeftConfig]) -> None:
    """Check that a model that comes with adapters trains the one that its reference is a copy of."""
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"You passed a model with adapters that transformers has loaded into it and `beta={beta}`. No reference "
            "can be kept of them.",
            remedy="Load them with `PeftModel.from_pretrained(model, folder, is_trainable=True)`.",
        )
    if "default" not in adapters:
        raise ConfigError(
            f"You passed a model with the adapters {', '.join(map(repr, adapters))} and `beta={beta}`, but none "
            "named 'default', which is the one that is trained and copied for the reference.",
            remedy="Load it with `adapter_name='default'`.",
        )
    active = list(model.active_adapters)
    if active != ["default"]:
        raise ConfigError(
            f"You passed a model with the active adapters {active} and `beta={beta}`; the reference follows one, "
            "named 'default'.",
            remedy="Call `model.set_adapter('default')`, or load the adapter to train under that name.",
        )
