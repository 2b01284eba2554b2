"""What became of the calls of each tool, counted over rollouts or, without a rollout log, over logged metrics."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import pandas

from ..types import JSONObject, JSONValue


_METRIC = re.compile(r"tools/(?!mcp/)(.+)/(calls|errors|timeouts|truncated|latency_p50|latency_p95)")


class Call(NamedTuple):
    """
    A tool call of a rollout.

    Args:
        tool (`str`):
            Name of the tool as it is shown.
        outcome (`str`):
            `"ok"`, `"malformed"`, `"unanswered"`, or the type of the error it ended in.
        seconds (`float`, *optional*):
            Time until it was answered; `None` if it was not.
        truncated (`bool`):
            Whether its result was cut.
    """

    tool: str
    outcome: str
    seconds: float | None
    truncated: bool


def calls_of(turns: Sequence[JSONObject]) -> list[Call]:
    """
    Return the calls of a rollout.

    Args:
        turns (`Sequence[dict]`):
            Records of its turns.
    """
    found = []
    for turn in turns:
        results: list[JSONObject | None] = turn["tool_results"]
        missing = len(turn["tool_calls"]) - len(results)
        for call, result in zip(turn["tool_calls"], [*results, *[None] * missing], strict=False):
            outcome = _outcome(call, result)
            seconds = None if result is None else round(float(result.get("seconds") or 0), 4)
            cut = outcome == "ok" and result is not None and bool(result.get("truncated"))
            found.append(Call(tool_name(call.get("name")), outcome, seconds, cut))
    return found


def tool_name(name: JSONValue) -> str:
    """Return the name of a tool as it is shown; a call that could not be read has none."""
    return str(name or "").strip() or "(unreadable)"


def _outcome(call: JSONObject, result: JSONObject | None) -> str:
    if call.get("error") is not None:
        return "malformed"
    if result is None:
        return "unanswered"
    return str(result.get("error_type") or "error") if result.get("is_error") else "ok"


def count_calls(calls: Sequence[tuple[int, float | None, Call]]) -> pandas.DataFrame:
    """
    Return the figures of each tool.

    Args:
        calls (`Sequence[tuple[int, float | None, Call]]`):
            Number and reward of a rollout with each of its calls.

    Returns:
        `pandas.DataFrame`: by the name of the tool, the most used first: `calls`, `failed`, `truncated` (counts),
        `failures` (the failed ones by type of error, in words), `p50`, `p95` (seconds), and `reward` (mean over the
        rollouts that call it).
    """
    frame = pandas.DataFrame(
        [(number, reward, *call) for number, reward, call in calls], columns=["rollout", "reward", *Call._fields]
    ).astype({"reward": float, "seconds": float, "truncated": int})
    tools, failed = frame.groupby("tool"), frame[frame["outcome"] != "ok"].groupby("tool")["outcome"]
    failures = {name: outcomes.value_counts() for name, outcomes in failed}
    figures = {
        "calls": tools.size(),
        "failed": failed.size(),
        "truncated": tools["truncated"].sum(),
        "failures": pandas.Series({name: _in_words(counts.items()) for name, counts in failures.items()}, dtype=str),
        "p50": tools["seconds"].median(),
        "p95": tools["seconds"].quantile(0.95),
        "reward": frame.drop_duplicates(["rollout", "tool"]).groupby("tool")["reward"].mean(),
    }
    return _ranked(pandas.DataFrame(figures))


def from_metrics(metrics: Sequence[JSONObject]) -> pandas.DataFrame:
    """
    Return the figures of each tool as [`count_calls`] does, from logged metrics; latencies are medians of these.

    Args:
        metrics (`Sequence[dict]`):
            Logged steps.
    """
    logged = [
        (match[1], match[2], float(value))
        for entry in metrics
        for metric, value in entry.items()
        if (match := _METRIC.fullmatch(metric)) and isinstance(value, (int, float))
    ]
    values = pandas.DataFrame(logged, columns=["tool", "figure", "value"]).groupby(["tool", "figure"])["value"]
    names = ["calls", "errors", "truncated", "timeouts", "latency_p50", "latency_p95"]
    sums, medians = (part.unstack().reindex(columns=names) for part in (values.sum(), values.median()))
    figures = sums[names[:3]].join(medians[names[4:]]).set_axis(["calls", "failed", "truncated", "p50", "p95"], axis=1)
    figures["failures"] = [_in_words([("timeout", count)]) for count in sums["timeouts"].fillna(0)]
    return _ranked(figures.assign(reward=float("nan")))


def _in_words(counts: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{kind} {count:g}" for kind, count in counts if count)


def _ranked(figures: pandas.DataFrame) -> pandas.DataFrame:
    counts = ["calls", "failed", "truncated"]
    return figures.fillna(dict.fromkeys(counts, 0) | {"failures": ""}).sort_values("calls", ascending=False)
