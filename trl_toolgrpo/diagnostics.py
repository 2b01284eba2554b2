"""What a run says about itself: ratio statistics, the log-prob self-check, tool and rollout figures, the console line.

Owns every figure that is logged beside TRL's own. Pure functions and small accumulators; fed by the trainer.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import LogprobMismatchError
from .rounding import Accepted, widest
from .trajectory import STOP_REASONS, Trajectory, locate


class RatioStatistics:
    """
    Mean, spread and extremes of r = exp(log π_θ − log π_sample) over every sampled token since the last reset, and the
    gap between the two log-probs where the policy is still the one that sampled.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sums: Tensor | None = None
        self._extremes: Tensor | None = None

    def state(self) -> dict[str, Tensor]:
        """What was added since the last reset, for [`RatioStatistics.load`]."""
        if self._sums is None or self._extremes is None:
            return {}
        return {"sums": self._sums, "extremes": self._extremes}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        self._sums, self._extremes = state.get("sums"), state.get("extremes")

    @property
    def filled(self) -> bool:
        """Whether anything was added since the last reset."""
        return self._sums is not None

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
        self._sums = sums if self._sums is None else self._sums + sums
        self._extremes = extremes if self._extremes is None else torch.maximum(self._extremes, extremes)

    def metrics(self, reduce_sum: Any = lambda x: x, gather: Any = lambda x: x) -> dict[str, float]:
        """
        The metrics over all processes: `ratio/*`, and `sampling/*` if any micro-batch was fresh.

        Args:
            reduce_sum (`Callable`, *optional*):
                Adds a tensor over processes.
            gather (`Callable`, *optional*):
                Concatenates a tensor of shape (1, n) over processes.
        """
        if self._sums is None or self._extremes is None:
            return {}
        count, fresh, total, squares, gap, k3 = reduce_sum(self._sums).tolist()
        highest, lowest, widest = gather(self._extremes[None]).amax(dim=0).tolist()
        found: dict[str, float] = {}
        if count:
            mean = total / count
            found["ratio/mean"] = mean
            spread = squares / count - mean * mean
            found["ratio/std"] = math.sqrt(max(spread, 0.0)) if math.isfinite(spread) else math.inf
            found["ratio/min"], found["ratio/max"] = -lowest, highest
        if fresh:
            found["sampling/logp_diff_mean"], found["sampling/logp_diff_max"] = gap / fresh, widest
            found["sampling/kl_k3"] = k3 / fresh  # http://joschu.net/blog/kl-approx.html
        return found


def compute_dtype(args: Any, model: torch.nn.Module) -> torch.dtype:
    """
    Dtype a policy computes in: autocast's, else the coarsest of its weights and of what quantized layers compute in.

    Args:
        args ([`ToolGRPOConfig`]):
            Says whether there is autocast.
        model (`nn.Module`):
            The policy.

    Returns:
        `torch.dtype`: float64 only where all weights are.
    """
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    found: set[Any] = {parameter.dtype for parameter in model.parameters()}
    found |= {getattr(module, "compute_dtype", None) for module in model.modules()}  # of a layer of bitsandbytes
    coarsest_first = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    return next((dtype for dtype in coarsest_first if dtype in found), torch.float32)


def averages(metrics: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """
    Mean of what was collected of each metric since the last log, as TRL takes it: without NaN, and `None` where there
    is nothing else.

    Args:
        metrics (`Mapping[str, Sequence[float]]`):
            The values of each.
    """
    kept = {name: [value for value in values if not math.isnan(value)] for name, values in metrics.items()}
    return {name: sum(values) / len(values) if values else None for name, values in kept.items()}


def length_metrics(lengths: Tensor, truncated: Tensor) -> dict[str, float]:
    """
    Compute TRL's `completions/*` metrics. TRL counts the tokens that train, and judges by the last token whether a
    rollout was truncated; here forced tokens count like any other token of a completion, and its stop reason tells.

    Args:
        lengths (`Tensor`):
            Assistant tokens of each rollout, sampled or forced, shape (N,).
        truncated (`Tensor`):
            Whether it was truncated, bool, shape (N,).
    """
    found = {"completions/clipped_ratio": truncated.float().mean().item()}
    ended = lengths[~truncated] if bool((~truncated).any()) else lengths.new_zeros(1)
    for name, counted in (("length", lengths), ("terminated_length", ended)):
        found[f"completions/mean_{name}"] = counted.mean().item()
        found[f"completions/min_{name}"] = counted.min().item()
        found[f"completions/max_{name}"] = counted.max().item()
    return found


def check_logprobs(
    recomputed: Tensor,
    trajectories: Sequence[Trajectory],
    accepted: Accepted,
    source: str,
    gather: Callable[[list[Any]], list[Any]] = list,
) -> None:
    """
    Compare recorded log-probs with recomputed ones, over all tokens and over those that begin a turn after a tool
    result. What one process finds is raised in all, so that none waits for it.

    Args:
        recomputed (`Tensor`):
            The trainer's log-probs, shape (B, T), nats, right-padded.
        trajectories (`Sequence[Trajectory]`):
            The rollouts, in the order of the rows.
        accepted ([`Exact`] or [`Rounding`]):
            Which differences are accepted.
        source (`str`):
            What sampled, for the message.
        gather (`Callable`, *optional*):
            Puts the lists of all processes together; by default there is one process.

    Raises:
        LogprobMismatchError: naming the rollout, the turn, the token and both values.
    """
    found = gather([_mismatch(recomputed.cpu().double(), trajectories, accepted, source)])
    problem = next((text for text in found if text is not None), None)
    if problem is not None:
        raise LogprobMismatchError(problem)


def _mismatch(
    recomputed: Tensor, trajectories: Sequence[Trajectory], accepted: Accepted, source: str
) -> str | None:
    """What is wrong with the log-probs of this process; `None` if nothing is."""
    gaps, doubts, begins, places = [], [], [], []
    for row, trajectory in enumerate(trajectories):
        sampled = torch.tensor(trajectory.trainable_mask, dtype=torch.bool).nonzero()[:, 0]
        recorded = torch.tensor(trajectory.logprobs, dtype=torch.float64)
        gap = (recomputed[row, : len(recorded)] - recorded)[sampled].abs()
        gaps.append(gap.nan_to_num(nan=math.inf, posinf=math.inf))
        doubts.append(1 - recomputed[row, : len(recorded)][sampled].exp())
        starts = [turn.start for turn in trajectory.turns[1:]]
        begins.append(torch.isin(sampled, torch.tensor(starts, dtype=torch.long)))
        places += [(row, place) for place in sampled.tolist()]
    if not places:
        return None
    gap, doubt, begin = torch.cat(gaps), torch.cat(doubts), torch.cat(begins)
    excess = accepted.excess(gap, doubt)
    if excess is None:
        excess = accepted.excess(gap[begin], doubt[begin])
        if excess is None:
            return None
        excess = f"of the tokens that begin a turn after tool results, {excess}"
        gap = gap.masked_fill(~begin, -1.0)
    row, place = places[int(gap.argmax())]
    trajectory = trajectories[row]
    return (
        f"The log-probs recorded by the {source} sampler are not those the trainer computes: over {len(places)} "
        f"tokens, {excess}. The largest is in rollout {row}, turn {locate(trajectory, place)}, completion token "
        f"{place} (id {trajectory.completion_ids[place]}): recorded {trajectory.logprobs[place]:.6f}, recomputed "
        f"{float(recomputed[row, place]):.6f}. Every ratio would be wrong by as much. Check that sampling and "
        f"training use the same weights, adapter, dtype and temperature; raise `logprob_check_tolerance` only if the "
        f"difference is known rounding."
    )


def rollout_counts(
    trajectories: Sequence[Trajectory],
    seconds: float,
    tool_wait: float,
    invalid: int,
    tool_names: Sequence[str] = (),
    unconstrained: int = 0,
    abandoned: int = 0,
) -> dict[str, Any]:
    """
    Figures of one process's rollouts that can be added up over processes; see [`rollout_metrics`].

    Args:
        trajectories (`Sequence[Trajectory]`):
            The rollouts.
        seconds, tool_wait (`float`):
            Wall-clock time in all, and waiting for tools with nothing to decode.
        invalid (`int`):
            Rollouts whose record broke its contract.
        tool_names (`Sequence[str]`, *optional*):
            Tools that are reported even if nobody called them.
        unconstrained (`int`, *optional*, defaults to `0`):
            Forced bodies left free because their schema cannot be satisfied.
        abandoned (`int`, *optional*, defaults to `0`):
            Calls given up since they ignored their time limit.
    """
    stops = dict.fromkeys(STOP_REASONS, 0)
    tools: dict[str, dict[str, Any]] = {name: _no_calls() for name in tool_names}
    unknown = malformed = sampled = forced = turns = 0
    for trajectory in trajectories:
        stops[trajectory.stop_reason] += 1
        turns += len(trajectory.turns)
        forced += sum(trajectory.forced_mask)
        sampled += sum(trajectory.tool_mask) - sum(trajectory.forced_mask)
        for turn in trajectory.turns:
            if turn.stop_reason == "stop":  # a call cut off by the token budget is not the policy's mistake
                malformed += sum(call.error is not None for call in turn.tool_calls)
            for call, result in zip(turn.tool_calls, turn.tool_results, strict=False):
                if result.error_type == "unknown_tool":
                    unknown += 1
                elif call.error is None:
                    figures = tools.setdefault(call.name, _no_calls())
                    figures["calls"] += 1
                    figures["errors"] += result.is_error
                    figures["timeouts"] += result.error_type == "timeout"
                    figures["truncated"] += result.truncated
                    figures["latencies"].append(result.seconds)
    return {
        "rollouts": len(trajectories),
        "turns": turns,
        "stops": stops,
        "sampled": sampled,
        "forced": forced,
        "seconds": seconds,
        "tool_wait": tool_wait,
        "tools": tools,
        "unknown": unknown,
        "malformed": malformed,
        "invalid": invalid,
        "unconstrained": unconstrained,
        "abandoned": abandoned,
    }


def _no_calls() -> dict[str, Any]:
    return {"calls": 0, "errors": 0, "timeouts": 0, "truncated": 0, "latencies": []}


def rollout_metrics(counts: Sequence[dict[str, Any]], with_tools: bool) -> dict[str, float]:
    """
    The `forced/*`, `rollout/*` and `tools/*` metrics of a rollout batch.

    Args:
        counts (`Sequence[dict]`):
            [`rollout_counts`] of every process.
        with_tools (`bool`):
            Whether the rollouts have tools.
    """

    def total(name: str) -> float:
        return sum(part[name] for part in counts)

    rollouts, tokens = max(total("rollouts"), 1), total("sampled") + total("forced")
    seconds = max(part["seconds"] for part in counts)
    found: dict[str, float] = {
        "forced/fraction": total("forced") / tokens if tokens else 0.0,
        "rollout/turns_mean": total("turns") / rollouts,
        "rollout/tokens_per_second": tokens / seconds if seconds else 0.0,
        "rollout/tool_wait_fraction": total("tool_wait") / max(total("seconds"), 1e-9),
    }
    for reason in STOP_REASONS:
        found[f"rollout/stop/{reason}"] = sum(part["stops"][reason] for part in counts) / rollouts
    if total("invalid"):
        found["rollout/invalid"] = total("invalid")
    if total("unconstrained"):
        found["forced/unconstrained"] = total("unconstrained")
    if not with_tools:
        return found
    found["tools/unknown_calls"], found["tools/malformed_calls"] = total("unknown"), total("malformed")
    found["tools/abandoned"] = total("abandoned")
    for name in sorted({name for part in counts for name in part["tools"]}):
        parts = [part["tools"][name] for part in counts if name in part["tools"]]
        for figure in ("calls", "errors", "timeouts", "truncated"):
            found[f"tools/{name}/{figure}"] = sum(part[figure] for part in parts)
        latencies = np.array([value for part in parts for value in part["latencies"]] or [0.0])
        found[f"tools/{name}/latency_p50"] = float(np.percentile(latencies, 50))
        found[f"tools/{name}/latency_p95"] = float(np.percentile(latencies, 95))
    return found


def console_line(logs: dict[str, Any]) -> str | None:
    """
    The one-line summary of a logged training step.

    Args:
        logs (`dict`):
            What was logged.

    Returns:
        `str` or `None`: the line; `None` if this is no training step. A ratio is `n/a` where no token takes part.
    """
    if logs.get("ratio/mean") is None and "loss" not in logs:
        return None
    ratio = f"{_shown(logs, 'ratio/mean')}±{_shown(logs, 'ratio/std')}" if "ratio/mean" in logs else "n/a"
    parts = [f"ratio {ratio}"]
    if logs.get("forced/fraction") is not None:
        parts.append(f"forced {logs['forced/fraction']:.1%}")
    if logs.get("kl") is not None:
        parts.append(f"kl {logs['kl']:.3f}")
    if logs.get("value/loss") is not None:
        explained = logs.get("value/explained_variance")
        parts.append(f"value loss {logs['value/loss']:.2f} ev {'n/a' if explained is None else f'{explained:.2f}'}")
    if logs.get("ref/syncs") is not None:
        parts.append(f"ref synced {logs['ref/syncs']:.0f}× ({logs['ref/tensors_differ']:.0f} tensors differ)")
    if logs.get("tools/call_frequency") is not None:
        failed = logs.get("tools/failure_frequency") or 0.0
        parts.append(f"tools {logs['tools/call_frequency']:.1f} calls, {failed:.0%} failed")
    return " | ".join(parts)


def _shown(logs: dict[str, Any], name: str) -> str:
    value = logs.get(name)
    return "nan" if value is None else f"{value:.3f}"
