"""The plain sampler: `model.generate` over whole histories, for models whose attention the default sampler cannot
handle.

It prefills the history again at every turn and keeps rows in lockstep, so it is slow; but it needs nothing of the
model beyond `generate`, and records the same log-probs.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..errors import SamplerError
from ..models.lm_head import base_model, held_head
from ..models.rotary import RowFrequencies
from ..models.temporary_attribute import temporary_attribute
from .model_sampler import sample_tokens
from .protocol import PolicySampler, RowNoise, SampledTokens, TokenConstraint, constrain, scoring_mode


@dataclass
class _Temperature(LogitsProcessor):
    """
    Divides by the temperature, applies constraints and keeps the log-softmax the next token is drawn from. Given
    `noise`, it draws the token itself, and leaves only that one to draw.
    """

    temperature: float
    constraints: list[TokenConstraint | None]
    drawing: dict[int, int]  # row at each place of the batch that has not ended
    noise: RowNoise | None
    log_softmax: Tensor | None = None

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
    """Called right after each token is drawn: records its log-prob, and ends a row at its own budget."""

    def __init__(self, source: _Temperature, start: int, budgets: Tensor, stop_ids: Collection[int]):
        self.source, self.start, self.budgets, self.stop_ids = source, start, budgets, stop_ids
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        if self.source.log_softmax is None:
            raise SamplerError("`generate` drew a token without calling the logits processor.")
        self.logprobs.append(self.source.log_softmax.gather(-1, input_ids[:, -1:])[:, 0].clamp(max=0.0))
        ended = self.budgets <= input_ids.shape[1] - self.start
        for place, constraint in enumerate(self.source.constraints):
            token = int(input_ids[place, -1])
            if constraint is not None:
                constraint.accept(token)
            if token in self.stop_ids or bool(ended[place]):  # what is drawn after the end is thrown away
                self.source.constraints[place] = None
                self.source.drawing.pop(place, None)
        return ended


def without_generation_settings(model: PreTrainedModel) -> AbstractContextManager[None]:
    """
    Take away a model's own generation settings while this is open. `generate` falls back on them, and many chat models
    have a repetition penalty, which would reshape the distribution the trainer scores.
    """
    return temporary_attribute(base_model(model), "generation_config", GenerationConfig())


@dataclass(eq=False)
class GenerateSampler(PolicySampler):
    """
    Samples with `model.generate`.

    Args:
        pads (`bool`, *optional*, defaults to `True`):
            Whether histories are padded on the left and sampled together, or one after the other, for a model whose
            `generate` treats rows of a padded batch differently from each of them alone.
    """

    pads: bool = True

    @contextmanager
    def open(self, prompts: Sequence[Sequence[int]], max_length: int) -> Iterator["GenerateSession"]:
        """Open a session, see [`Sampler.open`]; the model is in evaluation mode, without gradients, until it ends."""
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
        """Whether there is work for [`GenerateSession.step`]."""
        return bool(self.budgets)

    def extend(
        self, row: int, token_ids: Sequence[int], max_new_tokens: int, constraint: TokenConstraint | None = None
    ) -> None:
        """Append known tokens to a row and sample more, see [`SamplerSession.extend`]."""
        if row in self.budgets:
            raise SamplerError(f"Row {row} was extended while it is still being sampled.")
        self.histories[row] += token_ids
        self.budgets[row], self.constraints[row] = max_new_tokens, constraint

    def finish(self, row: int) -> None:
        """Forget a row, see [`SamplerSession.finish`]."""
        self.histories[row] = []

    def step(self) -> list[SampledTokens]:
        """Sample the whole turn of every queued row; see [`SamplerSession.step`]."""
        budgets, self.budgets = self.budgets, {}
        batches = [list(budgets)] if self.sampler.pads and budgets else [[row] for row in budgets]
        return [result for rows in batches for result in self._sample(rows, [budgets[row] for row in rows])]

    def _sample(self, rows: list[int], limits: list[int]) -> list[SampledTokens]:
        """Sample the turns of some rows together."""
        sampler, device = self.sampler, next(self.sampler.model.parameters()).device
        width = max(len(self.histories[row]) for row in rows)
        padding = [width - len(self.histories[row]) for row in rows]
        ids = [[sampler.pad_id] * p + self.histories[r] for p, r in zip(padding, rows, strict=True)]
        mask = [[0] * p + [1] * (width - p) for p in padding]
        constraints = [self.constraints[row] for row in rows]
        source = _Temperature(sampler.temperature, constraints, dict(enumerate(rows)), sampler.noise)
        recorder = _Recorder(source, width, torch.tensor(limits, device=device), sampler.stop_ids)
        settings = GenerationConfig(
            max_new_tokens=max(limits),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=sampler.pad_id,
            eos_token_id=sorted(sampler.stop_ids),
            disable_compile=True,
        )
        output = cast(GenerationMixin, sampler.model).generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([source]),
            stopping_criteria=StoppingCriteriaList([recorder]),
            synced_gpus=False,  # parameters are gathered, and other processes have other numbers of turns
        )
        logprobs = torch.stack(recorder.logprobs, dim=1).tolist()
        results = []
        for row, limit, tokens, values in zip(rows, limits, output[:, width:].tolist(), logprobs, strict=True):
            end = next((i + 1 for i, token in enumerate(tokens) if token in sampler.stop_ids), len(tokens))
            end = min(end, limit)
            self.histories[row] += tokens[:end]
            results.append(SampledTokens(row, tokens[:end], values[:end], tokens[end - 1] in sampler.stop_ids))
        return results
