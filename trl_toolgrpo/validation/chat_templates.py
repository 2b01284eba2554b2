"""Checks of the chat template and of forcing: tools are shown, and calls that are to be forced can be.

They need the tokenizer, the tools or the data, in addition to the options that `config/checks.py` checks alone.
"""

import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import replace

from trl import GRPOConfig
from trl.chat_template_utils import supports_tool_calling

from ..chat.prompt_renderer import Processor, PromptRenderer, message_texts
from ..chat.shown_in_prompts import Part, hidden_parts
from ..config.batch_position import micro_batches_of
from ..config.fields import ToolGRPOConfig
from ..errors import ChatTemplateError, ConfigError, ToolSchemaError
from ..tools.schema_forms import plain_form
from ..tools.tool import Tool
from ..types import JSONValue, Row


logger = logging.getLogger(__name__)

GREETING = [{"role": "user", "content": "Hello."}]
"""A prompt that tools are rendered with."""


def check_template(processing_class: Processor | None) -> None:
    """
    Check that a chat template can render a tool conversation.

    Raises:
        ChatTemplateError: if it cannot, or if there is none.
    """
    if processing_class is not None and not supports_tool_calling(processing_class):
        name = getattr(processing_class, "name_or_path", "") or type(processing_class).__name__
        raise ChatTemplateError(
            f"You passed tools and the tokenizer {name!r}, whose chat template does not support tool calling: it has "
            "to render a user message, an assistant message with a call and the tool's result.",
            remedy="Set `tokenizer.chat_template` to one that does, such as trl/chat_templates/qwen3.jinja.",
        )


def check_rendering(renderer: PromptRenderer, tools: Sequence[Tool]) -> None:
    """
    Check that a chat template can show each tool to the policy; what it leaves out of a tool that can be called
    without it is logged. A template that shows no tools at all is no matter here.

    Args:
        renderer ([`PromptRenderer`]):
            Renders prompts.
        tools (`Sequence[Tool]`):
            The tools.

    Raises:
        ToolSchemaError: for a tool with a schema the template fails on, or of which it leaves out a property, a type
            or the values that are allowed.
    """
    for tool in tools:
        hidden: list[Part] = []
        try:
            text = renderer.text(GREETING, [tool.schema])
            reason = _misprint_reason(text, tool.parameters)
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
                f"{json.dumps(tool.parameters)[:400]}.",
                remedy="Write the schema in words that the template knows (one `type` for each property, and an "
                "`enum` of strings, are what all of them do), leave the tool out, or use another template.",
            )
        if hidden:
            logger.warning(
                "The chat template does not show all of the tool %r: %s. Say it in a description that is shown, where "
                "it matters.",
                tool.name,
                ", ".join(part.words for part in hidden[:8]) + (" and more" if len(hidden) > 8 else ""),
            )


def _misprint_reason(text: str, schema: JSONValue) -> str | None:
    """Return why a text misprints types of a schema: a template that expects one type prints a list as Python does."""
    inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    types = schema.get("type") if isinstance(schema, dict) else None
    if isinstance(types, list) and str(types).upper() in text.upper():
        return f"it shows the types {types} as one type of that name"
    return next((found for part in inner if (found := _misprint_reason(text, part)) is not None), None)


def shown_tool(renderer: PromptRenderer, tool: Tool) -> Tool:
    """
    Return a tool as the prompt should show it: as it is, or with its schema written in plainer words that mean the
    same, where a chat template does not know those of the schema.

    Args:
        renderer ([`PromptRenderer`]):
            Renders prompts.
        tool ([`Tool`]):
            The tool.

    Raises:
        ToolSchemaError: if the template can show neither.
    """
    try:
        check_rendering(renderer, [tool])
        return tool
    except ToolSchemaError as error:
        parameters = plain_form(tool.schema["function"]["parameters"])
        if parameters == tool.schema["function"]["parameters"]:
            raise
        plain = replace(tool, parameters=parameters)
        try:
            check_rendering(renderer, [plain])
        except ToolSchemaError:
            raise error from None
        return plain


def warn_of_hidden_tools(renderer: PromptRenderer, tools: Sequence[Tool], rows: Sequence[Row]) -> None:
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
    prompt = rows[0].get("prompt") if rows else None
    messages = prompt if isinstance(prompt, list) else []
    said = " ".join(text for message in messages for text in message_texts(message))
    if not all(re.search(rf"(?<!\w){re.escape(tool.name)}(?!\w)", said) for tool in tools):
        logger.warning(
            "The chat template does not show tools: no prompt tells the policy of %s, or how to call it. Describe the "
            "tools in a system message, or use a template that shows them (trl/chat_templates has some).",
            ", ".join(tool.name for tool in tools[:8]),
        )


def check_forcing(args: ToolGRPOConfig, has_tools: bool, train_dataset: object = None) -> None:
    """
    Check that forcing, where asked for, can act, and that training outlasts it.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration.
        has_tools (`bool`):
            Whether rollouts have tools.
        train_dataset (`Dataset`, *optional*):
            What `num_train_epochs` counts.

    Raises:
        ConfigError: for `force_rate` above 0 without tools, and for a warm-up longer than training.
    """
    if args.force_rate > 0 and not has_tools:
        raise ConfigError(
            f"You passed `force_rate={args.force_rate}` without tools, so there is no call to force.",
            remedy="Pass `tools` or an `environment_factory`, or leave `force_rate` at 0.",
        )
    if args.assist_warmup_steps > 0 and args.max_steps < 0 and hasattr(train_dataset, "__len__"):
        steps = training_steps(args, len(train_dataset))
        if args.assist_warmup_steps > steps:
            raise ConfigError(
                f"You passed `assist_warmup_steps={args.assist_warmup_steps}`, but {args.num_train_epochs:g} epochs "
                f"of {len(train_dataset)} rows are {steps} optimizer steps: the warm-up would be longer than "
                "training.",
                remedy="Lower it, or train longer.",
            )


def training_steps(args: GRPOConfig, rows: int) -> int:
    """
    Count the optimizer steps in `num_train_epochs` epochs, as TRL does.

    Args:
        args (`GRPOConfig`):
            Batch sizes and epochs.
        rows (`int`):
            Rows of the training dataset.
    """
    rollout_batches = rows // ((args.generation_batch_size or 1) // (args.num_generations or 1))
    micro_batches = rollout_batches * micro_batches_of(args)
    return math.ceil(args.num_train_epochs * max(math.ceil(micro_batches / args.gradient_accumulation_steps), 1))
