"""What a recipe trains on: questions, the world they are asked in, and the verdict on a rollout."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from trl_toolgrpo.types import Message, Row


@dataclass(frozen=True)
class Verdict:
    """
    The verdict on one rollout.

    Args:
        success (`bool`):
            Whether the rollout did all that was asked, and nothing else. This is what a recipe reports.
        reward (`float`):
            What the policy is trained on: 1 for a success, less for part of the way.
        valid_call (`bool`):
            Whether a call was made that matches its tool's schema, right or wrong.
    """

    success: bool
    reward: float
    valid_call: bool


@dataclass(frozen=True)
class Task:
    """
    A task: its questions, the environment they are asked in, and the judge of the answers.

    Args:
        train, held_out ([`~datasets.Dataset`]):
            Questions, with the columns `row_id`, `split` (`"train"` or `"held_out"`), `prompt` and `difficulty`, and
            those that `environment_factory` and `judge` need.
        environment_factory (`Callable`, *optional*):
            Makes a new environment, whose `reset` gets the row's columns. `None` for a task whose tools are those of
            MCP servers.
        judge (`Callable`):
            `judge(completion, environment, row)` returns the [`Verdict`] on a rollout. It gets the messages after the
            prompt, the environment (without one, the [`~trl_toolgrpo.MCPSession`]) and the row.
    """

    train: Dataset
    held_out: Dataset
    environment_factory: Callable[[], Any] | None
    judge: Callable[[list[Message], Any, Row], Verdict]


def final_answer(completion: list[Message]) -> str:
    """
    Return the text of the final assistant message.

    Args:
        completion (`list[dict]`):
            Messages of the rollout after the prompt.

    Returns:
        `str`: the text; empty when the rollout ends on a tool call, a tool message or nothing.
    """
    if not completion or completion[-1]["role"] != "assistant" or completion[-1].get("tool_calls"):
        return ""
    return completion[-1].get("content") or ""
