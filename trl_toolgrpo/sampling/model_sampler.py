"""The default sampler: rollouts on the training model itself, on a CPU, one GPU or many.

Rows join, wait and leave without a barrier. The prompt of a group is prefilled and kept once; a row's keys and values
stay across its turns; tokens the row has to read (tool results) are prefilled in batches. A log-prob is recorded with
every sampled token, from the full softmax of `logits / temperature`. `model.generate` has none of this: it prefills
the whole history at every turn.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..errors import SamplerError
from ..models.lm_head import base_model, held_head
from ..models.rotary import RowFrequencies
from .noise import race
from .packed_linear import packed_linears
from .protocol import PolicySampler, SampledTokens, TokenConstraint, at_least_float32, constrain, scoring_mode
from .shared_prefix import KeyValueStore, Layout, PromptCache, RowCache, Span, shared_prefix_attention


PREFILL_TOKENS = 8192
"""Most tokens, padding included, of one pass that reads prompts or tool results of several rows."""
SAMPLED_AT_ONCE = 2**21
"""Most logits that are held in float32 at a time, few enough to stay in a processor's cache."""
JOIN_AFTER = 4
"""Most steps that a row with tokens to read waits for others to be prefilled with it, while rows are decoded."""


def sample_tokens(logits: Tensor, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    Sample by inverting the cumulative distribution, with one uniform number per row; or, given keys, by a race.

    Args:
        logits (`Tensor`):
            Logits of shape (B, V), any float dtype.
        temperature (`float`):
            Temperature the logits are divided by.
        noise (`Tensor`):
            Uniform numbers in [0, 1), float32, shape (B,); or keys, int64, as in [`race`].

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: token ids, int64, shape (B,); their log-probs in nats, shape (B,); the
        entropies in nats of what they were drawn from, shape (B,). Both are float32, or float64 for such logits.
    """
    rows = max(1, SAMPLED_AT_ONCE // logits.shape[-1])
    pieces = zip(logits.split(rows), noise.to(logits.device).split(rows), strict=True)
    found = [_sample_rows(part, temperature, drawn) for part, drawn in pieces]
    tokens, logprobs, entropies = (torch.cat(part) for part in zip(*found, strict=True))
    return tokens, logprobs, entropies


def _sample_rows(logits: Tensor, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Do the work of [`sample_tokens`] for so few rows that a float32 copy of their logits does no harm."""
    scores = at_least_float32(logits)
    if temperature != 1.0:
        scores = scores / temperature
    log_z = torch.logsumexp(scores, dim=-1, keepdim=True)
    probabilities = torch.sub(scores, log_z).exp_()
    if noise.dtype == torch.int64:
        tokens = race(probabilities, noise)[:, None]
    else:
        cumulative = probabilities.cumsum(dim=-1)
        # The first token whose cumulative mass exceeds the threshold always has mass of its own
        tokens = torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)
        tokens.clamp_(max=logits.shape[-1] - 1)
    logprobs = (scores.gather(-1, tokens) - log_z).clamp_(max=0.0)  # rounding alone can pass 0
    with torch.autocast(scores.device.type, enabled=False):  # whose least float32 is -inf
        expected = torch.linalg.vecdot(probabilities, scores.clamp(min=torch.finfo(scores.dtype).min))
    entropies = log_z[:, 0] - expected
    return tokens[:, 0], logprobs[:, 0], entropies


@dataclass(eq=False)
class ModelSampler(PolicySampler):
    """Samples from a causal language model whose attention goes through transformers' attention interface."""

    def __post_init__(self) -> None:
        self.model = base_model(self.model)
        self.with_values = getattr(self.model, "value_head", None) is not None
        self.frequencies = RowFrequencies(self.model)
        self.draw = self.noise or (lambda rows: torch.rand(len(rows)))

    @contextmanager
    def open(self, prompts: Sequence[Sequence[int]], max_length: int) -> Iterator["ModelSession"]:
        """Open a session, see [`Sampler.open`]; the model is in evaluation mode, without gradients, until it ends."""
        with scoring_mode(self.model), self.autocast(), held_head(self.model):
            session = ModelSession(self, prompts, max_length)
            with shared_prefix_attention(self.model, session.store), packed_linears(self.model):
                session.prefill_prompts()
                yield session


@dataclass
class _Row:
    """The state of one row: `length` own tokens are in the store, `pending` ones are known and not yet read."""

    prompt: int
    slot: int
    pending: list[int]
    length: int = 0
    budget: int = 0
    waited: int = 0
    constraint: TokenConstraint | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)


class ModelSession:
    """A running batch of a [`ModelSampler`]; see [`SamplerSession`] for the protocol."""

    def __init__(self, sampler: ModelSampler, prompts: Sequence[Sequence[int]], max_length: int):
        self.sampler = sampler
        self.device = next(sampler.model.parameters()).device
        distinct: dict[tuple[int, ...], int] = {}
        self.rows: list[_Row] = []
        for row, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise SamplerError(f"The prompt of row {row} has no tokens; a prompt needs at least one.")
            # The last prompt token is read by each row itself, so that its logits come with the first decode step
            group = distinct.setdefault(tuple(prompt), len(distinct))
            self.rows.append(_Row(prompt=group, slot=row, pending=[prompt[-1]]))
        self.prompts = [list(prompt[:-1]) for prompt in distinct]
        lengths = torch.tensor([len(prompt) for prompt in self.prompts], device=self.device)
        self.store = KeyValueStore(lengths, len(prompts), max_length + 1)
        self.slots = list(range(len(prompts)))  # row in each slot; decoding rows come first
        self.running = 0  # slots [0, running) are being decoded
        self.queued: list[int] = []
        self.cache = RowCache(self.store)
        self._layouts: dict[tuple[int, ...], Layout] = {}  # the latest, by the prompts of its rows

    @property
    def busy(self) -> bool:
        """Whether there is work for [`ModelSession.step`]."""
        return self.running > 0 or bool(self.queued)

    def extend(
        self, row: int, token_ids: Sequence[int], max_new_tokens: int, constraint: TokenConstraint | None = None
    ) -> None:
        """Append known tokens to a row and sample more, see [`SamplerSession.extend`]."""
        state = self.rows[row]
        if row in self.queued or (state.slot < self.running and self.slots[state.slot] == row):
            raise SamplerError(f"Row {row} was extended while it is still being sampled.")
        if max_new_tokens < 1:
            raise SamplerError(f"Row {row} was given a budget of {max_new_tokens} tokens, expected at least 1.")
        state.pending.extend(token_ids)
        state.budget, state.waited, state.constraint = max_new_tokens, 0, constraint
        state.tokens, state.logprobs, state.values, state.entropies = [], [], [], []
        self.queued.append(row)

    def finish(self, row: int) -> None:
        """Do nothing: the memory of a row is freed with the session."""

    def step(self) -> list[SampledTokens]:
        """Read queued tokens when it pays, then decode one token for each row; see [`SamplerSession.step`]."""
        if self.queued and self._should_join():
            self._join()
        return self._decode() if self.running else []

    # Reading

    def prefill_prompts(self) -> None:
        """Read every distinct prompt but its last token, in batches of similar length."""
        order = sorted(range(len(self.prompts)), key=lambda index: len(self.prompts[index]))
        # Prompts are stored in order of length, so that a batch is a slice
        position = {index: place for place, index in enumerate(order)}
        self.prompts = [self.prompts[index] for index in order]
        for state in self.rows:
            state.prompt = position[state.prompt]
        self.store.prompt_lengths = self.store.prompt_lengths[torch.tensor(order, device=self.device)]
        for first, stop in _prefill_batches(list(map(len, self.prompts))):
            batch = self._padded(self.prompts[first:stop])
            positions = torch.arange(batch.shape[1], device=self.device)[None]
            # The last token of a prompt is read by its rows, with the rotary frequencies of the whole prompt
            lengths = self.store.prompt_lengths[first:stop] + 1
            self._forward(batch, positions, PromptCache(self.store, first), lengths)

    def _should_join(self) -> bool:
        """Return whether to pause decoding and read what queued rows have to read."""
        waiting = [self.rows[row] for row in self.queued]
        for state in waiting:
            state.waited += 1
        if not self.running or max(state.waited for state in waiting) > JOIN_AFTER:
            return True
        return all(len(state.pending) == 1 for state in waiting) or 4 * len(waiting) >= self.running

    def _join(self) -> None:
        """Move the queued rows to the running ones, and read all but the last of their pending tokens."""
        joining, self.queued = self.queued, []
        first = self.running
        for row in joining:
            self._swap(self.rows[row].slot, self.running)
            self.running += 1
        lengths = [len(self.rows[row].pending) - 1 for row in joining]
        for start, stop in _prefill_batches(lengths):
            if max(lengths[start:stop]) > 0:
                self._read(joining[start:stop], first + start)

    def _read(self, rows: list[int], first: int) -> None:
        """Read all but the last pending token of rows that sit in slots `first, first + 1, ...`."""
        states = [self.rows[row] for row in rows]
        tokens = self._padded([state.pending[:-1] for state in states])
        span = self._span(states, first, tokens.shape[1])
        prompt_lengths = self.store.prompt_lengths[span.layout.groups]
        offset = torch.arange(tokens.shape[1], device=self.device)
        self.store.begin(span)
        start = prompt_lengths + span.lengths
        read = torch.tensor([len(state.pending) - 1 for state in states], device=self.device)
        self._forward(tokens, start[:, None] + offset, self.cache, start + read)
        for state in states:
            state.length += len(state.pending) - 1
            state.pending = state.pending[-1:]

    # Decoding

    def _decode(self) -> list[SampledTokens]:
        """Sample one token for each running row; return the rows that finished."""
        rows = self.slots[: self.running]
        states = [self.rows[row] for row in rows]
        span = self._span(states, 0, 1)
        tokens = torch.tensor([[state.pending[0]] for state in states], device=self.device)
        self.store.begin(span)
        start = self.store.prompt_lengths[span.layout.groups] + span.lengths
        output = self._forward(tokens, start[:, None], self.cache, start + 1)
        logits = constrain(output.logits[:, -1], [state.constraint for state in states])
        sampled, logprobs, entropies = sample_tokens(logits, self.sampler.temperature, self.sampler.draw(rows))
        values = output["token_values"][:, -1].tolist() if self.sampler.with_values else None
        finished = []
        found = zip(rows, sampled.tolist(), logprobs.tolist(), entropies.tolist(), strict=True)
        for place, (row, token, logprob, entropy) in enumerate(found):
            state = self.rows[row]
            state.length += 1
            state.pending = [token]
            if state.constraint is not None:
                state.constraint.accept(token)
            state.tokens.append(token)
            state.logprobs.append(logprob)
            state.entropies.append(entropy)
            if values is not None:
                state.values.append(values[place])
            stopped = token in self.sampler.stop_ids
            if stopped or len(state.tokens) == state.budget:
                turn = SampledTokens(row, state.tokens, state.logprobs, stopped, entropies=state.entropies)
                turn.values = state.values if values is not None else None
                finished.append(turn)
        for result in finished:
            self.running -= 1
            self._swap(self.rows[result.row].slot, self.running)
        return finished

    def _forward(self, tokens: Tensor, positions: Tensor, cache: DynamicCache, lengths: Tensor) -> Any:
        """Run the model over (B, T) tokens of rows that have `lengths` tokens (B,) with them; return its output, with
        the logits after the last one."""
        if isinstance(cache, PromptCache):
            self.store.span = None
        with self.sampler.frequencies.of(lengths):
            return self.sampler.model(
                input_ids=tokens,
                position_ids=positions.expand(tokens.shape[0], -1),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **({"with_values": True} if self.sampler.with_values else {}),
            )

    # Slots

    def _swap(self, one: int, other: int) -> None:
        """Exchange the rows of two slots."""
        if one == other:
            return
        first, second = self.rows[self.slots[one]], self.rows[self.slots[other]]
        self.store.swap(one, other, max(first.length, second.length))
        self.slots[one], self.slots[other] = self.slots[other], self.slots[one]
        first.slot, second.slot = other, one

    def _span(self, states: list[_Row], first: int, query_length: int) -> Span:
        """Return the span of a pass over rows that sit in slots `first, first + 1, ...`."""
        prompts = tuple(state.prompt for state in states)
        if prompts not in self._layouts:
            self._layouts = {prompts: self._layout(prompts)}
        lengths = [state.length for state in states]
        return Span(
            self._layouts[prompts], first, torch.tensor(lengths, device=self.device), query_length, max(lengths)
        )

    def _layout(self, prompts: tuple[int, ...]) -> Layout:
        """Return how rows share prompts."""
        rows_of: list[list[int]] = [[] for _ in self.prompts]
        ranks = []
        for row, prompt in enumerate(prompts):
            ranks.append(len(rows_of[prompt]))
            rows_of[prompt].append(row)
        sizes, width = [len(prompt) for prompt in self.prompts], max(ranks) + 1
        batched = all(rows_of) and self._pads(sizes)
        padded = [rows + rows[:1] * (width - len(rows)) for rows in rows_of] if batched else rows_of
        starts = [0, *itertools.accumulate(map(len, padded))]
        order = [row for rows in padded for row in rows]
        places = [starts[prompt] + rank for prompt, rank in zip(prompts, ranks, strict=True)]
        return Layout(
            groups=torch.tensor(prompts, device=self.device),
            ranks=torch.tensor(ranks, device=self.device),
            width=width,
            order=torch.tensor(order, device=self.device),
            places=None if order == list(range(len(prompts))) else torch.tensor(places, device=self.device),
            members=[(p, sizes[p], starts[p], starts[p] + len(rows)) for p, rows in enumerate(rows_of) if rows],
            batched=batched,
        )

    def _pads(self, sizes: list[int]) -> bool:
        """Return whether to attend to prompts of these lengths in one padded product, which saves launches on an
        accelerator; on a CPU padding costs more than it saves."""
        return self.device.type != "cpu" or len(set(sizes)) == 1

    def _padded(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Return token ids, right-padded, int64, shape (B, T)."""
        width = max(1, *(len(sequence) for sequence in sequences))
        pad = self.sampler.pad_id
        rows = [list(sequence) + [pad] * (width - len(sequence)) for sequence in sequences]
        return torch.tensor(rows, device=self.device)


def _prefill_batches(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield where batches of consecutive rows begin and end, each of at most `PREFILL_TOKENS`, padding included, or of
    one row."""
    start, longest = 0, 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if row > start and (row + 1 - start) * longest > PREFILL_TOKENS:
            yield start, row
            start, longest = row, length
    yield start, len(lengths)
