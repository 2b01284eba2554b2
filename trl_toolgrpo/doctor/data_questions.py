"""Whether the data's prompts can be asked: long enough a model, short enough prompts.

Owns the questions about data sets; they are asked of rows spread over each of them.
"""

from typing import Any

from ..data_checks import named_datasets
from ..rollout.context_length import context_length
from .findings import FAULT, NOTE, OK, Finding


ROWS = 256
"""Rows of a data set whose prompts are measured."""


def check_data(trainer: Any) -> tuple[list[Finding], int | None]:
    """
    The questions about data sets.

    Args:
        trainer ([`ToolGRPOTrainer`]):
            The trainer.

    Returns:
        `tuple[list[Finding], int | None]`: the answers, and the tokens that descriptions of tools take of a prompt.
    """
    tools = {tool.name: tool for tool in trainer._toolset.known}
    found, cost = [], None
    for name, dataset in named_datasets(trainer.train_dataset, trainer.eval_dataset):
        if not hasattr(dataset, "__getitem__"):
            continue
        rows = [dataset[index] for index in spread(len(dataset), ROWS)]
        prompts = [trainer._messages.rewritten(row["prompt"], tools) for row in rows if "prompt" in row]
        if not prompts:
            found.append(Finding(f"data: {name}", NOTE, f"{len(dataset)} rows; their environments give the prompts."))
            continue
        lengths = [trainer._renderer.length(prompt) for prompt in prompts]
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if cost is None:
            cost = lengths[longest] - trainer._renderer.length(prompts[longest], [])
        row = spread(len(dataset), ROWS)[longest]
        found.append(_judge(trainer, f"data: {name}", len(dataset), row, lengths))
    return found, cost


def _judge(trainer: Any, subject: str, rows: int, row: int, lengths: list[int]) -> Finding:
    longest, room = max(lengths), trainer.args.max_completion_length
    positions = context_length(trainer.model.config)
    words = f"{rows} rows; prompts of {min(lengths)} to {longest} tokens, tools included"
    if positions is None or longest + room <= positions:
        return Finding(subject, OK, f"{words}.")
    if longest >= positions:
        remedy = "Shorten the prompts or drop such rows, show fewer tools, or take a model with a longer context."
        return Finding(
            subject, FAULT, f"{words}: row {row} does not fit into the model's {positions} positions.", remedy
        )
    words += f": after row {row}, {positions - longest} of the model's {positions} positions are left, fewer than "
    words += f"`max_completion_length={room}`."
    return Finding(subject, NOTE, words, "Rollouts of long prompts end early. Shorten them, or lower the limit.")


def spread(count: int, most: int) -> list[int]:
    """At most `most` numbers below `count`, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]
