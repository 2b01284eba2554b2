"""Every tool-capable chat template TRL ships, with a tokenizer, as the trainer sets them up."""

import json
import re
from functools import cache

from conftest import TEMPLATES, chat_tokenizer
from trl.chat_template_utils import (
    add_response_schema,
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    supports_tool_calling,
)

from trl_toolgrpo.chat.parsing import add_missing_response_template
from trl_toolgrpo.chat.tool_chat import ToolChat, tool_message
from trl_toolgrpo.tools.tool import ToolCall


def _tool_capable():
    tokenizer = chat_tokenizer("qwen3")
    found = []
    for path in sorted(TEMPLATES.glob("*.jinja")):
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        if supports_tool_calling(tokenizer):
            found.append(path.stem)
    return found


_CAPABLE = _tool_capable()
ALL = [name for name in _CAPABLE if not name.endswith("_training")]
TRAINING = [name for name in _CAPABLE if name.endswith("_training")]
GEMMA4 = [name for name in ALL if re.match(r"(diffusion_)?gemma", name) and name != "gemma4_v2"]
ONE_CALL = ["llama3_1", "llama3_2"]  # templates that refuse parallel calls
FIRST_CALL = ["gptoss"]  # a template that renders the first call only
JSON_CONTENT = ["gptoss", "llama3_1", "llama3_2"]  # templates that write tool results as JSON
HEADLESS = ["deepseekv3"]  # the next turn follows the results without a header of its own

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "A tool.",
            "parameters": {
                "type": "object",
                "properties": {"person": {"type": "string"}, "year": {"type": "integer"}, "rate": {"type": "number"}},
            },
        },
    }
    for name in ("get_salary", "find_employee")
]
USER = {"role": "user", "content": "hello"}
CALLS = [
    ("get_salary", {"person": "Ada Lovelace", "year": 2001}),
    ("find_employee", {"person": "Grace", "rate": 0.5}),
]


_XML = "<tool_call>", "</tool_call>"
# What a call begins and ends with, by the beginnings of the templates' names
_MARKS = {
    "deepseek": ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    "diffusion_gemma": ("<|tool_call>", "<tool_call|>"),
    "gemma": ("<|tool_call>", "<tool_call|>"),
    "gptoss": (" to=functions", "}"),
    "lfm": ("<|tool_call_start|>", "<|tool_call_end|>"),
    "llama": ('{"name"', "}"),
    "muse": (" to=", "</atem:function_calls>"),
    **dict.fromkeys(("glm", "nemotron", "qwen"), _XML),
}


class Family:
    """A template with a tokenizer, set up as the trainer does."""

    def __init__(self, name, stop_texts=None):
        self.name = name
        self.tokenizer = tokenizer = chat_tokenizer(name)
        add_missing_response_template(tokenizer)
        if tokenizer.response_template is None:
            add_response_schema(tokenizer)
        self.template = None
        if not is_chat_template_prefix_preserving(tokenizer):
            self.template = get_training_chat_template(tokenizer)
        self.stops = [self.id(text) for text in stop_texts or tokenizer.stop_texts]
        self.chat = ToolChat(tokenizer, self.stops, self.template)
        base = name.removesuffix("_training")
        own = {"gptoss": "<|call|>", "glm4moe": "<|observation|>"}
        self.end_of_turn = "<|tool_response>" if base in GEMMA4 else own.get(base, tokenizer.stop_texts[0])
        self.end_of_text = "<|user|>" if base == "glm4moe" else tokenizer.stop_texts[0]

    def id(self, text):
        return self.tokenizer.convert_tokens_to_ids(text)

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids):
        return self.tokenizer.decode(ids)

    def render(self, messages, generation_prompt=False):
        return self.tokenizer.apply_chat_template(
            messages,
            tools=TOOLS,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            chat_template=self.template,
        )

    def assistant(self, calls, content=""):
        if not calls:
            return {"role": "assistant", "content": content}
        as_text = self.name == "deepseekv3"  # that template joins the arguments as text
        return {
            "role": "assistant",
            "content": content,
            "tool_calls": [
                {
                    "type": "function",
                    "id": f"call_0_{index}",
                    "function": {"name": name, "arguments": json.dumps(arguments) if as_text else arguments},
                }
                for index, (name, arguments) in enumerate(calls)
            ],
        }

    def written(self, calls, content=""):
        """Return the text of the assistant message from its header through the end of the turn, and past it."""
        before = self.render([USER])
        after = self.render([USER, self.assistant(calls, content)])
        assert after.startswith(before)
        text = after[len(before) :]
        end = self.end_of_turn if calls else self.end_of_text
        if end in text:
            return text[: text.index(end) + len(end)]
        return text + end

    def turn_of(self, *parts):
        """
        Return the tokens of a turn with texts around calls, and the prompt before it.

        A part is a text or a call (name, arguments) in the template's own words. Harmony and Muse Glimmer write texts
        as messages of their own, the others as they are.
        """
        call = next(part for part in parts if isinstance(part, tuple))
        ids, prompt = self.turn([call])
        text = self.decode(ids)
        begin, end = next(marks for prefix, marks in _MARKS.items() if self.name.startswith(prefix))
        written = text[: text.index(begin)]
        for index, part in enumerate(parts):
            if isinstance(part, tuple):
                call = self.decode(self.turn([part])[0])
                part = call[call.index(begin) : call.rindex(end) + len(end)]
            elif self.name.startswith("gptoss"):
                part = f"<|channel|>commentary<|message|>{part}<|end|><|start|>assistant"
            elif self.name.startswith("muse"):
                part = f" to=user<|message|>{part}"
            last = index == len(parts) - 1
            written += part + ("<|eom|><|start|>assistant" if self.name.startswith("muse") and not last else "")
        return self.encode(written + self.end_of_turn), prompt

    def turn(self, calls, content=""):
        """Return the tokens of a turn as the policy writes them, and the prompt before it."""
        prompt = self.render([USER], generation_prompt=True)
        header = prompt[len(self.render([USER])) :]
        text = self.written(calls, content)
        if text.startswith(header):
            return self.encode(text[len(header) :]), prompt
        # The template closes an empty thought in another way than it opens one: the policy closes it itself
        deepseek = self.name.startswith("deepseekv3")
        match = re.match(r"<｜Assistant｜>" if deepseek else r"(.*?<think>)\n?</think>", text, re.DOTALL)
        closed = "</think>\n\n" if deepseek else "</think>"
        return self.encode(closed + text[match.end() :]), prompt


@cache
def family(name):
    return Family(name)


def tool_messages(calls, contents):
    return [
        tool_message(ToolCall(f"call_0_{index}", name), content)
        for index, ((name, _), content) in enumerate(zip(calls, contents, strict=True))
    ]


def calls_of(name, count):
    """Return calls that a template can render in one turn, with as many results."""
    if name in ONE_CALL + FIRST_CALL:
        return CALLS[:1], [CALLS[0]] * count
    return CALLS[:count], CALLS[:count]


def controls(fam, ids):
    return [id for id in ids if id in fam.chat.control_ids]


def benign(fam, count=1):
    return fam.chat.tool_suffix(fam.id(fam.end_of_turn), tool_messages(CALLS[:count], ["x"] * count))[0]


def shown(fam, content):
    """Return the text of a content as the template writes it."""
    content = content.strip() if fam.chat._trims else content
    return json.dumps(content, ensure_ascii=False) if fam.name in JSON_CONTENT else content
