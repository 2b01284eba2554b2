"""The sampler protocol: extend these token sequences, return tokens and sample-time log-probs.

Owns the records that pass between the rollout loop and a sampler. A sampler knows tokens only: no chat, no tools.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


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
