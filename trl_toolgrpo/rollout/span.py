"""Which rows a forward pass extends, and how they share prompts.

Owns `Span`, the record that a sampling session hands to its store of keys and values. Imports nothing of the package.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Span:
    """
    Which rows a forward pass extends, and where.

    Args:
        slots (`int`):
            First slot of the rows in the store; the rows are `slots, slots + 1, ...`.
        lengths (`Tensor`):
            Own tokens of each row before this pass, int64, shape (B,).
        query_length (`int`):
            New tokens of each row, padding included.
        longest (`int`):
            Largest of `lengths`.
        groups (`Tensor`):
            Prompt of each row, int64, shape (B,).
        ranks (`Tensor`):
            Position of each row among the rows of its prompt, int64, shape (B,).
        width (`int`):
            Most rows any prompt has.
        order (`Tensor`):
            Rows in the order of their prompts, int64; where `batched`, `width` rows for every prompt, shape
            (G * width,), else shape (B,).
        places (`Tensor`, *optional*):
            Place of each row in `order`, int64, shape (B,); `None` where every row is in its place already.
        members (`list[tuple[int, int, int, int]]`):
            For each prompt with rows in this pass: its index, its length, and where its rows begin and end in `order`.
        batched (`bool`):
            Whether all prompts are attended to in one product (padded to the longest) or one after the other.
    """

    slots: int
    lengths: Tensor
    query_length: int
    longest: int
    groups: Tensor
    ranks: Tensor
    width: int
    order: Tensor
    places: Tensor | None
    members: list[tuple[int, int, int, int]]
    batched: bool

    def by_prompt(self, rows: Tensor) -> Tensor:
        """Rows (B, ...) in `order`."""
        return rows if self.places is None else rows.index_select(0, self.order)

    def by_row(self, ordered: Tensor) -> Tensor:
        """What [`Span.by_prompt`] put in order, as rows (B, ...) again."""
        return ordered if self.places is None else ordered.index_select(0, self.places)
