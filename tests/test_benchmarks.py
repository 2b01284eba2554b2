"""The benchmarks against TRL run: small sizes, both sides, the same text."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parent / "benchmarks"
SIZES = {"prompts": 1, "samples": 2, "turns": 2, "prompt_tokens": 150, "repeats": 1, "threads": 1}
SMALL = [f"--{name}={size}" for name, size in SIZES.items()]


@pytest.mark.long
@pytest.mark.parametrize(
    ("script", "flags", "line"),
    [
        ("rollout.py", ["--cases", "custom"], r"as given +[\d.]+ +[\d.]+ +\d+% +[\d.]+ +[\d.]+x +[\d.]+x"),
        ("step.py", [], r"times faster than TRL: rollouts [\d.]+x, update [\d.]+x, step [\d.]+x; [\d.]+x its peak"),
    ],
)
def test_a_benchmark_measures_both_sides(script, flags, line):
    command = [sys.executable, str(FOLDER / script), *SMALL, *flags]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.search(line, output), output
