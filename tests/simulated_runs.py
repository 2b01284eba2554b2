"""Metrics of simulated runs: sound ones, whose figures are as noisy as those of small batches, and ones with a fault
of a chosen strength. What health rules say of them is the share of false alarms, and the weakest fault they catch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from trl_toolgrpo.monitoring.health import rules
from trl_toolgrpo.monitoring.health.monitor import HealthMonitor, RunFacts
from trl_toolgrpo.monitoring.health.rollout_rules import DISTINCT, SHORTCUTS, correlation_within_groups


RULES = {rule.name: rule for rule in rules.RULES}
ONSET = 25
"""Step in which a planted fault begins."""


@dataclass(frozen=True)
class Kind:
    """
    What a sound run is like; from step to step it changes only by chance, unless it `learns`.

    `rewards`: "binary", "graded" (five values, more for longer answers, as tasks of several calls give) or "real".
    """

    rollouts: int = 64
    generations: int = 8
    rewards: str = "binary"
    success: float = 0.5
    questions: float = 2.0  # Beta parameter: the smaller, the more questions are always or never solved
    norms: float = 0.5  # deviation of the logarithm of gradient norms
    calls: float = 1.5
    errors: float = 0.2
    broken: float = 0.1
    truncated: float = 0.2
    slow: float = 0.05  # batches with one very slow call
    dtype: str = "float32"
    reused: int = 1  # optimizer steps on a rollout batch
    explained: float = 0.2  # what the critic can explain of the variance
    learns: bool = False  # over 200 steps: from 2 of 10 to 19 of 20, with calls that fail and break less and less


def learning(kind, step):
    """The kind of a run that learns, in one of its steps."""
    share = min(step / 200, 1.0)
    return replace(
        kind, success=0.2 + 0.75 * share, errors=0.55 - 0.5 * share, broken=0.3 - 0.28 * share,
        truncated=0.4 - 0.35 * share, calls=3 - 1.8 * share, explained=0.3 * (1 - share),
    )  # fmt: skip


def grown(step, entry):
    """The figures of an update that follow: entropy falls, the policy leaves its reference, gradients get rare."""
    share = min(step / 200, 1.0)
    entry["entropy"] *= 1 - 0.97 * share
    entry["kl"] += 0.6 * share
    entry["grad_norm"] *= 1 - 0.8 * share


def facts_of(kind):
    """What the rules know of such a run."""
    tolerance = 0.03 if kind.dtype == "bfloat16" else 1e-3
    return RunFacts(
        rollouts=kind.rollouts, generations=kind.generations, dtype=kind.dtype, logprob_tolerance=tolerance,
        steps_per_batch=kind.reused, learning_rate=1e-4, sync_steps=10,
    )  # fmt: skip


def rewards_of(random, kind, lengths):
    """Rewards of a batch; they depend on lengths only if they are "graded"."""
    if kind.rewards == "real":
        return random.normal(size=kind.rollouts)
    count = kind.rollouts // kind.generations
    a = kind.questions * kind.success
    chances = np.repeat(random.beta(a, max(kind.questions - a, 1e-3), count), kind.generations)
    if kind.rewards == "binary":
        return (random.random(kind.rollouts) < chances).astype(float)
    done = random.binomial(4, chances)
    lengths += 8 * done  # each step that is done costs a call
    return done / 4


def simulate(kind, seed, steps, score=rewards_of, change=None):
    """
    Yield the metrics of each step of a run.

    `score(random, kind, lengths, repeats)` gives rewards, `change(step, entry, random)` may change the metrics.
    """
    random = np.random.default_rng(seed)
    gap = 0.03 if kind.dtype == "bfloat16" else 1e-6
    for step in range(1, steps + 1):
        fresh = (step - 1) % kind.reused == 0
        spread = gap * 1.5 if fresh else 0.05
        entry = {
            "step": step, "loss": random.normal(0, 0.05), "learning_rate": 1e-4, "policy/moved": 1.0,
            "grad_norm": float(random.lognormal(-1, kind.norms)), "entropy": 0.4 * float(random.lognormal(0, 0.2)),
            "kl": 0.02 * float(random.lognormal(0, 1)), "ratio/std": spread,
            "ratio/mean": 1 + random.normal(0, spread / 20), "ref/syncs": float(step // 10),
            "value/grad_norm": float(random.lognormal(0, 0.5)), "forced/fraction": 0.0,
        }  # fmt: skip
        if fresh:
            entry |= {"sampling/logp_diff_mean": gap, "sampling/logp_diff_max": 10 * gap}
            entry |= batch_metrics(random, learning(kind, step) if kind.learns else kind, score)
        else:
            entry["value/loss"] = 0.1
        if kind.learns:
            grown(step, entry)
        if change is not None:
            change(step, entry, random)
        yield entry


def batch_metrics(random, kind, score):
    """Metrics of a rollout batch."""
    count, group = kind.rollouts, kind.generations
    lengths = np.round(random.lognormal(3.5, 0.3, count))
    repeats = random.poisson(0.5, count).astype(float)
    rewards = score(random, kind, lengths) if score is rewards_of else score(random, kind, lengths, repeats)
    groups = rewards.reshape(-1, group)
    variance = float(rewards.var())
    error = kind.explained * random.normal(0.5, 0.5) * variance + random.normal(0, 0.1) * 0.2 / math.sqrt(count)
    calls = int(random.poisson(kind.calls * count))
    tail = 3.0 if random.random() < kind.slow else 0.05
    clipped = random.binomial(count, kind.truncated) / count
    found = {
        "reward": float(rewards.mean()), "reward_std": float(rewards.std(ddof=1)),
        "frac_reward_zero_std": float((groups.std(axis=1) == 0).mean()),
        "completions/mean_length": float(lengths.mean()), "completions/clipped_ratio": clipped,
        "rollout/stop/length": clipped, "rollout/tokens_per_second": 500.0, "rollout/tool_wait_fraction": 0.2,
        "tools/call_frequency": calls / count, "tools/malformed_calls": float(random.binomial(calls, kind.broken)),
        "tools/unknown_calls": 0.0, "tools/add/calls": float(calls),
        "tools/add/errors": float(random.binomial(calls, kind.errors)),
        "tools/add/timeouts": float(random.binomial(calls, 0.05)),
        "tools/add/latency_p50": 0.02 * float(random.lognormal(0, 0.5)), "tools/add/latency_p95": tail,
        "value/loss": 0.5 * (variance * (1 - kind.explained) + 0.02) * float(random.lognormal(0, 0.4)),
        "value/explained_variance": error / variance if variance > 0 else None,
    }  # fmt: skip
    for (cost, metric), values in zip(SHORTCUTS.items(), (lengths, repeats), strict=True):
        value = correlation_within_groups(rewards.tolist(), values.tolist(), group, DISTINCT[cost])
        if value is not None:
            found[metric] = value
    return found


def alarms(entries, facts):
    """Rules that find something in a run, each with the step in which it did first."""
    monitor, found = HealthMonitor(list(RULES.values()), facts), {}
    for entry in entries:
        for line in monitor.step(entry):
            if line["level"] != "ok":
                found.setdefault(line["rule"], line["step"])
    return found


SOUND = [
    *(Kind(rollouts, generations, rewards, success)
      for rollouts, generations in ((4, 4), (8, 2), (8, 4), (16, 8), (64, 8))
      for rewards, success in (("binary", 0.5), ("binary", 0.9), ("graded", 0.6), ("real", 0.5))),
    *(Kind(rollouts, 8, "binary", 0.1) for rollouts in (16, 64)),
    Kind(norms=1.0), Kind(8, 4, norms=1.0, calls=0.5), Kind(8, 4, calls=3.0, errors=0.45, broken=0.2),
    Kind(8, 8, questions=0.5), Kind(64, 8, questions=0.3, success=0.8), Kind(16, 4, slow=0.15),
    Kind(8, 4, truncated=0.3), Kind(16, 4, explained=0.0), Kind(8, 4, explained=-0.05), Kind(dtype="bfloat16"),
    Kind(16, 4, dtype="bfloat16", reused=2), Kind(8, 4, "graded", reused=4), Kind(reused=2),
    *(Kind(rollouts, generations, rewards, learns=True) for rollouts, generations in ((8, 4), (16, 8), (64, 8))
      for rewards in ("binary", "graded")),
]  # fmt: skip
"""Kinds of sound runs: small batches and large ones, easy and hard tasks, tools that fail and are slow at times."""


# Faults


@dataclass(frozen=True)
class Fault:
    """
    A fault that can be planted: which rule has to name it, what its strength is measured in, strengths from weak to
    strong, and how it changes a run. `within` is the number of steps from its start after which it must be named.
    """

    rule: str
    unit: str
    strengths: tuple[float, ...]
    change: Callable | None = None  # (strength, entry, random), from the onset
    score: Callable | None = None  # strength -> `score` of `simulate`
    kind: Kind = Kind()
    within: int = 30
    from_start: bool = False


def scaled(name):
    """A change that multiplies a metric."""
    return lambda strength, entry, random: entry.update({name: entry[name] * strength} if name in entry else {})


def put(*names):
    """A change that sets metrics."""
    return lambda strength, entry, random: entry.update(dict.fromkeys(names, strength))


def share_of_calls(name):
    """A change that makes a share of the calls of a tool something."""

    def change(strength, entry, random):
        entry[name] = float(random.binomial(int(entry["tools/add/calls"]), strength))

    return change


def broken(strength, entry, random):
    calls = int(entry["tools/add/calls"])
    entry["tools/malformed_calls"] = float(random.binomial(calls, strength))
    sound = calls - int(entry["tools/malformed_calls"])
    for name in ("errors", "timeouts"):
        entry[f"tools/add/{name}"] = float(random.binomial(sound, entry[f"tools/add/{name}"] / max(calls, 1)))
    entry["tools/add/calls"] = float(sound)


def fewer_calls(strength, entry, random):
    entry["tools/call_frequency"] = float(random.poisson(1.5 * strength * 64)) / 64


def cut_off(strength, entry, random):
    entry["completions/clipped_ratio"] = entry["rollout/stop/length"] = random.binomial(64, strength) / 64


def no_advantages(strength, entry, random):
    """Each group has a spread with a chance of `strength`."""
    entry["frac_reward_zero_std"] = 1 - random.binomial(8, strength) / 8
    entry["reward_std"] = 0.0 if entry["frac_reward_zero_std"] == 1 else 0.1
    entry["reward"] = 0.0 if entry["frac_reward_zero_std"] == 1 else 0.01


def worse_critic(strength, entry, random):
    entry["value/explained_variance"] = -strength + random.normal(0, 0.15)


def growing_value_loss(strength, entry, random):
    """Which has grown `strength` times over 40 batches, and explains nothing."""
    growth = min(1 + (strength - 1) * (entry["step"] - ONSET) / 40, strength)
    entry["value/loss"] *= growth
    entry["value/explained_variance"] = random.normal(0, 0.05)


def wrong_logprobs(strength, entry, random):
    entry["sampling/logp_diff_mean"], entry["sampling/logp_diff_max"] = strength, 10 * strength


def no_spread(strength, entry, random):
    if "sampling/logp_diff_mean" not in entry:
        entry["ratio/std"] = strength


def follows(cost):
    """A reward that follows length or repeated calls with a correlation of `strength`, but for noise."""

    def of(strength):
        def score(random, kind, lengths, repeats):
            values = lengths if cost == "length" else repeats
            noise = values.std() * math.sqrt(1 / strength**2 - 1)
            return (values + random.normal(0, 1, len(values)) * noise) / 100

        return score

    return of


FAULTS = {
    "a loss that is NaN": Fault("not_finite", "loss", (math.nan,), put("loss"), within=1),
    "log-probs of another policy, by the ratio": Fault(
        "ratio_mean", "mean ratio", (1.005, 1.02, 1.05), put("ratio/mean"), within=1
    ),
    "the same, in bfloat16": Fault(
        "ratio_mean", "mean ratio", (1.02, 1.04, 1.06, 1.1), put("ratio/mean"), within=1, kind=Kind(dtype="bfloat16")
    ),
    "a policy that moves too far in a batch": Fault(
        "ratio_mean", "mean ratio", (1.1, 1.2, 1.3), put("ratio/mean"), within=1, kind=Kind(reused=2)
    ),
    "old log-probs recomputed": Fault(
        "ratio_spread", "std of the ratio", (1e-5, 2e-6, 5e-7, 0.0), no_spread, kind=Kind(reused=2), within=5
    ),
    "log-probs that differ": Fault(
        "logprob_gap", "mean gap in nats", (5e-4, 1.1e-3, 2e-3, 1e-2), wrong_logprobs, within=1
    ),
    "log-probs that differ, in bfloat16": Fault(
        "logprob_gap", "mean gap in nats", (0.06, 0.09, 0.13, 0.2), wrong_logprobs, within=1,
        kind=Kind(dtype="bfloat16"),
    ),
    "forced tokens in updates": Fault("forced_in_update", "share", (1e-4, 1e-2), put("forced/fraction"), within=1),
    "a reference that is not synced": Fault("reference_still", "syncs", (2.0,), put("ref/syncs"), within=10),
    "a reference that is not the policy": Fault(
        "reference_differs", "KL", (5e-5, 2e-4, 1e-3), put("ref/kl"), within=1
    ),
    "a tensor that a sync left out": Fault("reference_differs", "tensors", (1,), put("ref/tensors_differ"), within=1),
    "weights that do not move": Fault("policy_still", "share that moves", (0.0,), put("policy/moved"), within=2),
    "a critic without a gradient": Fault("critic_still", "norm", (0.0,), put("value/grad_norm"), within=2),
    "a critic that never changes": Fault(
        "critic_still", "explained", (1e-5, 1e-7, 0.0), put("value/explained_variance"), within=4
    ),
    "a critic worse than none": Fault("critic_worse", "explained, negative", (0.1, 0.2, 0.3, 0.5), worse_critic),
    "a value loss that grows": Fault("value_loss", "times", (1.5, 2.0, 3.0, 5.0), growing_value_loss, within=70),
    "no gradient": Fault("gradient_zero", "norm", (0.0,), put("grad_norm"), within=3),
    "a spike of the gradient": Fault(
        "gradient_spike", "times the median", (10, 20, 50, 100, 1000), lambda strength, entry, random:
        entry.update(grad_norm=math.exp(-1) * strength), within=1,
    ),
    "rewards that lose their spread": Fault(
        "advantages_zero", "groups with a spread", (0.1, 0.02, 0.0), no_advantages, within=10
    ),
    "rewards that never have a spread": Fault(
        "advantages_zero", "groups with a spread", (0.1, 0.02, 0.0), no_advantages, within=10, from_start=True
    ),
    "entropy that collapses": Fault("entropy_collapse", "of what it was", (0.2, 0.08, 0.04, 0.01), scaled("entropy")),
    "a policy far from its reference": Fault("kl_runaway", "nats", (0.3, 0.6, 1.0, 5.0), put("kl"), within=3),
    "tools that are called less": Fault(
        "tool_use_fading", "of the calls", (0.6, 0.45, 0.3, 0.1, 0.0), fewer_calls, within=10
    ),
    "a tool that fails": Fault(
        "tool_failing", "of its calls", (0.5, 0.65, 0.8, 1.0), share_of_calls("tools/add/errors"), within=10
    ),
    "a tool that gets slow": Fault(
        "tool_slow", "seconds (0.02 before)", (0.5, 1.1, 2.0), put("tools/add/latency_p50"), within=3
    ),
    "a tool whose slowest calls get slow": Fault(
        "tool_slow", "seconds (0.05 before)", (0.5, 1.1, 2.0), put("tools/add/latency_p95"), within=6
    ),
    "a tool that runs into its limit": Fault(
        "tool_slow", "of its calls", (0.15, 0.25, 0.4), share_of_calls("tools/add/timeouts"), within=10
    ),
    "waiting for tools": Fault(
        "tool_slow", "of the time", (0.6, 0.75, 0.9), put("rollout/tool_wait_fraction"), within=6
    ),
    "calls that break": Fault("broken_calls", "of the calls", (0.15, 0.35, 0.5, 0.8), broken, within=10),
    "calls that are broken from the start": Fault(
        "broken_calls", "of the calls", (0.25, 0.35, 0.5, 0.8), broken, within=10, from_start=True
    ),
    "rollouts that are cut off": Fault("truncated", "of the rollouts", (0.45, 0.6, 0.8), cut_off, within=10),
    "a reward for length": Fault("shortcut", "correlation", (0.9, 0.98, 0.99, 1.0), score=follows("length")),
    "a reward for length, two groups of four": Fault(
        "shortcut", "correlation", (0.9, 0.98, 0.99, 1.0), score=follows("length"), kind=Kind(8, 4)
    ),
    "a reward for repeated calls": Fault("shortcut", "correlation", (0.9, 0.98, 0.99, 1.0), score=follows("repeats")),
}  # fmt: skip
"""Faults by what they are."""


def caught(fault, strength, seed):
    """Steps from its start until a fault of this strength is named; `None` if it is not in time."""
    begin = 1 if fault.from_start or fault.score else ONSET

    def change(step, entry, random):
        if fault.change is not None and step >= begin and ("reward" in entry or fault.kind.reused > 1):
            fault.change(strength, entry, random)

    score = fault.score(strength) if fault.score else rewards_of
    entries = simulate(fault.kind, seed, begin + fault.within - 1, score, change)
    step = alarms(entries, facts_of(fault.kind)).get(fault.rule)
    return None if step is None or step < begin else step - begin + 1


def weakest(fault, seeds):
    """The weakest strength that is caught with every seed, as is each stronger one; `None` if there is none."""
    found = None
    for strength in reversed(fault.strengths):
        if any(caught(fault, strength, seed) is None for seed in seeds):
            break
        found = strength
    return found
