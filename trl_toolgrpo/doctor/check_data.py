"""Checks that the prompts of the data sets fit into the model, on rows spread over each of them."""

import numpy as np

from ..models.model_settings import context_length
from ..validation.data import named_datasets
from .result import FAULT, NOTE, OK, CheckResult, ToolTrainer


ROWS = 256
"""Rows of a data set whose prompts are measured."""


def check_data(trainer: ToolTrainer) -> tuple[list[CheckResult], int | None]:
    """
    Check each data set.

    Args:
        trainer ([`ToolGRPOTrainer`]):
            The trainer.

    Returns:
        `tuple[list[CheckResult], int | None]`: the results, and the tokens that descriptions of tools take of a
        prompt.
    """
    tools = {tool.name: tool for tool in trainer.rollouts.tools.toolset.known}
    found, cost = [], None
    for name, dataset in named_datasets(trainer.train_dataset, trainer.eval_dataset):
        if not hasattr(dataset, "__getitem__"):
            continue
        rows = np.linspace(0, len(dataset) - 1, min(len(dataset), ROWS)).round().astype(int).tolist()
        read = ((row, dataset[row]) for row in rows)
        asked = [(row, content["prompt"]) for row, content in read if "prompt" in content]
        if not asked:
            found.append(CheckResult(f"data: {name}", NOTE, f"{len(dataset)} rows; environments give the prompts."))
            continue
        prompts = [trainer.rollouts.prompts.messages.rewritten(prompt, tools) for _, prompt in asked]
        lengths = [trainer.rollouts.prompts.renderer.length(prompt) for prompt in prompts]
        longest = int(np.argmax(lengths))
        if cost is None:
            cost = lengths[longest] - trainer.rollouts.prompts.renderer.length(prompts[longest], [])
        found.append(_check_lengths(trainer, f"data: {name}", len(dataset), asked[longest][0], lengths))
    return found, cost


def _check_lengths(trainer: ToolTrainer, subject: str, rows: int, row: int, lengths: list[int]) -> CheckResult:
    longest, room = max(lengths), trainer.args.max_completion_length
    positions = context_length(trainer.model.config)
    message = f"{rows} rows; prompts of {min(lengths)} to {longest} tokens, tools included"
    if positions is None or longest + room <= positions:
        return CheckResult(subject, OK, f"{message}.")
    if longest >= positions:
        message += f": row {row} does not fit into the model's {positions} positions."
        remedy = "Shorten the prompts or drop such rows, show fewer tools, or take a model with a longer context."
        return CheckResult(subject, FAULT, message, remedy)
    message += f": after row {row}, {positions - longest} of the model's {positions} positions are left, "
    message += f"fewer than `max_completion_length={room}`."
    return CheckResult(subject, NOTE, message, "Rollouts of long prompts end early. Shorten them, or lower the limit.")
