"""Sample conversations on the console, which show a person what the figures mean."""

import json

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_toolgrpo.types import Message

from ..task import Verdict
from .scoreboard import Scoreboard


MAX_CHARACTERS = 400


class SampleConversation(TrainerCallback):
    """
    Prints the first rollout of the last batch at regular steps, on the main process.

    Args:
        scoreboard ([`Scoreboard`]):
            Keeps the rollout.
        every (`int`):
            Optimizer steps between two prints; 0 prints none.
    """

    def __init__(self, scoreboard: Scoreboard, every: int) -> None:
        self._scoreboard = scoreboard
        self._every = every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Print a conversation if one is due."""
        due = self._every > 0 and (state.global_step - 1) % self._every == 0
        if due and state.is_world_process_zero and self._scoreboard.sample is not None:
            tqdm.write(f"\nSample conversation at step {state.global_step}\n{as_text(*self._scoreboard.sample)}\n")


def as_text(prompt: list[Message], completion: list[Message], verdict: Verdict) -> str:
    """
    Return a conversation as one line per message.

    Args:
        prompt, completion (`list[dict]`):
            Its messages before and after the start of the rollout.
        verdict ([`Verdict`]):
            The verdict on it.

    Returns:
        `str`: the text, without a newline at the end.
    """
    lines = [f"  {message['role']:>9}: {_one_line(message)}" for message in [*prompt, *completion]]
    outcome = "success" if verdict.success else "failure"
    return "\n".join([*lines, f"    verdict: {outcome}, reward {verdict.reward:.2f}"])


def _one_line(message: Message) -> str:
    parts = [str(message["content"])] if message.get("content") else []
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        parts.append(f"{function['name']}({json.dumps(function['arguments'], ensure_ascii=False)})")
    text = " ".join(" ".join(parts).split())
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + "..."
