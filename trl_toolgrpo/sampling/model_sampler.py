"""The default sampler: rollouts on the training model itself, on a CPU, one GPU or many.

Rows join, wait and leave without a barrier. The prompt of a group is prefilled and kept once; a row's keys and values
stay across its turns; tokens the row has to read (tool results) are prefilled in batches. A log-prob is recorded with
every sampled token, from the full softmax of `logits / temperature`. `model.generate` has none of this: it prefills
the whole history at every turn.
"""

import itertools
from collections import Counter
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
from .decoding import READ_EVERY, Decoder
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
    """
    Samples from a causal language model whose attention goes through transformers' attention interface.

    Args:
        paths (`frozenset[str]`, *optional*):
            Faster ways that are used, see `gpu_paths`: any of `"attention"`, `"reading"` and `"capture"`.
    """

    paths: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.model = base_model(self.model)
        self.with_values = getattr(self.model, "value_head", None) is not None
        self.frequencies = RowFrequencies(self.model)
        self.draw = self.noise or (lambda rows: torch.rand(len(rows)))
        self.rewind = getattr(self.noise, "rewind", None)  # noise that does not depend on rows has none
        self.is_stop = frozenset(self.stop_ids)

    @contextmanager
    def open(self, prompts: Sequence[Sequence[int]], max_length: int) -> Iterator["ModelSession"]:
        """Open a session, see [`Sampler.open`]; the model is in evaluation mode, without gradients, until it ends."""
        with scoring_mode(self.model), self.autocast(), held_head(self.model):
            session = ModelSession(self, prompts, max_length)
            with shared_prefix_attention(self.model, session.store), packed_linears(self.model, len(prompts)):
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
    figures: tuple[list[float], ...] = ()  # log-probs, entropies and values of `tokens`


class ModelSession:
    """A running batch of a [`ModelSampler`]; see [`SamplerSession`] for the protocol."""

    def __init__(self, sampler: ModelSampler, prompts: Sequence[Sequence[int]], max_length: int):
        self.sampler = sampler
        self.device = next(sampler.model.parameters()).device
        for row, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise SamplerError(f"The prompt of row {row} has no tokens; a prompt needs at least one.")
        # In the order of length, so that prompts of similar length are a slice of the store. The last token of a
        # prompt is read by each row itself, so that its logits come with the first decoding step.
        distinct = sorted({tuple(prompt) for prompt in prompts}, key=len)
        group = {prompt: place for place, prompt in enumerate(distinct)}
        self.rows = [_Row(group[tuple(prompt)], row, [prompt[-1]]) for row, prompt in enumerate(prompts)]
        self.prompts = [list(prompt[:-1]) for prompt in distinct]
        paths = sampler.paths
        self.store = KeyValueStore(
            [len(prompt) for prompt in self.prompts],
            len(prompts),
            max_length + 1,
            self.device,
            fixed="capture" in paths,
            kernels="attention" in paths,
        )
        self.slots = list(range(len(prompts)))  # row in each slot; decoding rows come first
        self.running = 0  # slots [0, running) are being decoded
        self.queued: list[int] = []
        self.cache = RowCache(self.store)
        # Rotary frequencies that are chosen on the host would be those of the captured step in all others
        self.decoder = Decoder(self._sample, self.store, "capture" in paths and sampler.frequencies.border is None)
        self.most_of_a_prompt = max(Counter(state.prompt for state in self.rows).values())
        self._begun = False  # whether the decoder has the rows that run
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
        state.tokens, state.figures = [], ([], [], [])
        self.queued.append(row)

    def finish(self, row: int) -> None:
        """Do nothing: the memory of a row is freed with the session."""

    def step(self) -> list[SampledTokens]:
        """Read queued tokens when it pays, then decode one token for each row; see [`SamplerSession.step`]."""
        if self.queued and self._should_join():
            finished = self._read_sampled()
            self._join()
            if finished:
                return finished
        return self._decode() if self.running else []

    # Reading

    def prefill_prompts(self) -> None:
        """Read every distinct prompt but its last token, in batches of similar length."""
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
        joining, self.queued = set(self.queued), []
        first, self.running = self.running, self.running + len(joining)
        places = range(first, self.running)
        free = [slot for slot in places if self.slots[slot] not in joining]
        for row in sorted(joining, key=lambda row: self.rows[row].slot):
            if self.rows[row].slot not in places:
                self._swap(self.rows[row].slot, free.pop())
        rows = self.slots[first : self.running]
        self._begun = False
        lengths = [len(self.rows[row].pending) - 1 for row in rows]
        for start, stop in _prefill_batches(lengths):
            if max(lengths[start:stop]) > 0:
                self._read(rows[start:stop], first + start)

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
        """Sample one token for each running row; return the rows that finished, if it is time to read."""
        if not self._begun:
            self._begin()
        rows = self.slots[: self.running]
        states = [self.rows[row] for row in rows]
        free = all(state.constraint is None for state in states)
        self.decoder.advance(self.sampler.draw(rows), captured=free)
        # A constraint allows the next token by the last one
        most = READ_EVERY if free and "reading" in self.sampler.paths else 1
        left = min(state.budget - len(state.tokens) for state in states)
        return self._read_sampled() if self.decoder.unread >= min(most, left) else []

    def _begin(self) -> None:
        """Hand the running rows to the decoder; with a fixed number also some that only fill it up."""
        states = [self.rows[row] for row in self.slots[: self.decoder.rows_of(self.running)]]
        lengths = [state.length for state in states]
        layout = self._layout_of(states)
        self.decoder.begin([state.pending[-1] for state in states], lengths, self.running, layout)
        self._begun = True

    def _sample(self, span: Span, tokens: Tensor, noise: Tensor) -> list[Tensor]:
        """Run the model over the last tokens of rows and sample the next ones, as a [`Step`]."""
        self.store.begin(span)
        start = self.store.prompt_lengths[span.layout.groups] + span.lengths
        output = self._forward(tokens, start[:, None], self.cache, start + 1)
        constraints = [self.rows[row].constraint for row in self.slots[: self.running]]
        logits = constrain(output.logits[:, -1], constraints)
        found = [*sample_tokens(logits, self.sampler.temperature, noise)]
        return [*found, output["token_values"][:, -1]] if self.sampler.with_values else found

    def _read_sampled(self) -> list[SampledTokens]:
        """Read what was sampled since the last time, and take the rows that finished out of the running ones; what was
        sampled for them in addition is dropped."""
        steps = self.decoder.read()
        finished, left = [], set()
        for place, row in enumerate(self.slots[: self.running] if steps else ()):
            state = self.rows[row]
            stopped = False
            for used, step in enumerate(steps, 1):
                token = int(step[0][place])
                for kept, figures in zip(state.figures, step[1:], strict=False):
                    kept.append(figures[place])
                state.tokens.append(token)
                if state.constraint is not None:
                    state.constraint.accept(token)
                stopped = token in self.sampler.is_stop
                if stopped or len(state.tokens) == state.budget:
                    finished.append(self._turn(row, stopped))
                    left.add(state.slot)
                    if self.sampler.rewind is not None:
                        self.sampler.rewind(row, len(steps) - used)
                    break
            state.length += used
            state.pending = [token]
        self._take_out(left)
        return finished

    def _turn(self, row: int, stopped: bool) -> SampledTokens:
        """Return the turn that a row has finished."""
        state = self.rows[row]
        logprobs, entropies, values = state.figures
        turn = SampledTokens(row, state.tokens, logprobs, stopped, entropies=entropies)
        turn.values = values if self.sampler.with_values else None
        return turn

    def _take_out(self, left: set[int]) -> None:
        """Take the rows of some slots out of the running ones, which stay together."""
        if not left:
            return
        self._begun = False
        self.running -= len(left)
        holes = sorted(slot for slot in left if slot < self.running)
        moved = [slot for slot in range(self.running, self.running + len(left)) if slot not in left]
        for hole, slot in zip(holes, moved, strict=True):
            self._swap(hole, slot)

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
        lengths = [state.length for state in states]
        longest, layout = max(lengths), self._layout_of(states)
        lengths_there = torch.tensor(lengths, device=self.device)
        return Span(layout, first, lengths_there, query_length, longest, level=min(lengths) == longest)

    def _layout_of(self, states: list[_Row]) -> Layout:
        """Return how the given rows share prompts."""
        prompts = tuple(state.prompt for state in states)
        if prompts not in self._layouts:
            self._layouts = {prompts: self._layout(prompts)}
        return self._layouts[prompts]

    def _layout(self, prompts: tuple[int, ...]) -> Layout:
        """Return how rows share prompts; for a fixed number of rows one padded product of all prompts, whichever rows
        there are."""
        rows_of: list[list[int]] = [[] for _ in self.prompts]
        ranks = []
        for row, prompt in enumerate(prompts):
            ranks.append(len(rows_of[prompt]))
            rows_of[prompt].append(row)
        fixed = self.decoder.fixed
        sizes, width = [len(prompt) for prompt in self.prompts], self.most_of_a_prompt if fixed else max(ranks) + 1
        batched = fixed or (all(rows_of) and self._pads(sizes))
        padded = [rows + (rows[:1] or [0]) * (width - len(rows)) for rows in rows_of] if batched else rows_of
        starts = [0, *itertools.accumulate(map(len, padded))]
        order = [row for rows in padded for row in rows]
        places = [starts[prompt] + rank for prompt, rank in zip(prompts, ranks, strict=True)]
        in_place = not fixed and order == list(range(len(prompts)))
        return Layout(
            groups=torch.tensor(prompts, device=self.device),
            ranks=torch.tensor(ranks, device=self.device),
            width=width,
            order=torch.tensor(order, device=self.device),
            places=None if in_place else torch.tensor(places, device=self.device),
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
