"""Whether a model's answer depends on padding that its attention mask hides."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..rounding import widest


TOKENS, PADDING = 12, 9
"""Tokens of the trial, and padding tokens before them."""


def reads_padding(logits: Callable[[Tensor, Tensor], Tensor], vocabulary: int, exact: bool) -> bool:
    """
    Return whether padding on the left changes what a model says of the tokens after it.

    It does where a model ignores the mask (RWKV), or counts positions from the first column (GPT-2).

    Args:
        logits (`Callable[[Tensor, Tensor], Tensor]`):
            Gives the logits (B, T, V) for token ids and a mask, int64, shape (B, T).
        vocabulary (`int`):
            Number of token ids.
        exact (`bool`):
            Whether the model computes in float32 or better.
    """
    tokens, other = trial_rows(vocabulary)
    half = TOKENS // 2
    ids = torch.tensor([tokens, other])
    plain = logits(ids, torch.ones_like(ids))[:, half:]
    padded = torch.tensor([[pad % vocabulary] * PADDING + tokens for pad in (1, 2)])
    mask = torch.ones_like(padded)
    mask[:, :PADDING] = 0
    found = logits(padded, mask)[:, PADDING + half :]
    return differs(found, plain[:1].expand_as(found), plain[1] - plain[0], exact)


def trial_rows(vocabulary: int) -> tuple[list[int], list[int]]:
    """Return two rows of token ids that have their second halves in common."""
    tokens = [(7 * index + 3) % vocabulary for index in range(TOKENS)]
    half = TOKENS // 2
    return tokens, [(5 * index + 4) % vocabulary for index in range(half)] + tokens[half:]


def differs(found: Tensor, expected: Tensor, effect: Tensor, exact: bool) -> bool:
    """
    Return whether logits differ by more than rounding.

    What they differ by is held against what other tokens before them change: rounding is far below that in every
    dtype, and what an untrained model does wrong is not, however small its logits are.

    Args:
        found, expected (`Tensor`):
            The logits, of one shape.
        effect (`Tensor`):
            Differences between logits after other tokens, any shape.
        exact (`bool`):
            Whether the model computes in float32 or better.
    """
    found, expected, effect = (tensor.to(widest(tensor.device)) for tensor in (found, expected, effect))
    gap, size = (found - expected).abs().max(), expected.abs().max()
    limit = (1e-3 if exact else 2e-2) * effect.abs().max() + (1e-6 if exact else 1e-2) * size
    return not bool(gap <= limit)  # also where it is not a number
