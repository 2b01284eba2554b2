"""Curves as small panels, one for each metric, readable without a script.

Here it is decided what is drawn where; `template/page.html` has the SVG, and `template/curves.js` adds the values
under the pointer. A plotting library would take longer to import than the whole page takes to make, and would bring
no color schemes for light and dark.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..monitoring.curve_noise import is_flat
from .folder import RunFolder


FIRST = (
    "reward", "reward_std", "frac_reward_zero_std", "loss", "grad_norm", "entropy", "kl", "ratio/mean", "ratio/std",
    "sampling/logp_diff_max", "forced/fraction", "value/loss", "value/explained_variance", "ref/syncs",
    "tools/call_frequency", "tools/failure_frequency", "tools/malformed_calls", "rollout/turns_mean",
    "completions/mean_length", "completions/clipped_ratio", "rollout/tokens_per_second", "step_time",
)  # fmt: skip
"""Metrics that are shown at once, in this order; the others are folded away."""
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 320, 140, 56, 314, 122, 8
"""Size of a panel, and where its curves end, in pixels."""
POINTS = 600
"""Number of points of a line above which only the lowest and highest of neighbouring points are kept."""

_ROOM = 8  # characters of a number that fit to the left of a panel


@dataclass(frozen=True)
class Line:
    """
    One line of a panel.

    Args:
        label (`str`):
            Run it belongs to.
        steps, values (`Sequence[float]`):
            Points; values that are not finite are gaps.
        kind (`str`):
            `"train"`, a line, or `"eval"`, points.
        run (`int`):
            Number of the run, which gives the color.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    kind: str = "train"
    run: int = 0

    @property
    def points(self) -> list[tuple[float, float]]:
        """Points to draw, as step and value."""
        fewer = thin(np.asarray(self.steps, float), np.asarray(self.values, float), POINTS)
        return list(zip(*(axis.tolist() for axis in fewer), strict=True))


@dataclass(frozen=True)
class Panel:
    """
    What is drawn of a metric.

    Args:
        metric (`str`):
            Its name.
        latest (`list[tuple[int, str]]`):
            Number of each run, and its last value.
        summary (`str`, *optional*):
            The curves in words, for screen readers.
        steps (`tuple[float, float]`, *optional*):
            First and last step.
        ends (`tuple[str, str]`, *optional*):
            Labels below the panel: the first step and, if it differs, the last.
        grid (`list[tuple[float, str]]`, *optional*):
            Height and label of each horizontal line; none if there is nothing to draw.
        paths (`list[tuple[str, int, str]]`, *optional*):
            Kind, number of the run and SVG path of each line.
        values (`list`, *optional*):
            Points of each training line as steps and values, for the pointer.
    """

    metric: str
    latest: list[tuple[int, str]]
    summary: str = ""
    steps: tuple[float, float] = (0.0, 0.0)
    ends: tuple[str, str] = ("", "")
    grid: list[tuple[float, str]] = field(default_factory=list)
    paths: list[tuple[str, int, str]] = field(default_factory=list)
    values: list[list[tuple[float, float | None]]] = field(default_factory=list)


def panels(runs: Sequence[RunFolder]) -> tuple[list[Panel], list[Panel]]:
    """
    Return the panels that are shown at once, and those that are folded away.

    Args:
        runs (`Sequence[RunFolder]`):
            The runs, each with a color of its own.
    """
    lines: dict[str, list[Line]] = {}
    for number, run in enumerate(runs):
        for name in run.metric_names():
            metric = run.metric_of(name)
            prefix = name.removesuffix(metric)
            held_out = dict(run.evaluations()).get(prefix)
            label = f"{run.name}, {held_out}" if held_out else run.name
            line = Line(label, *run.curve(name), kind="eval" if prefix else "train", run=number)
            lines.setdefault(metric, []).append(line)
    first = [name for name in FIRST if name in lines]
    rest = [name for name in lines if name not in FIRST]
    return [panel(name, lines[name]) for name in first], [panel(name, lines[name]) for name in rest]


def panel(metric: str, lines: Sequence[Line]) -> Panel:
    """
    Place the curves of a metric in a panel.

    Args:
        metric (`str`):
            Its name.
        lines (`Sequence[Line]`):
            Curves of each run.
    """
    trained = [line for line in lines if line.kind == "train"]
    latest = [(line.run, _number(line.values[-1])) for line in trained]
    known = [p for line in lines for p in zip(line.steps, line.values, strict=True) if math.isfinite(p[1])]
    if not known:
        return Panel(metric, latest)
    steps, values = zip(*known, strict=True)
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    flat = is_flat(low, high, metric)
    if flat:
        middle = (low + high) / 2
        margin = abs(middle) * 0.1 or 1.0
        low, high = middle - margin, middle + margin

    def path(line: Line) -> str:
        drawn, joined = "", False
        for step, value in line.points:
            if math.isfinite(value):
                across = (step - first) / (last - first) if last > first else 0.5
                up = 0.5 if flat else (value - low) / (high - low)
                x, y = LEFT + (RIGHT - LEFT) * across, BOTTOM - (BOTTOM - TOP) * up
                drawn += f"L{x:.1f},{y:.1f}" if joined else f"M{x:.1f},{y:.1f}h0"  # h0 makes a dot of a point alone
            joined = math.isfinite(value) and line.kind == "train"
        return drawn

    return Panel(
        metric,
        latest,
        summary=f"{metric}: {'; '.join(map(_summary, lines))}",
        steps=(first, last),
        ends=(_number(first), f"step {_number(last)}" if last > first else ""),
        grid=list(zip((BOTTOM, (TOP + BOTTOM) / 2, TOP), _labels((low, (low + high) / 2, high)), strict=True)),
        paths=[(line.kind, line.run, path(line)) for line in lines],
        values=[[(x, float(f"{y:.5g}") if math.isfinite(y) else None) for x, y in line.points] for line in trained],
    )


def _labels(values: Sequence[float]) -> list[str]:
    """Return numbers next to a panel, with enough digits to tell them apart if there is room for them."""
    choices = [[_number(value, digits) for value in values] for digits in range(3, 8)]
    fitting = [labels for labels in choices if max(map(len, labels)) <= _ROOM] or choices[:1]
    return next((labels for labels in fitting if len(set(labels)) == len(labels)), fitting[-1])


def thin(steps: np.ndarray, values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Return at most about `most` points of a curve, with the lowest and the highest of those that are left out.

    Args:
        steps, values (`np.ndarray`):
            The curve, shape (n,).
        most (`int`):
            Points wanted.
    """
    if len(steps) <= most:
        return steps, values
    kept = {0, len(steps) - 1}
    for part in np.array_split(np.arange(len(steps)), most // 2):
        finite = np.isfinite(values[part])
        lows, highs = (np.where(finite, values[part], limit) for limit in (np.inf, -np.inf))
        kept |= {int(part[place]) for place in (lows.argmin(), highs.argmax(), finite.argmin())}  # the last is a gap
    chosen = sorted(kept)
    return steps[chosen], values[chosen]


def _summary(line: Line) -> str:
    known = [(value, step) for step, value in zip(line.steps, line.values, strict=True) if math.isfinite(value)]
    name = f"{line.label}{', evaluations' if line.kind == 'eval' else ''}"
    if not known:
        return f"{name} no finite value"
    first, last = (f"{_number(value)} at step {_number(step)}" for value, step in (known[0], known[-1]))
    return f"{name} {first}, {last}, lowest {_number(min(known)[0])}, highest {_number(max(known)[0])}"


def _number(value: float, digits: int = 3) -> str:
    """Write a number in few characters."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e5:
        return str(int(value))
    if 1000 <= abs(value) < 1e5:
        return f"{value:.{max(0, digits - 4)}f}"
    text = f"{value:.{digits - 2}e}" if 0 < abs(value) < 1e-3 else f"{value:.{digits}g}"
    return re.sub(r"e([+-])0*", lambda match: "e-" if match[1] == "-" else "e", text)
