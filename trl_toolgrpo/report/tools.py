"""What became of the calls of each tool, counted over rollouts or, without a rollout log, over logged metrics."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..types import JSONObject, JSONValue, Row


_METRIC = re.compile(r"tools/(?!mcp/)(.+)/(calls|errors|timeouts|truncated|latency_p50|latency_p95)")


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
            Latencies in seconds, where only these are known.
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
        """Return a percentile of the latencies, in seconds."""
        if self.seconds:
            return float(np.percentile(self.seconds, percentile))
        return self.p50 if percentile == 50 else self.p95

    def mean_reward(self) -> float | None:
        """Return the mean reward of the rollouts that call the tool."""
        return float(np.mean(self.rewards)) if self.rewards else None


class ToolStatistics:
    """
    Figures of all tools, and the rewards of rollouts that call none.

    Attributes:
        tools (`dict[str, ToolFigures]`): figures by the tool's name.
        rollouts (`int`): number of rollouts that were counted.
        without_calls (`list[float]`): rewards of the rollouts without a call.
    """

    def __init__(self) -> None:
        self.tools: dict[str, ToolFigures] = {}
        self.rollouts = 0
        self.without_calls: list[float] = []

    def add(self, rollout: Row) -> None:
        """
        Count the calls of a rollout.

        Args:
            rollout (`dict`):
                The rollout, as a row of the log.
        """
        self.rollouts += 1
        called = set()
        for turn in rollout["turns"]:
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
        if rollout["reward"] is not None:
            for rewards in [self.tools[name].rewards for name in called] or [self.without_calls]:
                rewards.append(rollout["reward"])


def from_metrics(metrics: Sequence[JSONObject]) -> ToolStatistics:
    """
    Return what the logged metrics say about tools; latencies are the medians of those logged.

    Args:
        metrics (`Sequence[dict]`):
            Logged steps.
    """
    logged: dict[str, dict[str, list[float]]] = {}
    for entry in metrics:
        for metric, value in entry.items():
            match = _METRIC.fullmatch(metric)
            if match and isinstance(value, (int, float)):
                logged.setdefault(match[1], {}).setdefault(match[2], []).append(value)
    found = ToolStatistics()
    for name, figures in logged.items():
        sums = Counter({figure: sum(values) for figure, values in figures.items()})
        medians = {figure: float(np.median(values)) for figure, values in figures.items()}
        found.tools[name] = ToolFigures(
            calls=sums["calls"],
            failed=sums["errors"],
            truncated=sums["truncated"],
            failures=Counter({"timeout": sums["timeouts"]}),
            p50=medians.get("latency_p50"),
            p95=medians.get("latency_p95"),
        )
    return found


def calls_of(turns: Sequence[JSONObject]) -> list[tuple[str, str, float]]:
    """
    Return the name, the outcome and the seconds of each call.

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
            found.append((tool_name(call.get("name")), _outcome(call, result), seconds))
    return found


def tool_name(name: JSONValue) -> str:
    """Return the name of a tool as it is shown; a call that could not be read has none."""
    return str(name or "").strip() or "(unreadable)"


def _outcome(call: JSONObject, result: JSONObject | None) -> str:
    """`"ok"`, `"malformed"`, `"unanswered"`, or the type of the error a call ended in."""
    if call.get("error") is not None:
        return "malformed"
    if result is None:
        return "unanswered"
    return str(result.get("error_type") or "error") if result.get("is_error") else "ok"
