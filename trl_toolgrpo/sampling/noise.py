"""Randomness that depends on what is drawn, not on when or where: noise for `deterministic_rollouts`."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import torch
from torch import Tensor

from ..models.rounding import widest


_GAMMA, _MIX_1, _MIX_2 = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass
class RolloutNoise:
    """
    The draws of one process's rollouts, each with a key of its own: seed, step, rollout, and which draw of it.

    Args:
        seed (`int`):
            Seed of the run.
        step (`int`):
            Number of the rollout batch.
        first (`int`, *optional*, defaults to `0`):
            Index of the process's first rollout among those of all processes.
        purpose (`str`, *optional*, defaults to `"train"`):
            `"train"` or `"eval"`: tells batches of the same number apart.
    """

    seed: int
    step: int
    first: int = 0
    purpose: str = "train"
    _drawn: Counter[int] = field(default_factory=Counter, repr=False)

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """Return keys for the next token of each of the given rows, int64, shape (B,); see [`race`]."""
        keys = []
        for row in rows:
            keys.append(self._key("token", row, self._drawn[row]))
            self._drawn[row] += 1
        return torch.tensor(keys, dtype=torch.int64)

    def rewind(self, row: int, count: int) -> None:
        """Take back the last `count` keys of a row, whose tokens were not kept."""
        self._drawn[row] -= count

    def other(self, kind: str, row: int, number: int = 0) -> random.Random:
        """Return randomness for decisions about a row other than its tokens, such as `kind="turn"`."""
        return random.Random(self._key(kind, row, number))

    def after(self, rows: int) -> "RolloutNoise":
        """Return the noise of the same batch from its rollout number `rows` on."""
        return RolloutNoise(self.seed, self.step, self.first + rows, self.purpose)

    def _key(self, kind: str, row: int, number: int) -> int:
        name = f"{self.seed}/{self.purpose}/{self.step}/{self.first + row}/{kind}/{number}"
        return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def uniforms(keys: Tensor, count: int) -> Tensor:
    """
    Return independent uniform numbers: the first outputs of SplitMix64 (Steele et al., OOPSLA 2014) from each key.

    Args:
        keys (`Tensor`):
            Keys, int64, shape (B,).
        count (`int`):
            How many numbers each gives.

    Returns:
        `Tensor`: numbers strictly between 0 and 1, float64, shape (B, `count`); the same on every device.
    """
    bits = keys[:, None] + torch.arange(1, count + 1, device=keys.device) * _GAMMA  # meant to wrap around
    bits = (bits ^ _shifted(bits, 30)) * _MIX_1
    bits = (bits ^ _shifted(bits, 27)) * _MIX_2
    bits = bits ^ _shifted(bits, 31)
    return (_shifted(bits, 12).double() + 0.5) * 2.0**-52


def race(probabilities: Tensor, keys: Tensor) -> Tensor:
    """
    Sample by an exponential race: the winner is the first of independent arrivals whose rates are the probabilities.

    Rows whose probabilities differ by rounding get the same token from the same key, but for a chance of at most twice
    the total variation between them. Inverting a cumulative sum has no such bound: rounding moves every later border.

    Args:
        probabilities (`Tensor`):
            Not necessarily normalized, any float dtype, shape (B, V).
        keys (`Tensor`):
            int64, shape (B,).

    Returns:
        `Tensor`: token ids, int64, shape (B,).
    """
    device = probabilities.device
    if widest(device) is not torch.float64:  # the same tokens as everywhere
        probabilities, keys = probabilities.cpu(), keys.cpu()
    arrivals = -uniforms(keys, probabilities.shape[-1]).log_()
    return (probabilities / arrivals).argmax(dim=-1).to(device)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Return bits shifted to the right, filled up with zeros; torch's own shift repeats the sign."""
    return (bits >> places) & (2 ** (64 - places) - 1)
