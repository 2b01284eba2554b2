"""The page: one HTML file with everything in it, which requests nothing from the network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from . import curves
from .folder import RunFolder, read_folder
from .page_data import FIELDS, JSON_OPTIONS, RunData, collect_rollouts
from .tables import comparison_table, settings_table, tool_table
from .verdict import judge
from .vocabulary import Vocabulary, load_tokenizer


MAX_MEGABYTES = 30.0
MARGIN = 0.98
"""Share of the size that is filled, since the table of tools is not known before."""


@dataclass
class ReportPage:
    """
    A finished report.

    Args:
        html (`str`):
            The page.
        runs (`list[RunFolder]`):
            The runs it is about, with what could not be read.
        shown, total (`int`):
            Rollouts whose tokens are in the page, and rollouts in the logs.
    """

    html: str
    runs: list[RunFolder]
    shown: int
    total: int


def build_report(folders: Sequence[str | Path], max_megabytes: float = MAX_MEGABYTES) -> ReportPage:
    """
    Read the output folders of one run, or of several to compare, and make the page.

    Args:
        folders (`Sequence[str | Path]`):
            Output folders.
        max_megabytes (`float`, *optional*, defaults to `30.0`):
            Size of the page. If the rollouts do not fit, the page lists them and holds the tokens of some, spread
            evenly over the run, and says so.

    Raises:
        ReportError: if a folder does not exist.
    """
    runs = [read_folder(folder) for folder in folders]
    vocabularies = [Vocabulary(load_tokenizer(run.path, run.problems) if run.rollouts else None) for run in runs]
    shell = _render(runs, [RunData(vocabulary) for vocabulary in vocabularies])
    room = int(MARGIN * max_megabytes * 1e6) - len(shell.encode())
    collected = [
        collect_rollouts(run.rollouts, vocabulary, room // len(runs), run.problems)
        for run, vocabulary in zip(runs, vocabularies, strict=True)
    ]
    page = _render(runs, collected)
    return ReportPage(page, runs, sum(data.shown for data in collected), sum(data.total for data in collected))


def _render(runs: Sequence[RunFolder], collected: Sequence[RunData]) -> str:
    """Make the page, after the rollouts were read, since that may have found more problems."""
    loader = jinja2.PackageLoader(__package__, "template")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.policies["json.dumps_kwargs"] = JSON_OPTIONS
    both = list(zip(runs, collected, strict=True))
    first, rest = curves.panels(runs)
    data = {
        "fields": FIELDS,
        "runs": [
            {"name": run.name, "texts": part.vocabulary.texts, "prompts": list(part.prompts), "rows": part.rows}
            for run, part in both
        ],
    }
    return environment.get_template("page.html").render(
        title=" and ".join(run.name for run in runs),
        runs=[(run, judge(run), part) for run, part in both],
        comparison=comparison_table(runs),
        settings=settings_table(runs),
        panels=first,
        folded=rest,
        chart=curves,
        tools=[(run.name, tool_table(run, part)) for run, part in both],
        whole=all(part.shown == len(part.rows) for part in collected),
        data=data,
    )
