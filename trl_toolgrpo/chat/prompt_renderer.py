"""Prompts as the trainer renders them: as text and as tokens."""

from collections.abc import Sequence
from typing import TypeAlias, cast

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from ..types import JSONObject, JSONSchema, Message


Prompt: TypeAlias = str | list[Message]

Processor: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin


class PromptRenderer:
    """
    Renders prompts as the trainer does.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Holds the chat template.
        schemas (`Sequence[dict]`):
            The tools, as the template gets them.
        chat_template (`str`, *optional*):
            Template to render with, instead of the tokenizer's own.
        kwargs (`dict`, *optional*):
            More arguments of `apply_chat_template`.
    """

    def __init__(
        self,
        processing_class: Processor,
        schemas: Sequence[JSONSchema] = (),
        chat_template: str | None = None,
        kwargs: JSONObject | None = None,
    ):
        self.processing_class = processing_class
        self.is_processor = isinstance(processing_class, ProcessorMixin)
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.schemas = list(schemas)
        self.chat_template = chat_template
        self.kwargs = dict(kwargs or {})

    def text(self, prompt: list[Message], schemas: Sequence[JSONSchema] | None = None) -> str:
        """
        Return the text of a conversation that the policy continues.

        Args:
            prompt (`list[dict]`):
                Its messages.
            schemas (`Sequence[dict]`, *optional*):
                Other tools than the renderer's.
        """
        if self.is_processor:
            prompt = prepare_multimodal_messages(prompt)
        tools = self.schemas if schemas is None else schemas
        rendered = self.processing_class.apply_chat_template(
            prompt,
            tools=[*tools] or None,
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=False,
            **self.kwargs,
        )
        return cast(str, rendered)

    def length(self, prompt: Prompt, schemas: Sequence[JSONSchema] | None = None) -> int:
        """
        Count the tokens of a prompt.

        Args:
            prompt (`str` or `list[dict]`):
                Text or messages.
            schemas (`Sequence[dict]`, *optional*):
                Other tools than the renderer's.
        """
        if isinstance(prompt, str):
            return len(self.tokenizer(prompt)["input_ids"])
        return len(self.tokenizer(self.text(prompt, schemas), add_special_tokens=False)["input_ids"])

    def takes_arguments_as_text(self) -> bool:
        """Return whether the template needs the arguments of a call as JSON text (as DeepSeek-V3's does)."""

        def renders(arguments: JSONObject | str) -> bool:
            call = {"type": "function", "id": "call_0_0", "function": {"name": "tool", "arguments": arguments}}
            message = {"role": "assistant", "content": "", "tool_calls": [call]}
            result = {"role": "tool", "name": "tool", "tool_call_id": "call_0_0", "content": "result"}
            try:
                return bool(self.text([{"role": "user", "content": "Hello."}, message, result]))
            except Exception:  # whatever a template raises
                return False

        return not renders({"key": "value"}) and renders('{"key": "value"}')


def message_texts(message: Message) -> list[str]:
    """Return the texts of a message: its content, or the parts of it that are text."""
    content = message.get("content")
    if isinstance(content, list):
        return [part["text"] for part in content if isinstance(part, dict) and part.get("text")]
    return [content] if isinstance(content, str) else []
