"""The command line of the report.

    python -m trl_toolgrpo.report <output_dir> [--out report.html]
    python -m trl_toolgrpo.report --compare A B

The exit code is 0 if there is something to show, and 1 if not.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import ReportError
from ..run_folder.files import replace_text
from .page import MAX_MEGABYTES, build_report


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """
    Read the command line.

    Args:
        arguments (`Sequence[str]`):
            The command line without the program.
    """
    parser = argparse.ArgumentParser(
        prog="python -m trl_toolgrpo.report",
        description="Make one self-contained HTML file of a run.",
        allow_abbrev=False,
    )
    runs = parser.add_mutually_exclusive_group(required=True)
    runs.add_argument("output_dir", nargs="?", type=Path, help="output folder of a run")
    runs.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="output folders of two runs")
    parser.add_argument("--out", type=Path, help="file to write; in the folder: report.html; for two runs, here")
    size = f"largest size in MB (default {MAX_MEGABYTES:g})"
    parser.add_argument("--max_size", type=float, default=MAX_MEGABYTES, help=size)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Make the report.

    Args:
        arguments (`Sequence[str]`, *optional*):
            The command line without the program.

    Returns:
        `int`: the exit code.
    """
    given = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    folders = given.compare or [given.output_dir]
    out = given.out or (Path("comparison.html") if given.compare else given.output_dir / "report.html")
    try:
        report = build_report(folders, given.max_size)
        replace_text(out, report.html)
    except (ReportError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    for run in report.runs:
        for problem in run.problems:
            print(f"{run.name}: {problem}", file=sys.stderr)
    part = f", {report.shown} of them with tokens" if report.shown < report.total else ""
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {report.total} rollouts{part}")
    return 1 if all(run.empty for run in report.runs) else 0


if __name__ == "__main__":
    sys.exit(main())
