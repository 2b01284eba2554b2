"""Response templates: how a family of chat templates writes thoughts, calls and text.

TRL knows them by the bytes of the chat template. Here they are known by what the chat template renders, and those of
TRL that read calls otherwise than they are written are replaced. All of them are valid for transformers' own parser.
"""

import contextlib
import copy
import functools
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jinja2
from trl import chat_template_utils as trl_templates


RAW_TEXT = "it's"
"""Text that templates which write texts as they are write between single quotes."""

_FUNCTION = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_AS_IT_IS = {"name": "text", "args": {"strip": False}}


def _mended(template: dict[str, Any], **fields: dict[str, Any]) -> dict[str, Any]:
    """`template` with other fields."""
    return {**template, "fields": {**template["fields"], **fields}}


# A call is opened by its marker alone, with an empty name, so that one which is not as the template writes it is
# malformed and not text.
# An argument ends where the markup goes on after its closing tag, and one newline at each end is markup.
_XML_CALLS = {
    "open_pattern": r"<tool_call>\s*(?:<function=(?P<name>[^\n>]+)>|(?P<name>))",
    "close_pattern": r"\s*(?:</function>\s*)?</tool_call>\s*",
    "repeats": True,
    "content": "xml-inline",
    "content_args": {
        "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"
        r"(?=\s*(?:<parameter=|(?:</function>\s*)?</tool_call>|\Z))",
        "value_parser": _AS_IT_IS,
    },
    "transform": _FUNCTION,
}
_GLM_CALLS = {
    "open_pattern": r"<tool_call>\s*(?P<name>[^\s<{]*)\s*",
    "close_pattern": r"\s*</tool_call>\s*",
    "repeats": True,
    "content": "xml-inline",
    "content_args": {
        "tag_pattern": r"<arg_key>(?P<key>[^<]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"
        r"(?=\s*(?:<arg_key>|</tool_call>|\Z))",
        "value_parser": _AS_IT_IS,
    },
    "transform": _FUNCTION,
}

_DEEPSEEKV3 = {
    "defaults": {"role": "assistant"},
    "start_anchor_pattern": r"<｜Assistant｜>|<｜tool▁outputs▁end｜>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"},
        "tool_calls": {
            "open_pattern": r"(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>"
            r"(?:function<｜tool▁sep｜>(?P<name>[^\n]+)\n```json\n|(?P<name>))",
            "close_pattern": r"(?:\s*```)?<｜tool▁call▁end｜>\s*(?:<｜tool▁calls▁end｜>)?",
            "repeats": True,
            "content": "json",
            "transform": _FUNCTION,
        },
        "content": {"close_pattern": r"<｜end▁of▁sentence｜>\s*", "content": "text"},
    },
}

# A message to a tool (` to=get_salary<|message|>`) that invokes none is a call with an empty name
_MUSE_GLIMMER = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|start|>assistant",
    "fields": {
        "reasoning_content": {
            "open": " to=self<|message|>",
            "close_pattern": r"<\|eom\|>(?:<\|start\|>assistant)?",
            "content": "text",
        },
        "tool_calls": {
            "open_pattern": r"(?: to=[^<\s]+<\|message\|>\s*)?"
            r'(?:<atem:function_calls>\s*(?:<atem:invoke name="(?P<name>[^"]+)">|(?P<name>))'
            r'|<atem:invoke name="(?P<name>[^"]+)">)'
            r"| to=(?!(?:user|self)<)[^<\s]+<\|message\|>(?!(?:(?!<\|eo[mt]\|>).)*<atem:)(?P<name>)",
            "close_pattern": r"\s*</atem:invoke>\s*(?:</atem:function_calls>)?(?:<\|eom\|><\|start\|>assistant)?"
            r"|<\|eom\|><\|start\|>assistant|(?=<\|eot\|>)",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r'<atem:parameter name="(?P<key>[^"]+)">(?P<value>.*?)</atem:parameter>'
                r"(?=\s*(?:<atem:parameter name=|</atem:invoke>\s*(?:</atem:function_calls>|<atem:invoke)|\Z))",
                "value_parser": _AS_IT_IS,
            },
            "transform": _FUNCTION,
        },
        "content": {
            "open_pattern": r"(?: to=user)?<\|message\|>"
            r"| to=(?!self<)[^<\s]+<\|message\|>(?=(?:(?!<\|eo[mt]\|>).)*<atem:)",
            "close_pattern": r"<\|eot\|>|<\|eom\|>(?:<\|start\|>assistant)?|(?=<atem:(?:function_calls|invoke)\b)|$",
            "content": "text",
        },
    },
}

# Harmony: the recipient stands before or after the channel, and the type of the content is a constraint or a word
_HARMONY_TYPE = r"\s*(?:<\|constrain\|>)?\s*\w*\s*<\|message\|>"
_GPTOSS = _mended(
    trl_templates.gptoss_template,
    thinking={
        "open_pattern": rf"<\|channel\|>analysis{_HARMONY_TYPE}",
        "close_pattern": r"<\|end\|>\s*(?:<\|start\|>assistant)?",
        "content": "text",
    },
    content={
        "open_pattern": rf"<\|channel\|>(?:final|commentary){_HARMONY_TYPE}",
        "close_pattern": r"<\|return\|>\s*|<\|end\|>\s*(?:<\|start\|>assistant)?",
        "content": "text",
    },
    tool_calls={
        "open_pattern": r"(?:<\|channel\|>\w+)?\s*to=functions\.(?P<name>[^\s<]+)\s*(?:<\|channel\|>\w+)?"
        + _HARMONY_TYPE,
        "close_pattern": r"<\|call\|>\s*",
        "repeats": True,
        "content": "json",
        "transform": _FUNCTION,
    },
)

# The call is opened by its own JSON, which also ends it
_LLAMA3 = _mended(
    trl_templates.llama3_template,
    tool_calls={
        "open_pattern": r'(?=\{\s*"name":\s*"[^"]+",\s*"(?:parameters|arguments)":)',
        "close_pattern": r"<\|eo[tm]_id\|>\s*|$",
        "repeats": True,
        "content": "json",
        "transform": {
            "type": "function",
            "function": {"name": "{content.name}", "arguments": "{content.parameters}"},
        },
    },
)

_TRLS_GEMMA4: dict[str, Any] = trl_templates.gemma4_template
_GEMMA4 = _mended(
    _TRLS_GEMMA4,
    tool_calls={
        **_TRLS_GEMMA4["fields"]["tool_calls"],
        "open_pattern": r"<\|tool_call>(?:call:(?P<name>[\w.\-]+)|(?P<name>))",
    },
)

_LFM2: dict[str, Any] = _mended(
    trl_templates.lfm2_2_5_template,
    tool_calls={
        "open": "<|tool_call_start|>",
        "close_pattern": r"\s*<\|tool_call_end\|>\s*",
        "content": "python-call-list",
        "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
        "transform_each": True,
    },
)
# Texts between single quotes as they are, those that hold a quote included
_LFM2_RAW = _mended(_LFM2, tool_calls={**_LFM2["fields"]["tool_calls"], "content_args": {"strings": "raw"}})

# The prompt opens every thought, and closes those that are not wanted. A thought begins where the turn does: to look
# ahead from every place takes minutes for a long turn. What the prompt closed, no `</think>` in a text opens again.
_NEMOTRON = {
    **_mended(
        trl_templates.nemotron_3_template,
        reasoning_content={
            "open_pattern": r"\A(?=.*?</think>)",
            "close_pattern": r"</think>\s*",
            "content": "text",
        },
        tool_calls=_XML_CALLS,
    ),
    "start_anchor_pattern": r"<\|im_start\|>assistant\n<think>\n?",
}


_MISSING = {
    "deepseekv3": _DEEPSEEKV3,
    "diffusion_gemma": trl_templates.gemma4_template,
    "muse_glimmer": _MUSE_GLIMMER,
}
_MENDED = (
    (trl_templates.qwen3_5_template, _mended(trl_templates.qwen3_5_template, tool_calls=_XML_CALLS)),
    (trl_templates.nemotron_3_template, _NEMOTRON),
    (trl_templates.glm4moe_template, _mended(trl_templates.glm4moe_template, tool_calls=_GLM_CALLS)),
    (trl_templates.gptoss_template, _GPTOSS),
    (trl_templates.llama3_template, _LLAMA3),
    (trl_templates.gemma4_template, _GEMMA4),
)


def response_template_of(tokenizer: Any) -> dict[str, Any] | None:
    """
    Return the response template for what a tokenizer's chat template renders.

    A chat template is known by a call, a plain turn and a generation prompt as it renders them, so that the templates
    TRL ships for training and those that differ elsewhere (a comment, another system prompt) are read like the one
    they came from.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with a chat template.

    Returns:
        `dict` or `None`: TRL's response template, or one of ours where TRL has none; `None` if no template that TRL
        ships renders the same.
    """
    found = _shipped().get(tokenizer.chat_template)
    if found is None:
        turns = _turns(tokenizer, tokenizer.chat_template)
        shipped = _shipped().items() if turns is not None else ()
        found = next((answer for text, answer in shipped if _begin_with(turns, _turns(tokenizer, text))), None)
    return copy.deepcopy(found)


def mended(template: dict[str, Any], rendered_text: str) -> dict[str, Any]:
    """
    Return the response template that calls are read with: `template`, unless it is one of TRL's that is wrong.

    Args:
        template (`dict`):
            The tokenizer's response template.
        rendered_text (`str`):
            A call with the argument [`RAW_TEXT`], as the chat template renders it.
    """
    if template == trl_templates.lfm2_2_5_template:
        return _LFM2_RAW if f"'{RAW_TEXT}'" in rendered_text else _LFM2
    return next((ours for theirs, ours in _MENDED if theirs == template), template)


@contextlib.contextmanager
def without_comments(processing_class: Any) -> Iterator[None]:
    """
    Let TRL, which knows its chat templates by their bytes, know one that differs from them in comments alone.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            What holds the chat template; it has its own again afterwards.
    """
    own = getattr(processing_class, "chat_template", None)
    wanted = _without_comments(own) if isinstance(own, str) else None
    shipped = next((text for text in _chat_templates().values() if wanted and _without_comments(text) == wanted), None)
    if shipped is None or processing_class is None:
        yield
        return
    processing_class.chat_template = shipped
    try:
        yield
    finally:
        processing_class.chat_template = own


def _chat_templates() -> dict[str, str]:
    """The chat templates TRL ships, by their names."""
    ending = "_chat_template"
    found = {name.removesuffix(ending): text for name, text in vars(trl_templates).items() if name.endswith(ending)}
    return {name: text for name, text in found.items() if isinstance(text, str)}


@functools.cache
def _shipped() -> dict[str, dict[str, Any]]:
    """Response templates of the chat templates TRL ships for use, by the text of the chat template."""
    found = {}
    for name, text in _chat_templates().items():
        holder: Any = SimpleNamespace(chat_template=text, response_template=_MISSING.get(name))
        if holder.response_template is None:
            with contextlib.suppress(ValueError):  # TRL cannot read calls of that one
                trl_templates.add_response_schema(holder)
        if holder.response_template is not None:
            found[text] = holder.response_template
    return found


def _turns(tokenizer: Any, chat_template: str) -> tuple[str, ...] | None:
    """What a chat template renders for a call, a plain turn and a generation prompt; `None` if it renders no call."""
    user = {"role": "user", "content": "hello"}
    arguments = {"text": RAW_TEXT, "number": 3}
    function: dict[str, Any] = {"name": "look_up", "arguments": arguments}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "0", "function": function}]}

    def render(*messages: dict[str, Any], **options: Any) -> str:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, chat_template=chat_template, **options)

    try:
        start = render(user)
        try:
            called = render(user, call)
        except TypeError:  # DeepSeek-V3 joins arguments as text
            function["arguments"] = json.dumps(arguments)
            called = render(user, call)
        texts = (
            called,
            render(user, {"role": "assistant", "content": "text"}),
            render(user, add_generation_prompt=True),
        )
    except Exception:  # whatever a template raises for what it does not render
        return None
    return tuple(text.removeprefix(start) for text in texts) if "look_up" in called else None


def _begin_with(turns: tuple[str, ...] | None, others: tuple[str, ...] | None) -> bool:
    """Whether turns are those others, but for what ends a turn, which the templates for training add."""
    if turns is None or others is None:
        return False
    *written, prompt = zip(turns, others, strict=True)
    return prompt[0] == prompt[1] and all(turn.startswith(other.rstrip()) for turn, other in written)


def _without_comments(chat_template: str) -> list[tuple[str, str]]:
    """Tokens of a chat template, neighbouring texts as one."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers compiles them
    tokens: list[tuple[str, str]] = []
    try:
        for _, kind, text in environment.lex(chat_template):
            if kind.startswith("comment"):
                continue
            if kind == "data" and tokens and tokens[-1][0] == "data":
                tokens[-1] = ("data", tokens[-1][1] + text)
            else:
                tokens.append((kind, text))
    except jinja2.TemplateSyntaxError:
        return [("data", chat_template)]
    return tokens
