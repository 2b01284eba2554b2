"""Attention of rollouts packed after the prompt they share, without the products that a mask would throw away.

A packed sequence is a prompt and segments after it; a mask over all of it would be mostly false. Here the prompt
attends to itself, and each segment to the prompt and itself, with torch's attention for every piece. The attention
function is registered with transformers. Each pass has its own pieces, and what gradient checkpointing computes again
in the backward pass reads those of the forward pass it repeats.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..models.lm_head import base_model
from ..sampling.shared_prefix import exchanged_attention
from ..trl_hooks import (
    around_checkpointed_parts,
    attention_implementation,
    has_replaceable_attention,
    has_unknown_checkpointing,
)


PACKED_ATTENTION = "toolgrpo_packed_prompt"
Piece: TypeAlias = tuple[int, Sequence[int]]
"""Number of tokens of a sequence's prompt, and of each segment after it."""
PackedAttention: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Tensor, dict[str, object]], Tensor]
"""Attention of one layer over packed sequences: the module, query (R, H, L, D), key and value (R, H_kv, L, D), and the
options of transformers' interface in; (R, L, H, D) out."""
_CURRENT: ContextVar[PackedAttention] = ContextVar("toolgrpo_packed_attention")


@contextmanager
def packed_attention(model: PreTrainedModel, attend: PackedAttention) -> Iterator[None]:
    """
    Have a model's forward pass read each sequence of a packed batch as a prompt and segments after it.

    The backward pass may come after the context is closed, and after passes over other batches.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model, unwrapped, one that [`suits`].
        attend ([`PackedAttention`]):
            Attention over the batch of this pass.
    """
    base, config = base_model(model), model.config.get_text_config()

    def exchanged() -> AbstractContextManager[None]:
        return exchanged_attention(config, PACKED_ATTENTION, _CURRENT, attend)

    with around_checkpointed_parts(base, exchanged), exchanged():
        yield


class PieceAttention:
    """
    Packed attention by pieces, with torch's own attention for each.

    Args:
        pieces (`Sequence[tuple[int, Sequence[int]]]`):
            For each sequence: number of tokens of the prompt, and of each segment.
        device (`torch.device`):
            Where the model is.
    """

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        self._sequences = [(start, [(n, _visible(start, n, device)) for n in counts]) for start, counts in pieces]

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, object]
    ) -> Tensor:
        """Return what each token attends to, shape (R, L, H, D); see [`PackedAttention`]."""
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        sequences = []
        for row, (start, segments) in enumerate(self._sequences):
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
        return torch.cat(sequences)


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
    """Return whether a model's attention can be exchanged, also where a part of the model is computed again."""
    bare = base_model(model)
    if not has_replaceable_attention(bare) or has_unknown_checkpointing(bare):
        return False
    return attention_implementation(bare.config.get_text_config()) == "sdpa"


def _visible(start: int, count: int, device: torch.device) -> Tensor:
    """Return what a segment sees of the prompt and itself, bool, shape (1, 1, count, start + count)."""
    return torch.ones(count, start + count, dtype=torch.bool, device=device).tril(start)[None, None]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **options: object
) -> tuple[Tensor, None]:
    """Compute attention in transformers' interface: (R, H, L, D) in, (R, L, H, D) out."""
    options.pop("is_causal", None)
    return _CURRENT.get()(module, query, key, value, options), None


ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, _attention)
