"""Health rules: what a rule is, what it is told, and when what it finds is said.

Owns `Rule`, `RunFacts`, the reading of a window of metrics, and `HealthMonitor`, which says each fault once. The
rules are in `health_updates.py` and `health_rollouts.py`; fed by `health_watch.py` with the metrics of logged steps.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


Window = Sequence[dict[str, Any]]
"""Metrics of the logged training steps of a run, oldest first, each with its `step`."""

RECOVERED = 5
"""Steps without a finding after which a fault is over."""


@dataclass(frozen=True)
class RunFacts:
    """
    What a rule has to know of a run beside its metrics.

    Args:
        logprob_tolerance (`float`, *optional*, defaults to `1e-3`):
            Mean difference in nats that rounding explains between recorded and recomputed log-probs.
        dtype (`str`, *optional*, defaults to `"float32"`):
            What the policy computes in.
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
    """

    logprob_tolerance: float = 1e-3
    dtype: str = "float32"
    steps_per_batch: int = 1
    policy_from: int = 0
    sync_steps: int | None = None
    copies_policy: bool = True
    max_grad_norm: float = 1.0

    @property
    def low_precision(self) -> bool:
        """Whether the policy computes in bfloat16 or float16."""
        return self.dtype in ("bfloat16", "float16")

    @property
    def rounding_spread(self) -> float:
        """Standard deviation of the ratio that rounding explains: differences of log-probs are about normal."""
        return 1.5 * self.logprob_tolerance


@dataclass(frozen=True)
class Finding:
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
            `check(window, facts)` gives a [`Finding`], or `None` where there is none.
        level (`str`, *optional*, defaults to `"warning"`):
            `"error"` where every further update is wasted or wrong.
    """

    name: str
    check: Callable[[Window, RunFacts], Finding | None]
    level: str = "warning"


# Reading a window


def latest(window: Window, name: str, count: int) -> list[float]:
    """The last `count` finite values of a metric, oldest first; fewer where there are not as many."""
    found: list[float] = []
    for entry in reversed(window):
        value = entry.get(name)
        if value is not None and math.isfinite(value):
            found.append(value)
            if len(found) == count:
                break
    return found[::-1]


def earliest(window: Window, name: str, count: int) -> list[float]:
    """The first `count` finite values of a metric."""
    found: list[float] = []
    for entry in window:
        value = entry.get(name)
        if value is not None and math.isfinite(value):
            found.append(value)
            if len(found) == count:
                break
    return found


def mean(values: Sequence[float]) -> float:
    """Mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def trained(window: Window, facts: RunFacts) -> Window:
    """The steps with a policy gradient."""
    return [entry for entry in window if entry["step"] > facts.policy_from and "forced/loss" not in entry]


def batches(window: Window, count: int | None = None) -> Window:
    """The steps in which a rollout batch was generated; the last `count` of them."""
    found = [entry for entry in window if entry.get("reward") is not None]
    return found if count is None else found[-count:]


def improved(window: Window) -> bool:
    """Whether reward is clearly above where it began, so that a policy that has settled is no fault."""
    first, last = earliest(window, "reward", 3), latest(window, "reward", 3)
    spread = max(earliest(window, "reward_std", 3), default=0.0)
    return bool(first) and mean(last) - mean(first) > max(0.3 * spread, 1e-6)


# Saying it


@dataclass
class HealthMonitor:
    """
    Runs rules over the steps of a run and says each fault once, when it begins and when it is over.

    Args:
        rules (`Sequence[Rule]`):
            The rules.
        facts ([`RunFacts`]):
            What they are told.
        window (`list[dict]`, *optional*):
            Steps before this one, of a run that goes on.
        open (`dict[str, int]`, *optional*):
            Faults that were not over yet, and the step in which each was last seen.
    """

    rules: Sequence[Rule]
    facts: RunFacts
    window: list[dict[str, Any]] = field(default_factory=list)
    open: dict[str, int] = field(default_factory=dict)

    def step(self, metrics: dict[str, Any]) -> list[dict[str, Any]]:
        """
        Take in a logged training step.

        Args:
            metrics (`dict`):
                Its metrics, with `step`.

        Returns:
            `list[dict]`: lines for `health.jsonl`: faults that begin (`level` `"warning"` or `"error"`) and faults
            that are over (`level` `"ok"`).
        """
        self.window.append(metrics)
        step, said = metrics["step"], []
        for rule in self.rules:
            finding = rule.check(self.window, self.facts)
            if finding is not None:
                if rule.name not in self.open:
                    said.append(
                        {
                            "step": step,
                            "rule": rule.name,
                            "level": rule.level,
                            "value": finding.value,
                            "threshold": finding.threshold,
                            "message": finding.message,
                        }
                    )
                self.open[rule.name] = len(self.window)
            elif rule.name in self.open and len(self.window) - self.open[rule.name] >= RECOVERED:
                del self.open[rule.name]
                said.append({"step": step, "rule": rule.name, "level": "ok"})
        return said


def still_open(lines: Iterable[dict[str, Any]]) -> list[str]:
    """
    Faults that were not over at the end of a `health.jsonl`.

    Args:
        lines (`Iterable[dict]`):
            Its lines.
    """
    last = {line["rule"]: line.get("level") for line in lines if "rule" in line}
    return [rule for rule, level in last.items() if level != "ok"]
