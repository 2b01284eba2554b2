"""Health rules on rollouts: use of tools, tools that fail or are slow, broken calls, truncation, shortcuts to reward.

Owns the thresholds and the words, and the figures that tell whether reward follows length or repeated calls. Fed by
`health.py`.
"""

import json
import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from .health import Finding, Rule, RunFacts, Window, batches, earliest, latest, mean, trained
from .trajectory import Trajectory


DISTINCT = 4
"""Least number of distinct rewards, and of distinct lengths, in a group that can show that one follows the other."""

SHORTCUTS = {"length": "reward/length_correlation", "calls": "reward/repeats_correlation"}
"""Metrics of how reward follows what a rollout costs, within groups."""

_REMEDIES = {
    "length": "the token budget ended them: raise `max_completion_length`",
    "tool_limit": "they ran out of turns: raise `max_tool_calling_iterations`, or reward shorter ways",
    "parse_errors": "the policy cannot write calls: warm it up (`assist_warmup_steps`), or raise `parse_error_budget`",
    "tool_overflow": "a tool's result did not fit: lower `max_tool_output_tokens`, or raise `max_completion_length`",
}


def _tool_use_fading(window: Window, facts: RunFacts) -> Finding | None:
    found = [e for e in batches(trained(window, facts)) if e.get("tools/call_frequency") is not None]
    if len(found) < 8:
        return None
    calls = [entry["tools/call_frequency"] for entry in found]
    means = [mean(calls[place : place + 4]) for place in range(len(calls) - 3)]
    peak = max(range(len(means)), key=means.__getitem__)
    now, best = means[-1], means[peak]
    before, after = (mean([e["reward"] for e in found[place : place + 4]]) for place in (peak, len(means) - 1))
    if best < 0.3 or now >= 0.5 * best or (after > before and now >= 0.1):
        return None
    return Finding(
        f"Tool use fades: {now:.2f} calls a rollout over the last 4 batches, {best:.2f} at its peak around step "
        f"{found[peak]['step']}. The policy has found that guessing, or an answer of its own, pays as well. Make "
        f"reward depend on what only a tool can know, check that failed calls are not punished harder than no calls, "
        f"and see whether results are cut off (`max_tool_output_tokens`).",
        now,
        0.5 * best,
    )


def _figures(entry: dict[str, Any], figure: str) -> dict[str, float]:
    """A figure of each tool, by name."""
    ending = f"/{figure}"
    return {
        name[6 : -len(ending)]: value
        for name, value in entry.items()
        if value is not None and name.startswith("tools/") and name.endswith(ending)
    }


def _tool_failing(window: Window, facts: RunFacts) -> Finding | None:
    """A question's own tool may fail since the question is hard; one that fails in many batches does so by itself."""
    recent = batches(window, 10)
    made: dict[str, list[tuple[float, float]]] = {}
    for entry in recent:
        errors = _figures(entry, "errors")
        for tool, calls in _figures(entry, "calls").items():
            if calls:
                made.setdefault(tool, []).append((calls, errors.get(tool, 0.0)))
    for tool, pairs in made.items():
        last = pairs[-3:]
        calls, failed = sum(pair[0] for pair in last), sum(pair[1] for pair in last)
        in_each = len(last) == 3 and all(errors >= 0.5 * count for count, errors in last)
        if in_each and calls >= 8 and failed > 0.6 * calls:
            return Finding(
                f"The tool `{tool}` fails in {failed / calls:.0%} of its {calls:.0f} calls over the last 3 batches "
                f"that use it. Either it is broken (a service that is down, a missing key), or the policy cannot "
                f"fill in its arguments. Read the errors in the sample conversations, call it by hand, and make its "
                f"description and schema say what it takes.",
                failed / calls,
                0.6,
            )
    return None


def _tool_slow(window: Window, facts: RunFacts) -> Finding | None:
    recent = batches(window, 24)
    if len(recent) < 3:
        return None
    for tool, latency in _figures(recent[-1], "latency_p95").items():
        used = [e for e in recent if e.get(f"tools/{tool}/calls")]
        times = [e[f"tools/{tool}/latency_p95"] for e in used]
        if len(times) >= 3 and used[-1] is recent[-1]:
            usual = median(times[:-2])
            if min(times[-2:]) > max(10 * usual, 1.0):
                return Finding(
                    f"The tool `{tool}` has become slow: 95% of its calls take up to {latency:.1f} s, {usual:.2f} s "
                    f"before. Rollouts wait for it. Look at the service behind it, cache or batch what it does, set "
                    f"`Tool(timeout=...)`, or raise `max_concurrent_tools`.",
                    latency,
                    max(10 * usual, 1.0),
                )
        late = sum(e.get(f"tools/{tool}/timeouts") or 0.0 for e in used[-3:])
        calls = sum(e.get(f"tools/{tool}/calls") or 0.0 for e in used[-3:])
        if calls >= 8 and late > 0.2 * calls:
            return Finding(
                f"The tool `{tool}` exceeds its time limit in {late / calls:.0%} of its calls. Each such call costs "
                f"the whole limit and teaches the policy that the tool fails. Raise `tool_timeout`, or make the tool "
                f"faster.",
                late / calls,
                0.2,
            )
    waits = latest(recent, "rollout/tool_wait_fraction", 5)
    if len(waits) == 5 and mean(waits) > 0.7:
        return Finding(
            f"{mean(waits):.0%} of the time of rollouts is spent waiting for tools with nothing to decode. Make the "
            f"slowest tool faster, raise `max_concurrent_tools`, or generate more rollouts at a time.",
            mean(waits),
            0.7,
        )
    return None


def _broken_calls(window: Window, facts: RunFacts) -> Finding | None:
    found = [e for e in batches(window) if "tools/malformed_calls" in e]
    if len(found) < 3:
        return None
    now, first = _broken_rate(found[-3:]), _broken_rate(found[:5])
    limit = 0.3 if len(found) < 8 else min(0.3, max(0.15, 3 * first))
    if now <= limit or any(_broken_rate([entry], 1) <= 0.5 * limit for entry in found[-3:]):
        return None
    return Finding(
        f"{now:.0%} of the calls of the last 3 batches cannot be read or name a tool that does not "
        f"exist{f' ({first:.0%} at the start)' if len(found) >= 8 else ''}. The policy loses the format of calls, or "
        f"never had it. Warm it up with assisted steps (`assist_warmup_steps`, `force_level='schema'`), lower "
        f"`learning_rate` or `temperature`, and check that the chat template is the model's own.",
        now,
        limit,
    )


def _broken_rate(found: Window, least: int = 8) -> float:
    broken = sum((e.get("tools/malformed_calls") or 0.0) + (e.get("tools/unknown_calls") or 0.0) for e in found)
    sound = sum(sum(_figures(entry, "calls").values()) for entry in found)
    return broken / (broken + sound) if broken + sound >= least else 0.0


def _truncated(window: Window, facts: RunFacts) -> Finding | None:
    found = batches(window, 3)
    shares = [entry.get("completions/clipped_ratio") or 0.0 for entry in found]
    if len(shares) < 3 or mean(shares) <= 0.5:
        return None
    reasons = {reason: mean([entry.get(f"rollout/stop/{reason}") or 0.0 for entry in found]) for reason in _REMEDIES}
    reason = max(reasons, key=reasons.__getitem__) if any(reasons.values()) else "length"
    return Finding(
        f"{mean(shares):.0%} of the rollouts of the last 3 batches were cut off before the policy was done; most "
        f"often {_REMEDIES[reason]}. They are scored as they stand, so that reward measures the limit and not the "
        f"answer.",
        mean(shares),
        0.5,
    )


def _shortcut(window: Window, facts: RunFacts) -> Finding | None:
    words = {
        "length": ("the length of its turns", "longer", "cap what length can earn, or score the final answer alone"),
        "calls": ("how often it repeats a call", "more repetitive", "reward what calls find, not their number"),
    }
    steps = trained(window, facts)
    for kind, metric in SHORTCUTS.items():
        last = latest(steps, metric, 3)
        if len(last) == 3 and min(last) > 0.97 and steps[-1].get(metric) is not None:
            what, how, remedy = words[kind]
            name = "completions/mean_length"
            before, now = mean(earliest(steps, name, 3)), mean(latest(steps, name, 3))
            return Finding(
                f"Reward follows {what}: a correlation of {last[-1]:.2f} within groups, three batches in a row (mean "
                f"length {before:.0f} tokens at the start, {now:.0f} now). The policy will get {how}, not "
                f"better. Look at the best and worst rollouts of a group, and {remedy}.",
                last[-1],
                0.97,
            )
    return None


ROLLOUT_RULES = (
    Rule("tool_use_fading", _tool_use_fading),
    Rule("tool_failing", _tool_failing),
    Rule("tool_slow", _tool_slow),
    Rule("broken_calls", _broken_calls),
    Rule("truncated", _truncated),
    Rule("shortcut", _shortcut),
)
"""The rules of this module."""


# Figures for the last rule


def costs(trajectory: Trajectory) -> list[float]:
    """Of one rollout the assistant tokens of a turn, and the calls that were made before with the same arguments."""
    calls = [_identity(call) for turn in trajectory.turns for call in turn.tool_calls if call.error is None]
    return [sum(trajectory.tool_mask) / max(len(trajectory.turns), 1), float(len(calls) - len(set(calls)))]


def _identity(call: Any) -> str:
    return f"{call.name} {json.dumps(call.arguments, sort_keys=True, default=str)}"


def correlation_within_groups(rewards: Sequence[float], values: Sequence[float], group: int) -> float | None:
    """
    Compute the correlation of reward with something else, each less its mean in the group.

    Two distinct pairs always lie on a line, so that one rollout which differs from the rest of its group gives a
    correlation of 1 or -1 and shows nothing. Groups in which either takes fewer than [`DISTINCT`] values are left out
    (in smaller groups, those in which two are alike), and there must be several groups.

    Args:
        rewards, values (`Sequence[float]`):
            Of each rollout, group after group; a reward may be NaN.
        group (`int`):
            Rollouts of a group.

    Returns:
        `float` or `None`: the correlation; `None` where fewer than 2 groups, 8 rollouts or 4 distinct pairs (8 in
        groups of fewer than 4 rollouts) are left.
    """
    pairs: list[tuple[float, float]] = []
    least, groups = min(DISTINCT, group), 0
    for start in range(0, len(rewards), group):
        own = [pair for pair in zip(rewards[start : start + group], values[start : start + group], strict=True)
               if not math.isnan(pair[0])]  # fmt: skip
        if len({reward for reward, _ in own}) >= least and len({value for _, value in own}) >= least:
            center = mean([reward for reward, _ in own]), mean([value for _, value in own])
            pairs += [(reward - center[0], value - center[1]) for reward, value in own]
            groups += 1
    if groups < 2 or len(pairs) < 8 or len(set(pairs)) < (DISTINCT if group >= DISTINCT else 2 * DISTINCT):
        return None
    both = sum(reward * value for reward, value in pairs)
    norm = math.sqrt(sum(reward**2 for reward, _ in pairs) * sum(value**2 for _, value in pairs))
    return both / norm if norm > 0 else None
