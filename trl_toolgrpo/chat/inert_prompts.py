"""Prompts in which what tools and environments say stays text, whatever it says."""

import functools
import json
import secrets
from collections.abc import Callable, Sequence

from ..errors import ToolSchemaError
from ..types import JSONSchema, Message, map_texts
from .control_tokens import ControlTokens
from .prompt_renderer import Prompt, PromptRenderer


KEPT = 1024
"""Schemas whose marked form is kept."""


class InertPrompts:
    """
    Encodes prompts so that neither the tools they show nor what an environment's `reset` said becomes a control token.

    The messages of a data set are the user's own, so control tokens in them stay control tokens.

    Args:
        control ([`ControlTokens`]):
            Of the tokenizer.
        renderer ([`PromptRenderer`]):
            Renders prompts.
    """

    def __init__(self, control: ControlTokens, renderer: PromptRenderer):
        self._control = control
        self._renderer = renderer
        self._mark = f"x{secrets.token_hex(8)}"
        # Schemas by their JSON, since prompt after prompt shows the same ones
        self._marked = functools.lru_cache(KEPT)(lambda schema: map_texts(self.mark, json.loads(schema)))

    def mark(self, text: str) -> str:
        """Return a text with marks for [`InertPrompts.encode`] where it has to be cut."""
        return self._control.marked(text, self._mark)

    def schemas(self, tools: Sequence[JSONSchema]) -> list[JSONSchema]:
        """
        Return schemas whose texts (names, descriptions, keys, allowed values) have marks where they have to be cut.

        Args:
            tools (`Sequence[dict]`):
                The schemas; they are not changed.
        """
        return [self._marked(json.dumps(tool, default=str)) for tool in tools]

    def encode(self, prompt: list[Message], schemas: Sequence[JSONSchema]) -> list[int] | None:
        """
        Return the tokens of a prompt that the policy continues.

        Args:
            prompt (`list[dict]`):
                Its messages, with marks.
            schemas (`Sequence[dict]`):
                Its tools, from [`InertPrompts.schemas`].

        Returns:
            `list[int]` or `None`: `None` if there is no mark, so that the tokens are those of any tokenization.

        Raises:
            ToolSchemaError: if the chat template does not repeat texts as they are, so that the marks are lost.
        """
        plain_prompt, plain_schemas = map_texts(self._unmarked, prompt), map_texts(self._unmarked, list(schemas))
        if plain_prompt == prompt and plain_schemas == list(schemas):
            return None
        text = self._renderer.text(prompt, schemas)
        if self._unmarked(text) != self._renderer.text(plain_prompt, plain_schemas):
            raise ToolSchemaError(
                "The tools of a prompt, or what the `reset` of its environment said, hold control tokens of the "
                "model, and the chat template does not repeat them as they are, so that they cannot be kept text.",
                remedy="Take them out of the names, descriptions and values of the tools.",
            )
        return [id for part in text.split(self._mark) for id in self._control.encode(part)]

    def _unmarked(self, text: str) -> str:
        return text.replace(self._mark, "")


def with_observation(given: Prompt | None, prompt: Prompt, change: Callable[[str], str]) -> Prompt:
    """
    Return a prompt with what the `reset` of its environment said changed: TRL adds it to the last message.

    Args:
        given (`list[dict]` or `None`):
            The prompt of the data set; `None` if it has none.
        prompt (`list[dict]`):
            The prompt with what `reset` said; it is not changed.
        change (`Callable`):
            Gives the text that takes the place of one that `reset` returned.
    """
    if not isinstance(prompt, list) or not prompt:
        return prompt
    before = (given[-1].get("content") if isinstance(given, list) and given else None) or ""
    now = prompt[-1].get("content") or ""
    if now == before:
        return prompt
    if isinstance(now, str):
        content = before + change(now[len(before) :])
    else:
        count = len(before) if isinstance(before, list) else 1  # TRL makes a part of a text
        said = [{**part, "text": change(part["text"])} if "text" in part else part for part in now[count:]]
        content = [*now[:count], *said]
    return [*prompt[:-1], {**prompt[-1], "content": content}]
