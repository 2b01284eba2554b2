"""The parts of the page that need no script: verdict, problems, tool table, settings, the panels of curves.

Owns their HTML; everything that a run wrote is escaped. Fed by the readers; put together by `page.py`.
"""

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from .curves import FIRST, Line, panel
from .folder import RunFolder
from .tools import ToolFigures, ToolStatistics
from .verdict import Finding, Verdict, edges


MARKS = {"ok": "✓", "warning": "!", "error": "✕", "unknown": "?"}
COMPARED = ("rollout/tokens_per_second", "tools/failure_frequency", "completions/clipped_ratio")
"""Metrics that a comparison puts side by side, after the rewards of training and of each evaluation set."""


def verdict_html(run: RunFolder, verdict: Verdict, number: int, several: bool) -> str:
    """The verdict on one run, with what its health rules said."""
    name = f'<span class="run-name run{number}">{_text(run.name)}</span> ' if several else ""
    said = "".join(f"<li>{_text(sentence)}</li>" for sentence in verdict.sentences)
    findings = "".join(map(_finding, verdict.findings))
    findings = f'<ul class="findings">{findings}</ul>' if findings else ""
    return (
        f'<section class="verdict {verdict.level}" aria-label="Verdict">'
        f'<h2><span class="mark" aria-hidden="true">{MARKS[verdict.level]}</span> {name}{_text(verdict.headline)}</h2>'
        f"{findings}<ul>{said}</ul></section>"
    )


def _finding(finding: Finding) -> str:
    span = f"step {finding.first}" if finding.first == finding.last else f"steps {finding.first} to {finding.last}"
    times = f", {finding.times} times" if finding.times > 1 else ""
    over = "" if finding.recovered is None else f", recovered at step {finding.recovered}"
    state = finding.level if finding.recovered is None else "recovered"
    return (
        f'<li class="{_text(state)}"><strong>{_text(state)}: {_text(finding.rule)}</strong> '
        f"({_text(span + times + over)}) <span>{_text(finding.message)}</span></li>"
    )


def problems_html(problems: Sequence[str]) -> str:
    """What could not be read."""
    if not problems:
        return ""
    items = "".join(f"<li>{_text(problem)}</li>" for problem in problems)
    return f'<section class="problems" role="note" aria-label="What could not be read"><ul>{items}</ul></section>'


def curves_html(runs: Sequence[RunFolder]) -> str:
    """The panels of all metrics: those of [`FIRST`], then the rest folded away."""
    names = list(dict.fromkeys(name for run in runs for name in run.metric_names()))
    trained = [name for name in names if not name.startswith("eval_")]
    evaluated = [run.metric_of(name) for run in runs for name in run.metric_names() if name.startswith("eval_")]
    trained = list(dict.fromkeys([*trained, *evaluated]))
    first = [name for name in FIRST if name in trained]
    rest = [name for name in trained if name not in first]
    if not trained:
        return '<p class="none">No figures were logged, so there are no curves.</p>'
    shown = "".join(panel(name, _lines(runs, name)) for name in first)
    folded = "".join(panel(name, _lines(runs, name)) for name in rest)
    more = f'<details><summary>{len(rest)} more</summary><div class="panels">{folded}</div></details>' if rest else ""
    return f'<div class="panels">{shown}</div>{more}'


def _lines(runs: Sequence[RunFolder], metric: str) -> list[Line]:
    lines = []
    for number, run in enumerate(runs):
        sets = [("eval", prefix, name) for prefix, name in run.evaluations()]
        for kind, prefix, name in [("train", "", ""), *sets]:
            steps, values = run.curve(f"{prefix}{metric}")
            if steps:
                label = f"{run.name}, {name}" if name else run.name
                lines.append(Line(label, steps, values, kind, number))
    return lines


def tools_html(run: RunFolder, statistics: ToolStatistics, note: str) -> str:
    """The table of tools of one run."""
    if not statistics.tools:
        return f'<p class="none">{_text(run.name)}: no tool call is on record.</p>'
    total = sum(tool.calls for tool in statistics.tools.values()) or 1
    rows = sorted(statistics.tools.items(), key=lambda item: -item[1].calls)
    body = "".join(_tool_row(name, tool, total) for name, tool in rows)
    columns = ("tool", "calls", "share", "failed", "failures", "cut", "p50", "p95", "mean reward")
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    if statistics.without_calls:
        mean = sum(statistics.without_calls) / len(statistics.without_calls)
        count = len(statistics.without_calls)
        note += f" {count} rollouts without a call have a mean reward of {mean:.3g}."
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Tools of {_text(run.name)}"><table>'
        f"<caption>{_text(note)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _tool_row(name: str, tool: ToolFigures, total: float) -> str:
    failures = ", ".join(f"{kind} {count:g}" for kind, count in tool.failures.most_common() if count)
    cells = [
        f"{tool.calls:.0f}",
        f"{tool.calls / total:.0%}",
        f"{tool.failed / tool.calls:.1%}" if tool.calls else "",
        failures,
        f"{tool.truncated:.0f}" if tool.truncated else "",
        _seconds(tool.latency(50)),
        _seconds(tool.latency(95)),
        "" if tool.mean_reward() is None else f"{tool.mean_reward():.3g}",
    ]
    return _row(name, cells)


def _row(name: str, cells: Sequence[str]) -> str:
    inner = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
    return f'<tr><th scope="row">{_text(name)}</th>{inner}</tr>'


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def settings_html(runs: Sequence[RunFolder]) -> str:
    """Settings of the runs, folded away; of two runs those that differ, open."""
    flat = [_flat(run.settings) for run in runs]
    if not any(flat):
        return ""
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    if len(runs) > 1:
        names = [name for name in names if len({settings.get(name) for settings in flat}) > 1]
        if not names:
            return '<p class="none">The settings of the runs do not differ.</p>'
    head = "".join(f'<th scope="col">{_text(run.name)}</th>' for run in runs)
    body = "".join(_row(name, [settings.get(name, "default") for settings in flat]) for name in names)
    what, opened = ("Settings that differ", " open") if len(runs) > 1 else ("Settings", "")
    return (
        f'<details{opened}><summary>{what}</summary><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{what}"><table class="settings"><thead><tr><th scope="col">setting</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
    )


def _flat(settings: dict[str, Any]) -> dict[str, str]:
    """Settings as names and short texts, those of the configuration and the versions by their own names."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found.update({inner: _short(item) for inner, item in value.items()})
        elif name not in ("version",):
            found[name] = " ".join(map(str, value)) if name == "command" and isinstance(value, list) else _short(value)
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 300 else f"{text[:300]}..."


def comparison_html(runs: Sequence[RunFolder]) -> str:
    """Begin and end of the main figures of two runs, side by side."""
    rows = []
    held_out = list(dict.fromkeys(f"{prefix}reward" for run in runs for prefix, _ in run.evaluations()))
    for metric in ("reward", *held_out, *COMPARED):
        found = [edges(run.curve(metric)[1]) for run in runs]
        if any(found):
            rows.append(_row(metric, ["" if ends is None else f"{ends[0]:.3g} → {ends[1]:.3g}" for ends in found]))
    if not rows:
        return ""
    head = "".join(
        f'<th scope="col" class="run-name run{number}">{_text(run.name)}</th>' for number, run in enumerate(runs)
    )
    caption = "Mean of the first and of the last few logged steps."
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Comparison"><table><caption>{caption}</caption>'
        f'<thead><tr><th scope="col">figure</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def joined(parts: Iterable[str]) -> str:
    """Parts of a page, one behind the other."""
    return "\n".join(part for part in parts if part)


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)
