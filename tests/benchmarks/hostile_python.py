"""Two hundred hostile Python programs under bubblewrap: which are not contained, and how long they take.

`sandbox="limits"` is left out: some of the programs would end the user's processes.

    python tests/benchmarks/hostile_python.py
"""

import argparse
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile_code import Machine, snippets

from trl_toolgrpo.tools.python_sandbox.sandbox import Limits, find_sandbox


def main() -> None:
    """Run every program, and print its faults and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="Time limit of a snippet.")
    parser.add_argument("--memory-mb", type=int, default=256)
    arguments = parser.parse_args()
    limits = Limits(arguments.seconds, arguments.memory_mb * 2**20, 16 * 2**20, 16, 10_000)
    sandbox = find_sandbox("bubblewrap", limits)
    ends, over, contained = Counter(), [], 0
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder, Machine(Path(folder)) as machine:
        found = snippets()
        for name, code in found.items():
            visits = machine.visits
            report, seconds = machine.attack(sandbox, code)
            faults = machine.damage(sandbox, report, seconds)
            machine.visits = 0
            ends[report.status] += 1
            over.append(max(0.0, seconds - limits.seconds))
            contained += not faults
            if faults:
                print(f"{name}: {'; '.join(faults)} ({visits} visits before)")
    print(
        f"{contained} of {len(found)} contained; beyond the limit of {limits.seconds:g} s: median "
        f"{statistics.median(over):.2f} s, most {max(over):.2f} s; ends: {dict(ends)}"
    )
    sys.exit(contained < len(found))


if __name__ == "__main__":
    main()
