"""Health rules: what a rule is, what it knows of a run, what counts as evidence, and when a finding is reported.

A run of thousands of steps shows every rule thousands of windows, and on a healthy run a rule must be silent on all of
them. So a rule that judges by a count asks how likely the count is by chance ([`binomial_tail`] below [`CHANCE`]), one
that judges by noisy figures asks for a difference of many standard errors, and one that judges by a figure which
rounding alone can move asks for more than rounding.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice

from ...types import JSONObject


Window = Sequence[JSONObject]
"""Metrics of the logged training steps of a run, oldest first, each with its `step`."""

RECOVERED = 5
"""Steps without a finding after which a fault is over."""

CHANCE = 1e-6
"""Likelihood below which a count is no accident, although a run gives it thousands of occasions."""

_FIRST, _MIDDLE, _LAST = 64, 128, 128


@dataclass(frozen=True)
class RunFacts:
    """
    What a rule has to know of a run in addition to its metrics.

    Args:
        logprob_tolerance (`float`, *optional*, defaults to `1e-3`):
            Mean difference in nats that rounding explains between recorded and recomputed log-probs.
        doubtful_tolerance (`float`, *optional*, defaults to `0.0`):
            The same at tokens that the policy hardly expects. A policy that is sure now may not stay so.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype that the policy computes in.
        steps_per_batch (`int`, *optional*, defaults to `1`):
            Most optimizer steps that a rollout batch feeds.
        policy_from (`int`, *optional*, defaults to `0`):
            Optimizer steps before the policy gradient begins: assisted ones and those of the critic alone.
        sync_steps (`int`, *optional*):
            Optimizer steps between two syncs of the reference; `None` without syncs.
        copies_policy (`bool`, *optional*, defaults to `True`):
            Whether a sync makes the reference equal to the policy.
        max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Norm that gradients are clipped to.
        rollouts (`int`, *optional*, defaults to `64`):
            Rollouts of a batch, over all processes.
        generations (`int`, *optional*, defaults to `8`):
            Rollouts of a group.
        learning_rate (`float`, *optional*, defaults to `0.0`):
            Learning rate that the schedule starts from; with the default every rate counts as a full one.
        group_advantages (`bool`, *optional*, defaults to `True`):
            Whether a group whose rewards are all the same has no advantages.
        loss_scaling (`bool`, *optional*, defaults to `False`):
            Whether the loss is scaled, and steps whose gradient overflows are left out.
        rope (`str`, *optional*, defaults to `""`):
            Kinds of rotary embeddings of the policy that depend on the length of the sequence.
    """

    logprob_tolerance: float = 1e-3
    doubtful_tolerance: float = 0.0
    dtype: str = "float32"
    steps_per_batch: int = 1
    policy_from: int = 0
    sync_steps: int | None = None
    copies_policy: bool = True
    max_grad_norm: float = 1.0
    rollouts: int = 64
    generations: int = 8
    learning_rate: float = 0.0
    group_advantages: bool = True
    loss_scaling: bool = False
    rope: str = ""

    @property
    def groups(self) -> int:
        """Groups of a rollout batch."""
        return max(self.rollouts // self.generations, 1)

    def at_full_rate(self, entry: JSONObject) -> bool:
        """Return whether a step has a tenth of the learning rate or more, so that its update should show."""
        rate = entry.get("learning_rate")
        return rate is None or rate >= 0.1 * self.learning_rate

    @property
    def largest_gap(self) -> float:
        """Mean difference of log-probs, in nats, that rounding explains at any time of the run."""
        if not self.low_precision:
            return self.logprob_tolerance
        return max(4 * self.logprob_tolerance, 2 * self.doubtful_tolerance)

    @property
    def low_precision(self) -> bool:
        """Whether the policy computes in bfloat16 or float16."""
        return self.dtype in ("bfloat16", "float16")

    @property
    def rounding_spread(self) -> float:
        """Standard deviation of the ratio that rounding explains: differences of log-probs are about normal."""
        return 1.5 * self.logprob_tolerance


@dataclass(frozen=True)
class HealthFinding:
    """
    What a rule has found.

    Args:
        message (`str`):
            What is seen, the likely cause and the remedy.
        value, threshold (`float`, *optional*):
            What was measured, and where the fault begins.
    """

    message: str
    value: float | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Rule:
    """
    A health rule.

    Args:
        name (`str`):
            Its name in `health.jsonl`.
        check (`Callable`):
            `check(window, facts)` returns a [`HealthFinding`], or `None` where nothing is wrong.
        level (`str`, *optional*, defaults to `"warning"`):
            `"error"` where every further update is wasted or wrong.
    """

    name: str
    check: Callable[[Window, RunFacts], HealthFinding | None]
    level: str = "warning"


# Reading a window


def latest(window: Window, name: str, count: int) -> list[float]:
    """Return the last `count` finite values of a metric, oldest first; fewer where there are not as many."""
    return earliest(window[::-1], name, count)[::-1]


def earliest(window: Window, name: str, count: int) -> list[float]:
    """Return the first `count` finite values of a metric, oldest first; fewer where there are not as many."""
    values = (entry.get(name) for entry in window)
    return list(islice((value for value in values if value is not None and math.isfinite(value)), count))


def mean(values: Sequence[float]) -> float:
    """Return the mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def trained(window: Window, facts: RunFacts) -> Window:
    """Return the steps with a policy gradient."""
    return [entry for entry in window if entry["step"] > facts.policy_from and "forced/loss" not in entry]


def batches(window: Window, count: int | None = None) -> Window:
    """Return the steps in which a rollout batch was generated: all, or the last `count` of them."""
    found = [entry for entry in window if entry.get("reward") is not None]
    return found if count is None else found[-count:]


def improved(window: Window) -> bool:
    """
    Return whether reward is clearly above where it began, so that a policy that has settled is no fault.

    Means over up to 8 batches at either end are compared, since that of one small batch is mostly noise.
    """
    found = batches(window)
    count = min(8, max(len(found) // 2, 1))
    first, last = earliest(found, "reward", count), latest(found, "reward", count)
    spread = max(earliest(found, "reward_std", count), default=0.0)
    return bool(first) and mean(last) - mean(first) > max(0.3 * spread, 1e-6)


# Evidence


def binomial_tail(count: float, total: float, share: float) -> float:
    """
    Return how likely at least `count` of `total` are if each has a chance of `share`.

    Args:
        count, total (`float`):
            Counts; means of counts over several batches are rounded.
        share (`float`):
            Chance of each, between 0 and 1.
    """
    least, whole = math.ceil(count - 1e-6), round(total)
    if least <= whole * share:
        return 1.0

    def log_choices(taken: int) -> float:
        return math.lgamma(whole + 1) - math.lgamma(taken + 1) - math.lgamma(whole - taken + 1)

    each, none = math.log(share), math.log1p(-share)
    return sum(math.exp(log_choices(n) + n * each + (whole - n) * none) for n in range(least, whole + 1))


def deviations(now: Sequence[float], before: Sequence[float], least: float = 0.0) -> float:
    """
    Return by how many standard errors the mean of some figures is above that of others.

    Args:
        now, before (`Sequence[float]`):
            Figures of two or more batches each.
        least (`float`, *optional*, defaults to `0.0`):
            Variance of one figure that is known to be there, as few figures may happen to agree.
    """
    squares = sum((x - mean(values)) ** 2 for values in (now, before) for x in values)
    variance = max(squares / (len(now) + len(before) - 2), least)
    difference = mean(now) - mean(before)
    if variance == 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / math.sqrt(variance * (1 / len(now) + 1 / len(before)))


# Reporting


@dataclass
class HealthMonitor:
    """
    Runs rules over the steps of a run and reports each fault twice: when it begins, and when it is over.

    Args:
        rules (`Sequence[Rule]`):
            The rules.
        facts ([`RunFacts`]):
            What they know of the run.
        open (`dict[str, int]`, *optional*):
            Faults that are not over, and the logged step, counted from 0, in which each was last seen.

    Attributes:
        window (`list[dict]`): the steps that rules see, at most 320 however long the run is: the first 64 and the
            last 128, and between them rollout batches, evenly over the run.
        count (`int`): logged steps so far.
    """

    rules: Sequence[Rule]
    facts: RunFacts
    open: dict[str, int] = field(default_factory=dict)
    window: list[JSONObject] = field(default_factory=list, init=False)
    count: int = field(default=0, init=False)
    _left: int = field(default=0, init=False)  # rollout batches that are no longer among the last steps
    _every: int = field(default=1, init=False)  # one in so many of them is kept

    def recall(self, steps: Iterable[JSONObject]) -> None:
        """
        Add the steps of a run that is resumed, without looking for faults.

        Args:
            steps (`Iterable[dict]`):
                Metrics of its logged training steps, oldest first.
        """
        for metrics in steps:
            self._remember(metrics)

    def _remember(self, metrics: JSONObject) -> None:
        self.window.append(metrics)
        self.count += 1
        if len(self.window) <= _FIRST + _LAST:
            return
        is_batch = self.window[-_LAST - 1].get("reward") is not None
        self._left += is_batch
        if not is_batch or self._left % self._every:
            del self.window[-_LAST - 1]
        elif len(self.window) > _FIRST + _MIDDLE + _LAST:
            self.window[_FIRST:-_LAST] = self.window[_FIRST:-_LAST][1::2]
            self._every *= 2

    def step(self, metrics: JSONObject) -> list[JSONObject]:
        """
        Add a logged training step and look for faults.

        Args:
            metrics (`dict`):
                Its metrics, with `step`.

        Returns:
            `list[dict]`: lines for `health.jsonl`: faults that begin (`level` `"warning"` or `"error"`) and faults
            that are over (`level` `"ok"`).
        """
        self._remember(metrics)
        lines = []
        for rule in self.rules:
            finding = rule.check(self.window, self.facts)
            line = {"step": metrics["step"], "rule": rule.name, "level": rule.level if finding else "ok"}
            if finding is not None:
                if rule.name not in self.open:
                    lines.append({**line, **asdict(finding)})
                self.open[rule.name] = self.count
            elif rule.name in self.open and self.count - self.open[rule.name] >= RECOVERED:
                del self.open[rule.name]
                lines.append(line)
        return lines


def still_open(lines: Iterable[JSONObject]) -> list[str]:
    """
    Return the faults that were not over at the end of a `health.jsonl`.

    Args:
        lines (`Iterable[dict]`):
            Its lines.
    """
    last = {line["rule"]: line.get("level") for line in lines if "rule" in line}
    return [rule for rule, level in last.items() if level != "ok"]
