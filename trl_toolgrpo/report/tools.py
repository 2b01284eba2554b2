"""What became of the calls of each tool, counted over rollouts or, without a rollout log, over logged figures.

Owns the statistics behind the tool table. Pure but for what it has been told.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .rollouts import RolloutTable


@dataclass
class ToolFigures:
    """
    Figures of one tool.

    Args:
        calls, failed, truncated (`float`):
            Counts.
        failures (`Counter`):
            Failed calls by the type of error.
        seconds (`list[float]`):
            Latencies of answered calls.
        rewards (`list[float]`):
            Rewards of the rollouts that call it.
        p50, p95 (`float`, *optional*):
            Latencies where only these are known.
    """

    calls: float = 0
    failed: float = 0
    truncated: float = 0
    failures: Counter = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    p50: float | None = None
    p95: float | None = None

    def latency(self, percentile: int) -> float | None:
        """A percentile of the latencies, in seconds."""
        if self.seconds:
            return float(np.percentile(self.seconds, percentile))
        return self.p50 if percentile == 50 else self.p95

    def mean_reward(self) -> float | None:
        """Mean reward of the rollouts that call the tool."""
        return float(np.mean(self.rewards)) if self.rewards else None


class ToolStatistics:
    """Counts the calls of rollouts, and of those without any."""

    def __init__(self) -> None:
        self.tools: dict[str, ToolFigures] = {}
        self.rollouts = 0
        self.without_calls: list[float] = []

    def add(self, table: RolloutTable) -> None:
        """
        Add rollouts.

        Args:
            table ([`RolloutTable`]):
                The rollouts.
        """
        for turns, reward in zip(table.turns, table.reward.tolist(), strict=True):
            self.rollouts += 1
            called = set()
            for turn in turns:
                results = turn["tool_results"]
                for number, (name, status, seconds) in enumerate(calls_of([turn])):
                    figures = self.tools.setdefault(name, ToolFigures())
                    called.add(name)
                    figures.calls += 1
                    if status == "ok":
                        figures.truncated += bool(results[number].get("truncated"))
                    else:
                        figures.failed += 1
                        figures.failures[status] += 1
                    if number < len(results):
                        figures.seconds.append(seconds)
            if math.isfinite(reward):
                for name in called:
                    self.tools[name].rewards.append(reward)
                if not called:
                    self.without_calls.append(reward)


def from_metrics(metrics: Sequence[dict[str, Any]]) -> ToolStatistics:
    """
    What the logged figures tell of tools; latencies are the medians of those logged.

    Args:
        metrics (`Sequence[dict]`):
            Logged steps.
    """
    found = ToolStatistics()
    latencies: dict[tuple[str, str], list[float]] = {}
    for entry in metrics:
        for key, value in entry.items():
            parts = key.split("/")
            if parts[0] != "tools" or len(parts) < 3 or parts[1] == "mcp" or not isinstance(value, (int, float)):
                continue
            name, figure = "/".join(parts[1:-1]), parts[-1]
            if figure not in ("calls", "errors", "timeouts", "truncated", "latency_p50", "latency_p95"):
                continue
            tool = found.tools.setdefault(name, ToolFigures())
            if figure.startswith("latency"):
                latencies.setdefault((name, figure[-3:]), []).append(float(value))
            elif figure == "timeouts":
                tool.failures["timeout"] += value  # type: ignore[assignment]  # a mean over rollout batches
            else:
                counted = {"calls": "calls", "errors": "failed", "truncated": "truncated"}[figure]
                setattr(tool, counted, getattr(tool, counted) + value)
    for (name, figure), values in latencies.items():
        setattr(found.tools[name], figure, float(np.median(values)))
    return found


def calls_of(turns: Sequence[dict[str, Any]]) -> list[tuple[str, str, float]]:
    """
    Name, what became of it, and seconds of each call.

    Args:
        turns (`Sequence[dict]`):
            Records of turns.
    """
    found = []
    for turn in turns:
        results = turn["tool_results"]
        for number, call in enumerate(turn["tool_calls"]):
            result = results[number] if number < len(results) else None
            seconds = round(float((result or {}).get("seconds") or 0.0), 4)
            found.append((tool_name(call.get("name")), call_status(call, result), seconds))
    return found


def tool_name(name: Any) -> str:
    """The name of a tool as it is shown; calls that could not be read have none."""
    return str(name or "").strip() or "(unreadable)"


def call_status(call: dict[str, Any], result: dict[str, Any] | None) -> str:
    """`"ok"`, `"malformed"`, `"unanswered"`, or the type of the error a call ended in."""
    if call.get("error") is not None:
        return "malformed"
    if result is None:
        return "unanswered"
    return str(result.get("error_type") or "error") if result.get("is_error") else "ok"
