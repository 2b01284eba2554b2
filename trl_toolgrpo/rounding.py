"""What rounding can do to log-probs, so that a fault can be told from it.

In float32 two correct forward passes agree to about 1e-6, and a fixed bound tells a fault from rounding. In bfloat16
one unit in the last place (ulp) of a logit between 16 and 32 is 0.125, so that two correct passes of a pretrained
model differ by 0.03 nats on average and by 0.3 on single tokens. How much depends on the model, so it is measured: the
model scores a few rollouts twice, at once and piece by piece with its cache, and what differs is rounding.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor


LOW_PRECISION = (torch.bfloat16, torch.float16)

EXACT_TOLERANCE = 1e-3
"""Largest difference, in nats, that two correct passes show in float32 or float64."""

SLACK = 2.0
"""How many times the model's own differences are still taken for rounding."""

QUANTILES = (0.75, 0.9, 0.99)

_LEAST_TOKENS = (64, 64, 400)
"""Tokens below which each quantile says too little to be compared."""

_ULPS = 0.1, (0.15, 0.25, 0.5)
"""Least mean and quantiles that are taken for rounding, in ulps at the size of the largest logit: a few tokens may
happen to be rounded alike in both passes."""

COMPARED_TOKENS = 128
"""Most completion tokens of a rollout that are scored a second time."""

_CACHES = ("past_key_values", "cache")
"""What forward passes call their cache: most models, and Mamba."""


class Accepted(Protocol):
    """Which differences between two log-probs of the same tokens are accepted."""

    @property
    def mean(self) -> float:
        """Mean absolute difference that rounding explains, nats."""
        ...

    def excess(self, gaps: Tensor) -> str | None:
        """
        Compare absolute differences with what is accepted.

        Args:
            gaps (`Tensor`):
                Absolute differences in nats, any float dtype, shape (N,).

        Returns:
            `str` or `None`: what is beyond, for a message; `None` if all of it is accepted.
        """
        ...


@dataclass(frozen=True)
class Exact:
    """
    Accept no difference above a fixed bound: float32, float64, and a bound that the user has set.

    Args:
        tolerance (`float`, *optional*, defaults to `1e-3`):
            Largest difference, nats.
    """

    tolerance: float = EXACT_TOLERANCE

    @property
    def mean(self) -> float:
        """See [`Accepted.mean`]."""
        return self.tolerance

    def excess(self, gaps: Tensor) -> str | None:
        """See [`Accepted.excess`]."""
        if gaps.numel() == 0 or bool((gaps <= self.tolerance).all()):
            return None
        return f"the largest difference is {float(gaps.max()):.2e} nats, accepted {self.tolerance:g}"


@dataclass(frozen=True)
class Rounding:
    """
    Accept what two correct passes of the model differ by in its dtype, up to [`SLACK`].

    Args:
        mean (`float`):
            Mean absolute difference of the two passes, nats.
        quantiles (`tuple[float, ...]`):
            Its quantiles [`QUANTILES`], nats.
    """

    mean: float
    quantiles: tuple[float, ...]

    @classmethod
    def of(cls, gaps: Tensor, ulp: float) -> "Rounding":
        """
        Rounding as two correct passes show it.

        Args:
            gaps (`Tensor`):
                Absolute differences of the two passes in nats, shape (N,).
            ulp (`float`):
                Unit in the last place of the largest logit, see [`ulp_of`].
        """
        gaps = gaps.double()
        finite = gaps[gaps.isfinite()]
        mean = float(finite.mean()) if finite.numel() else 0.0
        found = finite.quantile(finite.new_tensor(QUANTILES)).tolist() if finite.numel() else [0.0] * len(QUANTILES)
        least_mean, least = _ULPS
        quantiles = tuple(max(value, share * ulp) for value, share in zip(found, least, strict=True))
        return cls(max(mean, least_mean * ulp), quantiles)

    def excess(self, gaps: Tensor) -> str | None:
        """See [`Accepted.excess`]. The mean of a few tokens may be further off, by its standard error."""
        count = gaps.numel()
        if count == 0:
            return None
        gaps = gaps.double().nan_to_num(nan=math.inf, posinf=math.inf)
        mean, limit = float(gaps.mean()), self.mean * (SLACK + 4 / math.sqrt(count))
        if mean > limit:
            return f"the mean difference is {mean:.2e} nats, and rounding explains {self.mean:.2e} (up to {limit:.2e})"
        found = gaps.quantile(gaps.new_tensor(QUANTILES)).tolist()
        for share, value, known, least in zip(QUANTILES, found, self.quantiles, _LEAST_TOKENS, strict=True):
            if count >= least and value > SLACK * known:
                return (
                    f"{1 - share:.0%} of the tokens differ by more than {value:.2e} nats, and rounding explains "
                    f"{known:.2e} (up to {SLACK * known:.2e})"
                )
        return None


def ulp_of(dtype: torch.dtype, size: float) -> float:
    """Unit in the last place of a number of the given size in a dtype."""
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(size)) if 0 < size < math.inf else 0.0


def measure_rounding(
    model: Any,
    prompt_ids: Sequence[int],
    completions: Tensor,
    scored: Tensor,
    temperature: float,
    autocast: Callable[[], AbstractContextManager],
    growing: bool = True,
) -> Rounding:
    """
    Measure what two correct passes of a model differ by: one over whole rollouts, without padding before them, and one
    piece by piece with the model's cache. Neither is the trainer's or the sampler's own, which may be at fault.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The policy, unwrapped, in evaluation mode and without gradients.
        prompt_ids (`Sequence[int]`):
            The prompt that all rows share.
        completions (`Tensor`):
            Completions, padded on the right with any token, int64, shape (B, T).
        scored (`Tensor`):
            Which of them are tokens, bool, shape (B, T).
        temperature (`float`):
            What logits are divided by.
        autocast (`Callable`):
            Gives the autocast context of training.
        growing (`bool`, *optional*, defaults to `True`):
            Whether pieces grow. A state-space or linear-attention layer may go on from its state by one token alone,
            and say something else of a longer piece.
    """
    plain, largest = score_at_once(model, prompt_ids, completions, temperature, autocast)
    try:
        other, _ = score_in_pieces(model, prompt_ids, completions, temperature, autocast, growing)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        if should_reduce_batch_size(error):
            raise
        rows = completions.split(1)  # a model without such a cache: each row by itself
        other = torch.cat([score_at_once(model, prompt_ids, row, temperature, autocast)[0] for row in rows])
    coarsest = max((p.dtype for p in model.parameters() if p.is_floating_point()), key=lambda d: torch.finfo(d).eps)
    with autocast():
        if torch.is_autocast_enabled(completions.device.type):
            coarsest = torch.get_autocast_dtype(completions.device.type)
    return Rounding.of((plain - other).abs()[scored].cpu(), ulp_of(coarsest, largest))


def score_at_once(
    model: Any,
    prompt_ids: Sequence[int],
    completions: Tensor,
    temperature: float,
    autocast: Callable[[], AbstractContextManager],
) -> tuple[Tensor, float]:
    """
    Score completions of one prompt in one pass without a cache.

    Args:
        model, prompt_ids, completions, temperature, autocast:
            As in [`measure_rounding`].

    Returns:
        `tuple[Tensor, float]`: log-probs in nats, float32, shape (B, T), and the largest absolute logit.
    """
    width = completions.shape[1]
    prompt = torch.tensor([list(prompt_ids)] * len(completions), device=completions.device)
    ids = torch.cat([prompt, completions], dim=1)
    with autocast():
        logits = model(input_ids=ids, use_cache=False, **_last_logits(model, width + 1)).logits
    logits = logits[:, -width - 1 : -1].float()
    scores = torch.log_softmax(logits / temperature, dim=-1)
    return scores.gather(-1, completions[..., None])[..., 0], float(logits.abs().max())


def _last_logits(model: Any, count: int) -> dict[str, int]:
    """Options of a forward pass that gives the logits of the last positions alone, where the model takes them."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(bare.forward).parameters else {}


def score_in_pieces(
    model: Any,
    prompt_ids: Sequence[int],
    completions: Tensor,
    temperature: float,
    autocast: Callable[[], AbstractContextManager],
    growing: bool = True,
) -> tuple[Tensor, float]:
    """
    Score completions of one prompt as decoding does, with the model's cache: the prompt first, then pieces of 1, 2, 4,
    ... tokens, or single ones.

    Args:
        model, prompt_ids, completions, temperature, autocast, growing:
            As in [`measure_rounding`].

    Returns:
        `tuple[Tensor, float]`: log-probs in nats, float32, shape (B, T), and the largest absolute logit.

    Raises:
        TypeError: if the model keeps no cache.
    """
    rows, width = completions.shape
    prompt = torch.tensor([list(prompt_ids)] * rows, device=completions.device)
    pieces, start, size = [prompt], 0, 1
    while start < width - 1:
        pieces.append(completions[:, start : min(start + size, width - 1)])
        start, size = start + size, 2 * size if growing else 1
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = inspect.signature(bare.forward).parameters
    kept = next((name for name in _CACHES if name in parameters), _CACHES[0])
    last_alone = _last_logits(model, 1)
    cache, found, largest, place = None, [], 0.0, 0
    with autocast():
        for piece in pieces:
            options: dict[str, Any] = dict(last_alone) if cache is None else {kept: cache}
            output = model(input_ids=piece, use_cache=True, **options)
            cache = getattr(output, kept, None)
            if cache is None:
                raise TypeError(f"{type(model).__name__} returns no `{kept}`")
            logits = (output.logits[:, -1:] if place == 0 else output.logits).float()
            largest = max(largest, float(logits.abs().max()))
            scores = torch.log_softmax(logits / temperature, dim=-1)
            labels = completions[:, place : place + logits.shape[1]]
            found.append(scores.gather(-1, labels[..., None])[..., 0])
            place += logits.shape[1]
    return torch.cat(found, dim=1), largest
