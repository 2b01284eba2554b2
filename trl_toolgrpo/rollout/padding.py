"""Whether a model's answer depends on padding that its attention mask hides."""

from collections.abc import Callable

import torch
from torch import Tensor


TOKENS, PADDING = 12, 9
"""Tokens of the trial, and padding tokens before them."""


def reads_padding(logits: Callable[[Tensor, Tensor], Tensor], vocabulary: int, exact: bool) -> bool:
    """
    Return whether padding on the left changes what a model says of the tokens after it.

    It does where a model ignores the mask (RWKV), or counts positions from the first column (GPT-2). The same tokens
    are read with and without padding. What they change is held against what other tokens would: rounding is far below
    that in every dtype, and a small effect of an untrained model is not.

    Args:
        logits (`Callable[[Tensor, Tensor], Tensor]`):
            Gives the logits (B, T, V) for token ids and a mask, int64, shape (B, T).
        vocabulary (`int`):
            Number of token ids.
        exact (`bool`):
            Whether the model computes in float32 or better.
    """
    tokens = [(7 * index + 3) % vocabulary for index in range(TOKENS)]
    half = TOKENS // 2
    other = [(5 * index + 4) % vocabulary for index in range(half)] + tokens[half:]
    ids = torch.tensor([tokens, other])
    plain = logits(ids, torch.ones_like(ids))[:, half:].double()
    padded = torch.tensor([[pad % vocabulary] * PADDING + tokens for pad in (1, 2)])
    mask = torch.ones_like(padded)
    mask[:, :PADDING] = 0
    found = logits(padded, mask)[:, PADDING + half :].double()
    gap, effect = (found - plain[:1]).abs().max(), (plain[1] - plain[0]).abs().max()
    limit = (1e-3 if exact else 2e-2) * effect + (1e-6 if exact else 1e-2) * plain.abs().max()
    return not bool(gap <= limit)  # also where it is not a number
