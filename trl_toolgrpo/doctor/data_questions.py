"""Whether the data's prompts can be asked: long enough a model, short enough prompts.

Owns the questions about data sets; they are asked of rows spread over each of them.
"""

from typing import Any

from ..model_settings import model_setting
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
    datasets = {"train_dataset": trainer.train_dataset, "eval_dataset": trainer.eval_dataset}
    found, cost = [], None
    for name, dataset in datasets.items():
        if dataset is None or not hasattr(dataset, "__getitem__") or isinstance(dataset, dict):
            continue
        rows = [dataset[index] for index in spread(len(dataset), ROWS)]
        prompts = [row["prompt"] for row in rows if "prompt" in row]
        if not prompts:
            found.append(Finding(f"data: {name}", NOTE, f"{len(dataset)} rows; their environments give the prompts."))
            continue
        lengths = [prompt_length(trainer, prompt, True) for prompt in prompts]
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if cost is None:
            cost = lengths[longest] - prompt_length(trainer, prompts[longest], False)
        row = spread(len(dataset), ROWS)[longest]
        found.append(_judge(trainer, f"data: {name}", len(dataset), row, lengths))
    return found, cost


def _judge(trainer: Any, subject: str, rows: int, row: int, lengths: list[int]) -> Finding:
    longest, room = max(lengths), trainer.args.max_completion_length
    positions = model_setting(trainer.model.config.get_text_config(), "max_position_embeddings")
    words = f"{rows} rows; prompts of {min(lengths)} to {longest} tokens, tools included"
    if positions is None or longest + room <= positions:
        return Finding(subject, OK, f"{words}.")
    if longest >= positions:
        remedy = "Shorten the prompts or drop such rows, show fewer tools, or take a model with a longer context."
        return Finding(
            subject, FAULT, f"{words}: row {row} does not fit into the model's {positions} positions.", remedy
        )
    words += f": behind row {row}, {positions - longest} of the model's {positions} positions are left, fewer than "
    words += f"`max_completion_length={room}`."
    return Finding(subject, NOTE, words, "Rollouts of long prompts end early. Shorten them, or lower the limit.")


def prompt_length(trainer: Any, prompt: Any, with_tools: bool) -> int:
    """
    Tokens of a prompt as the trainer renders it.

    Args:
        trainer ([`ToolGRPOTrainer`]):
            The trainer.
        prompt (`str` or `list[dict]`):
            A row's prompt.
        with_tools (`bool`):
            Whether tools are described in it.
    """
    tokenizer = trainer._tokenizer
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    tools = [tool.schema for tool in trainer._toolset.known] if with_tools else []
    text = tokenizer.apply_chat_template(
        prompt,
        tools=tools or None,
        chat_template=trainer.chat_template,
        add_generation_prompt=True,
        tokenize=False,
        **(trainer.chat_template_kwargs or {}),
    )
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def spread(count: int, most: int) -> list[int]:
    """At most `most` numbers below `count`, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]
