"""Checks of a trainer's arguments against each other, at construction: say what was passed, why it fails, what to do.

Owns the checks that need more than the configuration: data sets, tools, the prompts that name them, adapters. Fed by
the trainer.
"""

import itertools
import json
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from trl.chat_template_utils import supports_tool_calling

from .config import ToolGRPOConfig
from .errors import ChatTemplateError, ConfigError, DatasetError, ToolSchemaError
from .model_settings import model_setting
from .tools.names import check_tool_columns, check_tool_mentions
from .tools.types import Tool


logger = logging.getLogger(__name__)

ROWS_CHECKED = 20_000
"""Rows of each data set whose prompts are searched for tools that do not exist."""
STREAMED_ROWS_CHECKED = 100
"""The same for a data set that is streamed, where each row may cost a download."""

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
        DatasetError: for a data set without `prompt` where no environment gives it, or string prompts with tools.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise DatasetError(f"You passed `{name}` without a single row. Pass a data set that has prompts in it.")
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


def check_tool_names(name: str, dataset: Any, tools: Sequence[Tool]) -> None:
    """
    Check that prompts name only tools that exist; what is merely suspicious is logged.

    Raises:
        ToolNameError: for a prompt or a `tools` column that names a tool which does not exist.
    """
    if not tools or not isinstance(dataset, (Dataset, IterableDataset)):
        return
    names = [tool.name for tool in tools]
    known = {*(dataset.column_names or ()), *itertools.chain.from_iterable(_parameters(tool) for tool in tools)}
    rows = list(_rows(dataset, ROWS_CHECKED))
    for row in rows:
        check_tool_columns([*_listed(row.get("tools")), *_called(row.get("prompt"))], names)
    for warning in check_tool_mentions(_texts(rows), names, known):
        logger.warning("`%s`: %s", name, warning)


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


def warn_of_dropout(model: torch.nn.Module, disabled: bool) -> None:
    """Warn where the policy is trained with dropout, without which its tokens are sampled."""
    text_config = getattr(model, "config", None)
    text_config = text_config.get_text_config() if text_config is not None else None
    names = ("attention_dropout", "attn_pdrop", "resid_pdrop")
    functional = any(model_setting(text_config, name, 0) for name in names)
    active = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    if functional or (active and not disabled):
        logger.warning(
            "The policy has active dropout. Tokens are sampled without it and trained with it, so the ratio is not 1 "
            "even before the first update. Set `disable_dropout=True`, and `attention_dropout` of the model's "
            "configuration to 0, which it does not reach."
        )


def _rows(dataset: Any, count: int) -> Iterable[dict[str, Any]]:
    """Rows of a data set; where no transform may need the rest, only what is read here, since images are slow."""
    if isinstance(dataset, Dataset):
        read = [name for name in ("prompt", "tools") if name in dataset.column_names]
        if dataset.format["type"] != "custom":
            if not read:
                return ()
            dataset = dataset.select_columns(read)
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
    Check that a chat template can show each tool to the policy.

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
        ToolSchemaError: for a tool with a schema the template fails on.
    """
    prompt = [{"role": "user", "content": "Hello."}]
    for tool in tools:
        try:
            text = processing_class.apply_chat_template(
                prompt, tools=[tool.schema], chat_template=chat_template, tokenize=False, **(kwargs or {})
            )
            reason = _garbled(text, tool.parameters)
        except Exception as error:
            reason = str(error)
        if reason is not None:
            raise ToolSchemaError(
                f"The chat template cannot render the tool {tool.name!r}: {reason}. Its parameters are "
                f"{json.dumps(tool.parameters)[:400]}. Write the schema in words that the template knows (one `type` "
                f"for each property is what all of them do), leave the tool out, or use another template."
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
            content = message.get("content")
            if isinstance(content, str):
                yield content
            elif isinstance(content, list):
                yield from (part["text"] for part in content if isinstance(part, dict) and part.get("text"))


def _parameters(tool: Tool) -> Collection[str]:
    return (tool.parameters.get("properties") or {}).keys()


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
    Whether the reference of a run can be synced, before TRL builds it.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration.
        model (`str`, `PreTrainedModel` or `PeftModel`), peft_config (`PeftConfig`, *optional*):
            As passed to the trainer.

    Raises:
        ConfigError: for an adapter that cannot be followed, by name, and an adapter mode without an adapter.
    """
    adapters: dict[str, Any] = getattr(model, "peft_config", None) or {}
    if adapters and args.beta != 0 and "default" not in adapters:
        raise ConfigError(
            f"You passed a model with the adapters {', '.join(map(repr, adapters))} and `beta={args.beta}`, but none "
            f"named 'default', which is the one that is trained and copied for the reference. Load it with "
            f"`adapter_name='default'`."
        )
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
    active = getattr(model, "active_adapters", ["default"]) if adapters else ["default"]
    if list(active) != ["default"]:
        raise ConfigError(
            f"You passed a model with the active adapters {list(active)}; the reference follows one, named 'default'. "
            f"Call `model.set_adapter('default')`."
        )
    mode, kind = reference_mode(args), str(getattr(config.peft_type, "value", config.peft_type))
    supported = COPIED if mode == "adapter" else MERGED
    if kind not in supported:
        raise ConfigError(
            f"You passed `sync_ref_model=True` with an adapter of type {kind}, which a reference of the kind {mode!r} "
            f"cannot follow. Use LoRA (`LoraConfig`); supported are {', '.join(supported)}."
        )
