"""Attention over a shared prompt and a row's own tokens, without copying either.

Rows of one prompt attend to a single copy of its keys and values, all rows of a group in one matrix product; each
row's own tokens are attended to separately; the two parts are merged by their log-sum-exp (as in "Hydragen", arXiv
2402.05099, and FlashDecoding). transformers has caches for one batch of rows, not for a prefix that rows share.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..trl_hooks import replaced_attention
from .protocol import score_dtype


ATTENTION_NAME = "toolgrpo_shared_prefix"
Given = TypeVar("Given")
_CURRENT: ContextVar["KeyValueStore"] = ContextVar("toolgrpo_key_value_store")


@dataclass
class Layout:
    """
    How rows share prompts, for as long as the same rows run.

    Args:
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

    groups: Tensor
    ranks: Tensor
    width: int
    order: Tensor
    places: Tensor | None
    members: list[tuple[int, int, int, int]]
    batched: bool

    def by_prompt(self, rows: Tensor) -> Tensor:
        """Return rows (B, ...) in `order`."""
        return rows if self.places is None else rows.index_select(0, self.order)

    def by_row(self, ordered: Tensor) -> Tensor:
        """Undo [`Layout.by_prompt`]."""
        return ordered if self.places is None else ordered.index_select(0, self.places)

    def copy_(self, other: "Layout") -> None:
        """Take over another layout of as many rows, in the same tensors; both are batched and have `places`."""
        for name in ("groups", "ranks", "order", "places"):
            getattr(self, name).copy_(getattr(other, name))


@dataclass
class Span:
    """
    The rows that a forward pass extends, and where they are.

    Args:
        layout ([`Layout`]):
            How the rows share prompts.
        slots (`int`):
            First slot of the rows in the store; the rows are `slots, slots + 1, ...`.
        lengths (`Tensor`):
            Own tokens of each row before this pass, int64, shape (B,).
        query_length (`int`):
            New tokens of each row, padding included.
        longest (`int`):
            Largest of `lengths`, or a bound on them.
        level (`bool`):
            Whether each of `lengths` is surely `longest`.
    """

    layout: Layout
    slots: int
    lengths: Tensor
    query_length: int
    longest: int
    level: bool

    @functools.cached_property
    def positions(self) -> Tensor:
        """Return the place of each new token among its row's own tokens, int64, shape (B, T)."""
        return self.lengths[:, None] + torch.arange(self.query_length, device=self.lengths.device)


class KeyValueStore:
    """
    Keys and values of every prompt, once, and of every row's own tokens.

    What a pass reads of it is known without reading the device, so that passes can be queued one after the other.

    Args:
        prompt_sizes (`Sequence[int]`):
            Stored tokens of each of G prompts.
        rows (`int`):
            Rows of the session.
        max_length (`int`):
            Places for own tokens of a row, one more than it can have.
        device (`torch.device`, *optional*):
            Where the model is.
        fixed (`bool`, *optional*, defaults to `False`):
            Whether all places are allocated at once, and stay where they are.
        kernels (`bool`, *optional*, defaults to `False`):
            Whether CUDA's kernel that returns the log-sum-exp is used.
    """

    def __init__(
        self,
        prompt_sizes: Sequence[int],
        rows: int,
        max_length: int,
        device: torch.device | None = None,
        fixed: bool = False,
        kernels: bool = False,
    ):
        self.prompt_sizes = list(prompt_sizes)
        self.longest_prompt = max(1, *self.prompt_sizes)
        self.prompt_lengths = torch.tensor(self.prompt_sizes, device=device)
        self.rows = rows
        self.max_length = max_length
        self.kernels = kernels
        self.capacity = max_length if fixed else 0
        self._width = 0
        # Keys and values of each layer
        self.prompts: list[tuple[Tensor, Tensor]] = []
        self.own: list[tuple[Tensor, Tensor]] = []
        self.span: Span | None = None  # of the pass that runs; `None` while prompts are read
        self._places: dict[int, Tensor] = {}
        self._biases: dict[tuple[str, int | None], Tensor | None] = {}

    @property
    def running(self) -> Span:
        """Return the span of the pass that runs; raise `RuntimeError` if there is none."""
        if self.span is None:
            raise RuntimeError("KeyValueStore.begin was not called before the forward pass.")
        return self.span

    # Prompts

    def store_prompts(self, layer: int, first: int, key: Tensor, value: Tensor) -> None:
        """Store keys and values of prompts `first, first + 1, ...`; `key` and `value` have shape (B, H_kv, T, D)."""
        if layer == len(self.prompts):
            shape = (len(self.prompt_sizes), key.shape[1], self.longest_prompt)
            self.prompts.append((key.new_zeros(*shape, key.shape[3]), value.new_zeros(*shape, value.shape[3])))
        for kept, new in zip(self.prompts[layer], (key, value), strict=True):
            kept[first : first + new.shape[0], :, : new.shape[2]] = new

    # Own tokens

    def begin(self, span: Span) -> None:
        """Prepare a forward pass over `span`: room for its tokens, and no stale masks."""
        self.span = span
        self._biases, self._places = {}, {}
        # Padding of a row whose history is long may reach beyond the store; it is written to the last place
        needed = self._width = min(span.longest + span.query_length, self.max_length)
        if needed > self.capacity:
            # Grown by half at a time, so that the copies add up to a few times the final size at most
            self.capacity = max(needed, min(int(self.capacity * 1.5) + 32, self.max_length))
            for layer, (keys, values) in enumerate(self.own):  # one layer at a time: no second copy of all of them
                self.own[layer] = self._enlarged(keys), self._enlarged(values)

    def _enlarged(self, old: Tensor) -> Tensor:
        new = old.new_zeros(*old.shape[:2], self.capacity, old.shape[3])
        new[:, :, : old.shape[2]] = old
        return new

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values of the current span; return views of its rows, (B, H_kv, L, D) each."""
        span = self.running
        if layer == len(self.own):
            shape = (self.rows, key.shape[1], self.capacity)
            self.own.append((key.new_zeros(*shape, key.shape[3]), value.new_zeros(*shape, value.shape[3])))
        rows, places = slice(span.slots, span.slots + key.shape[0]), self._place(key.shape[1])
        for own, new in zip(self.own[layer], (key, value), strict=True):
            own.view(-1, own.shape[3]).index_copy_(0, places, new.reshape(-1, new.shape[3]))
        keys, values = self.own[layer]
        return keys[rows, :, : self._width], values[rows, :, : self._width]

    def layer_of(self, key: Tensor, layer: int) -> int:
        """Return the layer that `key`, a view returned by [`KeyValueStore.append`], belongs to: `layer`, or an earlier
        one whose keys and values it uses instead of its own."""
        storage = key.untyped_storage().data_ptr()
        candidates = itertools.chain([layer] if layer < len(self.own) else [], range(len(self.own)))
        return next((at for at in candidates if self.own[at][0].untyped_storage().data_ptr() == storage), layer)

    def _place(self, heads: int) -> Tensor:
        """Return the index of each new key, in the order (B, H_kv, T), in the store flattened but for its last
        dimension."""
        if heads not in self._places:
            span, device = self.running, self.running.lengths.device
            row = torch.arange(span.slots, span.slots + len(span.lengths), device=device)
            head = row[:, None] * heads + torch.arange(heads, device=device)
            places = span.positions.clamp(max=self.max_length - 1)
            self._places[heads] = (head[:, :, None] * self.capacity + places[:, None]).flatten()
        return self._places[heads]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first `length` own tokens of two slots."""
        for store in itertools.chain.from_iterable(self.own):
            first, second = store[one, :, :length], store[other, :, :length]
            kept = first.clone()
            first.copy_(second)
            second.copy_(kept)

    # Masks

    def bias(self, part: str, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """
        Return the additive mask of the current span against the prompts (`"prompt"`, shape (G, width, T, P)) or
        against the rows' own tokens (`"own"`, shape (B, T, L)); `None` if every key may be seen.
        """
        if (part, window) not in self._biases:
            if part == "prompt":
                found = None if self._sees_prompts(window) else additive_mask(self._prompt_visible(window), dtype)
            else:
                found = None if self._sees_own(window) else additive_mask(self._own_visible(window), dtype)
            self._biases[part, window] = found
        return self._biases[part, window]

    def _sees_prompts(self, window: int | None) -> bool:
        """Return whether every query sees all of its padded prompt."""
        span, size = self.running, self.longest_prompt
        same = set(self.prompt_sizes) == {size}
        return same and (window is None or size + span.longest + span.query_length <= window)

    def _sees_own(self, window: int | None) -> bool:
        """Return whether every query sees all of the width that is read of its row."""
        span = self.running
        same = span.level and span.query_length == 1 and self._width == span.longest + 1
        return same and (window is None or span.longest < window)

    def _prompt_visible(self, window: int | None) -> Tensor:
        span = self.running
        key = torch.arange(self.longest_prompt, device=span.lengths.device)
        visible = key < self.prompt_lengths[:, None, None, None]
        if window is None:
            return visible
        layout = span.layout
        distance = self.prompt_lengths[layout.groups][:, None] + span.positions  # (B, T) absolute query positions
        near = span.lengths.new_zeros(len(self.prompt_sizes), layout.width, span.query_length)
        near[layout.groups, layout.ranks] = distance
        return visible & (key > near[..., None] - window)

    def prompt_bias(
        self, prompt: int, size: int, rows: Tensor, window: int | None, dtype: torch.dtype
    ) -> Tensor | None:
        """Return the additive mask of some rows against their one prompt, shape (n, T, P); `None` if all of it is
        seen."""
        if size == 0:
            shape = (len(rows), self.running.query_length, 1)
            return torch.full(shape, torch.finfo(dtype).min, dtype=dtype, device=rows.device)
        if window is None:
            return None
        name = (f"prompt {prompt}", window)
        if name not in self._biases:
            key = torch.arange(size, device=rows.device)
            visible = key > size + self.running.positions[rows][..., None] - window
            self._biases[name] = additive_mask(visible, dtype)
        return self._biases[name]

    def _own_visible(self, window: int | None) -> Tensor:
        query = self.running.positions[..., None]
        key = torch.arange(self._width, device=query.device)
        visible = key <= query
        return visible if window is None else visible & (key > query - window)


class PromptCache(DynamicCache):
    """The cache of a prefill of prompts, which hands each layer's keys and values to the store."""

    def __init__(self, store: KeyValueStore, first: int):
        super().__init__()
        self.store, self.first = store, first

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        # Under autocast normalized keys are float32 and values are not; torch's own attention casts them alike
        key_states = key_states.to(value_states.dtype)
        self.store.store_prompts(layer_idx, self.first, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class RowCache(DynamicCache):
    """The cache of a pass over rows, which appends to the store and returns views of it."""

    def __init__(self, store: KeyValueStore):
        super().__init__()
        self.store = store

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return self.store.append(layer_idx, key_states.to(value_states.dtype), value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.store.span.longest if self.store.span is not None else 0


@contextmanager
def exchanged_attention(
    config: PreTrainedConfig, name: str, variable: ContextVar[Given], given: Given
) -> Iterator[None]:
    """
    Run a model with another attention function while this is open.

    Args:
        config (`PreTrainedConfig`):
            Configuration of the model.
        name (`str`):
            Name the function is registered by.
        variable (`ContextVar`), given:
            Where the function looks for what it needs, and what that is.
    """
    token = variable.set(given)
    try:
        with replaced_attention(config, name):
            yield
    finally:
        variable.reset(token)


def shared_prefix_attention(model: PreTrainedModel, store: KeyValueStore) -> AbstractContextManager[None]:
    """Run `model` with the shared-prefix attention over `store` while this is open."""
    return exchanged_attention(model.config, ATTENTION_NAME, _CURRENT, store)


# torch's own attention kernel for CPUs returns the log-sum-exp too, in float32 and without materializing the scores
_CPU_KERNEL: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def _cuda_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return attention and its log-sum-exp as `_Attention.attend` does, by the kernel of memory-efficient attention,
    which holds no scores. It wants the strides of a mask to be multiples of 16 bytes."""
    batch, heads, count, _ = query.shape
    if bias is not None:
        width = key.shape[2]
        aligned = bias.new_zeros(*bias.shape[:-1], -(-width // 8) * 8)
        aligned[..., :width] = bias
        bias = aligned[..., :width].expand(batch, heads, count, width)
    out, lse, *_ = _CUDA_KERNEL(query, key, value, bias, True, scale=scale)
    return out, lse[:, :, :count, None]  # it is padded to whole blocks of queries


_CUDA_KERNEL: Any = torch.ops.aten._scaled_dot_product_efficient_attention


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to add to scores, in `dtype`: 0 where `visible` (bool, any shape), the least number elsewhere."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)


@dataclass(frozen=True)
class _Attention:
    """
    The attention of one layer in one pass.

    Args:
        scale (`float`):
            What scores are multiplied by.
        window (`int`, *optional*):
            Keys that a query sees, its own included; all by default.
        softcap (`float`, *optional*):
            Bound of the scores, as in Gemma 2.
        with_lse (`bool`):
            Whether the log-sum-exp of all scores of a query is needed.
        kernels (`bool`, *optional*, defaults to `False`):
            Whether CUDA's kernel that returns the log-sum-exp is used.
    """

    scale: float
    window: int | None
    softcap: float | None
    with_lse: bool
    kernels: bool = False

    def mask_dtype(self, query: Tensor) -> torch.dtype:
        """Return the dtype of masks for a query: that of scores, or where a CUDA kernel reads them, the query's."""
        return query.dtype if self._suits_cuda(query) else score_dtype(query)

    def _suits_cuda(self, query: Tensor) -> bool:
        of_kernel = (torch.float16, torch.bfloat16, torch.float32)
        return self.kernels and query.device.type == "cuda" and query.dtype in of_kernel and self.softcap is None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return attention and its log-sum-exp; query (B, H, Q, D), key and value (B, H, K, D). The log-sum-exp and
        `bias` have the dtype of scores: torch's kernel reads a mask for float64 queries as float64, whatever it is."""
        wide, softcap = score_dtype(query), self.softcap
        if self._suits_cuda(query):
            return _cuda_attention(query, key, value, bias, self.scale)
        if _CPU_KERNEL is not None and query.device.type == "cpu" and softcap is None and key.shape == value.shape:
            if bias is not None:
                bias = bias.expand(query.shape[0], 1, query.shape[2], key.shape[2])
            out, lse = _CPU_KERNEL(query, key, value, 0.0, False, attn_mask=bias, scale=self.scale)
            return out, lse[..., None].to(wide)
        # Products of low-precision inputs are accumulated and kept in float32, which autocast would round
        with torch.autocast(query.device.type, enabled=False):
            scores = torch.matmul(query.to(wide) * self.scale, key.to(wide).transpose(-1, -2))
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if bias is not None:
                scores = scores + bias
            lse = torch.logsumexp(scores, dim=-1, keepdim=True)
            out = torch.matmul(torch.exp(scores - lse).to(value.dtype), value)
        return out, lse

    def causal(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return causal attention of a right-padded prompt batch, and its log-sum-exp where `with_lse`; query
        (B, H_kv, G, T, D), key and value (B, H_kv, T, D)."""
        batch, heads, groups, length, _ = query.shape
        if not self.with_lse and self.softcap is None and (self.window is None or self.window >= length):
            flat = query.reshape(batch, heads * groups, length, -1)
            out = F.scaled_dot_product_attention(flat, key, value, is_causal=True, scale=self.scale, enable_gqa=True)
            return out.view(query.shape[:4] + value.shape[3:]), None
        position = torch.arange(length, device=key.device)
        visible = position[None] <= position[:, None]
        if self.window is not None:
            visible &= position[None] > position[:, None] - self.window
        bias = additive_mask(visible, self.mask_dtype(query))
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        out, lse = self.attend(query.flatten(1, 2), key, value, bias)
        return out.unflatten(1, (heads, groups)), lse.unflatten(1, (heads, groups))

    def rows(
        self, store: KeyValueStore, layer: int, query: Tensor, own_key: Tensor, own_value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return attention of rows (B, H_kv, G, T, D) to their prompts and their own tokens, merged by log-sum-exp,
        and that log-sum-exp where `with_lse`."""
        layout = store.running.layout
        batch, heads, groups, length, dim = query.shape
        wide = score_dtype(query)
        own_bias = store.bias("own", self.window, self.mask_dtype(query))
        if own_bias is not None:  # (B, T, L) -> (B, 1, G * T, L), or (B, 1, 1, L) for all queries of a single token
            own_bias = own_bias[:, None]
            if length > 1:
                own_bias = own_bias.expand(-1, groups, -1, -1).reshape(batch, 1, groups * length, -1)
        flat = query.reshape(batch, heads, groups * length, dim)
        own, own_lse = self.attend(flat, own_key, own_value, own_bias)

        ordered = layout.by_prompt(flat)
        if layout.batched:
            shared, shared_lse = self._all_prompts(store, layer, ordered, groups)
        else:
            parts = [self._one_prompt(store, layer, ordered, groups, *member) for member in layout.members]
            shared, shared_lse = (torch.cat(part) for part in zip(*parts, strict=True))
        shared, shared_lse = layout.by_row(shared), layout.by_row(shared_lse)
        out = torch.lerp(own.to(wide), shared.to(wide), torch.sigmoid(shared_lse - own_lse))
        lse = torch.logaddexp(own_lse, shared_lse) if self.with_lse else own_lse
        shape = (batch, heads, groups, length, -1)
        return out.view(*shape), lse.view(*shape)

    def _one_prompt(
        self, store: KeyValueStore, layer: int, ordered: Tensor, groups: int, prompt: int, size: int, *ends: int
    ) -> tuple[Tensor, Tensor]:
        """Return attention of the rows of one prompt to it, in one product, and its log-sum-exp; `ends` are where the
        rows begin and end in `ordered`."""
        key, value = (kept[prompt : prompt + 1, :, : max(1, size)] for kept in store.prompts[layer])
        mine = ordered[slice(*ends)].transpose(0, 1)  # (H_kv, n, G * T, D)
        heads, count, queries, dim = mine.shape
        rows = store.running.layout.order[slice(*ends)]
        bias = store.prompt_bias(prompt, size, rows, self.window, self.mask_dtype(mine))
        if bias is not None:  # (n, T, P) -> (1, 1, n * G * T, P)
            bias = bias[:, None].expand(-1, groups, -1, -1).reshape(1, 1, count * queries, -1)
        out, lse = self.attend(mine.reshape(1, heads, count * queries, dim), key, value, bias)
        out = out.view(heads, count, queries, -1).transpose(0, 1)
        return out, lse.view(heads, count, queries, 1).transpose(0, 1)

    def _all_prompts(
        self, store: KeyValueStore, layer: int, ordered: Tensor, groups: int
    ) -> tuple[Tensor, Tensor]:
        """Return attention of all rows to their prompts and its log-sum-exp, in one product that is padded to the
        longest prompt and the fullest group."""
        prompts, width = len(store.prompt_sizes), store.running.layout.width
        _, heads, queries, dim = ordered.shape
        packed = ordered.view(prompts, width, heads, queries, dim).transpose(1, 2)
        packed = packed.reshape(prompts, heads, width * queries, dim)
        bias = store.bias("prompt", self.window, self.mask_dtype(ordered))
        if bias is not None and self.window is not None:  # (G, width, T, P) -> (G, 1, width * groups * T, P)
            bias = bias[:, :, None].expand(-1, -1, groups, -1, -1).reshape(prompts, 1, width * queries, -1)
        out, lse = self.attend(packed, *store.prompts[layer], bias)
        shape = (prompts, heads, width, queries, -1)
        out, lse = (x.view(*shape).transpose(1, 2).reshape(prompts * width, heads, queries, -1) for x in (out, lse))
        return out, lse


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention function in transformers' interface: (B, H, T, D) in, (B, T, H, D) out."""
    store = _CURRENT.get()
    given, query = query.dtype, query.to(value.dtype)
    batch, all_heads, length, dim = query.shape
    heads = key.shape[1]
    if length != (key.shape[2] if store.span is None else store.span.query_length):
        # Layers that only use the keys of earlier ones may leave out tokens whose logits are not needed. They do so in
        # passes that fill the store, whose output nobody reads.
        return value.new_zeros(batch, length, all_heads, value.shape[3], dtype=given), None
    grouped = query.view(batch, heads, all_heads // heads, length, dim)
    scale = dim**-0.5 if scaling is None else scaling
    attention = _Attention(scale, sliding_window, softcap, s_aux is not None, store.kernels)
    lse: Tensor | None
    if store.span is None:
        out, lse = attention.causal(grouped, key, value)
    else:
        out, lse = attention.rows(store, store.layer_of(key, module.layer_idx), grouped, key, value)
    if s_aux is not None and lse is not None:
        # An attention sink: a logit per head that takes part in the softmax and has no value
        sink = s_aux.view(1, heads, -1, 1, 1).to(lse.dtype)
        out = out * torch.sigmoid(lse - sink)
    out = out.reshape(batch, all_heads, length, -1).transpose(1, 2).to(given)
    return out.contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _attention)
