"""Health rules on rollouts: use of tools, tools that fail or are slow, broken calls, truncation, shortcuts to reward.

Each rule is a function of the metrics of the steps so far; its docstring says what evidence it asks for. The figures
that tell whether reward follows length or repeated calls are computed at the end.
"""

import json
import math
from collections.abc import Sequence
from statistics import median

from ...rollout.trajectory import Trajectory
from ...types import JSONObject
from .monitor import (
    CHANCE,
    HealthFinding,
    Rule,
    RunFacts,
    Window,
    batches,
    binomial_tail,
    deviations,
    earliest,
    latest,
    mean,
    trained,
)  # fmt: skip


SHORTCUTS = {"length": "reward/length_correlation", "calls": "reward/repeats_correlation"}
"""Metrics of how reward follows what a rollout costs, within groups."""

DISTINCT = {"length": 4, "calls": 3}
"""Least number of distinct rewards, and of distinct costs, in a group that can show that one follows the other. An
answer that lacks a step is shorter and worth less, without a shortcut; a call made twice is part of no answer."""

_IN_A_ROW = 4

_REMEDIES = {
    "length": "the token budget ended them: raise `max_completion_length`",
    "tool_limit": "they ran out of turns: raise `max_tool_calling_iterations`, or reward shorter ways",
    "parse_errors": "the policy cannot write calls: warm it up (`assist_warmup_steps`), or raise `parse_error_budget`",
    "tool_overflow": "a tool's result did not fit: lower `max_tool_output_tokens`, or raise `max_completion_length`",
    "environment": "their environments did not answer: see the warnings, or raise `environment_timeout`",
}


def _tool_use_fading(window: Window, facts: RunFacts) -> HealthFinding | None:
    """
    Half as many calls over 6 batches as at the peak, and by 8 standard errors: the peak is the largest of many means,
    and a small batch has twice as many calls as another by chance. Fewer calls for more reward are no fault, nor are
    fewer for the same reward while every rollout still makes one.
    """
    found = [e for e in batches(trained(window, facts)) if e.get("tools/call_frequency") is not None]
    if len(found) < 12:
        return None
    calls = [entry["tools/call_frequency"] for entry in found]
    means = [mean(calls[place : place + 6]) for place in range(len(calls) - 5)]
    peak = max(range(len(means) - 6), key=means.__getitem__)
    now, best = means[-1], means[peak]
    if best < 0.3 or now >= 0.5 * best or deviations(calls[peak : peak + 6], calls[-6:], best / facts.rollouts) < 8:
        return None
    rewards = [entry["reward"] for entry in found]
    gained = deviations(rewards[-6:], rewards[peak : peak + 6])
    if (gained > 2 and now >= 0.1) or (gained > -2 and now >= 1):
        return None
    return HealthFinding(
        f"Tool use fades: {now:.2f} calls a rollout over the last 6 batches, {best:.2f} at its peak around step "
        f"{found[peak]['step']}. The policy has found that guessing, or an answer of its own, pays as well. Make "
        f"reward depend on what only a tool can know, check that failed calls are not punished harder than no calls, "
        f"and see whether results are cut off (`max_tool_output_tokens`).",
        now,
        0.5 * best,
    )


def _figures(entry: JSONObject, figure: str) -> dict[str, float]:
    """Return a figure of each tool, by name."""
    start, end = "tools/", f"/{figure}"
    names = [name for name in entry if name.startswith(start) and name.endswith(end) and entry[name] is not None]
    return {name.removeprefix(start).removesuffix(end): entry[name] for name in names}


def _tool_failing(window: Window, facts: RunFacts) -> HealthFinding | None:
    """
    A question's own tool may fail since the question is hard; one that fails in many batches does so by itself. In
    each of the last 3 batches that use it half of its calls fail, and in all of them more than 6 of 10, and more than
    would by chance if every second call failed.
    """
    made: dict[str, list[tuple[float, float]]] = {}
    for entry in batches(window, 10):
        errors = _figures(entry, "errors")
        for tool, calls in _figures(entry, "calls").items():
            if calls:
                made.setdefault(tool, []).append((calls, errors.get(tool, 0.0)))
    for tool, pairs in made.items():
        last = pairs[-3:]
        calls, failed = sum(pair[0] for pair in last), sum(pair[1] for pair in last)
        in_each = len(last) == 3 and all(errors >= 0.5 * count for count, errors in last)
        if in_each and failed > 0.6 * calls and binomial_tail(failed, calls, 0.5) < CHANCE:
            return HealthFinding(
                f"The tool `{tool}` fails in {failed / calls:.0%} of its {calls:.0f} calls over the last 3 batches "
                f"that use it. Either it is broken (a service that is down, a missing key), or the policy cannot "
                f"fill in its arguments. Read the errors in the sample conversations, call it by hand, and make its "
                f"description and schema say what it takes.",
                failed / calls,
                0.6,
            )
    return None


def _tool_slow(window: Window, facts: RunFacts) -> HealthFinding | None:
    """
    A tool has become slow where its typical call has, twice in a row; where only its slowest calls have, which many
    services show now and then, five times in a row. It runs into its time limit where more than a fifth of its calls
    do, and more than would by chance if a tenth did. Waiting counts from a second for each batch.
    """
    recent = batches(window, 24)
    if len(recent) < 3:
        return None
    for tool in _figures(recent[-1], "calls"):
        used = [e for e in recent if e.get(f"tools/{tool}/calls")]
        if not used or used[-1] is not recent[-1]:
            continue
        found = _slower(used, tool, "latency_p50", 2) or _slower(used, tool, "latency_p95", 5)
        if found is not None:
            what, now, usual = found
            return HealthFinding(
                f"The tool `{tool}` has become slow: {what} of its calls take up to {now:.1f} s, {usual:.2f} s "
                f"before. Rollouts wait for it. Look at the service it calls, cache or batch what it does, set "
                f"`Tool(timeout=...)`, or raise `max_concurrent_tools`.",
                now,
                max(10 * usual, 1.0),
            )
        late = sum(e.get(f"tools/{tool}/timeouts") or 0.0 for e in used[-5:])
        calls = sum(e.get(f"tools/{tool}/calls") or 0.0 for e in used[-5:])
        if late > 0.2 * calls and binomial_tail(late, calls, 0.1) < CHANCE:
            return HealthFinding(
                f"The tool `{tool}` exceeds its time limit in {late / calls:.0%} of its calls. Each such call costs "
                f"the whole limit and teaches the policy that the tool fails. Raise `tool_timeout`, or make the tool "
                f"faster.",
                late / calls,
                0.2,
            )
    waits = latest(recent, "rollout/tool_wait_fraction", 5)
    if len(waits) == 5 and mean(waits) > 0.7 and _seconds_waited(recent[-5:], facts) >= 1:
        return HealthFinding(
            f"{mean(waits):.0%} of the time of rollouts is spent waiting for tools with nothing to decode. Make the "
            f"slowest tool faster, raise `max_concurrent_tools`, or generate more rollouts at a time.",
            mean(waits),
            0.7,
        )
    return None


def _slower(used: Window, tool: str, figure: str, count: int) -> tuple[str, float, float] | None:
    """
    Return the share of calls, the last latency and the usual one, where the last `count` are ten times the usual one
    and above 1 s.
    """
    times = latest(used, f"tools/{tool}/{figure}", len(used))
    if len(times) <= count:
        return None
    usual = median(times[:-count])
    return (f"{figure[-2:]}%", times[-1], usual) if min(times[-count:]) > max(10 * usual, 1.0) else None


def _seconds_waited(found: Window, facts: RunFacts) -> float:
    """Return the seconds that a batch waits for tools, on average; infinite where the speed of rollouts is unknown."""
    waited = []
    for entry in found:
        speed, length = entry.get("rollout/tokens_per_second"), entry.get("completions/mean_length")
        if not speed or length is None:
            return math.inf
        waited.append(length * facts.rollouts / speed * (entry.get("rollout/tool_wait_fraction") or 0.0))
    return mean(waited)


def _broken_calls(window: Window, facts: RunFacts) -> HealthFinding | None:
    """
    In 3 batches, or in 6, more broken calls than by chance: more than 3 of 10 where one of 5 would be usual, and once
    the run has shown what is usual, more than 15 of 100 and three times as many. No single batch may be far better,
    and a policy that began worse is learning.
    """
    found = [e for e in batches(window) if "tools/malformed_calls" in e]
    if len(found) < 3:
        return None
    (broken, calls), (first, of) = _broken(found[-3:]), _broken(found[:5])
    limit, usual = 0.3, 0.2
    if len(found) >= 8 and of:
        if first / of > 1.5 * broken / max(calls, 1):
            return None
        limit, usual = min(0.3, max(0.15, 3 * first / of)), min(0.2, max(0.05, 1.5 * first / of))
    began = f" ({first / of:.0%} at the start)" if len(found) >= 8 and of else ""
    each = [_broken([entry]) for entry in found[-3:]]
    if any(part <= 0.5 * limit * whole for part, whole in each):
        return None
    counts = [(broken, calls), _broken(found[-6:])]
    if broken <= limit * calls or min(binomial_tail(*count, usual) for count in counts) >= CHANCE:
        return None
    return HealthFinding(
        f"{broken / calls:.0%} of the calls of the last 3 batches cannot be read or name a tool that does not "
        f"exist{began}. The policy loses the format of calls, or never had it. Warm it up with assisted steps "
        f"(`assist_warmup_steps`, `force_level='schema'`), lower `learning_rate` or `temperature`, and check that the "
        f"chat template is the model's own.",
        broken / calls,
        limit,
    )


def _broken(found: Window) -> tuple[float, float]:
    """Return the number of broken calls, and of all calls."""
    broken = sum((e.get("tools/malformed_calls") or 0.0) + (e.get("tools/unknown_calls") or 0.0) for e in found)
    return broken, broken + sum(sum(_figures(entry, "calls").values()) for entry in found)


def _truncated(window: Window, facts: RunFacts) -> HealthFinding | None:
    """
    More than half of 3 batches, and more than by chance if every third rollout were cut off. Forced calls of assisted
    steps, which may leave no room for an answer, do not count.
    """
    found = batches(trained(window, facts), 3)
    shares = [entry.get("completions/clipped_ratio") or 0.0 for entry in found]
    rollouts = 3 * facts.rollouts
    if len(shares) < 3 or mean(shares) <= 0.5 or binomial_tail(mean(shares) * rollouts, rollouts, 1 / 3) > 1e-4:
        return None
    reasons = {reason: mean([entry.get(f"rollout/stop/{reason}") or 0.0 for entry in found]) for reason in _REMEDIES}
    reason = max(reasons, key=reasons.__getitem__) if any(reasons.values()) else "length"
    return HealthFinding(
        f"{mean(shares):.0%} of the rollouts of the last 3 batches were cut off before the policy was done; most "
        f"often {_REMEDIES[reason]}. They are scored as they stand, so that reward measures the limit and not the "
        f"answer.",
        mean(shares),
        0.5,
    )


def _shortcut(window: Window, facts: RunFacts) -> HealthFinding | None:
    """
    A reward that grows with length does so in every batch: four in a row, none left out, each with a correlation above
    0.97 over groups that have several distinct rewards and lengths ([`correlation_within_groups`]), while lengths do
    not come down. An answer that lacks a step is shorter and worth less as well, but such rewards take few values.
    """
    words = {
        "length": ("the length of its turns", "longer", "cap what length can earn, or score the final answer alone"),
        "calls": ("how often it repeats a call", "more repetitive", "reward what calls find, not their number"),
    }
    trends = {"length": ("completions/mean_length", "tokens"), "calls": ("tools/call_frequency", "calls")}
    steps = batches(trained(window, facts))
    for kind, metric in SHORTCUTS.items():
        last = [entry[metric] for entry in steps[-_IN_A_ROW:] if (entry.get(metric) or 0.0) > 0.97]
        if len(last) < _IN_A_ROW:
            continue
        what, how, remedy = words[kind]
        name, unit = trends[kind]
        before, now = mean(earliest(steps, name, _IN_A_ROW)), mean(latest(steps, name, _IN_A_ROW))
        if now >= 0.9 * before:
            return HealthFinding(
                f"Reward follows {what}: a correlation of {mean(last):.2f} within groups, {_IN_A_ROW} batches in a "
                f"row ({before:.3g} {unit} a rollout at the start, {now:.3g} now). The policy will get {how}, not "
                f"better. Look at the best and worst rollouts of a group, and {remedy}.",
                mean(last),
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


# Figures that the last rule reads


def costs(trajectory: Trajectory) -> list[float]:
    """Return the assistant tokens a turn of a rollout, and how many calls repeat one with the same arguments."""
    calls = [call for turn in trajectory.turns for call in turn.tool_calls if call.error is None]
    distinct = {(call.name, json.dumps(call.arguments, sort_keys=True, default=str)) for call in calls}
    return [sum(trajectory.tool_mask) / max(len(trajectory.turns), 1), float(len(calls) - len(distinct))]


def correlation_within_groups(
    rewards: Sequence[float], values: Sequence[float], group: int, distinct: int = 4
) -> float | None:
    """
    Compute the correlation of reward with something else, each less its mean in the group.

    Two distinct pairs always lie on a line, so that one rollout which differs from the rest of its group gives a
    correlation of 1 or -1 and shows nothing. Groups in which either takes few distinct values are left out, and there
    must be several groups.

    Args:
        rewards, values (`Sequence[float]`):
            Of each rollout, group after group; a reward may be NaN.
        group (`int`):
            Rollouts of a group.
        distinct (`int`, *optional*, defaults to `4`):
            Least number of distinct rewards and of distinct values in a group; in a smaller one all must differ.

    Returns:
        `float` or `None`: the correlation; `None` where fewer than 2 groups or 8 rollouts are left, or fewer distinct
        pairs than `distinct` (twice as many in groups smaller than that).
    """
    pairs: list[tuple[float, float]] = []
    least, groups = min(distinct, group), 0
    for start in range(0, len(rewards), group):
        own = [pair for pair in zip(rewards[start : start + group], values[start : start + group], strict=True)
               if not math.isnan(pair[0])]  # fmt: skip
        if len({reward for reward, _ in own}) >= least and len({value for _, value in own}) >= least:
            center = mean([reward for reward, _ in own]), mean([value for _, value in own])
            pairs += [(reward - center[0], value - center[1]) for reward, value in own]
            groups += 1
    if groups < 2 or len(pairs) < 8 or len(set(pairs)) < (distinct if group >= distinct else 2 * distinct):
        return None
    both = sum(reward * value for reward, value in pairs)
    norm = math.sqrt(sum(reward**2 for reward, _ in pairs) * sum(value**2 for _, value in pairs))
    return both / norm if norm > 0 else None
