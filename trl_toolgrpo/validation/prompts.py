"""Checks of the prompts of data sets, at construction: each can be rendered, shows what it says and fits the model."""

import heapq
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping

from ..chat.prompt_messages import PromptMessages
from ..chat.prompt_renderer import Prompt, PromptRenderer
from ..chat.shown_in_prompts import Part, hidden_messages, message_kind
from ..errors import DatasetError
from ..tools.tool import Tool
from ..types import JSONValue, Message


logger = logging.getLogger(__name__)

PROMPTS_MEASURED = 256
"""Longest prompts of each data set that are tokenized, where their characters say that they might not fit."""


def check_prompts(
    name: str, prompts: Iterable[tuple[int, JSONValue]], messages: PromptMessages, renderer: PromptRenderer,
    tools: Mapping[str, Tool],
) -> None:  # fmt: skip
    """
    Check that the prompts of a data set can be rendered, and that what their messages say is shown.

    A prompt is rendered if it holds a kind of message, or two kinds in a row, that none before it held: as many
    prompts as there are kinds.

    Args:
        name (`str`):
            Name of the data set, for messages.
        prompts (`Iterable[tuple[int, str | list]]`):
            Rows and their prompts.
        messages ([`PromptMessages`]):
            Rewrites messages for the template.
        renderer ([`PromptRenderer`]):
            Renders them.
        tools (`Mapping[str, Tool]`):
            The tools, by name.

    Raises:
        DatasetError: for a prompt that is none or cannot be rendered, or whose text or calls are not in what the
            policy reads.
    """
    seen: set[tuple[object, object]] = set()
    warned: set[str] = set()
    for row, prompt in prompts:
        if isinstance(prompt, str):
            continue
        if not isinstance(prompt, list):
            raise DatasetError(
                f"`{name}`, row {row}: the prompt is {str(prompt)[:60]!r} of type {type(prompt).__name__}. It has to "
                "be text or a list of messages.",
                remedy="Correct it, or drop such rows (`dataset.filter`).",
            )
        try:
            prompt = messages.rewritten(prompt, tools)
        except DatasetError as error:
            raise DatasetError(f"`{name}`, row {row}: {error.message.rstrip('.')}.", remedy=error.remedy) from None
        kinds = [None, *(message_kind(m) if isinstance(m, dict) else type(m) for m in prompt), None]
        pairs = set(itertools.pairwise(kinds))
        if pairs <= seen:
            continue
        seen |= pairs
        for part in _hidden(name, row, prompt, renderer):
            if part.needed:
                raise DatasetError(
                    f"`{name}`, row {row}: the chat template does not show {part.words}, so the policy would never "
                    "read it.",
                    remedy=_remedy(prompt),
                )
            if part.words.partition(" of message")[0] not in warned:
                warned.add(part.words.partition(" of message")[0])
                logger.warning("`%s`, row %s: the chat template does not show %s.", name, row, part.words)
    if messages.doubtful:
        logger.warning(
            "`%s`: earlier calls have nulls in %s, whose schema does not say what it holds. They are shown as they "
            "are; if `datasets` has put them there, write the arguments as JSON text.",
            name,
            ", ".join(sorted(messages.doubtful)[:8]),
        )
        messages.doubtful.clear()


def _hidden(name: str, row: int, prompt: list[Message], renderer: PromptRenderer) -> list[Part]:
    try:
        renderer.text(prompt)
        return hidden_messages(prompt, renderer.text)
    except Exception as error:  # whatever jinja and the template raise
        roles = ", ".join(str(m.get("role")) if isinstance(m, dict) else type(m).__name__ for m in prompt)
        raise DatasetError(
            f"`{name}`, row {row}: the chat template cannot render the prompt: {type(error).__name__}: {error}. Its "
            f"messages are {roles}.",
            remedy="Write them as the template expects, drop such rows, or use another template.",
        ) from error


def _remedy(prompt: list[Message]) -> str:
    roles = {message.get("role") for message in prompt}
    if "developer" in roles:
        return "Give the message the role 'system', or use a template that knows 'developer'."
    if "function" in roles:
        return "Give results of tools the role 'tool', or use a template that knows 'function'."
    if any(len(message.get("tool_calls") or ()) > 1 for message in prompt):
        return "Give each call a message of its own, followed by its result, or use another template."
    return "Write it in a message that the template shows, drop such rows, or use another template."


def check_prompt_lengths(
    name: str, prompts: Iterable[tuple[int, JSONValue]], renderer: PromptRenderer, positions: int, budget: int,
    rewritten: Callable[[Prompt], Prompt],
) -> None:  # fmt: skip
    """
    Check that the prompts of a data set fit into the model, and warn where they leave less than the budget.

    Only prompts are tokenized whose bytes, of which a token has at least one, could be too many tokens; of those the
    [`PROMPTS_MEASURED`] longest.

    Args:
        name (`str`):
            Name of the data set, for messages.
        prompts (`Iterable[tuple[int, str | list]]`):
            Rows and their prompts.
        renderer ([`PromptRenderer`]):
            Renders prompts.
        positions (`int`):
            Positions of the model.
        budget (`int`):
            Most tokens of a completion.
        rewritten (`Callable`):
            Gives a prompt as it is rendered.

    Raises:
        DatasetError: for a prompt that leaves no position to write to.
    """
    frame: int | None = None
    long = []
    for row, prompt in prompts:
        if isinstance(prompt, list) and frame is None:
            frame = len(renderer.text([{"role": "user", "content": "Hello."}]).encode())
        size = _most_tokens(prompt) + (frame or 0)
        if size + budget > positions:
            long.append((size, -row, prompt))
    longest = -1, -1
    for _, row, prompt in heapq.nlargest(PROMPTS_MEASURED, long, key=lambda entry: entry[:2]):
        longest = max(longest, (renderer.length(rewritten(prompt)), row))
    tokens, row = longest[0], -longest[1]
    if tokens >= positions:
        raise DatasetError(
            f"`{name}`, row {row}: the prompt has {tokens} tokens, tools included, and the model {positions} "
            "positions, so there is no room for a completion.",
            remedy="Shorten the prompt or drop such rows (`dataset.filter`), show fewer tools, or take a model with "
            "a longer context.",
        )
    if tokens + budget > positions:
        logger.warning(
            "`%s`, row %s: the prompt has %s tokens, tools included, which leaves %s of the model's %s positions, "
            "fewer than `max_completion_length=%s`. Rollouts of such prompts end there, with stop reason `length`.",
            *(name, row, tokens, positions - tokens, positions, budget),
        )


_MESSAGE_FRAME = 64
"""Tokens that a template writes around a message, at most."""


def _most_tokens(value: JSONValue) -> int:
    """Count the bytes of all text in a prompt, keys and the frames of messages included."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "replace"))
    if isinstance(value, dict):
        return _MESSAGE_FRAME + sum(len(key) + _most_tokens(inner) for key, inner in value.items())
    if isinstance(value, list):
        return sum(map(_most_tokens, value))
    return 0 if value is None else len(str(value))
