"""Curves as SVG: one small panel for each metric, readable without a script.

Some metrics are shown first; `template/curves.js` adds the values under the pointer.
"""

import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..curve_noise import is_flat


FIRST = (
    "reward", "reward_std", "frac_reward_zero_std", "loss", "grad_norm", "entropy", "kl", "ratio/mean", "ratio/std",
    "sampling/logp_diff_max", "forced/fraction", "value/loss", "value/explained_variance", "ref/syncs",
    "tools/call_frequency", "tools/failure_frequency", "tools/malformed_calls", "rollout/turns_mean",
    "completions/mean_length", "completions/clipped_ratio", "rollout/tokens_per_second", "step_time",
)  # fmt: skip
"""Metrics that are shown at once, in this order; the others are folded away."""
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 320, 140, 56, 6, 18, 8
POINTS = 400
"""Most points of a line; of more, the lowest and highest of neighbouring ones are drawn."""

_ROOM = 8  # characters of a number that fit to the left of a panel

Place = Callable[[float, float], str]
"""Where in a panel the value of a step is, as `x,y`."""


@dataclass(frozen=True)
class Line:
    """
    One line of a panel.

    Args:
        label (`str`):
            Run it is of.
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


def panel(metric: str, lines: Sequence[Line]) -> str:
    """
    A metric as a figure with its name, its last values and its curves.

    Args:
        metric (`str`):
            Its name.
        lines (`Sequence[Line]`):
            Curves of each run.

    Returns:
        `str`: HTML.
    """
    points = [p for line in lines for p in zip(line.steps, line.values, strict=True) if math.isfinite(p[1])]
    latest = " ".join(
        f'<span class="last run{line.run}">{_number(line.values[-1])}</span>' for line in lines if line.kind == "train"
    )
    title = (
        f'<figcaption><span class="metric">{html.escape(metric)}</span> {latest}'
        f'<span class="at" hidden></span></figcaption>'
    )
    if not points:
        return f'<figure class="panel">{title}<p class="none">no finite value was logged</p></figure>'
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min(ys), max(ys)
    flat = is_flat(low, high, metric)
    if flat:
        low, high = _around((low + high) / 2)
    first, last = min(xs), max(xs)

    def at(step: float, value: float) -> str:
        value = (low + high) / 2 if flat else value
        x = LEFT + (WIDTH - LEFT - RIGHT) * ((step - first) / (last - first) if last > first else 0.5)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low))
        return f"{x:.1f},{y:.1f}"

    ends = low, (low + high) / 2, high
    heights = (HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2, TOP)
    grid = "".join(_gridline(y, label) for y, label in zip(heights, _labels(ends), strict=True))
    steps = f'<text x="{LEFT}" y="{HEIGHT - 4}">{_number(first)}</text>' + (
        f'<text class="end" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}">step {_number(last)}</text>' if last > first else ""
    )
    drawn = "".join(_points(line, at) if line.kind == "eval" else _polylines(line, at) for line in lines)
    label = html.escape(f"{metric}: {'; '.join(_in_words(line) for line in lines)}", quote=True)
    return (
        f'<figure class="panel" data-metric="{html.escape(metric, quote=True)}" '
        f'data-x="{first} {last} {LEFT} {WIDTH - RIGHT} {WIDTH}">{title}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{grid}{steps}{drawn}</svg></figure>'
    )


def _polylines(line: Line, at: Place) -> str:
    """A line with a gap where values are not finite; a point alone is drawn as one."""
    steps, values = thin(np.asarray(line.steps, float), np.asarray(line.values, float), POINTS)
    parts: list[list[str]] = [[]]
    for step, value in zip(steps.tolist(), values.tolist(), strict=True):
        if math.isfinite(value):
            parts[-1].append(at(step, value))
        elif parts[-1]:
            parts.append([])
    drawn = []
    for part in parts:
        if len(part) == 1:
            x, y = part[0].split(",")
            drawn.append(f'<circle class="run{line.run}" cx="{x}" cy="{y}" r="2"/>')
        elif part:
            drawn.append(f'<polyline class="run{line.run}" points="{" ".join(part)}"/>')
    return "".join(drawn)


def _points(line: Line, at: Place) -> str:
    drawn = []
    for step, value in zip(line.steps, line.values, strict=True):
        if math.isfinite(value):
            x, y = at(step, value).split(",")
            drawn.append(f'<circle class="eval run{line.run}" cx="{x}" cy="{y}" r="3.5"/>')
    return "".join(drawn)


def _gridline(y: float, label: str) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="end" x="{LEFT - 4}" y="{y + 3:.1f}">{label}</text>'
    )


def _labels(values: Sequence[float]) -> list[str]:
    """Numbers beside a panel: with as many digits as tell them apart, and few enough to have room there."""
    labels = [_number(value) for value in values]
    for digits in range(4, 8):
        if len(set(labels)) == len(labels):
            break
        finer = [_number(value, digits) for value in values]
        if max(map(len, finer)) > _ROOM:
            break
        labels = finer
    return labels


def thin(steps: np.ndarray, values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """
    At most about `most` points of a curve, with the lowest and the highest of those that are left out.

    Args:
        steps, values (`np.ndarray`):
            The curve, shape (n,).
        most (`int`):
            Points wanted.
    """
    if len(steps) <= most:
        return steps, values
    kept: set[int] = {0, len(steps) - 1}
    for part in np.array_split(np.arange(len(steps)), most // 2):
        finite = part[np.isfinite(values[part])]
        kept |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])} if len(finite) else set()
        kept |= {int(x) for x in part[~np.isfinite(values[part])][:1]}
    chosen = np.array(sorted(kept))
    return steps[chosen], values[chosen]


def _around(value: float) -> tuple[float, float]:
    margin = abs(value) * 0.1 or 1.0
    return value - margin, value + margin


def _in_words(line: Line) -> str:
    known = [(step, value) for step, value in zip(line.steps, line.values, strict=True) if math.isfinite(value)]
    what = f"{line.label}{', evaluations' if line.kind == 'eval' else ''}"
    if not known:
        return f"{what} no finite value"
    values = [value for _, value in known]
    return (
        f"{what} {_number(values[0])} at step {_number(known[0][0])}, {_number(values[-1])} at step "
        f"{_number(known[-1][0])}, lowest {_number(min(values))}, highest {_number(max(values))}"
    )


def _number(value: float, digits: int = 3) -> str:
    """A number in as few characters as tell it."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e5:
        return str(int(value))
    if 1000 <= abs(value) < 1e5:
        return f"{value:.{max(0, digits - 4)}f}"
    text = f"{value:.{digits - 2}e}" if 0 < abs(value) < 1e-3 else f"{value:.{digits}g}"
    return re.sub(r"e([+-])0*", lambda match: "e-" if match[1] == "-" else "e", text)
