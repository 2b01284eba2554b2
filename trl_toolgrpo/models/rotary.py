"""Rotary embeddings whose frequencies depend on the length of what is read.

`longrope` has a set of frequencies for sequences up to `original_max_position_embeddings` and another for longer ones;
`dynamic` changes them with every token after `max_position_embeddings`. transformers judges by the largest position of
a forward pass: one row decides for all rows of a batch, and a row that grows past the border is read with other
frequencies than it was written with. Here each row gets the frequencies of a pass over that row alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn


_Embedding: TypeAlias = tuple[Tensor, ...]
"""Cosines and sines, each of shape (B, T, D)."""


class RowFrequencies:
    """
    The rotary frequencies of a model, for each row of a batch by its own length.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model, unwrapped.

    Attributes:
        border (`int` or `None`): longest sequence, in tokens, that is read with the frequencies of short ones; `None`
            for a model whose frequencies never change.
        kinds (`str`): the `rope_type`s that change them, for messages.
        settle (`bool`): whether they stay the same beyond the border, so that a whole rollout may lie there.
    """

    def __init__(self, model: nn.Module):
        found = [(module, borders) for module in model.modules() if (borders := _borders(module))]
        self._modules = [module for module, _ in found]
        lengths = {kind: length for _, borders in found for kind, length in borders}
        self.border = min(lengths.values(), default=None)
        self.kinds = ", ".join(sorted(lengths))
        self.settle = set(lengths) <= {"longrope"}

    def limit(self, prompt_length: int) -> float:
        """Return the most tokens a rollout can have, prompt included, for all of them to be read with the same
        frequencies."""
        if self.border is None or (self.settle and prompt_length > self.border):
            return float("inf")
        return self.border

    @contextmanager
    def of(self, lengths: Tensor | None = None) -> Iterator[None]:
        """
        Give each row of a forward pass the frequencies of a pass over that row alone, while this is open.

        Args:
            lengths (`Tensor`, *optional*):
                Tokens of each row without padding, int64, shape (B,); rows begin in the first column or in a cache.
                By default it is read off a row's largest position.
        """
        kept = [module.__dict__.get("forward") for module in self._modules]
        for module in self._modules:
            module.forward = self._by_row(module.forward, lengths)
        try:
            yield
        finally:
            for module, forward in zip(self._modules, kept, strict=True):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward

    def _by_row(self, forward: Callable[..., _Embedding], lengths: Tensor | None) -> Callable[..., _Embedding]:
        """Return the forward pass of a rotary embedding that takes rows of the same frequencies at a time."""

        def run(x: Tensor, position_ids: Tensor, *args: object, **kwargs: object) -> _Embedding:
            sizes = position_ids.amax(dim=1) + 1 if lengths is None else lengths.to(position_ids.device)
            places = position_ids.expand(len(sizes), -1)
            # transformers goes by the largest position: add a row's last one, and keep padding from exceeding it
            last = sizes[:, None] - 1
            places = torch.cat([torch.minimum(places, last), last], dim=1)
            groups = self._rows_by_frequency(sizes)
            found = [forward(x, places[rows], *args, **kwargs) for rows in groups]
            order = torch.cat(groups).argsort()
            return tuple(torch.cat(parts)[order][:, :-1] for parts in zip(*found, strict=True))

        return run

    def _rows_by_frequency(self, sizes: Tensor) -> list[Tensor]:
        """Return the indices of rows, grouped by their frequencies."""
        kind = torch.where(sizes > (self.border or 0), 1 if self.settle else sizes, 0)
        return [(kind == value).nonzero()[:, 0] for value in kind.unique().tolist()]


def _borders(module: Any) -> list[tuple[str, int]]:
    """Return where the frequencies of a module change, with the `rope_type` that says so; empty for most modules."""
    kinds = getattr(module, "rope_type", None)  # one, or one for each type of layer
    if kinds is None or not hasattr(module, "original_max_seq_len"):
        return []
    by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
    found = []
    for layer, kind in by_layer.items():
        if "dynamic" in kind:
            found.append((kind, int(module.original_max_seq_len)))
        elif kind == "longrope":
            parameters = module.config.rope_parameters
            parameters = parameters if layer is None else parameters[layer]
            found.append((kind, int(parameters["original_max_position_embeddings"])))
    return found
