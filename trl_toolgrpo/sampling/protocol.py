"""The protocol of samplers: extend these token sequences, return tokens and their log-probs as they were sampled.

A sampler knows tokens only: no chat, no tools.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .record_faults import field_meant_by, figure_faults, is_count, item_faults, list_faults


Autocast: TypeAlias = Callable[[], AbstractContextManager[object]]
"""Makes the autocast context that the trainer scores under."""
RowNoise: TypeAlias = Callable[[list[int]], Tensor]
"""Gives one uniform number, float32, or one key, int64, for each of the given rows; shape (B,)."""


@dataclass(eq=False)
class PolicySampler:
    """
    What a sampler needs that samples with the training model itself.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The policy, unwrapped.
        stop_ids (`Sequence[int]`):
            Tokens that end a turn.
        pad_id (`int`):
            Padding token id; any valid token id will do for [`ModelSampler`].
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of sampling and of the recorded log-probs.
        autocast (`Callable`, *optional*):
            Makes the autocast context that the trainer scores under.
        noise (`Callable[[list[int]], Tensor]`, *optional*):
            Gives one uniform number, or one key, for each of the given rows; by default torch's global generator
            draws.
    """

    model: PreTrainedModel
    stop_ids: Sequence[int]
    pad_id: int
    temperature: float = 1.0
    autocast: Autocast = nullcontext
    noise: RowNoise | None = None


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """
    Switch to evaluation mode without gradients, and without `torch.compile`, which would compile anew for every
    length; every module's training flag is restored at the end.
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
    The tokens a sampler wrote for one row since that row was last extended.

    Args:
        row (`int`):
            Row that was extended.
        token_ids (`list[int]`):
            Sampled tokens in order, the stop token included.
        logprobs (`list[float]`):
            Log-prob in nats of each token under the full softmax of `logits / temperature`, recorded when the token
            was sampled; meaningless under a constraint.
        stopped (`bool`):
            `True` if the last token is a stop token, `False` if the token budget ran out.
        values (`list[float]`, *optional*):
            V(s_t) before each token, where the policy has a value head and the sampler evaluates it.
        entropies (`list[float]`, *optional*):
            Entropy in nats of the distribution each token was drawn from, where the sampler records it.
        policy_version (`int`, *optional*):
            Optimizer steps taken by the policy that wrote the tokens, where the sampler holds a copy of it.
    """

    row: int
    token_ids: list[int]
    logprobs: list[float]
    stopped: bool
    values: list[float] | None = None
    entropies: list[float] | None = None
    policy_version: int | None = None


def turn_fault(sampled: object, constrained: bool = False, most: float = math.inf) -> str | None:
    """
    Return what is wrong with a record that a sampler returned; `None` if nothing is.

    Args:
        sampled ([`SampledTokens`]):
            What was returned; any object with these fields will do.
        constrained (`bool`, *optional*, defaults to `False`):
            Whether it was sampled under a constraint, where log-probs are meaningless.
        most (`float`, *optional*):
            Most tokens that were asked for.
    """
    return next(_sampled_faults(sampled, constrained, most), None)


def _sampled_faults(sampled: object, constrained: bool, most: float) -> Iterator[str]:
    """Yield what is wrong with a record; later checks rely on the earlier ones having found nothing."""
    required = {name: getattr(sampled, name, None) for name in ("token_ids", "logprobs")}
    for name, value in required.items():
        if value is None:
            others = [other for other in dir(sampled) if not other.startswith("_") and other != name]
            meant = next((other for other in others if field_meant_by(other, [name])), None)
            hint = f" `{meant}` is not read: name it `{name}`." if meant else ""
            yield f"field `{name}` of a turn is missing; the sampler returned a {type(sampled).__name__}.{hint}"
        yield from list_faults(f"`{name}` of a turn", value)
    for name in ("stopped", "values", "entropies", "policy_version"):
        if not hasattr(sampled, name):
            yield f"field `{name}` of a turn is missing; the sampler returned a {type(sampled).__name__}."
    tokens = required["token_ids"] or []
    yield from item_faults("`token_ids` of a turn", tokens, "token ids", is_count)
    if len(tokens) > most:
        yield f"field `token_ids` of a turn has {len(tokens)} values, expected at most {most}, as asked for."
    if not constrained:
        yield from figure_faults("`logprobs` of a turn", required["logprobs"], len(tokens), "token", most=0)
    for name in ("values", "entropies"):
        figures = getattr(sampled, name, None)
        if figures is not None:
            yield from figure_faults(f"`{name}` of a turn", figures, len(tokens), "token")


class TokenConstraint(Protocol):
    """The tokens a turn may consist of, one by one; the last is a stop token."""

    def allowed(self, size: int) -> Tensor:
        """Return a mask of the tokens that may come next, bool, shape (`size`,), on the CPU."""
        ...

    def accept(self, token_id: int) -> None:
        """Advance by one of the allowed tokens."""
        ...


class SamplerSession(Protocol):
    """
    A batch of rows that are extended again and again, each at its own pace, keeping their history.

    Each call of [`SamplerSession.extend`] is answered once: by one [`SampledTokens`], from one of the steps after it.
    """

    @property
    def busy(self) -> bool:
        """Whether any row is queued or being sampled: whether [`SamplerSession.step`] has work to do."""
        ...

    def extend(
        self, row: int, token_ids: Sequence[int], max_new_tokens: int, constraint: TokenConstraint | None = None
    ) -> None:
        """
        Append known tokens to a row, then sample up to `max_new_tokens` more, all of them under `constraint` where
        one is given. Returns at once. The known tokens are tool results, or the beginning of a forced call; what was
        sampled for the row before is part of it already.
        """
        ...

    def step(self) -> list[SampledTokens]:
        """Do a bounded piece of work (about one token for every running row); return the rows that finished."""
        ...

    def finish(self, row: int) -> None:
        """Announce that a row will not be extended again, so that its memory can be reused. It may never have been."""
        ...


class Sampler(Protocol):
    """
    Something that opens sessions over batches of prompts; rows with equal prompts share the work on them.

    An object with this method can be passed to [`ToolGRPOTrainer`] as `sampler`. It has to keep to this:

    - The tokens of a row are its prompt, then what [`SamplerSession.extend`] appended and what was sampled, in order.
      No token is changed, left out or decoded and encoded again.
    - A token is drawn from the full softmax of `logits / temperature`, with the `temperature` of the configuration and
      without top-k, top-p or penalties. Its log-prob in that softmax is recorded, in nats, from float32 logits.
    - A turn ends after the first stop token (`trainer.eos_token_ids`), which is part of it, or after `max_new_tokens`.
    - The weights are the policy's, in evaluation mode, in the dtype and under the autocast that the trainer scores in.

    The trainer checks the log-probs by `logprob_check`. It reads two more names, if the object has them:

    - `load_policy(policy, version)` is called in every process before the first rollout batch of a policy: when
      training begins, after each optimizer step, and when other weights were loaded. `policy` is the unwrapped
      training model, with its adapter and value head if it has them, and `version` the optimizer steps it has taken.
      Copy its weights from its `named_parameters()` to a model of the sampler's own: a deep copy would
      run the training model, whose `forward` TRL has wrapped, and for a `state_dict()` FSDP would shard the weights
      again, which are gathered for this call.
    - `max_sequence_length` is the most tokens that a row can hold, prompt included.

    A resumed run samples as the undisturbed one would if the noise comes from torch's global generators.
    """

    def open(self, prompts: Sequence[Sequence[int]], max_length: int) -> AbstractContextManager[SamplerSession]:
        """
        Open a session; there may be several for a rollout batch, one after the other.

        Args:
            prompts (`Sequence[Sequence[int]]`):
                Prompt tokens of each row.
            max_length (`int`):
                Upper bound on the tokens a row can hold after its prompt.
        """
        ...


def at_least_float32(logits: Tensor) -> Tensor:
    """Return logits in float32, or unchanged if they are wider."""
    return logits.to(score_dtype(logits))


def score_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that scores of a tensor are computed in: float32, or its own if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def constrain(logits: Tensor, constraints: Sequence[TokenConstraint | None]) -> Tensor:
    """
    Return logits with -inf for every token that its row's constraint does not allow.

    Args:
        logits (`Tensor`):
            Shape (B, V), any float dtype; not modified.
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
