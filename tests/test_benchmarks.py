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
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bfloat16_weights"])
def test_a_benchmark_measures_both_sides(script, flags, line, dtype):
    command = [sys.executable, str(FOLDER / script), *SMALL, *flags, "--dtype", dtype, "--shape", "tiny"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.search(line, output), output
    assert re.search(rf"^.+, \d+ cores, .+; {dtype}$", output.splitlines()[0]), output


def test_sizes_are_not_taken_for_cases_that_have_their_own():
    command = [sys.executable, str(FOLDER / "rollout.py"), "--cases", "600", "--turns", "8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--cases custom" in done.stderr
