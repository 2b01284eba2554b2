"""The verdict on a run in words: what the health rules said and how the main figures moved.

Owns the words at the top of the report. Pure functions of a [`RunFolder`].
"""

from dataclasses import dataclass, field
from typing import Any

from .folder import RunFolder, finite


HEADLINES = {
    "ok": "Healthy: no health rule has anything to say.",
    "unknown": "No verdict: nothing says that health rules were watching this run.",
}
EDGE = 5
"""Logged steps whose mean stands for the beginning and the end of a run."""


@dataclass
class Finding:
    """
    What one health rule said in the course of a run.

    Args:
        rule (`str`):
            Its name.
        level (`str`):
            The worst of its levels, `"warning"` or `"error"`.
        message (`str`):
            The last thing it said.
        first, last (`int`):
            Steps at which it spoke first and last.
        times (`int`):
            How often it spoke.
        recovered (`int`, *optional*):
            Step at which it said that all is well again; `None` while it does not.
    """

    rule: str
    level: str
    message: str
    first: int
    last: int
    times: int = 1
    recovered: int | None = None


@dataclass
class Verdict:
    """
    A verdict.

    Args:
        level (`str`):
            `"ok"`, `"warning"`, `"error"` or `"unknown"`.
        headline (`str`):
            The verdict in one sentence.
        sentences (`list[str]`):
            How the main figures moved.
        findings (`list[Finding]`):
            What health rules said, the worst first.
    """

    level: str
    headline: str
    sentences: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def judge(run: RunFolder) -> Verdict:
    """
    The verdict on a run.

    Args:
        run ([`RunFolder`]):
            The run.
    """
    findings = collect_findings(run.health or [])
    open_levels = [finding.level for finding in findings if finding.recovered is None]
    if run.empty:
        return Verdict("unknown", "No verdict: nothing of a run was found.")
    if run.health is None:
        level, headline = "unknown", HEADLINES["unknown"]
    elif open_levels:
        level = "error" if "error" in open_levels else "warning"
        errors, warnings = open_levels.count("error"), open_levels.count("warning")
        counted = [_counted(errors, "error"), _counted(warnings, "warning")]
        names = ", ".join(finding.rule for finding in findings if finding.recovered is None)
        head = "Sick" if errors else "Needs a look"
        stand = "stands" if len(open_levels) == 1 else "stand"
        headline = f"{head}: {' and '.join(filter(None, counted))} {stand} at the end ({names})."
    elif findings:
        level, headline = "ok", f"Healthy at the end: {_counted(len(findings), 'rule')} spoke up and recovered."
    else:
        level, headline = "ok", HEADLINES["ok"]
    return Verdict(level, headline, summarize(run), findings)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}" if count else ""


def collect_findings(health: list[dict[str, Any]]) -> list[Finding]:
    """
    The messages of each rule as one finding: those that stand first, errors before warnings.

    Args:
        health (`list[dict]`):
            Messages in order.
    """
    found: dict[str, Finding] = {}
    for entry in health:
        rule, level, step = str(entry["rule"]), str(entry["level"]), _step(entry)
        known = found.get(rule)
        if level == "ok":
            if known is not None:
                known.recovered = step
        elif known is None:
            found[rule] = Finding(rule, level, str(entry.get("message") or ""), step, step)
        else:
            known.level = "error" if "error" in (known.level if known.recovered is None else level, level) else level
            known.message = str(entry.get("message") or known.message)
            known.last, known.times, known.recovered = step, known.times + 1, None
    return sorted(found.values(), key=lambda f: (f.recovered is not None, f.level != "error", f.first))


def _step(entry: dict[str, Any]) -> int:
    step = entry.get("step")
    return step if isinstance(step, int) else 0


def summarize(run: RunFolder) -> list[str]:
    """
    How the main figures of a run moved, a sentence each.

    Args:
        run ([`RunFolder`]):
            The run.
    """
    if not run.metrics:
        return ["No figures were logged yet."]
    first, last = run.metrics[0]["step"], run.metrics[-1]["step"]
    times = [entry["time"] for entry in run.metrics if isinstance(entry.get("time"), (int, float))]
    lasted = f", {_duration(times[-1] - times[0])}" if len(times) > 1 and times[-1] > times[0] else ""
    sentences = [f"Steps {first} to {last} are logged{lasted}."]
    sentences += _moved(run, "reward", "The mean reward of training")
    for prefix, name in run.evaluations():
        sentences += _moved(run, f"{prefix}reward", f"The held-out reward{f' on {name}' if name else ''}")
    for metric, words in (
        ("ratio/mean", "The ratio of the policy to what sampled was {:.3f} on average over the last steps."),
        (
            "value/explained_variance",
            "The explained variance of the value head is {:.2f} over the last steps (1 at best; below 0 it does worse "
            "than the mean return).",
        ),
        ("tools/call_frequency", "A rollout makes {:.1f} tool calls at the end."),
        ("tools/failure_frequency", "Of its tool calls {:.1%} fail at the end."),
        ("completions/clipped_ratio", "At the end {:.0%} of the rollouts are cut off by a limit."),
    ):
        _, values = run.curve(metric)
        ends = finite(values[-EDGE:])
        if ends:
            sentences.append(words.format(sum(ends) / len(ends)))
    return sentences


def edges(values: list[float]) -> tuple[float, float] | None:
    """Mean of the first and of the last few finite values; `None` with fewer than two values."""
    known = finite(values)
    width = min(EDGE, max(len(known) // 2, 1))
    return (sum(known[:width]) / width, sum(known[-width:]) / width) if len(known) > 1 else None


def _moved(run: RunFolder, metric: str, what: str) -> list[str]:
    _, values = run.curve(metric)
    if len(values) == 1:
        return [f"{what} was {values[0]:.3g} in the one step that is logged."]
    ends = edges(values)
    if ends is None:
        return []
    before, after = ends
    spread = max(finite(values)) - min(finite(values))
    how = "stayed" if abs(after - before) <= 0.05 * spread else "rose" if after > before else "fell"
    moved = f"{what} {how} " + (f"at {after:.3g}" if how == "stayed" else f"from {before:.3g} to {after:.3g}")
    return [f"{moved}."]


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
