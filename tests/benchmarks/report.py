"""The cost of a report of many rollouts: size, time to build, first paint and time until it can be used in Chromium.

    python tests/benchmarks/report.py [--rollouts 10000]

The rollouts are synthetic (see `synthetic_run.py`) and as hard to compress as real ones: random log-probs, ratios,
advantages and values for each token.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from chromium import chromium, find_chromium
from synthetic_run import write_run


MARKS = "['listed', 'opened'].map((name) => performance.getEntriesByName(name)[0].startTime)"


def measure_browser(path, repeats):
    """Return median milliseconds until the first paint, the list, and the first open rollout."""
    found = []
    with chromium() as page:
        page.show()
        for _ in range(repeats):
            page.open(path)
            page.wait_for("document.querySelector('#token b')", seconds=120)
            paint = "performance.getEntriesByType('paint').find((entry) => entry.name === 'first-paint')"
            page.wait_for(paint)
            first = page.run(f"{paint}.startTime")
            found.append([first, *page.run(MARKS)])
    return [statistics.median(values) for values in zip(*found, strict=True)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rollouts", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        folder = write_run(Path(home) / "run", given.rollouts, vocabulary=30_000, prompt=400)
        log = sum(path.stat().st_size for path in (folder / "rollouts").iterdir())
        print(f"{given.rollouts} rollouts, {log / 1e6:.1f} MB of rollout log")
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import trl_toolgrpo"], check=True)
        imports = time.perf_counter() - started
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        started = time.perf_counter()
        told = subprocess.run([sys.executable, "-m", "trl_toolgrpo.report", folder], check=True, capture_output=True)
        seconds = time.perf_counter() - started
        spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        print(told.stdout.decode().strip())
        print(f"built in {seconds:.1f} s, {imports:.1f} s of it for imports; {spent:.1f} s of a core in all")
        if find_chromium() is None:
            print("no browser was found; `apt-get install chromium`, or name one with CHROMIUM")
            return
        paint, listed, opened = measure_browser(folder / "report.html", given.repeats)
        print(f"first paint {paint:.0f} ms, list there {listed:.0f} ms, first rollout open {opened:.0f} ms")


if __name__ == "__main__":
    main()
