"""Metrics of a run in addition to TRL's (ratio, rollouts, tools), and the line that each step prints."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..rollout.trajectory import STOP_REASONS, Trajectory


def averages(metrics: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """
    Return the mean of what was collected of each metric since the last log, as TRL takes it: without NaN, and `None`
    where nothing else was collected.

    Args:
        metrics (`Mapping[str, Sequence[float]]`):
            Values of each metric.
    """
    kept = {name: [value for value in values if not math.isnan(value)] for name, values in metrics.items()}
    return {name: sum(values) / len(values) if values else None for name, values in kept.items()}


def length_metrics(lengths: Tensor, truncated: Tensor) -> dict[str, float]:
    """
    Return TRL's `completions/*` metrics.

    TRL counts only the tokens that train and judges by the last token whether a rollout was truncated. Here forced
    tokens count like any other token of a completion, and the stop reason says whether it was truncated.

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


@dataclass
class RolloutCounts:
    """
    Figures of the rollouts of one process, to be added up over processes by [`rollout_metrics`].

    Args:
        totals (`Counter[str]`):
            Sums, by name.
        latencies (`dict[str, list[float]]`):
            Seconds that each call took, by tool.
        seconds, tool_wait (`float`):
            Wall-clock time in total, and spent waiting for tools.
        cache_gib (`float`, *optional*):
            The bound on keys and values that was chosen by the memory of a GPU, in GiB.
    """

    totals: Counter[str]
    latencies: dict[str, list[float]]
    seconds: float
    tool_wait: float
    cache_gib: float | None = None


def rollout_counts(
    trajectories: Sequence[Trajectory],
    seconds: float,
    tool_wait: float,
    invalid: int,
    tool_names: Sequence[str] = (),
    unconstrained: int = 0,
    abandoned: int = 0,
    cache_gib: float | None = None,
) -> RolloutCounts:
    """
    Count what happened in the rollouts of one process.

    Args:
        trajectories (`Sequence[Trajectory]`):
            The rollouts.
        seconds, tool_wait (`float`):
            Wall-clock time in total, and spent waiting for tools with nothing to decode.
        invalid (`int`):
            Rollouts whose record broke its contract.
        tool_names (`Sequence[str]`, *optional*):
            Tools that are reported even if nobody called them.
        unconstrained (`int`, *optional*, defaults to `0`):
            Forced bodies left free because their schema cannot be satisfied.
        abandoned (`int`, *optional*, defaults to `0`):
            Calls given up since they ignored their time limit.
        cache_gib (`float`, *optional*):
            The bound on keys and values that was chosen by the memory of a GPU, in GiB.
    """
    totals: Counter[str] = Counter(rollouts=len(trajectories), invalid=invalid, abandoned=abandoned)
    totals["unconstrained"] = unconstrained
    latencies: dict[str, list[float]] = {name: [] for name in tool_names}
    for trajectory in trajectories:
        totals[f"stop/{trajectory.stop_reason}"] += 1
        totals["turns"] += len(trajectory.turns)
        totals["forced"] += sum(trajectory.forced_mask)
        totals["tokens"] += sum(trajectory.tool_mask)
        for turn in trajectory.turns:
            if turn.stop_reason == "stop":  # a call cut off by the token budget is not the policy's mistake
                totals["malformed"] += sum(call.error is not None for call in turn.tool_calls)
            for call, result in zip(turn.tool_calls, turn.tool_results, strict=False):
                if result.error_type == "unknown_tool":
                    totals["unknown"] += 1
                elif call.error is None:
                    latencies.setdefault(call.name, []).append(result.seconds)
                    totals[f"tools/{call.name}/errors"] += result.is_error
                    totals[f"tools/{call.name}/timeouts"] += result.error_type == "timeout"
                    totals[f"tools/{call.name}/truncated"] += result.truncated
    return RolloutCounts(totals, latencies, seconds, tool_wait, cache_gib)


def rollout_metrics(counts: Sequence[RolloutCounts], with_tools: bool) -> dict[str, float]:
    """
    Return the `forced/*`, `rollout/*` and `tools/*` metrics of a rollout batch.

    Args:
        counts (`Sequence[RolloutCounts]`):
            [`rollout_counts`] of every process.
        with_tools (`bool`):
            Whether the rollouts have tools.
    """
    total: Counter[str] = Counter()
    latencies: dict[str, list[float]] = {}
    for part in counts:
        total.update(part.totals)
        for name, values in part.latencies.items():
            latencies.setdefault(name, []).extend(values)
    rollouts, seconds = max(total["rollouts"], 1), max(part.seconds for part in counts)
    in_all = sum(part.seconds for part in counts)
    found: dict[str, float] = {
        "forced/fraction": total["forced"] / max(total["tokens"], 1),
        "rollout/turns_mean": total["turns"] / rollouts,
        "rollout/tokens_per_second": total["tokens"] / seconds if seconds else 0.0,
        "rollout/tool_wait_fraction": sum(part.tool_wait for part in counts) / max(in_all, 1e-9),
    }
    found |= {f"rollout/stop/{reason}": total[f"stop/{reason}"] / rollouts for reason in STOP_REASONS}
    if total["invalid"]:
        found["rollout/invalid"] = total["invalid"]
    if total["unconstrained"]:
        found["forced/unconstrained"] = total["unconstrained"]
    chosen = [part.cache_gib for part in counts if part.cache_gib is not None]
    if chosen:
        found["rollout/cache_gib"] = min(chosen)
    if not with_tools:
        return found
    found |= {"tools/unknown_calls": total["unknown"], "tools/malformed_calls": total["malformed"]}
    found["tools/abandoned"] = total["abandoned"]
    for name, values in sorted(latencies.items()):
        found[f"tools/{name}/calls"] = len(values)
        for kind in ("errors", "timeouts", "truncated"):
            found[f"tools/{name}/{kind}"] = total[f"tools/{name}/{kind}"]
        found |= {f"tools/{name}/latency_p{p}": float(np.percentile(values or [0.0], p)) for p in (50, 95)}
    return found


def console_line(logs: Mapping[str, float | None]) -> str | None:
    """
    Return the summary of a logged training step, in one line.

    Args:
        logs (`Mapping[str, float | None]`):
            What was logged.

    Returns:
        `str` or `None`: the line; `None` if this is no training step. The ratio is `n/a` where no token takes part.
    """
    if logs.get("ratio/mean") is None and "loss" not in logs:
        return None
    ratio = [logs.get(name) for name in ("ratio/mean", "ratio/std")] if "ratio/mean" in logs else []
    parts = ["ratio " + ("±".join("nan" if value is None else f"{value:.3f}" for value in ratio) or "n/a")]
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
