"""The command line of the doctor.

    python -m trl_toolgrpo.doctor --config recipes/tiny_cpu.yaml [--script recipes/qwen3_tools.py] [--max_steps 3 ...]

It prints a table and exits with 0 for go, 1 for no-go.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ..errors import DoctorError
from .examine import Examination, examine
from .load_script import find_script
from .result import NOTE


COLORS = {"ok": "green", "note": "yellow", "fault": "bold red"}


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """
    Read the command line; arguments that are not the doctor's are the script's.

    Args:
        arguments (`Sequence[str]`):
            The command line without the program.

    Returns:
        `tuple[Namespace, list[str]]`: the doctor's arguments, and those the script gets.
    """
    parser = argparse.ArgumentParser(
        prog="python -m trl_toolgrpo.doctor",
        description="Check a run before it starts: go or no-go. Further arguments are those of the script.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML of the run")
    parser.add_argument("--script", type=Path, help="script with a make_trainer; by default the one next to the YAML")
    given, rest = parser.parse_known_args(arguments)
    return given, ["--config", str(given.config), *rest]


def draw(examination: Examination) -> Table:
    """
    Return the results as a table.

    Args:
        examination ([`Examination`]):
            What was found.
    """
    table = Table(*(Column(name, overflow="fold") for name in ("looked at", "", "found")), box=None)
    for result in examination.results:
        text = result.message + (f"\n-> {result.remedy}" if result.remedy else "")
        table.add_row(result.subject, Text(result.state, COLORS[result.state]), Text(text))
    return table


def verdict(examination: Examination) -> str:
    """
    Return go or no-go in one line; a go names what should be looked at all the same.

    Args:
        examination ([`Examination`]):
            What was found.
    """
    if examination.go:
        noted = dict.fromkeys(result.subject for result in examination.results if result.state == NOTE)
        return f"go ({examination.seconds:.0f} s)" + (f", with notes on: {', '.join(noted)}" if noted else "")
    return f"no-go: {', '.join(result.subject for result in examination.faults)} ({examination.seconds:.0f} s)"


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Examine a run.

    Args:
        arguments (`Sequence[str]`, *optional*):
            The command line without the program.

    Returns:
        `int`: the exit code.
    """
    given, rest = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    console = Console(soft_wrap=False)
    try:
        script = find_script(given.config, given.script)
    except DoctorError as error:
        console.print(f"no-go: {error}", markup=False)
        return 1
    examination = examine(script, rest)
    console.print(draw(examination))
    console.print(verdict(examination), style="bold green" if examination.go else "bold red", markup=False)
    return 0 if examination.go else 1


if __name__ == "__main__":
    sys.exit(main())
