"""Attention over a shared prompt and a row's own tokens, without copying either.

Owns the key-value store of a sampling session and the attention function registered with transformers. Rows of one
prompt attend to a single copy of its keys and values, all rows of a group in one matrix product; each row's own tokens
are attended to apart; the two parts are merged by their log-sum-exp (as in "Hydragen", arXiv 2402.05099, and
FlashDecoding). Fed by `model_sampler.py`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .span import Span


ATTENTION_NAME = "toolgrpo_shared_prefix"
Given = TypeVar("Given")
_CURRENT: ContextVar["KeyValueStore"] = ContextVar("toolgrpo_key_value_store")


class KeyValueStore:
    """
    Keys and values of every prompt, once, and of every row's own tokens.

    Args:
        prompt_lengths (`Tensor`):
            Stored tokens of each prompt, int64, shape (G,).
        rows (`int`):
            Rows of the session.
        max_length (`int`):
            Places for own tokens of a row, one more than it can have.
    """

    def __init__(self, prompt_lengths: Tensor, rows: int, max_length: int):
        self.prompt_lengths = prompt_lengths
        self.rows = rows
        self.max_length = max_length
        self.capacity = self._width = 0
        self.prompt_keys: list[Tensor] = []
        self.prompt_values: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.span: Span | None = None
        self._own_positions: Tensor | None = None
        self._places: dict[int, Tensor] = {}
        self._biases: dict[tuple[str, int | None], Tensor | None] = {}

    # Prompts

    def store_prompts(self, layer: int, first: int, key: Tensor, value: Tensor) -> None:
        """Keep keys and values of prompts `first, first + 1, ...`; `key` and `value` have shape (B, H_kv, T, D)."""
        if layer == len(self.prompt_keys):
            shape = (len(self.prompt_lengths), key.shape[1], max(1, int(self.prompt_lengths.max())))
            self.prompt_keys.append(key.new_zeros(*shape, key.shape[3]))
            self.prompt_values.append(value.new_zeros(*shape, value.shape[3]))
        self.prompt_keys[layer][first : first + key.shape[0], :, : key.shape[2]] = key
        self.prompt_values[layer][first : first + key.shape[0], :, : key.shape[2]] = value

    # Own tokens

    def begin(self, span: Span) -> None:
        """Prepare a forward pass over `span`: room for its tokens, and no stale masks."""
        self.span = span
        self._biases, self._places = {}, {}
        # Padding of a row whose history is long may reach beyond the store; it is written to the last place
        needed = self._width = min(span.longest + span.query_length, self.max_length)
        self._own_positions = span.lengths[:, None] + torch.arange(span.query_length, device=span.lengths.device)
        if needed > self.capacity:
            # Grown by half at a time, so that the copies add up to a few times the final size at most.
            self.capacity = max(needed, min(int(self.capacity * 1.5) + 32, self.max_length))
            for kept in (self.keys, self.values):
                for layer, old in enumerate(kept):  # one layer at a time: no second copy of all of them
                    kept[layer] = self._grown(old)

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(*old.shape[:2], self.capacity, old.shape[3])
        new[:, :, : old.shape[2]] = old
        return new

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values of the current span; returns views of its rows, (B, H_kv, L, D) each."""
        span = self.span
        if span is None or self._own_positions is None:
            raise RuntimeError("KeyValueStore.begin was not called before the forward pass.")
        if layer == len(self.keys):
            self.keys.append(key.new_zeros(self.rows, key.shape[1], self.capacity, key.shape[3]))
            self.values.append(value.new_zeros(self.rows, value.shape[1], self.capacity, value.shape[3]))
        stop = span.slots + key.shape[0]
        length = self._width
        places = self._place(key.shape[1])
        for own, new in ((self.keys[layer], key), (self.values[layer], value)):
            own.view(-1, own.shape[3]).index_copy_(0, places, new.reshape(-1, new.shape[3]))
        return self.keys[layer][span.slots : stop, :, :length], self.values[layer][span.slots : stop, :, :length]

    def layer_of(self, key: Tensor, layer: int) -> int:
        """Layer whose keys `key` are, a view that [`KeyValueStore.append`] returned: of `layer`, or of an earlier one
        whose keys and values it uses in place of its own."""
        own = layer < len(self.keys) and self.keys[layer].untyped_storage().data_ptr()
        storage = key.untyped_storage().data_ptr()
        if own == storage:
            return layer
        return next((at for at, kept in enumerate(self.keys) if kept.untyped_storage().data_ptr() == storage), layer)

    def _place(self, heads: int) -> Tensor:
        """Index of each new key, in the order (B, H_kv, T), into the store flattened but for its last dimension."""
        if heads not in self._places:
            span, lengths = self._span()
            row = torch.arange(span.slots, span.slots + len(lengths), device=lengths.device)
            head = row[:, None] * heads + torch.arange(heads, device=lengths.device)
            places = self._positions().clamp(max=self.max_length - 1)
            self._places[heads] = (head[:, :, None] * self.capacity + places[:, None]).flatten()
        return self._places[heads]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first `length` own tokens of two slots."""
        pair, swapped = [one, other], [other, one]
        for store in (*self.keys, *self.values):
            store[pair, :, :length] = store[swapped, :, :length]

    # Masks

    def bias(self, part: str, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """
        Additive mask of the current span against the prompts (`"prompt"`, shape (G, width, T, P)) or against the rows'
        own tokens (`"own"`, shape (B, T, L)); `None` where every key may be seen.
        """
        if (part, window) not in self._biases:
            visible = self._prompt_visible(window) if part == "prompt" else self._own_visible(window)
            self._biases[part, window] = None if bool(visible.all()) else additive_mask(visible, dtype)
        return self._biases[part, window]

    def _prompt_visible(self, window: int | None) -> Tensor:
        span, lengths = self._span()
        key = torch.arange(max(1, int(self.prompt_lengths.max())), device=lengths.device)
        visible = key < self.prompt_lengths[:, None, None, None]
        if window is None:
            return visible
        distance = self.prompt_lengths[span.groups][:, None] + self._positions()  # (B, T) absolute query positions
        near = lengths.new_zeros(len(self.prompt_lengths), span.width, span.query_length)
        near[span.groups, span.ranks] = distance
        return visible & (key > near[..., None] - window)

    def prompt_bias(
        self, prompt: int, size: int, rows: Tensor, window: int | None, dtype: torch.dtype
    ) -> Tensor | None:
        """Additive mask of some rows against their one prompt, shape (n, T, P); `None` where all of it is seen."""
        if size == 0:
            nothing = self._positions()[rows][..., None]
            return torch.full(nothing.shape, torch.finfo(dtype).min, dtype=dtype, device=rows.device)
        if window is None:
            return None
        name = (f"prompt {prompt}", window)
        if name not in self._biases:
            key = torch.arange(size, device=rows.device)
            visible = key > size + self._positions()[rows][..., None] - window
            self._biases[name] = additive_mask(visible, dtype)
        return self._biases[name]

    def _own_visible(self, window: int | None) -> Tensor:
        query = self._positions()[..., None]
        key = torch.arange(self._width, device=query.device)
        visible = key <= query
        return visible if window is None else visible & (key > query - window)

    def _positions(self) -> Tensor:
        if self._own_positions is None:
            raise RuntimeError("KeyValueStore.begin was not called before the forward pass.")
        return self._own_positions

    def _span(self) -> tuple[Span, Tensor]:
        if self.span is None:
            raise RuntimeError("KeyValueStore.begin was not called before the forward pass.")
        return self.span, self.span.lengths


class PromptCache(DynamicCache):
    """Cache of a prompt prefill: hands each layer's keys and values to the store."""

    def __init__(self, store: KeyValueStore, first: int):
        super().__init__()
        self.store, self.first = store, first

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        # Under autocast normalized keys are float32 and values are not; torch's own attention casts them alike
        key_states = key_states.to(value_states.dtype)
        self.store.store_prompts(layer_idx, self.first, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class RowCache(DynamicCache):
    """Cache of a pass over rows: appends to the store and returns views of it."""

    def __init__(self, store: KeyValueStore):
        super().__init__()
        self.store = store

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        return self.store.append(layer_idx, key_states.to(value_states.dtype), value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.store.span.longest if self.store.span is not None else 0


@contextmanager
def exchanged_attention(config: Any, name: str, variable: ContextVar[Given], given: Given) -> Iterator[None]:
    """
    While open, a model runs with an attention function of another name; its own is put back at the end.

    Args:
        config (`PretrainedConfig`):
            Configuration of the model.
        name (`str`):
            Name the function is registered by.
        variable (`ContextVar`), given:
            Where the function looks for what it needs, and what that is.
    """
    before = config._attn_implementation
    token = variable.set(given)
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
        variable.reset(token)


def shared_prefix_attention(model: Any, store: KeyValueStore) -> AbstractContextManager[None]:
    """Run `model` with the shared-prefix attention over `store`; the model's own attention is put back at the end."""
    return exchanged_attention(model.config, ATTENTION_NAME, _CURRENT, store)


# torch's own attention kernel for CPUs gives the log-sum-exp too, in float32 and without materializing the scores
_CPU_KERNEL = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to scores, in `dtype`: 0 where `visible` (bool, any shape), the least number elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, torch.finfo(dtype).min
    )


def score_dtype(query: Tensor) -> torch.dtype:
    """Dtype of attention scores and of masks added to them: float32, or the query's own where that is wider."""
    return torch.promote_types(query.dtype, torch.float32)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None, softcap: float | None):
    """Attention and its log-sum-exp; query (B, H, Q, D), key and value (B, H, K, D). The log-sum-exp and `bias` have
    the dtype of scores: torch's kernel reads a mask for float64 queries as float64, whatever it is."""
    wide = score_dtype(query)
    if _CPU_KERNEL is not None and query.device.type == "cpu" and softcap is None and key.shape == value.shape:
        if bias is not None:
            bias = bias.expand(query.shape[0], 1, query.shape[2], key.shape[2])
        out, lse = _CPU_KERNEL(query, key, value, 0.0, False, attn_mask=bias, scale=scale)
        return out, lse[..., None].to(wide)
    # Products of low-precision inputs are accumulated and kept in float32, which autocast would round
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.matmul(query.to(wide) * scale, key.to(wide).transpose(-1, -2))
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if bias is not None:
            scores = scores + bias
        lse = torch.logsumexp(scores, dim=-1, keepdim=True)
        out = torch.matmul(torch.exp(scores - lse).to(value.dtype), value)
    return out, lse


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float, window, softcap, with_lse: bool = False):
    """Causal attention of a right-padded prompt batch: query (B, H_kv, G, T, D), key and value (B, H_kv, T, D)."""
    length = key.shape[2]
    if not with_lse and softcap is None and (window is None or window >= length):
        batch, heads, groups = query.shape[:3]
        out = F.scaled_dot_product_attention(
            query.reshape(batch, heads * groups, length, -1), key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        return out.view(query.shape[:4] + value.shape[3:]), None
    position = torch.arange(length, device=key.device)
    visible = position[None] <= position[:, None]
    if window is not None:
        visible &= position[None] > position[:, None] - window
    bias = additive_mask(visible, score_dtype(query))
    batch, heads, groups = query.shape[:3]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out, lse = _attend(query.flatten(1, 2), key, value, scale, bias, softcap)
    return out.unflatten(1, (heads, groups)), lse.unflatten(1, (heads, groups))


def _rows(store: KeyValueStore, layer: int, query: Tensor, own_key: Tensor, own_value: Tensor, options: dict):
    """Attention of rows (B, H_kv, G, T, D) to their prompts and to their own tokens, merged by log-sum-exp."""
    span = store.span
    if span is None:
        raise RuntimeError("KeyValueStore.begin was not called before the forward pass.")
    scale, window, softcap = options["scale"], options["window"], options["softcap"]
    batch, heads, groups, length, dim = query.shape
    wide = score_dtype(query)
    own_bias = store.bias("own", window, wide)
    if own_bias is not None:  # (B, T, L) -> (B, 1, G * T, L)
        own_bias = own_bias[:, None].expand(-1, groups, -1, -1).reshape(batch, 1, groups * length, -1)
    flat = query.reshape(batch, heads, groups * length, dim)
    own, own_lse = _attend(flat, own_key, own_value, scale, own_bias, softcap)

    ordered = span.by_prompt(flat)
    if span.batched:
        shared, shared_lse = _batched_prompts(store, layer, ordered, groups, options)
    else:
        parts = [_one_prompt(store, layer, ordered, groups, member, options) for member in span.members]
        shared, shared_lse = (torch.cat(part) for part in zip(*parts, strict=True))
    shared, shared_lse = span.by_row(shared), span.by_row(shared_lse)
    out = torch.lerp(own.to(wide), shared.to(wide), torch.sigmoid(shared_lse - own_lse))
    lse = torch.logaddexp(own_lse, shared_lse) if options["with_lse"] else own_lse
    shape = (batch, heads, groups, length, -1)
    return out.view(*shape), lse.view(*shape)


def _one_prompt(store, layer, ordered, groups, member, options):
    """Attention of the rows of one prompt to it: one product over all of them."""
    prompt, size, start, stop = member
    key = store.prompt_keys[layer][prompt : prompt + 1, :, : max(1, size)]
    value = store.prompt_values[layer][prompt : prompt + 1, :, : max(1, size)]
    mine = ordered[start:stop].transpose(0, 1)  # (H_kv, n, G * T, D)
    heads, count, queries, dim = mine.shape
    bias = store.prompt_bias(prompt, size, store.span.order[start:stop], options["window"], score_dtype(mine))
    if bias is not None:  # (n, T, P) -> (1, 1, n * G * T, P)
        bias = bias[:, None].expand(-1, groups, -1, -1).reshape(1, 1, count * queries, -1)
    packed = mine.reshape(1, heads, count * queries, dim)
    out, lse = _attend(packed, key, value, options["scale"], bias, options["softcap"])
    out = out.view(heads, count, queries, -1).transpose(0, 1)
    return out, lse.view(heads, count, queries, 1).transpose(0, 1)


def _batched_prompts(store, layer, ordered, groups, options):
    """Attention of all rows to their prompts in one product, padded to the longest prompt and the fullest group."""
    span = store.span
    prompts, width = len(store.prompt_lengths), span.width
    _, heads, queries, dim = ordered.shape
    packed = ordered.view(prompts, width, heads, queries, dim).transpose(1, 2)
    packed = packed.reshape(prompts, heads, width * queries, dim)
    bias = store.bias("prompt", options["window"], score_dtype(ordered))
    if bias is not None and options["window"] is not None:  # (G, width, T, P) -> (G, 1, width * groups * T, P)
        bias = bias[:, :, None].expand(-1, -1, groups, -1, -1).reshape(prompts, 1, width * queries, -1)
    keys, values = store.prompt_keys[layer], store.prompt_values[layer]
    out, lse = _attend(packed, keys, values, options["scale"], bias, options["softcap"])
    shape = (prompts, heads, width, queries, -1)
    out, lse = (x.view(*shape).transpose(1, 2).reshape(prompts * width, heads, queries, -1) for x in (out, lse))
    return out, lse


def _attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, s_aux=None, **kwargs
):
    """Attention function in transformers' interface: (B, H, T, D) in, (B, T, H, D) out."""
    store = _CURRENT.get()
    given, query = query.dtype, query.to(value.dtype)
    batch, all_heads, length, dim = query.shape
    heads = key.shape[1]
    if length != (key.shape[2] if store.span is None else store.span.query_length):
        # Layers that only use the keys of earlier ones may leave out tokens whose logits are not asked for. That is so
        # in passes that fill the store, whose output nobody reads.
        return value.new_zeros(batch, length, all_heads, value.shape[3], dtype=given), None
    grouped = query.view(batch, heads, all_heads // heads, length, dim)
    scale = dim**-0.5 if scaling is None else scaling
    if store.span is None:
        out, lse = _causal(grouped, key, value, scale, sliding_window, softcap)
        if s_aux is not None and lse is None:
            out, lse = _causal(grouped, key, value, scale, length, softcap, with_lse=True)
    else:
        options = {"scale": scale, "window": sliding_window, "softcap": softcap, "with_lse": s_aux is not None}
        out, lse = _rows(store, store.layer_of(key, module.layer_idx), grouped, key, value, options)
    if s_aux is not None:  # an attention sink: a logit per head that takes part in the softmax and has no value
        sink = s_aux.view(1, heads, -1, 1, 1).to(lse.dtype)
        out = out * torch.sigmoid(lse - sink)
    out = out.reshape(batch, all_heads, length, -1).transpose(1, 2).to(given)
    return out.contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _attention)

__all__ = [
    "ATTENTION_NAME", "Cache", "KeyValueStore", "PromptCache", "RowCache", "exchanged_attention",
    "shared_prefix_attention",
]  # fmt: skip
