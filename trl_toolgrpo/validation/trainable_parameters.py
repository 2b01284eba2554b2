"""Checks that the policy can be trained: it has values and trainable parameters, and the optimizer moves them."""

import logging

import torch
from accelerate.utils import parse_flag_from_env
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from ..config.fields import ToolGRPOConfig
from ..errors import ConfigError


logger = logging.getLogger(__name__)


def check_optimizer(args: ToolGRPOConfig) -> None:
    """
    Check that the device has what the optimizer needs.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration.

    Raises:
        ConfigError: for a paged optimizer on a CPU.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if name.startswith("paged_") and args.device.type == "cpu":
        plain = name.removeprefix("paged_")
        instead = {"adamw_32bit": "adamw_torch", "ademamix_32bit": "ademamix"}.get(plain, plain)
        raise ConfigError(
            f"You passed `optim={name!r}` on a CPU. Paged optimizers move their state between a GPU and its host, "
            "and on a CPU there is nothing to page.",
            remedy=f"Use `optim={instead!r}`, or train on a GPU.",
        )


def policy_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """
    Return the parameters of a policy that training can move, by name.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The policy, with a value head or without.

    Returns:
        `dict[str, nn.Parameter]`: those that require a gradient and take part in the forward pass. The value head is
        left out, and so are adapters that are not active, switched off or merged into the base weights.
    """
    adapters = _adapter_parameters(model)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "value_head." not in name and adapters.get(id(parameter), ("", True))[1]
    }


def _adapter_parameters(model: nn.Module) -> dict[int, tuple[str, bool]]:
    """Return, by the id of each parameter of an adapter, the adapter's name and whether the forward pass uses it."""
    found = {}
    for module in model.modules() if hasattr(model, "peft_config") else ():
        off = getattr(module, "disable_adapters", False) is True or bool(getattr(module, "merged_adapters", ()))
        for table in getattr(module, "adapter_layer_names", ()):
            for adapter, layer in getattr(getattr(module, table, None), "items", dict)():
                used = not off and adapter in getattr(module, "active_adapters", ())
                own = layer.parameters() if isinstance(layer, nn.Module) else (layer,)
                found.update({id(parameter): (adapter, used) for parameter in own})
    return found


def check_policy_is_trained(model: nn.Module) -> None:
    """
    Check that something of the policy can be trained.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The policy.

    Raises:
        ConfigError: for a policy that is frozen: says what is, and what to do.
    """
    if policy_parameters(model):
        return
    start = "Nothing of the policy would be trained: "
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"{start}no parameter of the {type(model).__name__} you passed requires a gradient.",
            remedy="Call `model.requires_grad_(True)`, or pass a `peft_config` to train an adapter of the frozen "
            "model.",
        )
    active, adapters = list(model.active_adapters), _adapter_parameters(model)
    loaded = [name for name in active if getattr(model.peft_config[name], "inference_mode", False)]
    waiting = sorted({adapters[id(p)][0] for p in model.parameters() if p.requires_grad and id(p) in adapters})
    named = ", ".join(map(repr, waiting))
    if set(waiting) & set(active):
        reason = f"the adapter {named} is switched off or merged into the base weights, so no gradient reaches it"
        remedy = "Call `model.enable_adapter_layers()`, or `model.unmerge_adapter()` if it was merged."
    elif waiting:
        reason = f"the adapter {named} requires gradients, but {active} is active and frozen"
        remedy = f"Call `model.set_adapter({waiting[0]!r})`, or load the adapter to train with `is_trainable=True`."
    elif loaded:
        reason = f"the adapter {', '.join(map(repr, loaded))} was loaded for inference, which is PEFT's default"
        remedy = (
            "Load it with `PeftModel.from_pretrained(model, folder, is_trainable=True)`, or leave `inference_mode` "
            "of its configuration at False."
        )
    else:
        reason = f"no parameter of the adapter {', '.join(map(repr, active))} requires a gradient"
        remedy = f"Call `model.set_adapter({active[0]!r})`, which makes it trainable, or pass a `peft_config`."
    raise ConfigError(f"{start}{reason}, and the base model is frozen.", remedy=remedy)


def check_head(model: PreTrainedModel | PeftModel) -> None:
    """
    Check that log-probs can be computed with the LM head of a policy, whose weight and bias TRL reads by themselves.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The policy.

    Raises:
        ConfigError: for a head that shares the trained tokens of the embedding it is tied to.
    """
    head = model.get_output_embeddings()
    if isinstance(head, AuxiliaryTrainingWrapper) and not isinstance(head, ModulesToSaveWrapper):
        raise ConfigError(
            "You passed `trainable_token_indices` for a model whose LM head is tied to its embedding, so that the "
            f"head is a {type(head).__name__}, with which TRL cannot compute log-probs.",
            remedy="Leave `trainable_token_indices` out, or untie the head (`tie_word_embeddings=False`) before you "
            "add it.",
        )


def check_adapter_is_recorded(model: nn.Module) -> None:
    """
    Check that what `model.generate` samples from a policy is what its forward pass says.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The policy.

    Raises:
        ConfigError: for an adapter of learned tokens before the prompt (prompt tuning, p-tuning, prefix tuning).
    """
    learned = [config for config in getattr(model, "peft_config", {}).values() if config.is_prompt_learning]
    if learned:
        kind = getattr(learned[0].peft_type, "value", learned[0].peft_type)
        raise ConfigError(
            f"You passed an adapter of type {kind}, which puts learned tokens before the prompt. With those, "
            "`model.generate` gives tokens other log-probs than a forward pass does, so that every ratio would be "
            "wrong.",
            remedy="Use another adapter, such as `LoraConfig`.",
        )


def check_optimizer_holds_policy(model: nn.Module, optimizer: object, scheduler: object = None) -> None:
    """
    Check that an optimizer moves the policy; one that leaves a part of it as it is on purpose is logged.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The policy.
        optimizer (`torch.optim.Optimizer`, *optional*):
            The optimizer, where there is one already.
        scheduler (`LRScheduler`, *optional*):
            What sets its learning rate.

    Raises:
        ConfigError: for an optimizer of other parameters than those that are trained, and a scheduler of another
            optimizer.
    """
    driven = getattr(scheduler, "optimizer", None)
    if driven is not None and driven is not getattr(optimizer, "optimizer", optimizer) and driven is not optimizer:
        raise ConfigError(
            "You passed a learning-rate scheduler made for another optimizer than the one you passed with it, so the "
            "rate would never change.",
            remedy="Pass both in `optimizers=(optimizer, scheduler)`, or neither and set `lr_scheduler_type`.",
        )
    held = _held_parameters(optimizer)
    if held is None:
        return
    trained, known = policy_parameters(model), {id(parameter) for parameter in model.parameters()}
    missing = [name for name, parameter in trained.items() if id(parameter) not in held]
    if not missing:
        return
    adapted = {id(parameter) for parameter in trained.values()} & set(_adapter_parameters(model))
    # Made for another model, or before the adapter was added
    stale = bool(held - known) or (bool(adapted) and not adapted & held)
    some = f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
    if len(missing) == len(trained) or stale:
        raise ConfigError(
            f"You passed an optimizer that leaves {len(missing)} of the policy's {len(trained)} trained tensors as "
            f"they are: {some}. It holds {len(held - {id(p) for p in trained.values()})} others, such as those of "
            "the model before its adapter was added (`peft_config` adds one when the trainer is made) or of another "
            "model.",
            remedy="Leave the optimizer out and set `optim` and `learning_rate`; or wrap the model with "
            "`get_peft_model` first, make the optimizer from its parameters, and pass both without `peft_config`.",
        )
    logger.warning(
        "The optimizer you passed holds %d of the policy's %d trained tensors; the others get a gradient and are "
        "never moved: %s. Freeze them with `requires_grad_(False)` if that is meant.",
        len(trained) - len(missing),
        len(trained),
        some,
    )


def _held_parameters(optimizer: object) -> set[int] | None:
    """Return the ids of the parameters an optimizer moves; `None` where it does not tell, as those of DeepSpeed."""
    by_layer = getattr(optimizer, "optimizer_dict", None)  # transformers' layer-wise ones hold a dummy
    if by_layer:
        return {id(parameter) for parameter in by_layer}
    groups = getattr(optimizer, "param_groups", None)
    return None if groups is None else {id(parameter) for group in groups for parameter in group["params"]}


def warn_of_no_learning_rate(model: nn.Module, optimizer: object) -> None:
    """
    Log that a policy is not trained, where the learning rate of all its parameters is 0; one that rises from 0 is not.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The policy.
        optimizer (`torch.optim.Optimizer`):
            The optimizer, before its first step.
    """
    trained = {id(parameter) for parameter in policy_parameters(model).values()}
    groups = [g for g in getattr(optimizer, "param_groups", None) or () if trained & {id(p) for p in g["params"]}]
    if groups and not any(group.get("initial_lr", group["lr"]) for group in groups):
        logger.warning(
            "The learning rate of the policy is 0: rollouts are made and scored, and no weight of it is changed. Set "
            "`learning_rate`, or the `lr` of the optimizer you passed, to train it."
        )


def warn_of_dropout(model: nn.Module) -> None:
    """
    Warn where the policy is trained with dropout, without which its tokens are sampled.

    Dropout is a module, a number in a layer or one in the configuration; which of these acts, two passes in training
    mode tell, where one of them is above 0.

    Args:
        model (`nn.Module`):
            The policy, before it is wrapped.
    """
    rates = _dropout_rates(model)
    if rates and _differs_in_training(model):
        logger.warning(
            "The policy has active dropout (%s). Tokens are sampled without it and trained with it, so the ratio is "
            "not 1 even before the first update. Set `disable_dropout=True`, which reaches modules, `lora_dropout=0`, "
            "and the dropout of the model's configuration to 0, which `disable_dropout` does not reach.",
            ", ".join(f"`{name}={rate:g}`" for name, rate in sorted(rates.items())[:8]),
        )


def _dropout_rates(model: nn.Module) -> dict[str, float]:
    """Return rates above 0 by the name of what holds them: modules, numbers of layers, the model's configuration."""
    text_config = getattr(model, "config", None)
    text_config = text_config.get_text_config() if text_config is not None else None
    held = [] if text_config is None else list(vars(text_config).items())
    for name, module in model.named_modules():
        if "drop" in type(module).__name__.lower():
            own_name = next((part for part in reversed(name.split(".")) if "drop" in part), "dropout")
            held.append((own_name, getattr(module, "p", None)))
        held += vars(module).items()
    rates: dict[str, float] = {}
    for key, value in held:
        if "drop" in key and type(value) is float and value > 0:
            rates[key] = max(value, rates.get(key, 0.0))
    return rates


def _differs_in_training(model: nn.Module) -> bool:
    """Return whether two passes over the same tokens differ in training mode; true where that cannot be tried."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        device = next(model.parameters()).device
        size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        ids = (torch.arange(32, device=device) * 7 + 3)[None] % size
        with torch.random.fork_rng(), torch.no_grad():
            model.train()
            first, second = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
        return not torch.equal(first, second)
    except Exception:  # parameters that are sharded already, a model that takes other inputs
        return True
    finally:
        for module, training in modes:
            module.training = training


def check_has_values(args: ToolGRPOConfig, model: object, reward_funcs: object) -> None:
    """
    Check that no tensor of a model is on the meta device, where it has a shape and no values. With FSDP the first
    process may be the only one that has them.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration, with what the model is loaded by.
        model (`str`, `PreTrainedModel` or `PeftModel`):
            As it was passed.
        reward_funcs:
            As they were passed; models among them are looked at, too.

    Raises:
        ConfigError: naming the first such tensor.
    """
    given = args.model_init_kwargs
    place = given.get("device_map") if isinstance(given, dict) else None
    places = place.values() if isinstance(place, dict) else [place]
    if any(str(found) == "meta" for found in places):
        raise ConfigError(
            "You passed `model_init_kwargs={'device_map': ...}` with the meta device, where parameters have a shape "
            "and no values: nothing can be sampled or trained.",
            remedy="Leave `device_map` out; the trainer puts the model on its device.",
        )
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    functions = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    models = {"the model": model, **{f"reward function {n}": function for n, function in enumerate(functions)}}
    for what, module in models.items():
        if not isinstance(module, nn.Module):
            continue
        tensors = [*module.named_parameters(), *module.named_buffers()]
        empty = [name for name, tensor in tensors if tensor.is_meta]
        if empty:
            raise ConfigError(
                f"You passed as {what} a {type(module).__name__} with {len(empty)} of {len(tensors)} tensors on the "
                f"meta device, such as `{empty[0]}`: they have a shape and no values, so that nothing can be "
                "computed.",
                remedy="Load it with `from_pretrained` outside of `torch.device('meta')` and `init_empty_weights()`, "
                "or give it values with `to_empty(device='cpu')` and `load_state_dict`; add an adapter without "
                "`low_cpu_mem_usage=True`.",
            )
