"""The warm start of the tiny model: supervised training on scripted conversations, before reinforcement learning."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

from trl_toolgrpo.types import Message


@dataclass(frozen=True)
class WarmStart:
    """
    Settings of the warm start.

    Args:
        demonstrations (`int`, *optional*):
            Number of conversations.
        slip_rate (`float`, *optional*):
            Share of the conversations of two calls and more in which the demonstrator stops early.
        mistype_rate (`float`, *optional*):
            Share of the calls with an employee id that the demonstrator first makes with a mistyped one.
        steps (`int`, *optional*):
            Optimizer steps.
        tools_every (`int`, *optional*):
            One conversation in this number is rendered as the trainer does it. The others leave out the tool
            descriptions, which are the same in all and half of their length.
        batch_size (`int`, *optional*):
            Conversations per step.
        learning_rate (`float`, *optional*):
            Peak of the learning rate, which then falls linearly to a tenth.
    """

    demonstrations: int = 6000
    slip_rate: float = 0.6
    mistype_rate: float = 0.15
    steps: int = 900
    tools_every: int = 4
    batch_size: int = 16
    learning_rate: float = 2e-3


def train_on_demonstrations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[Message]],
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
            Conversations to learn.
        tools (`list`):
            Tools described in the prompts.
        settings ([`WarmStart`]):
            Number of steps, batch size and learning rate.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.

    Returns:
        `float`: loss of the last step.
    """
    plain = [row for i, row in enumerate(conversations) if i % settings.tools_every]
    examples = encode(tokenizer, conversations[:: settings.tools_every], tools) + encode(tokenizer, plain, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1.0) * (1 - 0.9 * step / settings.steps)
    )
    loss = torch.tensor(float("nan"))
    model.train()
    batches = islice(batches_by_length(examples, settings.batch_size, random.Random(seed)), settings.steps)
    progress = tqdm(batches, total=settings.steps, desc="warm start", mininterval=2.0)
    for rows in progress:
        input_ids = pad_sequence([ids for ids, _ in rows], batch_first=True, padding_value=tokenizer.pad_token_id)
        targets = pad_sequence([labels for _, labels in rows], batch_first=True, padding_value=-100)[:, 1:]
        hidden = model.model(input_ids=input_ids).last_hidden_state[:, :-1]
        trained = targets != -100
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[trained]), targets[trained])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return loss.item()


def batches_by_length(
    examples: list[tuple[Tensor, Tensor]], size: int, randomness: random.Random
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """
    Yield batches of examples of similar length, without end. Each pass over the examples divides them into new groups
    of 16 batches, sorts each group by length, and yields all batches in random order.

    Args:
        examples (`list[tuple[Tensor, Tensor]]`):
            Examples as `encode` returns them.
        size (`int`):
            Examples per batch; those left over in a group are skipped.
        randomness (`random.Random`):
            Draws the order.

    Yields:
        `list[tuple[Tensor, Tensor]]`: a batch.

    Raises:
        ValueError: if there are fewer examples than a batch holds.
    """
    if len(examples) < size:
        raise ValueError(f"A batch of {size} cannot be drawn from {len(examples)} demonstrations. Ask for more.")
    while True:
        shuffled, batches = randomness.sample(examples, len(examples)), []
        for start in range(0, len(shuffled), 16 * size):
            group = sorted(shuffled[start : start + 16 * size], key=lambda example: len(example[0]))
            batches += [group[i : i + size] for i in range(0, len(group) - size + 1, size)]
        yield from randomness.sample(batches, len(batches))


def encode(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[Message]], tools: list | None
) -> list[tuple[Tensor, Tensor]]:
    """
    Return the tokens and targets of conversations.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Renders the conversations.
        conversations (`list[list[dict]]`):
            The conversations.
        tools (`list`, *optional*):
            Tools to describe in the prompt.

    Returns:
        `list[tuple[Tensor, Tensor]]`: `input_ids` and `labels` of each, both `(length,)` and int64; labels are -100
        except at the tokens of the assistant's messages that are imitated.
    """
    if not conversations:
        return []
    encoded: Any = tokenizer.apply_chat_template(
        conversations,
        tools=tools,
        chat_template=get_training_chat_template(tokenizer),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    examples = []
    for messages, ids, mask in zip(conversations, encoded["input_ids"], encoded["assistant_masks"], strict=True):
        input_ids, assistant = torch.tensor(ids), torch.tensor(mask)
        turns = [message for message in messages if message["role"] == "assistant"]
        imitate = torch.tensor([message.get("imitate", True) for message in turns])
        starts = assistant.diff(prepend=torch.zeros(1, dtype=assistant.dtype)) == 1
        turn = starts.cumsum(0) - 1  # the assistant's turn that a token belongs to, or follows
        examples.append((input_ids, torch.where((assistant == 1) & imitate[turn.clamp(min=0)], input_ids, -100)))
    return examples
