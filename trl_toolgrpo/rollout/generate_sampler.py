"""The plain sampler: `model.generate` over whole histories, for models whose attention the default sampler cannot
handle.

Owns `GenerateSampler`. It prefills the history again at every turn and keeps rows in lockstep, so it is slow; but it
asks nothing of the model beyond `generate`, and records the same log-probs. Fed with token ids by the rollout loop.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..errors import SamplerError
from ..lm_head import held_head
from .model_sampler import sample_tokens
from .rotary import RowFrequencies
from .sampler import SampledTokens, TokenConstraint, constrain, scoring_mode


class _Temperature(LogitsProcessor):
    """
    Divides by the temperature, applies constraints and keeps the log-softmax the next token is drawn from. Given
    `noise`, it draws the token itself, and leaves nothing else to draw.
    """

    def __init__(
        self,
        temperature: float,
        constraints: Sequence[TokenConstraint | None],
        rows: Sequence[int],
        noise: Callable[[list[int]], Tensor] | None,
    ):
        self.temperature = temperature
        self.constraints = list(constraints)
        self.noise = noise
        self.drawing = dict(enumerate(rows))  # row at each place of the batch that has not ended
        self.log_softmax: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scaled = constrain(scores.float() / self.temperature, self.constraints)
        self.log_softmax = torch.log_softmax(scaled, dim=-1)
        if self.noise is None or not self.drawing:
            return scaled
        places = torch.tensor(list(self.drawing), device=scores.device)
        tokens, _, _ = sample_tokens(scaled[places], 1.0, self.noise(list(self.drawing.values())))
        scaled[places] = torch.full_like(scaled[places], -torch.inf).scatter_(1, tokens[:, None], 0.0)
        return scaled


class _Recorder(StoppingCriteria):
    """Called right after each token is drawn: records its log-prob; ends a row at its own budget."""

    def __init__(self, source: _Temperature, start: int, budgets: Tensor, stop_ids: Collection[int]):
        self.source, self.start, self.budgets, self.stop_ids = source, start, budgets, stop_ids
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.source.log_softmax is None:
            raise SamplerError("`generate` drew a token without calling the logits processor.")
        self.logprobs.append(self.source.log_softmax.gather(-1, input_ids[:, -1:])[:, 0].clamp(max=0.0))
        ended = self.budgets <= input_ids.shape[1] - self.start
        for place, constraint in enumerate(self.source.constraints):
            token = int(input_ids[place, -1])
            if constraint is not None:
                constraint.accept(token)
            if token in self.stop_ids or bool(ended[place]):  # what is drawn behind the end is thrown away
                self.source.constraints[place] = None
                self.source.drawing.pop(place, None)
        return ended


@contextmanager
def without_generation_settings(model: Any) -> Iterator[None]:
    """
    Without the model's own generation settings. `generate` fills them in wherever it is given none, and many a chat
    model brings a repetition penalty, which would reshape the distribution the trainer scores.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    settings, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = settings


class GenerateSampler:
    """
    Samples with `model.generate`.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The policy, unwrapped.
        stop_ids (`Sequence[int]`):
            Tokens that end a turn.
        pad_id (`int`):
            Padding token id.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of sampling and of the recorded log-probs.
        autocast (`Callable`, *optional*):
            Gives the autocast context the trainer scores under.
        noise (`Callable`, *optional*):
            As in [`ModelSampler`]; by default `generate` draws.
        pads (`bool`, *optional*, defaults to `True`):
            Whether histories are padded on the left and sampled together, or one after the other, for a model whose
            `generate` gives rows of a batch something else than each of them alone.
    """

    def __init__(
        self,
        model: Any,
        stop_ids: Sequence[int],
        pad_id: int,
        temperature: float = 1.0,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        noise: Callable[[list[int]], Tensor] | None = None,
        pads: bool = True,
    ):
        self.model = model
        self.pads = pads
        self.noise = noise
        self.stop_ids = frozenset(stop_ids)
        self.pad_id = pad_id
        self.temperature = temperature
        self.autocast = autocast

    @contextmanager
    def open(self, prompts: Sequence[Sequence[int]], max_length: int) -> Iterator["GenerateSession"]:
        """See [`Sampler.open`]. The model is in evaluation mode, without gradients, while the session is open."""
        frequencies = RowFrequencies(self.model).of()  # `generate` counts positions without padding
        settings = without_generation_settings(self.model)
        with scoring_mode(self.model), settings, self.autocast(), held_head(self.model), frequencies:
            yield GenerateSession(self, prompts)


class GenerateSession:
    """A running batch of a [`GenerateSampler`]; see [`SamplerSession`] for the protocol."""

    def __init__(self, sampler: GenerateSampler, prompts: Sequence[Sequence[int]]):
        self.sampler = sampler
        self.histories = [list(prompt) for prompt in prompts]
        self.budgets: dict[int, int] = {}
        self.constraints: dict[int, TokenConstraint | None] = {}

    @property
    def busy(self) -> bool:
        """See [`SamplerSession.busy`]."""
        return bool(self.budgets)

    def extend(
        self, row: int, token_ids: Sequence[int], max_new_tokens: int, constraint: TokenConstraint | None = None
    ) -> None:
        """See [`SamplerSession.extend`]."""
        if row in self.budgets:
            raise SamplerError(f"Row {row} was extended while it is still being sampled.")
        self.histories[row] += token_ids
        self.budgets[row], self.constraints[row] = max_new_tokens, constraint

    def finish(self, row: int) -> None:
        """See [`SamplerSession.finish`]."""
        self.histories[row] = []

    def step(self) -> list[SampledTokens]:
        """See [`SamplerSession.step`]: here one step samples the whole turn of every queued row."""
        budgets, self.budgets = self.budgets, {}
        batches: dict[int, list[int]] = {}
        for row in budgets:
            batches.setdefault(0 if self.sampler.pads else row, []).append(row)
        return [result for rows in batches.values() for result in self._sample(rows, [budgets[row] for row in rows])]

    def _sample(self, rows: list[int], limits: list[int]) -> list[SampledTokens]:
        """Sample the turns of some rows together."""
        device = next(self.sampler.model.parameters()).device
        width = max(len(self.histories[row]) for row in rows)
        padding = [width - len(self.histories[row]) for row in rows]
        ids = [[self.sampler.pad_id] * p + self.histories[r] for p, r in zip(padding, rows, strict=True)]
        mask = [[0] * p + [1] * (width - p) for p in padding]
        constraints = [self.constraints[row] for row in rows]
        source = _Temperature(self.sampler.temperature, constraints, rows, self.sampler.noise)
        recorder = _Recorder(source, width, torch.tensor(limits, device=device), self.sampler.stop_ids)
        output = self.sampler.model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=self._generation_config(max(limits)),
            logits_processor=LogitsProcessorList([source]),
            stopping_criteria=StoppingCriteriaList([recorder]),
            synced_gpus=False,  # parameters are gathered, and other processes have other numbers of turns
        )
        logprobs = torch.stack(recorder.logprobs, dim=1).tolist()
        results = []
        for row, limit, tokens, values in zip(rows, limits, output[:, width:].tolist(), logprobs, strict=True):
            end = next((i + 1 for i, token in enumerate(tokens) if token in self.sampler.stop_ids), len(tokens))
            end = min(end, limit)
            self.histories[row] += tokens[:end]
            results.append(SampledTokens(row, tokens[:end], values[:end], tokens[end - 1] in self.sampler.stop_ids))
        return results

    def _generation_config(self, max_new_tokens: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=self.sampler.pad_id,
            eos_token_id=sorted(self.sampler.stop_ids),
            disable_compile=True,
        )
