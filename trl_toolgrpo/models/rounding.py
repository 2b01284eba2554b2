"""What rounding does to log-probs, so that it can be told from a fault.

In float32 two correct forward passes agree to about 1e-6, and a fixed bound tells a fault from rounding. In bfloat16
one unit in the last place (ulp) of a logit between 16 and 32 is 0.125, so two correct passes of a pretrained model
differ by 0.03 nats on average and by 0.3 on single tokens. How much depends on the model, so it is measured: the model
scores a few rollouts twice, the second time with the embeddings of its tokens rounded another way, which changes every
later rounding. A second pass over the same embeddings would not do: with other chunks, or with a cache, it often gives
the same numbers to the bit.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from .lm_head import base_model


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config.fields import ToolGRPOConfig


LOW_PRECISION = (torch.bfloat16, torch.float16)

EXACT_TOLERANCE = 1e-3
"""Largest difference, in nats, that two correct passes show in float32 or float64."""

SLACK = 2.0
"""Multiple of the model's own differences that is still taken for rounding."""

QUANTILES = (0.75, 0.9, 0.99)

_OF_MEAN = (1.44, 2.06, 3.23)
"""Those quantiles of the absolute value of a normal variable, as multiples of its mean."""

_LEAST_TOKENS = (64, 64, 400)
"""Number of tokens below which each quantile says too little to be compared."""

_LEAST = 5e-4
"""Smallest difference, in nats, that is taken for rounding; twice as much is accepted in float32."""

COMPARED_TOKENS = 128
"""Largest number of completion tokens of a rollout that are scored a second time."""


def widest(device: torch.device) -> torch.dtype:
    """Return the widest float dtype of a device: float64 on CPUs and CUDA GPUs; float32 elsewhere, as Apple's GPUs and
    many other accelerators have no float64."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def compute_dtype(args: "ToolGRPOConfig", model: nn.Module) -> torch.dtype:
    """
    Return the dtype a policy computes in: autocast's, else the coarsest of its weights and its quantized layers.

    Args:
        args ([`ToolGRPOConfig`]):
            Says whether there is autocast.
        model (`nn.Module`):
            The policy.

    Returns:
        `torch.dtype`: float64 only if all weights are.
    """
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    found: set[object] = {parameter.dtype for parameter in model.parameters()}
    found |= {getattr(module, "compute_dtype", None) for module in model.modules()}  # of a layer of bitsandbytes
    coarsest_first = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    return next((dtype for dtype in coarsest_first if dtype in found), torch.float32)


@dataclass(frozen=True)
class Exact:
    """
    Accepts no difference above a fixed bound: for float32, float64, and a bound that the user has set.

    Args:
        tolerance (`float`, *optional*, defaults to `1e-3`):
            Largest difference, nats.
    """

    tolerance: float = EXACT_TOLERANCE

    @property
    def mean(self) -> float:
        """Mean absolute difference that rounding explains, nats; as `doubtful`, the same for every token."""
        return self.tolerance

    doubtful = mean

    def excess(self, gaps: Tensor, doubt: Tensor | None = None) -> str | None:
        """
        Compare absolute differences with what is accepted.

        Args:
            gaps (`Tensor`):
                Absolute differences in nats, any float dtype, shape (N,).
            doubt (`Tensor`, *optional*):
                Probability of any other token in the place of each, shape (N,). Not needed here.

        Returns:
            `str` or `None`: what exceeds the bound, for a message; `None` if nothing does.
        """
        if gaps.numel() == 0 or bool((gaps <= self.tolerance).all()):
            return None
        return f"the largest difference is {float(gaps.max()):.2e} nats, accepted {self.tolerance:g}"


@dataclass(frozen=True)
class Rounding:
    """
    Accepts what two correct passes of the model differ by in its dtype, times [`SLACK`].

    An error of the logits moves the log-prob of a token in proportion to the probability of all other tokens, so it
    hardly shows where a policy is sure. Tokens that are less expected than the measured ones may therefore differ by
    proportionally more: for example the first tokens after a tool's result, where the rest of the text is a format
    that the policy knows by heart.

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
        Return the rounding that two correct passes show.

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
        """Compare as [`Exact.excess`] does; the mean of a few tokens may be off by its standard error in addition."""
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


Accepted: TypeAlias = Exact | Rounding
"""Which differences between two log-probs of the same tokens are accepted."""


def measure_rounding(
    model: "PreTrainedModel",
    prompt_ids: Sequence[int],
    completions: Tensor,
    scored: Tensor,
    temperature: float,
    autocast: Callable[[], AbstractContextManager],
) -> Rounding:
    """
    Measure what two correct passes of a model differ by.

    Neither is the trainer's or the sampler's own pass, which may be at fault: both run over whole rollouts, without a
    cache and without padding on the left. Each makes B forward passes.

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
            Makes the autocast context of training.
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
def _rounded_anew(model: "PreTrainedModel", eps: float) -> Iterator[None]:
    """Move the embeddings of tokens by up to half a unit in the last place, by the same draws at every call."""
    draws = torch.Generator().manual_seed(0)

    def move(module: nn.Module, args: object, output: Tensor) -> Tensor:
        shift = (2 * torch.rand(output.shape, generator=draws) - 1).to(output.device)
        return (output * (1 + eps / 2 * shift)).to(output.dtype)

    hook = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()


def score(
    model: "PreTrainedModel",
    prompt_ids: Sequence[int],
    completions: Tensor,
    temperature: float,
    autocast: Callable[[], AbstractContextManager],
) -> Tensor:
    """
    Score completions of one prompt in plain passes, one for each, so that the logits of one stand at a time.

    Args:
        model, prompt_ids, completions, temperature, autocast:
            As in [`measure_rounding`].

    Returns:
        `Tensor`: log-probs in nats, float32, shape (B, T).
    """
    width = completions.shape[1]
    prompt = torch.tensor([list(prompt_ids)], device=completions.device)
    takes = "logits_to_keep" in inspect.signature(base_model(model).forward).parameters
    options = {"use_cache": False, **({"logits_to_keep": width + 1} if takes else {})}
    found = []
    for completion in completions.split(1):
        with autocast():
            logits = model(input_ids=torch.cat([prompt, completion], dim=1), **options).logits
        scores = logits[:, -width - 1 : -1].float() / temperature
        found.append(scores.gather(-1, completion[..., None])[..., 0] - scores.logsumexp(dim=-1))
    return torch.cat(found)
