"""Response templates: how a family of chat templates writes thoughts, calls and text.

TRL identifies them by the bytes of the chat template. Here they are identified by what the chat template renders, and
those of TRL's that do not match how calls are written are replaced. All are valid for transformers' own parser.
"""

import contextlib
import copy
import functools
import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from trl import chat_template_utils as trl_templates

from ..models.temporary_attribute import temporary_attribute
from ..types import JSONObject, Message


RAW_TEXT = "it's"
"""Text that templates which do not escape texts write between single quotes."""

_FUNCTION = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}


def _with_fields(template: JSONObject, **fields: JSONObject) -> JSONObject:
    """Return `template` with other fields."""
    return {**template, "fields": {**template["fields"], **fields}}


def _text(open_pattern: str, close_pattern: str) -> JSONObject:
    """Return a field of text."""
    return {"open_pattern": open_pattern, "close_pattern": close_pattern, "content": "text"}


def _json_calls(open_pattern: str, close_pattern: str, transform: JSONObject = _FUNCTION) -> JSONObject:
    """Return a field of calls whose arguments are a JSON object."""
    return {**_text(open_pattern, close_pattern), "repeats": True, "content": "json", "transform": transform}


def _xml_calls(open_pattern: str, close_pattern: str, tag_pattern: str) -> JSONObject:
    """Return a field of calls with a tag around each argument, whose text is taken as it is."""
    value_parser = {"name": "text", "args": {"strip": False}}
    content_args = {"tag_pattern": tag_pattern, "value_parser": value_parser}
    return {**_json_calls(open_pattern, close_pattern), "content": "xml-inline", "content_args": content_args}


# A call is opened by its marker alone, with an empty name, so that one in another form than the template's is
# malformed and not text.
# An argument ends where the markup goes on after its closing tag, and one newline at each end is markup.
_QWEN_CALLS = _xml_calls(
    r"<tool_call>\s*(?:<function=(?P<name>[^\n>]+)>|(?P<name>))",
    r"\s*(?:</function>\s*)?</tool_call>\s*",
    r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"
    r"(?=\s*(?:<parameter=|(?:</function>\s*)?</tool_call>|\Z))",
)
_GLM_CALLS = _xml_calls(
    r"<tool_call>\s*(?P<name>[^\s<{]*)\s*",
    r"\s*</tool_call>\s*",
    r"<arg_key>(?P<key>[^<]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>(?=\s*(?:<arg_key>|</tool_call>|\Z))",
)

_DEEPSEEKV3 = {
    "defaults": {"role": "assistant"},
    "start_anchor_pattern": r"<｜Assistant｜>|<｜tool▁outputs▁end｜>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"},
        "tool_calls": _json_calls(
            r"(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>"
            r"(?:function<｜tool▁sep｜>(?P<name>[^\n]+)\n```json\n|(?P<name>))",
            r"(?:\s*```)?<｜tool▁call▁end｜>\s*(?:<｜tool▁calls▁end｜>)?",
        ),
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
        "tool_calls": _xml_calls(
            r"(?: to=[^<\s]+<\|message\|>\s*)?"
            r'(?:<atem:function_calls>\s*(?:<atem:invoke name="(?P<name>[^"]+)">|(?P<name>))'
            r'|<atem:invoke name="(?P<name>[^"]+)">)'
            r"| to=(?!(?:user|self)<)[^<\s]+<\|message\|>(?!(?:(?!<\|eo[mt]\|>).)*<atem:)(?P<name>)",
            r"\s*</atem:invoke>\s*(?:</atem:function_calls>)?(?:<\|eom\|><\|start\|>assistant)?"
            r"|<\|eom\|><\|start\|>assistant|(?=<\|eot\|>)",
            r'<atem:parameter name="(?P<key>[^"]+)">(?P<value>.*?)</atem:parameter>'
            r"(?=\s*(?:<atem:parameter name=|</atem:invoke>\s*(?:</atem:function_calls>|<atem:invoke)|\Z))",
        ),
        "content": _text(
            r"(?: to=user)?<\|message\|>| to=(?!self<)[^<\s]+<\|message\|>(?=(?:(?!<\|eo[mt]\|>).)*<atem:)",
            r"<\|eot\|>|<\|eom\|>(?:<\|start\|>assistant)?|(?=<atem:(?:function_calls|invoke)\b)|$",
        ),
    },
}

# Harmony: the recipient stands before or after the channel, and the type of the content is a constraint or a word
_HARMONY_TYPE = r"\s*(?:<\|constrain\|>)?\s*\w*\s*<\|message\|>"
_HARMONY_END = r"<\|end\|>\s*(?:<\|start\|>assistant)?"
_GPTOSS = _with_fields(
    trl_templates.gptoss_template,
    thinking=_text(rf"<\|channel\|>analysis{_HARMONY_TYPE}", _HARMONY_END),
    content=_text(rf"<\|channel\|>(?:final|commentary){_HARMONY_TYPE}", rf"<\|return\|>\s*|{_HARMONY_END}"),
    tool_calls=_json_calls(
        r"(?:<\|channel\|>\w+)?\s*to=functions\.(?P<name>[^\s<]+)\s*(?:<\|channel\|>\w+)?" + _HARMONY_TYPE,
        r"<\|call\|>\s*",
    ),
)

# The call is opened by its own JSON, which also ends it
_LLAMA3 = _with_fields(
    trl_templates.llama3_template,
    tool_calls=_json_calls(
        r'(?=\{\s*"name":\s*"[^"]+",\s*"(?:parameters|arguments)":)',
        r"<\|eo[tm]_id\|>\s*|$",
        {"type": "function", "function": {"name": "{content.name}", "arguments": "{content.parameters}"}},
    ),
)

_TRLS_GEMMA4: JSONObject = trl_templates.gemma4_template
_GEMMA4 = _with_fields(
    _TRLS_GEMMA4,
    tool_calls={
        **_TRLS_GEMMA4["fields"]["tool_calls"],
        "open_pattern": r"<\|tool_call>(?:call:(?P<name>[\w.\-]+)|(?P<name>))",
    },
)

_LFM2 = _with_fields(
    trl_templates.lfm2_2_5_template,
    tool_calls={
        "open": "<|tool_call_start|>",
        "close_pattern": r"\s*<\|tool_call_end\|>\s*",
        "content": "python-call-list",
        "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
        "transform_each": True,
    },
)
# Texts are not escaped between single quotes, even if they hold a quote
_LFM2_RAW = _with_fields(_LFM2, tool_calls={**_LFM2["fields"]["tool_calls"], "content_args": {"strings": "raw"}})

# The prompt opens every thought, and closes those that are not wanted. A thought begins where the turn does: to look
# ahead from every place takes minutes for a long turn. What the prompt closed, no `</think>` in a text opens again.
_NEMOTRON = {
    **_with_fields(
        trl_templates.nemotron_3_template,
        reasoning_content=_text(r"\A(?=.*?</think>)", r"</think>\s*"),
        tool_calls=_QWEN_CALLS,
    ),
    "start_anchor_pattern": r"<\|im_start\|>assistant\n<think>\n?",
}

_MISSING = {
    "deepseekv3": _DEEPSEEKV3,
    "diffusion_gemma": trl_templates.gemma4_template,
    "muse_glimmer": _MUSE_GLIMMER,
}
_CORRECTED = (
    (trl_templates.qwen3_5_template, _with_fields(trl_templates.qwen3_5_template, tool_calls=_QWEN_CALLS)),
    (trl_templates.nemotron_3_template, _NEMOTRON),
    (trl_templates.glm4moe_template, _with_fields(trl_templates.glm4moe_template, tool_calls=_GLM_CALLS)),
    (trl_templates.gptoss_template, _GPTOSS),
    (trl_templates.llama3_template, _LLAMA3),
    (trl_templates.gemma4_template, _GEMMA4),
)


def rendered_call(
    render: Callable[..., Any], name: str, arguments: JSONObject, results: Sequence[Message] = ()
) -> str:
    """
    Return the text of a dummy conversation with one call; it ends with the call, or with the opening of the turn after
    the results.

    Args:
        render (`Callable`):
            Renders messages with a chat template; takes `add_generation_prompt`.
        name (`str`), arguments (`dict`):
            Of the call.
        results (`Sequence[dict]`, *optional*):
            Tool messages.
    """
    function: JSONObject = {"name": name, "arguments": arguments}
    call = {"type": "function", "id": "call_0_0", "function": function}
    assistant = {"role": "assistant", "content": "", "tool_calls": [call]}
    messages = [{"role": "user", "content": "dummy"}, assistant, *results]
    try:
        return render(messages, add_generation_prompt=bool(results))
    except TypeError:  # templates that concatenate the arguments as text (DeepSeek-V3)
        function["arguments"] = json.dumps(arguments)
        return render(messages, add_generation_prompt=bool(results))


def response_template_of(tokenizer: PreTrainedTokenizerBase) -> JSONObject | None:
    """
    Return the response template for what a tokenizer's chat template renders.

    A chat template is recognized by how it renders a call, a plain turn and a generation prompt, so that the templates
    TRL ships for training, and those that differ elsewhere (a comment, another system prompt), are read like the one
    they came from.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with a chat template.

    Returns:
        `dict` or `None`: TRL's response template, or one of ours where TRL has none; `None` if no template that TRL
        ships renders the same.
    """
    shipped = _shipped()
    found = shipped.get(tokenizer.chat_template)
    if found is None and (turns := _turns(tokenizer, tokenizer.chat_template)):
        found = next((answer for text, answer in shipped.items() if _begin_with(turns, _turns(tokenizer, text))), None)
    return copy.deepcopy(found)


def corrected_template(template: JSONObject, rendered_text: str) -> JSONObject:
    """
    Return the response template to read calls with: `template`, unless it is one of TRL's that reads calls wrongly.

    Args:
        template (`dict`):
            The tokenizer's response template.
        rendered_text (`str`):
            A call with the argument [`RAW_TEXT`], as the chat template renders it.
    """
    if template == trl_templates.lfm2_2_5_template:
        return _LFM2_RAW if f"'{RAW_TEXT}'" in rendered_text else _LFM2
    return next((ours for theirs, ours in _CORRECTED if theirs == template), template)


def without_comments(processing_class: Any) -> contextlib.AbstractContextManager[None]:
    """
    Let TRL, which knows its chat templates by their bytes, recognize one that differs from them only in comments.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            What holds the chat template; its own is restored afterwards.
    """
    own = getattr(processing_class, "chat_template", None)
    wanted = _without_comments(own) if isinstance(own, str) else None
    shipped = next((text for text in _chat_templates().values() if wanted and _without_comments(text) == wanted), None)
    if shipped is None:
        return contextlib.nullcontext()
    return temporary_attribute(processing_class, "chat_template", shipped)


def _chat_templates() -> dict[str, str]:
    """Return the chat templates TRL ships, by name."""
    ending = "_chat_template"
    found = {name.removesuffix(ending): text for name, text in vars(trl_templates).items() if name.endswith(ending)}
    return {name: text for name, text in found.items() if isinstance(text, str)}


@functools.cache
def _shipped() -> dict[str, JSONObject]:
    """Return the response templates of the chat templates TRL ships for use, by the text of the chat template."""
    found = {}
    for name, text in _chat_templates().items():
        holder: Any = SimpleNamespace(chat_template=text, response_template=_MISSING.get(name))
        if holder.response_template is None:
            with contextlib.suppress(ValueError):  # TRL cannot read calls of that one
                trl_templates.add_response_schema(holder)
        if holder.response_template is not None:
            found[text] = holder.response_template
    return found


def _turns(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> tuple[str, ...] | None:
    """Return what a chat template renders for a call, a plain turn and a generation prompt; `None` if it renders no
    call."""
    user, answer = {"role": "user", "content": "dummy"}, {"role": "assistant", "content": "text"}
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False, chat_template=chat_template)
    try:
        start = str(render([user]))
        called = rendered_call(render, "look_up", {"text": RAW_TEXT, "number": 3})
        texts = (called, str(render([user, answer])), str(render([user], add_generation_prompt=True)))
    except Exception:  # whatever a template raises for what it does not render
        return None
    return tuple(text.removeprefix(start) for text in texts) if "look_up" in called else None


def _begin_with(turns: tuple[str, ...], others: tuple[str, ...] | None) -> bool:
    """Return whether turns are those others, except for the end of a turn, which the templates for training add."""
    if others is None:
        return False
    *written, prompt = zip(turns, others, strict=True)
    return prompt[0] == prompt[1] and all(turn.startswith(other.rstrip()) for turn, other in written)


def _without_comments(chat_template: str) -> list[tuple[str, str]]:
    """Return the tokens of a chat template without comments, with adjacent texts joined."""
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
