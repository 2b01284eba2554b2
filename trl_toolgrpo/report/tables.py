"""The tables of the page: tools, settings, and two runs side by side."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..types import JSONObject, JSONValue
from .folder import RunFolder
from .page_data import RunData
from .tools import count_calls, from_metrics
from .verdict import edges


COMPARED = ("rollout/tokens_per_second", "tools/failure_frequency", "completions/clipped_ratio")
"""Metrics that a comparison puts side by side, after the rewards of training and of each evaluation set."""


@dataclass(frozen=True)
class Table:
    """
    A table.

    Args:
        label (`str`):
            What it is, for screen readers.
        head (`Sequence[str]`):
            Names of the columns.
        rows (`list[list[str]]`):
            Texts of each row; the first names it.
        caption (`str`, *optional*):
            Text above it.
    """

    label: str
    head: Sequence[str]
    rows: list[list[str]]
    caption: str = ""


def tool_table(run: RunFolder, data: RunData) -> Table | None:
    """
    Return the table of the tools of a run; `None` if no call is on record.

    Args:
        run ([`RunFolder`]):
            The run.
        data ([`RunData`]):
            Its rollouts; without any, the logged metrics are used.
    """
    figures = count_calls(data.calls) if data.rows else from_metrics(run.metrics)
    caption = f"{run.name}: {f'counted over {len(data.rows)} rollouts' if data.rows else 'from the logged metrics'}."
    if rewards := data.without_calls:
        caption += f" {len(rewards)} rollouts without a call have a mean reward of {sum(rewards) / len(rewards):.3g}."
    head = ("tool", "calls", "share", "failed", "failures", "cut", "p50", "p95", "mean reward")
    total = figures["calls"].sum() or 1
    rows = [
        [
            str(tool.Index),
            f"{tool.calls:.0f}",
            f"{tool.calls / total:.0%}",
            f"{tool.failed / tool.calls:.1%}" if tool.calls else "",
            tool.failures,
            f"{tool.truncated:.0f}" if tool.truncated else "",
            _seconds(tool.p50),
            _seconds(tool.p95),
            "" if math.isnan(tool.reward) else f"{tool.reward:.3g}",
        ]
        for tool in figures.itertuples()
    ]
    return Table(f"Tools of {run.name}", head, rows, caption) if rows else None


def _seconds(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def settings_table(runs: Sequence[RunFolder]) -> Table | None:
    """
    Return the settings of a run, or those in which several runs differ; `None` if nothing is known of them.

    Args:
        runs (`Sequence[RunFolder]`):
            The runs.
    """
    flat = [_flat(run.settings) for run in runs]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    if not names:
        return None
    rows = [[name, *(settings.get(name, "default") for settings in flat)] for name in names]
    if len(runs) > 1:
        rows = [row for row in rows if len(set(row[1:])) > 1]
    label = "Settings that differ" if len(runs) > 1 else "Settings"
    return Table(label, ["setting", *(run.name for run in runs)], rows)


def _flat(settings: JSONObject) -> dict[str, str]:
    """Return settings as names and short texts, those of the configuration and the versions by their own names."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found.update({inner: _short(item) for inner, item in value.items()})
        elif name != "version":
            found[name] = " ".join(map(str, value)) if name == "command" and isinstance(value, list) else _short(value)
    return found


def _short(value: JSONValue) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 300 else f"{text[:300]}..."


def comparison_table(runs: Sequence[RunFolder]) -> Table | None:
    """
    Return the main figures at the beginning and the end of several runs, side by side.

    Args:
        runs (`Sequence[RunFolder]`):
            The runs.
    """
    rows = []
    held_out = dict.fromkeys(f"{prefix}reward" for run in runs for prefix, _ in run.evaluations())
    for metric in ("reward", *held_out, *COMPARED):
        found = [edges(run.curve(metric)[1]) for run in runs]
        if any(found):
            rows.append([metric, *("" if ends is None else f"{ends[0]:.3g} → {ends[1]:.3g}" for ends in found)])
    if len(runs) < 2 or not rows:
        return None
    head = ["figure", *(run.name for run in runs)]
    return Table("Comparison", head, rows, "Mean of the first and of the last few logged steps.")
