"""The sampler protocol: extend these token sequences, return tokens and sample-time log-probs.

Owns the records that pass between the rollout loop and a sampler. A sampler knows tokens only: no chat, no tools.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..trajectory import field_meant_by, is_finite_number


@contextmanager
def scoring_mode(model: torch.nn.Module) -> Iterator[None]:
    """
    Evaluation mode without gradients, and without `torch.compile`, which would compile anew for every length; every
    module's training flag is put back at the end.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    for module in training:
        # In evaluation mode, on a CPU with AVX512-BF16, bitsandbytes packs its weight into a form for inference alone
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.training = True
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True


@dataclass
class SampledTokens:
    """
    What a sampler wrote for one row since it was last extended.

    Args:
        row (`int`):
            Row that was extended.
        token_ids (`list[int]`):
            Sampled tokens in order, the stop token included.
        logprobs (`list[float]`):
            Log-prob in nats of each token under the full softmax of `logits / temperature`, recorded when the token
            was sampled; without meaning under a constraint.
        stopped (`bool`):
            `True` if the last token is a stop token, `False` if the token budget ran out.
        values (`list[float]`, *optional*):
            Value before each token, where the policy has a value head and the sampler asks it.
        entropies (`list[float]`, *optional*):
            Entropy in nats of the distribution each token was drawn from, where the sampler records it.
        policy_version (`int`, *optional*):
            Optimizer steps the policy that wrote the tokens had taken, where the sampler holds a copy of it.
    """

    row: int
    token_ids: list[int]
    logprobs: list[float]
    stopped: bool
    values: list[float] | None = None
    entropies: list[float] | None = None
    policy_version: int | None = None


def fault_of(sampled: Any, constrained: bool = False) -> str | None:
    """
    What is wrong with a record that a sampler returned; `None` if it keeps its contract.

    Args:
        sampled ([`SampledTokens`]):
            What was returned; any object with these fields will do.
        constrained (`bool`, *optional*, defaults to `False`):
            Whether it was sampled under a constraint, where log-probs have no meaning.
    """
    for name in ("token_ids", "logprobs"):
        value = getattr(sampled, name, None)
        if value is None:
            others = [other for other in dir(sampled) if not other.startswith("_") and other != name]
            meant = next((other for other in others if field_meant_by(other, [name])), None)
            hint = f" `{meant}` is not read: name it `{name}`." if meant else ""
            return f"field `{name}` of a turn is missing; the sampler returned a {type(sampled).__name__}.{hint}"
        if not isinstance(value, (list, tuple)):
            return f"field `{name}` of a turn expected a list, got {type(value).__name__}."
    absent = [name for name in ("stopped", "values", "entropies", "policy_version") if not hasattr(sampled, name)]
    if absent:
        return f"field `{absent[0]}` of a turn is missing; the sampler returned a {type(sampled).__name__}."
    for position, token in enumerate(sampled.token_ids):
        if type(token) is not int or token < 0:
            return f"field `token_ids` of a turn expected token ids, got {token!r} at position {position}."
    figures = {name: getattr(sampled, name, None) for name in ("logprobs", "values", "entropies")}
    if constrained:
        del figures["logprobs"]
    faults = (
        _fault_of_figures(name, figure, len(sampled.token_ids))
        for name, figure in figures.items()
        if figure is not None
    )
    return next((fault for fault in faults if fault is not None), None)


def _fault_of_figures(name: str, figures: Any, count: int) -> str | None:
    if not isinstance(figures, (list, tuple)):
        return f"field `{name}` of a turn expected a list, got {type(figures).__name__}."
    if len(figures) != count:
        return f"field `{name}` has {len(figures)} values, expected {count}, one per token of the turn."
    for position, value in enumerate(figures):
        if not is_finite_number(value) or (name == "logprobs" and value > 0):
            most = " of at most 0" if name == "logprobs" else ""
            return f"field `{name}` of a turn expected finite values{most}, got {value!r} at position {position}."
    return None


class TokenConstraint(Protocol):
    """What a turn may consist of, token by token. Ends with a stop token."""

    def allowed(self, size: int) -> Tensor:
        """Mask over the vocabulary, bool, shape (`size`,), on the CPU: the tokens that may come next."""
        ...

    def accept(self, token_id: int) -> None:
        """Go on behind a token, one of those allowed."""
        ...


class SamplerSession(Protocol):
    """A batch of rows that are extended again and again, each at its own pace, keeping their history."""

    @property
    def busy(self) -> bool:
        """Whether any row is queued or being sampled, so that [`SamplerSession.step`] has work to do."""
        ...

    def extend(
        self, row: int, token_ids: Sequence[int], max_new_tokens: int, constraint: TokenConstraint | None = None
    ) -> None:
        """
        Append known tokens to a row, then sample up to `max_new_tokens` more, all of them under `constraint` where
        one is given. Returns at once.
        """
        ...

    def step(self) -> list[SampledTokens]:
        """Do a bounded piece of work (about one token for every running row); returns the rows that finished."""
        ...

    def finish(self, row: int) -> None:
        """Say that a row will not be extended again, so that its memory can be used."""
        ...


class Sampler(Protocol):
    """Opens a session over a batch of prompts; rows with equal prompts share their prompt's work."""

    def open(self, prompts: Sequence[Sequence[int]], max_length: int) -> AbstractContextManager[SamplerSession]:
        """
        Args:
            prompts (`Sequence[Sequence[int]]`):
                Prompt tokens of each row.
            max_length (`int`):
                Upper bound on the tokens a row can hold after its prompt.
        """
        ...


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits in float32, or as they are where they are wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def constrain(logits: Tensor, constraints: Sequence[TokenConstraint | None]) -> Tensor:
    """
    Logits with -inf for every token that a row's constraint does not allow.

    Args:
        logits (`Tensor`):
            Shape (B, V), any float dtype; left as it is.
        constraints (`Sequence[TokenConstraint | None]`):
            One for each row.

    Returns:
        `Tensor`: shape (B, V).
    """
    rows = [row for row, constraint in enumerate(constraints) if constraint is not None]
    if not rows:
        return logits
    allowed = torch.stack([c.allowed(logits.shape[-1]) for c in constraints if c is not None]).to(logits.device)
    place = torch.tensor(rows, device=logits.device)
    return logits.index_copy(0, place, logits[place].masked_fill(~allowed, -torch.inf))
