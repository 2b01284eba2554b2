"""Checks of a trainer's arguments against each other, at construction: say what was passed, why it fails, what to do.

Owns the checks that need more than the configuration: data sets, tools, the prompts that name them, adapters. Fed by
the trainer.
"""

import itertools
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from trl.chat_template_utils import supports_tool_calling

from .config import ToolGRPOConfig
from .errors import ChatTemplateError, ConfigError, DatasetError, ToolNameError, ToolSchemaError
from .prompt_checks import PromptRenderer
from .shown_in_prompts import Part, hidden_parts
from .tools.names import check_tool_columns, find_mentions
from .tools.schema_forms import plain_form
from .tools.types import Tool


logger = logging.getLogger(__name__)

GREETING = [{"role": "user", "content": "Hello."}]
"""A prompt that tools are rendered with."""

ROWS_CHECKED = 20_000
"""Rows of each data set whose prompts are searched for tools that do not exist."""
STREAMED_ROWS_CHECKED = 100
"""The same for a data set that is streamed, where each row may cost a download."""

MENTIONS_SHOWN, MENTIONS_LISTED = 5, 10
"""Names in prompts that resemble a tool's: how many get a warning of their own, and how many more are listed."""

_INSTRUCTING = ("system", "developer")

# Tuners whose second adapter is a plain copy of the first; merged weights also need a difference to add to the base.
COPIED = ("LORA", "LOHA", "LOKR", "IA3")
MERGED = ("LORA", "LOHA", "LOKR")


def named_datasets(train: Any, evaluation: Any) -> Iterator[tuple[str, Any]]:
    """Every data set of a trainer with a name for messages."""
    if train is not None:
        yield "train_dataset", train
    if isinstance(evaluation, dict):
        for name, dataset in evaluation.items():
            yield f"eval_dataset[{name!r}]", dataset
    elif evaluation is not None:
        yield "eval_dataset", evaluation


def check_dataset(name: str, dataset: Any, has_tools: bool, has_environment: bool) -> None:
    """
    Check that a data set has prompts, and conversational ones where tools are called.

    Raises:
        DatasetError: for a data set without `prompt` where no environment gives it, string prompts with tools, and a
            format such as that of pandas.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise DatasetError(f"You passed `{name}` without a single row. Pass a data set that has prompts in it.")
    if isinstance(dataset, Dataset) and dataset.format["type"] not in (None, "custom", "torch"):
        raise DatasetError(
            f"You passed `{name}` in the format {dataset.format['type']!r}, which gives prompts as something else "
            f"than text or lists of messages. Pass `dataset.with_format(None)`."
        )
    columns = list(dataset.column_names or ())
    if "prompt" not in columns:  # a transform of the data set may make it
        columns += [name for name in next(iter(_rows(dataset, 1)), {}) if name not in columns]
    if "tools" in columns and not (has_tools or has_environment):
        logger.warning(
            "`%s` has a column `tools`, but you passed neither `tools` nor an `environment_factory`: no tool is shown "
            "to the policy and none can be called.",
            name,
        )
    if "prompt" not in columns and not has_environment:
        raise DatasetError(
            f"You passed `{name}` with the columns {', '.join(columns) or '(none)'}, and none of them is `prompt`. "
            f"Rename the column that holds the prompt, or pass an `environment_factory` whose `reset` returns it."
        )
    if not (has_tools or has_environment) or "prompt" not in columns:
        return
    for row in _rows(dataset, 1):
        if not isinstance(row["prompt"], list):
            raise DatasetError(
                f"You passed tools and `{name}`, whose prompts are of type {type(row['prompt']).__name__}. A tool "
                f"call is a message, so prompts have to be conversations: "
                f"[{{'role': 'user', 'content': {str(row['prompt'])[:60]!r}}}]."
            )


def check_rows(args: ToolGRPOConfig, dataset: Any) -> None:
    """
    Check that the training data is enough for one rollout batch, without which training ends at once.

    Args:
        args ([`ToolGRPOConfig`]):
            Batch sizes.
        dataset (`Dataset` or `IterableDataset`):
            The training data; of a stream as many rows are read as a rollout batch takes.

    Raises:
        DatasetError: for too few rows, with both numbers.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return
    size, count = int(args.generation_batch_size or 0), int(args.num_generations or 1)
    needed = size // count
    rows = len(dataset) if isinstance(dataset, Dataset) else sum(1 for _ in itertools.islice(dataset, needed))
    if rows < needed:
        raise DatasetError(
            f"`train_dataset` has {rows} row{'' if rows == 1 else 's'}, and a rollout batch takes {needed} prompts "
            f"({size} rollouts in groups of `num_generations={count}`): no batch would ever be whole, and training "
            f"would end after 0 steps. Add rows, or make batches smaller: lower `per_device_train_batch_size`, "
            f"`gradient_accumulation_steps`, `steps_per_generation` or `generation_batch_size`, or raise "
            f"`num_generations`."
        )


def check_tool_names(
    name: str, dataset: Any, rows: Sequence[dict[str, Any]], tools: Sequence[Tool], mode: str
) -> dict[str, str]:
    """
    Check that prompts name only tools that exist.

    Args:
        name (`str`):
            Name of the data set, for messages.
        dataset (`Dataset` or `IterableDataset`):
            The data set.
        rows (`Sequence[dict]`):
            Its rows, as [`prompt_rows`] reads them.
        tools (`Sequence[Tool]`):
            The tools.
        mode (`str`):
            `tool_mention_check` of [`ToolGRPOConfig`].

    Returns:
        `dict[str, str]`: What to say of each name that is merely suspicious.

    Raises:
        ToolNameError: for a message that calls a tool which does not exist, a `tools` column that lists one, and a
            text that seems to name one, as far as `mode` says.
    """
    if not tools or not rows:
        return {}
    names = [tool.name for tool in tools]
    for row in rows:
        check_tool_columns([*_listed(row.get("tools")), *_called(row.get("prompt"))], names)
    if mode == "off":
        return {}
    known = {*(dataset.column_names or ()), *itertools.chain.from_iterable(_identifiers(t.parameters) for t in tools)}
    texts = _instructions(rows)
    suspicious = {}
    for mention in find_mentions(texts, names, known):
        place, role = texts[mention.text]
        sentence = (
            f"`{name}`, row {place}: a {role} message names the tool `{mention.name}`, which does not exist; did you "
            f"mean `{mention.tool}`? It says: {mention.excerpt!r}."
        )
        if mode == "error" or (mode == "auto" and mention.reordered and role in _INSTRUCTING):
            raise ToolNameError(
                f"{sentence} Correct the prompt, or set `tool_mention_check='warn'` if this is meant to name no tool."
            )
        suspicious[mention.name] = sentence
    return suspicious


def warn_of_mentions(suspicious: dict[str, str]) -> None:
    """
    Log what [`check_tool_names`] found suspicious: a sentence for each of the first names, and one for all others.

    Args:
        suspicious (`dict[str, str]`):
            What to say, by name.
    """
    sentences, others = list(suspicious.values())[:MENTIONS_SHOWN], list(suspicious)[MENTIONS_SHOWN:]
    if others:
        listed = [f"`{other}`" for other in others[:MENTIONS_LISTED]] + ["..."] * (len(others) > MENTIONS_LISTED)
        sentences.append(f"Prompts name {len(others)} more identifiers that resemble tools: {', '.join(listed)}.")
    for sentence in sentences:
        logger.warning(
            "%s If no tool is meant, nothing is wrong; `tool_mention_check='off'` looks for none.",
            sentence,
            extra={"subject": "tools"},  # for the doctor's table
        )


def refuse_unrecorded(args: ToolGRPOConfig, whose: str) -> None:
    """
    Check that nothing is asked for that acts on recorded rollouts alone, where rollouts are TRL's own.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration.
        whose (`str`):
            What makes them TRL's own, for the message.

    Raises:
        ConfigError: naming the option.
    """
    neutral: dict[str, Any] = {
        "sampler_correction": None,
        "advantage_estimator": "group",
        "deterministic_rollouts": False,
        "force_rate": 0,
        "assist_warmup_steps": 0,
    }
    if not args.use_vllm:  # which is TRL's own option
        neutral["rollout_backend"] = "transformers"
    for name, value in neutral.items():
        if getattr(args, name) != value:
            raise ConfigError(
                f"You passed `{name}={getattr(args, name)!r}` with {whose}, whose rollouts are TRL's own. It acts on "
                f"rollouts of this package alone. Leave one of them out."
            )


def prompt_rows(dataset: Any) -> list[dict[str, Any]]:
    """
    Prompts and `tools` columns of the first rows of a data set, as many as are checked.

    Args:
        dataset (`Any`):
            A data set; of anything but a `Dataset` or an `IterableDataset` no row is read.
    """
    return list(_rows(dataset, ROWS_CHECKED)) if isinstance(dataset, (Dataset, IterableDataset)) else []


def check_forcing(args: Any, recording: bool, has_tools: bool, train_dataset: Any = None) -> None:
    """
    Check that forcing, where asked for, can act, and that training outlasts it; and that rollouts which are to be
    deterministic are this package's own.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration.
        recording (`bool`):
            Whether rollouts are this package's own.
        has_tools (`bool`):
            Whether they have tools.
        train_dataset (`Dataset`, *optional*):
            What `num_train_epochs` counts.

    Raises:
        ConfigError: for `force_rate` above 0 without tools or on a path that is not this package's, for a warm-up
            longer than training, and for `deterministic_rollouts` with a `rollout_func`.
    """
    if args.deterministic_rollouts and not recording:
        raise ConfigError(
            "You passed `deterministic_rollouts=True` with a `rollout_func`, whose noise is its own. Leave one out."
        )
    if args.force_rate > 0 and not has_tools:
        raise ConfigError(
            f"You passed `force_rate={args.force_rate}` without tools, so there is no call to force. Pass `tools` or "
            f"an `environment_factory`, or leave `force_rate` at 0."
        )
    if (args.force_rate > 0 or args.assist_warmup_steps > 0) and not recording:
        raise ConfigError(
            "You passed `force_rate` or `assist_warmup_steps` with rollouts of TRL's own (`rollout_func` or "
            "`record_sample_logprobs=False`), which do not know which tokens were forced. Leave them out."
        )
    if args.assist_warmup_steps > 0 and args.max_steps < 0 and hasattr(train_dataset, "__len__"):
        steps = training_steps(args, len(train_dataset))
        if args.assist_warmup_steps > steps:
            raise ConfigError(
                f"You passed `assist_warmup_steps={args.assist_warmup_steps}`, but {args.num_train_epochs:g} epochs "
                f"of {len(train_dataset)} rows are {steps} optimizer steps: the warm-up would be longer than "
                f"training. Lower it, or train longer."
            )


def check_optimizer(args: Any) -> None:
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
            f"You passed `optim={name!r}` on a CPU. Paged optimizers move their state between a GPU and its host, and "
            f"on a CPU there is nothing to page. Use `optim={instead!r}`, or train on a GPU."
        )


# The policy, and what moves it


def policy_parameters(model: Any) -> dict[str, nn.Parameter]:
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


def _adapter_parameters(model: Any) -> dict[int, tuple[str, bool]]:
    """Return, by the id of each parameter of an adapter, the adapter's name and whether the forward pass uses it."""
    found = {}
    for module in model.modules() if hasattr(model, "peft_config") else ():
        off = getattr(module, "disable_adapters", False) is True or bool(getattr(module, "merged_adapters", ()))
        for table in getattr(module, "adapter_layer_names", ()):
            for adapter, layer in getattr(getattr(module, table, None), "items", dict)():
                used = not off and adapter in module.active_adapters
                own = layer.parameters() if isinstance(layer, nn.Module) else (layer,)
                found.update({id(parameter): (adapter, used) for parameter in own})
    return found


def check_policy_is_trained(model: Any) -> None:
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
            f"{start}no parameter of the {type(model).__name__} you passed requires a gradient. Call "
            f"`model.requires_grad_(True)`, or pass a `peft_config` to train an adapter of the frozen model."
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
    raise ConfigError(f"{start}{reason}, and the base model is frozen. {remedy}")


def check_head(model: Any) -> None:
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
            f"You passed `trainable_token_indices` for a model whose LM head is tied to its embedding, so that the "
            f"head is a {type(head).__name__}, with which TRL cannot compute log-probs. Leave "
            f"`trainable_token_indices` out, or untie the head (`tie_word_embeddings=False`) before you add it."
        )


def check_adapter_is_recorded(model: Any) -> None:
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
            f"`model.generate` gives tokens other log-probs than a forward pass does, so that every ratio would be "
            f"wrong. Use another adapter, such as `LoraConfig`."
        )


def check_optimizer_holds_policy(model: Any, optimizer: Any, scheduler: Any = None) -> None:
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
            "rate would never change. Pass both in `optimizers=(optimizer, scheduler)`, or neither and set "
            "`lr_scheduler_type`."
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
            f"they are: {some}. It holds {len(held - {id(p) for p in trained.values()})} others, such as those of the "
            f"model before its adapter was added (`peft_config` adds one when the trainer is made) or of another "
            f"model. Leave the optimizer out and set `optim` and `learning_rate`; or wrap the model with "
            f"`get_peft_model` first, make the optimizer from its parameters, and pass both without `peft_config`."
        )
    logger.warning(
        "The optimizer you passed holds %d of the policy's %d trained tensors; the others get a gradient and are "
        "never moved: %s. Freeze them with `requires_grad_(False)` if that is meant.",
        len(trained) - len(missing),
        len(trained),
        some,
    )


def warn_of_no_learning_rate(model: Any, optimizer: Any) -> None:
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


def _held_parameters(optimizer: Any) -> set[int] | None:
    """Return the ids of the parameters an optimizer moves; `None` where it does not tell, as those of DeepSpeed."""
    by_layer = getattr(optimizer, "optimizer_dict", None)  # transformers' layer-wise ones hold a dummy
    if by_layer:
        return {id(parameter) for parameter in by_layer}
    groups = getattr(optimizer, "param_groups", None)
    return None if groups is None else {id(parameter) for group in groups for parameter in group["params"]}


def training_steps(args: Any, rows: int) -> int:
    """
    Optimizer steps in `num_train_epochs` epochs, as TRL counts them.

    Args:
        args (`GRPOConfig`):
            Batch sizes and epochs.
        rows (`int`):
            Rows of the training dataset.
    """
    rollout_batches = rows // (args.generation_batch_size // args.num_generations)
    micro_batches = rollout_batches * args.steps_per_generation * args.num_iterations
    return math.ceil(args.num_train_epochs * max(math.ceil(micro_batches / args.gradient_accumulation_steps), 1))


def warn_of_dropout(model: torch.nn.Module) -> None:
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


def _dropout_rates(model: torch.nn.Module) -> dict[str, float]:
    """Rates above 0 by the name of what holds them: modules, numbers of layers, the model's configuration."""
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


def _differs_in_training(model: torch.nn.Module) -> bool:
    """Whether two passes over the same tokens differ in training mode; true where that cannot be tried."""
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


def _rows(dataset: Any, count: int) -> Iterable[dict[str, Any]]:
    """Rows of a data set; where no transform may need the rest, only what is read here, since images are slow."""
    if isinstance(dataset, Dataset):
        read = [name for name in ("prompt", "tools") if name in dataset.column_names]
        if dataset.format["type"] != "custom":
            if not read:
                return ()
            dataset = dataset.select_columns(read)
            batch = dataset[: min(count, len(dataset))]  # at once: row by row takes ten times as long
            return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        return (dataset[index] for index in range(min(count, len(dataset))))
    return itertools.islice(iter(dataset), min(count, STREAMED_ROWS_CHECKED))


def check_template(processing_class: Any) -> None:
    """
    Check that a chat template can render a tool conversation.

    Raises:
        ChatTemplateError: if it cannot, or if there is none.
    """
    if processing_class is not None and not supports_tool_calling(processing_class):
        name = getattr(processing_class, "name_or_path", "") or type(processing_class).__name__
        raise ChatTemplateError(
            f"You passed tools and the tokenizer {name!r}, whose chat template does not support tool calling: it has "
            f"to render a user message, an assistant message with a call and the tool's result. Set "
            f"`tokenizer.chat_template` to one that does, such as trl/chat_templates/qwen3.jinja."
        )


def check_rendering(processing_class: Any, tools: Sequence[Tool], chat_template: str | None, kwargs: Any) -> None:
    """
    Check that a chat template can show each tool to the policy; what it leaves out of a tool that can be called
    without it is logged. A template that shows no tools at all is no matter here.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Renders prompts.
        tools (`Sequence[Tool]`):
            The tools.
        chat_template (`str`, *optional*):
            Template to render with, instead of the tokenizer's own.
        kwargs (`dict`, *optional*):
            More arguments of `apply_chat_template`.

    Raises:
        ToolSchemaError: for a tool with a schema the template fails on, or of which it leaves out a property, a type
            or the values that are allowed.
    """
    renderer = PromptRenderer(processing_class, (), chat_template, kwargs)
    for tool in tools:
        hidden: list[Part] = []
        try:
            text = renderer.text(GREETING, [tool.schema])
            reason = _garbled(text, tool.parameters)
            if reason is None and text != renderer.text(GREETING, []):
                hidden = hidden_parts(tool.schema, lambda schema: renderer.text(GREETING, [schema]))
        except Exception as error:
            reason = str(error)
        needed = [part.words for part in hidden if part.needed]
        if needed:
            reason = f"it does not show {', '.join(needed[:6])}{' and more' if len(needed) > 6 else ''}"
        if reason is not None:
            raise ToolSchemaError(
                f"The chat template cannot render the tool {tool.name!r}: {reason}. Its parameters are "
                f"{json.dumps(tool.parameters)[:400]}. Write the schema in words that the template knows (one `type` "
                f"for each property, and an `enum` of strings, are what all of them do), leave the tool out, or use "
                f"another template."
            )
        if hidden:
            logger.warning(
                "The chat template does not show all of the tool %r: %s. Say it in a description that is shown, where "
                "it matters.",
                tool.name,
                ", ".join(part.words for part in hidden[:8]) + (" and more" if len(hidden) > 8 else ""),
            )


def shown_tool(processing_class: Any, tool: Tool, chat_template: str | None, kwargs: Any) -> Tool:
    """
    Return a tool as the prompt should show it: as it is, or with its schema written in plainer words that mean the
    same, where a chat template does not know those of the schema.

    Args:
        processing_class, chat_template, kwargs:
            As in [`check_rendering`].
        tool ([`Tool`]):
            The tool.

    Raises:
        ToolSchemaError: if the template can show neither.
    """
    try:
        check_rendering(processing_class, [tool], chat_template, kwargs)
        return tool
    except ToolSchemaError as error:
        parameters = plain_form(tool.schema["function"]["parameters"])
        if parameters == tool.schema["function"]["parameters"]:
            raise
        plain = replace(tool, parameters=parameters)
        try:
            check_rendering(processing_class, [plain], chat_template, kwargs)
        except ToolSchemaError:
            raise error from None
        return plain


def warn_of_hidden_tools(renderer: PromptRenderer, tools: Sequence[Tool], rows: Sequence[dict[str, Any]]) -> None:
    """
    Warn of a chat template that ignores tools, unless the first prompt names each of them by itself.

    Args:
        renderer ([`PromptRenderer`]):
            Renders prompts.
        tools (`Sequence[Tool]`):
            The tools.
        rows (`Sequence[dict]`):
            Rows of the training data.
    """
    if not tools or renderer.text(GREETING, [tools[0].schema]) != renderer.text(GREETING, []):
        return
    said = " ".join(_texts(rows[:1]))
    if not all(re.search(rf"(?<!\w){re.escape(tool.name)}(?!\w)", said) for tool in tools):
        names = ", ".join(tool.name for tool in tools[:8])
        logger.warning(
            "The chat template does not show tools: no prompt tells the policy of %s, or how to call it. Describe the "
            "tools in a system message, or use a template that shows them (trl/chat_templates has some).",
            names,
        )


def _garbled(text: str, schema: Any) -> str | None:
    """Which types of a schema a template has written as Python writes a list, as those do that expect one type."""
    inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    types = schema.get("type") if isinstance(schema, dict) else None
    if isinstance(types, list) and str(types).upper() in text.upper():
        return f"it shows the types {types} as one type of that name"
    return next((found for part in inner if (found := _garbled(text, part)) is not None), None)


def _texts(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        prompt = row.get("prompt")
        for message in prompt if isinstance(prompt, list) else ():
            yield from _texts_of(message)


def _texts_of(message: dict[str, Any]) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        yield from (part["text"] for part in content if isinstance(part, dict) and part.get("text"))


def _instructions(rows: Iterable[dict[str, Any]]) -> dict[str, tuple[int, str]]:
    """Return the texts that may tell the policy what to do, those of the system first, each with its row and role."""
    found: dict[str, tuple[int, str]] = {}
    others: dict[str, tuple[int, str]] = {}
    for number, row in enumerate(rows):
        prompt = row.get("prompt")
        for message in prompt if isinstance(prompt, list) else ():
            role = message.get("role")
            if role not in ("tool", "function"):  # what a tool has said is data
                for text in _texts_of(message):
                    (found if role in _INSTRUCTING else others).setdefault(text, (number, role))
    return found | {text: source for text, source in others.items() if text not in found}


def _identifiers(schema: Any) -> Iterator[str]:
    """Yield the names of properties in a schema, also within others, and the texts it allows as values."""
    if isinstance(schema, list):
        yield from itertools.chain.from_iterable(map(_identifiers, schema))
    for key, inner in schema.items() if isinstance(schema, dict) else ():
        if key == "enum" and isinstance(inner, list):
            yield from (value for value in inner if isinstance(value, str))
        else:
            yield from inner if key == "properties" and isinstance(inner, dict) else ()
            yield from _identifiers(inner)


def _called(prompt: Any) -> list[str]:
    """Names of the tools that the messages of a prompt call already."""
    calls = [
        call for message in (prompt if isinstance(prompt, list) else ()) for call in message.get("tool_calls") or ()
    ]
    return _listed(calls)


def _listed(tools: Any) -> list[str]:
    """Names in a row's `tools` column: names, schemas, or either as JSON text."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            tools = [tools]
    found = []
    for tool in tools if isinstance(tools, list) else ():
        if isinstance(tool, dict):
            tool = (tool.get("function") or tool).get("name")
        if isinstance(tool, str):
            found.append(tool)
    return found


def reference_mode(args: ToolGRPOConfig) -> str:
    """What `ref_sync_mode` comes to for a PEFT run."""
    if args.ref_sync_mode == "auto":
        return "adapter" if args.ref_model_mixup_alpha == 1 else "merged"
    return args.ref_sync_mode


def check_reference(args: ToolGRPOConfig, model: Any, peft_config: Any) -> None:
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
    adapters: dict[str, Any] = getattr(model, "peft_config", None) or {}
    if args.beta != 0 and adapters:
        _check_given_adapters(args.beta, model, adapters)
    if not args.sync_ref_model:
        return
    config: PeftConfig | None = peft_config or adapters.get("default")
    if config is None:
        if args.ref_sync_mode != "auto":
            raise ConfigError(
                f"You passed `ref_sync_mode={args.ref_sync_mode!r}` for a model without an adapter, whose reference "
                f"is a second model. Leave it at 'auto', or pass a `peft_config`."
            )
        return
    mode, kind = reference_mode(args), str(getattr(config.peft_type, "value", config.peft_type))
    supported = COPIED if mode == "adapter" else MERGED
    if kind not in supported:
        raise ConfigError(
            f"You passed `sync_ref_model=True` with an adapter of type {kind}, which a reference of the kind {mode!r} "
            f"cannot follow. Use LoRA (`LoraConfig`); supported are {', '.join(supported)}."
        )


def check_best_metric(args: ToolGRPOConfig, eval_dataset: Any) -> None:
    """
    Check that the metric which chooses the best model is one of some evaluation set.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration.
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*):
            What is evaluated.

    Raises:
        ConfigError: if there are several sets, and the metric is of none of them.
    """
    metric = args.metric_for_best_model
    if not isinstance(eval_dataset, dict) or metric is None or args.eval_strategy == "no":
        return
    bare = metric.removeprefix("eval_")
    if any(bare.startswith(f"{name}_") for name in eval_dataset):
        return
    choices = " or ".join(repr(f"eval_{name}_{bare}") for name in eval_dataset)
    raise ConfigError(
        f"You passed `eval_dataset` as a dict, and the best model is chosen by `metric_for_best_model={metric!r}`. "
        f"Each set has figures of its own, so that there is no `eval_{bare}`. Pass {choices}."
    )


def check_has_values(args: Any, model: Any, reward_funcs: Any) -> None:
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
    given: Any = args.model_init_kwargs
    place = given.get("device_map") if isinstance(given, dict) else None
    places = place.values() if isinstance(place, dict) else [place]
    if any(str(found) == "meta" for found in places):
        raise ConfigError(
            "You passed `model_init_kwargs={'device_map': ...}` with the meta device, where parameters have a shape "
            "and no values: nothing can be sampled or trained. Leave `device_map` out; the trainer puts the model on "
            "its device."
        )
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    functions = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    models = {"the model": model, **{f"reward function {n}": function for n, function in enumerate(functions)}}
    for what, module in models.items():
        if not isinstance(module, torch.nn.Module):
            continue
        tensors = [*module.named_parameters(), *module.named_buffers()]
        empty = [name for name, tensor in tensors if tensor.is_meta]
        if empty:
            raise ConfigError(
                f"You passed as {what} a {type(module).__name__} with {len(empty)} of {len(tensors)} tensors on the "
                f"meta device, such as `{empty[0]}`: they have a shape and no values, so that nothing can be "
                f"computed. Load it with `from_pretrained` outside of `torch.device('meta')` and "
                f"`init_empty_weights()`, or give it values with `to_empty(device='cpu')` and `load_state_dict`; add "
                f"an adapter without `low_cpu_mem_usage=True`."
            )


def _check_given_adapters(beta: float, model: Any, adapters: dict[str, Any]) -> None:
    """Check that a model that comes with adapters trains the one that its reference is a copy of."""
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"You passed a model with adapters that transformers has loaded into it and `beta={beta}`. No reference "
            f"can be kept of them. Load them with `PeftModel.from_pretrained(model, folder, is_trainable=True)`."
        )
    if "default" not in adapters:
        raise ConfigError(
            f"You passed a model with the adapters {', '.join(map(repr, adapters))} and `beta={beta}`, but none "
            f"named 'default', which is the one that is trained and copied for the reference. Load it with "
            f"`adapter_name='default'`."
        )
    active = list(model.active_adapters)
    if active != ["default"]:
        raise ConfigError(
            f"You passed a model with the active adapters {active} and `beta={beta}`; the reference follows one, "
            f"named 'default'. Call `model.set_adapter('default')`, or load the adapter to train under that name."
        )
