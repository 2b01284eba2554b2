"""What rounding can do to log-probs, so that a fault can be told from it.

In float32 two correct forward passes agree to about 1e-6, and a fixed bound tells a fault from rounding. In bfloat16
one unit in the last place (ulp) of a logit between 16 and 32 is 0.125, so that two correct passes of a pretrained
model differ by 0.03 nats on average and by 0.3 on single tokens. How much depends on the model, so it is measured: the
model scores a few rollouts twice, the second time with the embeddings of its tokens rounded another way, so that every
later rounding falls out anew. A second pass over the same embeddings would not do: other pieces, or a cache, often
give the same numbers to the bit.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


LOW_PRECISION = (torch.bfloat16, torch.float16)

EXACT_TOLERANCE = 1e-3
"""Largest difference, in nats, that two correct passes show in float32 or float64."""

SLACK = 2.0
"""How many times the model's own differences are still taken for rounding."""

QUANTILES = (0.75, 0.9, 0.99)

_OF_MEAN = (1.44, 2.06, 3.23)
"""Those quantiles of the absolute value of a normal variable, as multiples of its mean."""

_LEAST_TOKENS = (64, 64, 400)
"""Tokens below which each quantile says too little to be compared."""

_LEAST = 5e-4
"""Least difference in nats that is taken for rounding: twice as much is what is accepted in float32."""

COMPARED_TOKENS = 128
"""Most completion tokens of a rollout that are scored a second time."""


class Accepted(Protocol):
    """Which differences between two log-probs of the same tokens are accepted."""

    @property
    def mean(self) -> float:
        """Mean absolute difference that rounding explains, nats."""
        ...

    @property
    def doubtful(self) -> float:
        """Mean absolute difference that rounding explains at tokens that the policy hardly expects, nats."""
        ...

    def excess(self, gaps: Tensor, doubt: Tensor | None = None) -> str | None:
        """
        Compare absolute differences with what is accepted.

        Args:
            gaps (`Tensor`):
                Absolute differences in nats, any float dtype, shape (N,).
            doubt (`Tensor`, *optional*):
                Probability of any other token in the place of each, shape (N,).

        Returns:
            `str` or `None`: what is beyond, for a message; `None` if all of it is accepted.
        """
        ...


def widest(device: torch.device) -> torch.dtype:
    """Return the widest float dtype of a device: float64, but float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


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

    @property
    def doubtful(self) -> float:
        """See [`Accepted.doubtful`]."""
        return self.tolerance

    def excess(self, gaps: Tensor, doubt: Tensor | None = None) -> str | None:
        """See [`Accepted.excess`]."""
        if gaps.numel() == 0 or bool((gaps <= self.tolerance).all()):
            return None
        return f"the largest difference is {float(gaps.max()):.2e} nats, accepted {self.tolerance:g}"


@dataclass(frozen=True)
class Rounding:
    """
    Accept what two correct passes of the model differ by in its dtype, up to [`SLACK`].

    An error of the logits moves the log-prob of a token in proportion to the probability of all others: it hardly
    shows where a policy is sure. So tokens that are less expected than those measured may differ by as much more, such
    as the first ones of an answer to a tool's result, written by a policy that knows its format by heart.

    Args:
        mean (`float`):
            Mean absolute difference of the two passes, nats.
        quantiles (`tuple[float, ...]`):
            Its quantiles [`QUANTILES`], nats.
        doubtful (`float`, *optional*, defaults to `0.0`):
            Mean absolute difference at tokens that are hardly expected, nats.
    """

    mean: float
    quantiles: tuple[float, ...]
    doubtful: float = 0.0

    @classmethod
    def of(cls, gaps: Tensor, doubt: Tensor | None = None) -> "Rounding":
        """
        Rounding as two correct passes show it.

        Args:
            gaps (`Tensor`):
                Absolute differences of the two passes in nats, shape (N,).
            doubt (`Tensor`, *optional*):
                Probability of any other token in the place of each, shape (N,).
        """
        gaps = gaps.cpu().double()
        known = gaps.isfinite()
        finite = gaps[known]
        if finite.numel() == 0:
            return cls(_LEAST, (_LEAST,) * len(QUANTILES))
        found = finite.quantile(finite.new_tensor(QUANTILES)).tolist()
        others = 0.0 if doubt is None else float(doubt.cpu().double()[known].sum())
        doubtful = float(finite.sum()) / max(others, 1.0) if doubt is not None else 0.0
        return cls(max(float(finite.mean()), _LEAST), tuple(max(value, _LEAST) for value in found), doubtful)

    def excess(self, gaps: Tensor, doubt: Tensor | None = None) -> str | None:
        """See [`Accepted.excess`]. The mean of a few tokens may be further off, by its standard error."""
        count = gaps.numel()
        if count == 0:
            return None
        gaps = gaps.cpu().double().nan_to_num(nan=math.inf, posinf=math.inf)
        expected, quantiles = self.mean, list(self.quantiles)
        if doubt is not None:
            explained = _LEAST + self.doubtful * doubt.cpu().double().nan_to_num(nan=0.0)
            expected = max(expected, float(explained.mean()))
            here = explained.quantile(explained.new_tensor(QUANTILES)).tolist()
            quantiles = [max(q, times * x) for q, times, x in zip(quantiles, _OF_MEAN, here, strict=True)]
        mean, limit = float(gaps.mean()), expected * (SLACK + 4 / math.sqrt(count))
        if mean > limit:
            return f"the mean difference is {mean:.2e} nats, and rounding explains {expected:.2e} (up to {limit:.2e})"
        found = gaps.quantile(gaps.new_tensor(QUANTILES)).tolist()
        for share, value, known, least in zip(QUANTILES, found, quantiles, _LEAST_TOKENS, strict=True):
            if count >= least and value > SLACK * known:
                return (
                    f"{1 - share:.0%} of the tokens differ by more than {value:.2e} nats, and rounding explains "
                    f"{known:.2e} (up to {SLACK * known:.2e})"
                )
        return None


def measure_rounding(
    model: Any,
    prompt_ids: Sequence[int],
    completions: Tensor,
    scored: Tensor,
    temperature: float,
    autocast: Callable[[], AbstractContextManager],
) -> Rounding:
    """
    Measure what two correct passes of a model differ by. Neither is the trainer's or the sampler's own, which may be
    at fault: both are over whole rollouts, without a cache and without padding before them.

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
    """
    device = completions.device
    dtype = max((p.dtype for p in model.parameters() if p.is_floating_point()), key=lambda d: torch.finfo(d).eps)
    with autocast():
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
    plain = score(model, prompt_ids, completions, temperature, autocast)
    with _rounded_anew(model, torch.finfo(dtype).eps):
        other = score(model, prompt_ids, completions, temperature, autocast)
    return Rounding.of((plain - other).abs()[scored].cpu(), 1 - plain.exp()[scored].cpu())


@contextmanager
def _rounded_anew(model: Any, eps: float) -> Iterator[None]:
    """While open, what tokens are embedded as is off by up to half a unit in the last place, by the same draws."""
    draws = torch.Generator().manual_seed(0)

    def move(module: Any, args: Any, output: Tensor) -> Tensor:
        shift = (2 * torch.rand(output.shape, generator=draws) - 1).to(output.device)
        return (output * (1 + eps / 2 * shift)).to(output.dtype)

    hook = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()


def score(
    model: Any,
    prompt_ids: Sequence[int],
    completions: Tensor,
    temperature: float,
    autocast: Callable[[], AbstractContextManager],
) -> Tensor:
    """
    Score completions of one prompt in one plain pass.

    Args:
        model, prompt_ids, completions, temperature, autocast:
            As in [`measure_rounding`].

    Returns:
        `Tensor`: log-probs in nats, float32, shape (B, T).
    """
    width = completions.shape[1]
    prompt = torch.tensor([list(prompt_ids)] * len(completions), device=completions.device)
    ids = torch.cat([prompt, completions], dim=1)
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    takes = "logits_to_keep" in inspect.signature(bare.forward).parameters
    with autocast():
        logits = model(input_ids=ids, use_cache=False, **({"logits_to_keep": width + 1} if takes else {})).logits
    scores = torch.log_softmax(logits[:, -width - 1 : -1].float() / temperature, dim=-1)
    return scores.gather(-1, completions[..., None])[..., 0]
