"""The verdict on a run in words: what the health rules said and how the main figures moved."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from ..types import JSONObject
from .folder import RunFolder, finite


EDGE = 5
"""Logged steps whose mean stands for the beginning and the end of a run."""


@dataclass
class RuleHistory:
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
        times (`int`, *optional*, defaults to `1`):
            How often it spoke.
        recovered (`int`, *optional*):
            Step at which it found nothing any more; `None` if it still does.
    """

    rule: str
    level: str
    message: str
    first: int
    last: int
    times: int = 1
    recovered: int | None = None


@dataclass
class RunVerdict:
    """
    A verdict.

    Args:
        level (`str`):
            `"ok"`, `"warning"`, `"error"` or `"unknown"`.
        headline (`str`):
            The verdict in one sentence.
        sentences (`list[str]`):
            How the main figures moved.
        rules (`list[RuleHistory]`):
            What the health rules said, the worst first.
    """

    level: str
    headline: str
    sentences: list[str] = field(default_factory=list)
    rules: list[RuleHistory] = field(default_factory=list)


def judge(run: RunFolder) -> RunVerdict:
    """
    Judge a run by what its health rules said.

    Args:
        run ([`RunFolder`]):
            The run.
    """
    if run.empty:
        return RunVerdict("unknown", "No verdict: nothing of a run was found.")
    rules = rule_histories(run.health or [])
    standing = [rule for rule in rules if rule.recovered is None]
    levels = [rule.level for rule in standing]
    if run.health is None:
        level, headline = "unknown", "No verdict: nothing says that health rules were watching this run."
    elif standing:
        level = "error" if "error" in levels else "warning"
        counts = [_counted(levels.count(kind), kind) for kind in ("error", "warning") if kind in levels]
        headline = (
            f"{'Sick' if level == 'error' else 'Needs a look'}: {' and '.join(counts)} "
            f"{'stands' if len(levels) == 1 else 'stand'} at the end ({', '.join(rule.rule for rule in standing)})."
        )
    elif rules:
        level, headline = "ok", f"Healthy at the end: {_counted(len(rules), 'rule')} spoke up and recovered."
    else:
        level, headline = "ok", "Healthy: no health rule has anything to say."
    return RunVerdict(level, headline, summarize(run), rules)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def rule_histories(health: Sequence[JSONObject]) -> list[RuleHistory]:
    """
    Gather the messages of each rule: those that still stand first, errors before warnings.

    Args:
        health (`Sequence[dict]`):
            Messages in order.
    """
    found: dict[str, RuleHistory] = {}
    for entry in health:
        rule, level, message = entry["rule"], str(entry["level"]), str(entry.get("message") or "")
        step = entry["step"] if isinstance(entry.get("step"), int) else 0
        known = found.get(rule)
        if level == "ok":
            if known is not None:
                known.recovered = step
        elif known is None:
            found[rule] = RuleHistory(rule, level, message, step, step)
        else:
            known.level = "error" if known.level == "error" and known.recovered is None else level
            known.message = message or known.message
            known.last, known.times, known.recovered = step, known.times + 1, None
    return sorted(found.values(), key=lambda rule: (rule.recovered is not None, rule.level != "error", rule.first))


def summarize(run: RunFolder) -> list[str]:
    """
    Say how the main figures of a run moved, in a sentence each.

    Args:
        run ([`RunFolder`]):
            The run.
    """
    if not run.metrics:
        return ["No figures were logged yet."]
    first, last = run.metrics[0]["step"], run.metrics[-1]["step"]
    times = [entry["time"] for entry in run.metrics if isinstance(entry.get("time"), (int, float))]
    seconds = round(times[-1] - times[0]) if times else 0
    duration = f", over {timedelta(seconds=seconds)}" if seconds >= 60 else f", over {seconds} s" if seconds else ""
    sentences = [f"Steps {first} to {last} are logged{duration}."]
    sentences += _moved(run, "reward", "The mean reward of training")
    for prefix, name in run.evaluations():
        sentences += _moved(run, f"{prefix}reward", f"The held-out reward{f' on {name}' if name else ''}")
    for metric, words in (
        ("ratio/mean", "The ratio of the policy to the sampling policy was {:.3f} on average over the last steps."),
        ("value/explained_variance", "The value head's explained variance is {:.2f} (1 at best, not below 0)."),
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
    """Return the mean of the first and of the last few finite values; `None` with fewer than two values."""
    known = finite(values)
    width = min(EDGE, max(len(known) // 2, 1))
    return (sum(known[:width]) / width, sum(known[-width:]) / width) if len(known) > 1 else None


def _moved(run: RunFolder, metric: str, what: str) -> list[str]:
    _, values = run.curve(metric)
    if len(values) == 1:
        return [f"{what} was {values[0]:.3g} in the only logged step."]
    ends = edges(values)
    if ends is None:
        return []
    before, after = ends
    spread = max(finite(values)) - min(finite(values))
    if abs(after - before) <= 0.05 * spread:
        return [f"{what} stayed at {after:.3g}."]
    return [f"{what} {'rose' if after > before else 'fell'} from {before:.3g} to {after:.3g}."]
