"""The page: one HTML file with everything in it, which asks nothing of the network.

Owns how the template, the parts and the packed rollouts become one file of bounded size. The template, its style and
its scripts are in `template/`.
"""

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from .curves import thin
from .folder import RunFolder, read_folder
from .html_parts import (
    comparison_html,
    curves_html,
    joined,
    problems_html,
    settings_html,
    tools_html,
    verdict_html,
)
from .packing import PackedRun, pack_run
from .tools import from_metrics
from .verdict import judge
from .vocabulary import Vocabulary, load_tokenizer


MAX_MEGABYTES = 30.0
SCRIPTS = ("data.js", "filters.js", "list.js", "conversation.js", "curves.js", "main.js")
MARGIN = 0.98
"""Share of the size that is filled, since the tool table is not known before."""
CURVE_POINTS = 1000
"""Most points of a curve whose values are shown under the pointer."""


@dataclass
class Report:
    """
    A finished report.

    Args:
        html (`str`):
            The page.
        runs (`list[RunFolder]`):
            What it is about, with what could not be read.
        shown, total (`int`):
            Rollouts in the page and in the logs.
    """

    html: str
    runs: list[RunFolder]
    shown: int
    total: int


def build_report(folders: Sequence[str | Path], max_megabytes: float = MAX_MEGABYTES) -> Report:
    """
    Read the output folders of one run, or of several to compare, and make the page.

    Args:
        folders (`Sequence[str | Path]`):
            Output folders.
        max_megabytes (`float`, *optional*, defaults to `30.0`):
            Size of the page. Where the rollouts do not fit, the page holds some, spread evenly over the run, and says
            so.

    Raises:
        ReportError: if a folder does not exist.
    """
    runs = [read_folder(folder) for folder in folders]
    tokenizers = [load_tokenizer(run.path, run.problems) if run.rollouts else None for run in runs]
    vocabularies = [Vocabulary(tokenizer) for tokenizer in tokenizers]
    fixed = {
        "title": _escaped(" and ".join(run.name for run in runs)),
        "curves": curves_html(runs),
        "points": _json([_curve_points(run) for run in runs]),
    }
    places = ("tools", "coverage", "data", "chunks")
    shell = _fill_template({**fixed, "summary": _summary(runs), **dict.fromkeys(places, "")})
    room = int(MARGIN * max_megabytes * 1e6) - len(shell.encode())
    packed = [
        pack_run(run.rollouts, vocabulary, room // len(runs), vocabulary.tokenizer is None, run.problems)
        for run, vocabulary in zip(runs, vocabularies, strict=True)
    ]
    page = _fill_template({**fixed, **_rollout_parts(runs, packed, vocabularies)})
    return Report(page, runs, sum(part.shown for part in packed), sum(part.total for part in packed))


def _rollout_parts(
    runs: Sequence[RunFolder], packed: Sequence[PackedRun], vocabularies: Sequence[Vocabulary]
) -> dict[str, str]:
    """The parts of the page that are known when the rollouts are packed; they may have found more problems."""
    both = list(zip(runs, packed, strict=True))
    data = {
        "runs": [
            {"name": run.name, "index": vars(part.index), "sizes": part.sizes}
            | {"tokens": vocabulary.texts(), "ids": vocabulary.ids}
            for (run, part), vocabulary in zip(both, vocabularies, strict=True)
        ],
    }
    return {
        "summary": _summary(runs),
        "tools": joined(_tools(run, part) for run, part in both),
        "coverage": joined(_coverage(run, part) for run, part in both),
        "data": _json(data),
        "chunks": joined(
            f'<script type="text/plain" id="chunk-{number}-{place}">{chunk}</script>'
            for number, part in enumerate(packed)
            for place, chunk in enumerate(part.chunks)
        ),
    }


def _summary(runs: Sequence[RunFolder]) -> str:
    several = len(runs) > 1
    parts = []
    for number, run in enumerate(runs):
        parts += [verdict_html(run, judge(run), number, several), problems_html(run.problems)]
    return joined([*parts, comparison_html(runs) if several else "", settings_html(runs)])


def _tools(run: RunFolder, part: PackedRun) -> str:
    if part.tools.tools or part.tools.rollouts:
        return tools_html(run, part.tools, f"{run.name}: counted over {part.tools.rollouts} rollouts.")
    return tools_html(run, from_metrics(run.metrics), f"{run.name}: from the figures logged.")


def _coverage(run: RunFolder, part: PackedRun) -> str:
    """How many of the rollouts the page holds."""
    if not part.total:
        return f'<p class="none">{_escaped(run.name)}: no rollout log was found (rollouts/*.parquet).</p>'
    if part.shown == part.total:
        return ""
    return (
        f'<p class="note">{_escaped(run.name)}: {part.shown:,} of {part.total:,} rollouts are shown, spread evenly '
        f"over the run; all of them would be too much for one page, or could not be read.</p>"
    )


def _curve_points(run: RunFolder) -> dict[str, Any]:
    """Steps and values of each metric, for what is shown under the pointer."""
    found = {}
    for name in run.metric_names():
        steps, values = run.curve(name)
        fewer = thin(np.asarray(steps, float), np.asarray(values, float), CURVE_POINTS)
        found[name] = [[int(step) for step in fewer[0]], [float(f"{value:.5g}") for value in fewer[1]]]
    return {"name": run.name, "curves": found}


def _fill_template(parts: dict[str, str]) -> str:
    """The template with its places filled, in one pass, so that nothing a run wrote is taken for a place."""
    folder = resources.files(__package__) / "template"
    source = (folder / "page.html").read_text(encoding="utf-8")
    parts = {
        **parts,
        "style": (folder / "style.css").read_text(encoding="utf-8"),
        "script": joined((folder / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], source)


def _json(value: Any) -> str:
    """JSON that may stand in a script element: NaN is null, and no text can end the element."""
    text = json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)
