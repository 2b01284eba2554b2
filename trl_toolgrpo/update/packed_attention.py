"""Attention of rollouts packed after the prompt they share, without the products that a mask would throw away.

A packed sequence is a prompt and segments after it; a mask over all of it would be mostly false. Here the prompt
attends to itself, and each segment to the prompt and itself, with torch's attention for every piece. The attention
function is registered with transformers.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..models.lm_head import base_model
from ..sampling.shared_prefix import exchanged_attention
from ..trl_hooks import attention_implementation, has_replaceable_attention


PACKED_ATTENTION = "toolgrpo_packed_prompt"
Piece: TypeAlias = tuple[int, Sequence[int]]
"""Number of tokens of a sequence's prompt, and of each segment after it."""
_CURRENT: ContextVar[Sequence[tuple[int, Sequence[tuple[int, Tensor]]]]] = ContextVar("toolgrpo_packed_pieces")


def packed_attention(
    model: PreTrainedModel, pieces: Sequence[Piece], device: torch.device
) -> AbstractContextManager[None]:
    """
    Have a model's forward pass read each sequence of a packed batch as a prompt and segments after it.

    The backward pass may come after the context is closed, but must not recompute the forward pass: no gradient
    checkpointing.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model, unwrapped, with torch's attention (`"sdpa"`).
        pieces (`Sequence[tuple[int, Sequence[int]]]`):
            For each sequence: number of tokens of the prompt, and of each segment.
        device (`torch.device`):
            Where the model is.
    """
    masks = [(start, [(count, _visible(start, count, device)) for count in counts]) for start, counts in pieces]
    return exchanged_attention(model.config.get_text_config(), PACKED_ATTENTION, _CURRENT, masks)


def dense_mask(pieces: Sequence[Piece], length: int) -> Tensor:
    """
    Return which tokens attend to which, as a mask.

    Args:
        pieces (`Sequence[tuple[int, Sequence[int]]]`):
            For each sequence: number of tokens of the prompt, and of each segment.
        length (`int`):
            Number of tokens of a sequence, L; those beyond its pieces are padding.

    Returns:
        `Tensor`: bool, shape (R, 1, L, L).
    """
    mask = torch.eye(length, dtype=torch.bool).repeat(len(pieces), 1, 1)  # padding sees itself, not nothing
    for seen, (start, counts) in zip(mask, pieces, strict=True):
        seen[:start, :start] = _visible(0, start, mask.device)
        at = start
        for count in counts:
            own = slice(at, at + count)
            seen[own, :start] = True
            seen[own, own] = _visible(0, count, mask.device)
            at += count
    return mask[:, None]


def suits(model: PreTrainedModel) -> bool:
    """Return whether a model's attention can be exchanged, and its forward pass runs only once."""
    bare = base_model(model)
    for module in bare.modules():  # a second pass would run after this attention is put back
        if getattr(module, "gradient_checkpointing", False) or isinstance(module, CheckpointWrapper):
            return False
    return has_replaceable_attention(bare) and attention_implementation(bare.config.get_text_config()) == "sdpa"


def _visible(start: int, count: int, device: torch.device) -> Tensor:
    """Return what a segment sees of the prompt and itself, bool, shape (1, 1, count, start + count)."""
    return torch.ones(count, start + count, dtype=torch.bool, device=device).tril(start)[None, None]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **options: object
) -> tuple[Tensor, None]:
    """Compute attention in transformers' interface: (R, H, L, D) in, (R, L, H, D) out."""
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    options.pop("is_causal", None)
    sequences = []
    for row, (start, segments) in enumerate(_CURRENT.get()):
        queries, keys, values = query[row : row + 1], key[row : row + 1], value[row : row + 1]
        prompt_keys, prompt_values = keys[:, :, :start], values[:, :, :start]
        found, at = [], start
        if start:
            ask = queries[:, :, :start]
            found.append(attend(module, ask, prompt_keys, prompt_values, None, is_causal=True, **options)[0])
        for count, visible in segments:
            own = slice(at, at + count)
            seen = (torch.cat([prompt_keys, keys[:, :, own]], 2), torch.cat([prompt_values, values[:, :, own]], 2))
            found.append(attend(module, queries[:, :, own], *seen, visible, **options)[0])
            at += count
        rest = query.shape[2] - at  # padding, which nothing reads
        found.append(values.new_zeros(1, rest, query.shape[1], value.shape[3]))
        sequences.append(torch.cat(found, dim=1))
    return torch.cat(sequences), None


ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, _attention)
