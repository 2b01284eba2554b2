"""Supervised training of the tiny model on scripted conversations, before any reinforcement learning.

Owns the demonstrations and the training loop; fed by `workspace.py`, used by `tiny_model.py`. The demonstrator is
careless: often it stops before the last call and answers with whatever the one before returned. So the model starts
with all the skills and the demonstrator's bad habit, which is what GRPO is to train away.
"""

import json
import random
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template
from workspace import WorkspaceEnvironment


@dataclass(frozen=True)
class WarmStart:
    """
    Length and quality of the warm start.

    Args:
        demonstrations (`int`, *optional*):
            Number of conversations.
        slip_rate (`float`, *optional*):
            Share of the conversations of two calls and more in which the demonstrator stops early.
        steps (`int`, *optional*):
            Optimizer steps.
        tools_every (`int`, *optional*):
            One step in so many sees the conversations as the trainer renders them. The others leave out the tool
            descriptions, which are the same in all of them and half of their length.
        batch_size (`int`, *optional*):
            Conversations per step.
        learning_rate (`float`, *optional*):
            Peak of the learning rate, which falls linearly to a tenth.
    """

    demonstrations: int = 6000
    slip_rate: float = 0.68
    steps: int = 600
    tools_every: int = 4
    batch_size: int = 16
    learning_rate: float = 3e-3


def demonstrate(row: dict[str, Any], slip_rate: float, seed: int = 0) -> list[dict[str, Any]]:
    """
    Play a row of the workspace with its plan.

    Args:
        row (`dict`):
            Row of `workspace.build_workspace`.
        slip_rate (`float`):
            Probability to stop early, after a call chosen uniformly from all but the last.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the slips, together with the row's id.

    Returns:
        `list[dict]`: the conversation, prompt included.
    """
    randomness = random.Random(zlib.crc32(f"{row['row_id']} {seed}".encode()))
    environment = WorkspaceEnvironment()
    environment.reset(**row)
    messages, answer, plan = list(row["prompt"]), row["answer"], json.loads(row["plan"])
    calls = len(plan)
    if calls > 1 and randomness.random() < slip_rate:
        calls = randomness.randint(1, calls - 1)
    for name, arguments in plan[:calls]:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        result = getattr(environment, name)(**arguments)
        messages.append({"role": "tool", "name": name, "content": json.dumps(result)})
    if calls < len(plan):
        answer = str(list(result.values())[-1])
    return [*messages, {"role": "assistant", "content": answer}]


def train_on_demonstrations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[dict[str, Any]]],
    tools: list,
    settings: WarmStart,
    seed: int = 0,
) -> float:
    """
    Train on the assistant's tokens of the conversations.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Trained in place.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Renders the conversations, with TRL's training variant of its chat template.
        conversations (`list[list[dict]]`):
            What to learn.
        tools (`list`):
            Tools described in the prompts.
        settings ([`WarmStart`]):
            Number of steps, batch size and learning rate.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.

    Returns:
        `float`: loss of the last step.
    """
    order = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1.0) * (1 - 0.9 * step / settings.steps)
    )
    loss = torch.tensor(float("nan"))
    model.train()
    progress = trange(settings.steps, desc="warm start", mininterval=2.0)
    for step in progress:
        rows = order.sample(conversations, settings.batch_size)
        input_ids, labels = encode(tokenizer, rows, tools if step % settings.tools_every == 0 else None)
        hidden = model.model(input_ids=input_ids).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        trained = targets != -100
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[trained]), targets[trained])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return loss.item()


def encode(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, Any]]], tools: list | None
) -> tuple[Tensor, Tensor]:
    """
    Tokens and targets of a batch of conversations.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Renders the conversations.
        conversations (`list[list[dict]]`):
            The batch.
        tools (`list`, *optional*):
            Tools to describe in the prompt.

    Returns:
        `tuple[Tensor, Tensor]`: `input_ids` and `labels`, both `(batch, length)` and int64, padded on the right;
        labels are -100 but at the assistant's tokens.
    """
    encoded = tokenizer.apply_chat_template(
        conversations,
        tools=tools,
        chat_template=get_training_chat_template(tokenizer),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    length = max(len(ids) for ids in encoded["input_ids"])
    input_ids = torch.full((len(conversations), length), tokenizer.pad_token_id)
    labels = torch.full((len(conversations), length), -100)
    for i, (ids, mask) in enumerate(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)):
        tokens = torch.tensor(ids)
        input_ids[i, : len(ids)] = tokens
        labels[i, : len(ids)] = torch.where(torch.tensor(mask) == 1, tokens, -100)
    return input_ids, labels
