"""Statistics of the ratio between the policy now and when it sampled, over the micro-batches of a log line."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..models.rounding import widest


class RatioStatistics:
    """
    Statistics of r = exp(log π_θ − log π_sample) over every sampled token since the last reset: mean, spread and
    extremes, and the gap between the two log-probs while the policy is still the one that sampled.
    """

    def __init__(self) -> None:
        self._state: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Forget everything."""
        self._state = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return what was added since the last reset, for a checkpoint."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state."""
        self._state = dict(state)

    def add(self, logps: Tensor, recorded: Tensor, mask: Tensor, fresh: bool) -> None:
        """
        Add a micro-batch.

        Args:
            logps (`Tensor`):
                Log-probs of the policy now, shape (B, T), nats.
            recorded (`Tensor`):
                Log-probs recorded when the tokens were sampled, shape (B, T), nats.
            mask (`Tensor`):
                1 for tokens the policy sampled, shape (B, T).
            fresh (`bool`):
                Whether no optimizer step was taken since the tokens were sampled.
        """
        difference = (logps - recorded)[mask.bool()].to(widest(logps.device))
        ratio = torch.exp(difference)
        gap = difference.abs() if fresh else difference[:0]
        k3 = ratio - 1 - difference if fresh else difference[:0]
        count = ratio.new_tensor([ratio.numel(), gap.numel()])
        sums = torch.cat([count, torch.stack([ratio.sum(), ratio.square().sum(), gap.sum(), k3.sum()])])
        nothing = difference.new_full((1,), -math.inf)
        extremes = torch.stack([torch.cat([nothing, x]).max() for x in (ratio, -ratio, gap)])
        if self._state:
            sums, extremes = self._state["sums"] + sums, torch.maximum(self._state["extremes"], extremes)
        self._state = {"sums": sums, "extremes": extremes}

    def metrics(
        self,
        reduce_sum: Callable[[Tensor], Tensor] = lambda sums: sums,
        gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> dict[str, float]:
        """
        Return the metrics over all processes: `ratio/*`, and `sampling/*` if any micro-batch was fresh.

        Args:
            reduce_sum (`Callable`, *optional*):
                Adds up a tensor over processes.
            gather (`Callable`, *optional*):
                Concatenates a tensor of shape (1, n) over processes.
        """
        if not self._state:
            return {}
        count, fresh, total, squares, gap, k3 = reduce_sum(self._state["sums"]).tolist()
        highest, lowest, largest_gap = gather(self._state["extremes"][None]).amax(dim=0).tolist()
        found: dict[str, float] = {}
        if count:
            mean = total / count
            found["ratio/mean"] = mean
            spread = squares / count - mean * mean
            found["ratio/std"] = math.sqrt(max(spread, 0.0)) if math.isfinite(spread) else math.inf
            found["ratio/min"], found["ratio/max"] = -lowest, highest
        if fresh:
            found["sampling/logp_diff_mean"], found["sampling/logp_diff_max"] = gap / fresh, largest_gap
            found["sampling/kl_k3"] = k3 / fresh  # http://joschu.net/blog/kl-approx.html
        return found
