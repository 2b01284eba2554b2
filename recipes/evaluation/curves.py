"""Draw curves of one or several runs from the logs in their output folders.

    python -m trl_toolgrpo.recipes.evaluation.curves assisted=outputs/one alone=outputs/other --out curves.svg

It needs matplotlib (extra `report`).
"""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from trl_toolgrpo import ReportError
from trl_toolgrpo.report import read_folder
from trl_toolgrpo.types import JSONObject


LABELS = {
    "success": "share of rollouts that succeed",
    "valid_calls": "share of rollouts with a valid call",
    "value/explained_variance": "explained variance",
}


def read_curve(log: Sequence[JSONObject], metric: str) -> tuple[list[int], list[float]]:
    """
    Return the curve of one metric of one run.

    Args:
        log (`Sequence[dict]`):
            Logged figures of a run; `None` stands for one that was not finite.
        metric (`str`):
            Name of a metric; with the prefix `eval_` that of the evaluations.

    Returns:
        `tuple[list[int], list[float]]`: optimizer steps, and the values there.
    """
    points = [(entry["step"], entry[metric]) for entry in log if metric in entry]
    return [step for step, _ in points], [float("nan" if value is None else value) for _, value in points]


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of each value and those before it, `width` in all."""
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def draw(runs: dict[str, list[Path]], metrics: Sequence[str], out: Path, width: int = 5) -> None:
    """
    Draw one panel for each metric, with a line for each run and a color for each label.

    Args:
        runs (`dict[str, list[Path]]`):
            Output folders of the runs of each label.
        metrics (`Sequence[str]`):
            Metrics of training; points mark those of evaluations.
        out (`Path`):
            File to write; its ending gives the format.
        width (`int`, *optional*, defaults to `5`):
            Steps the lines are averaged over; the steps themselves are drawn faintly.

    Raises:
        ReportError: for a metric that no run has logged, or a folder without a log.
        ImportError: if matplotlib is not installed.
    """
    logs = {label: [read_folder(folder).metrics for folder in folders] for label, folders in runs.items()}
    known = sorted({name for found in logs.values() for log in found for entry in log for name in entry} - {"step"})
    for metric in metrics:
        if metric not in known and f"eval_{metric}" not in known:
            closest = get_close_matches(metric, known, n=1)
            raise ReportError(
                f"No run has logged the metric {metric!r}"
                + (f"; did you mean {closest[0]!r}?" if closest else ".")
                + f" There are: {', '.join(known) or 'none'}."
            )
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib. Run `pip install 'trl_toolgrpo[report]'`.") from error
    matplotlib.use("svg" if out.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "curves"})  # a small and reproducible file
    figure, axes = pyplot.subplots(1, len(metrics), figsize=(5.2 * len(metrics), 3.4), squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        for number, (label, found) in enumerate(logs.items()):
            color = f"C{number}"
            for index, log in enumerate(found):
                steps, values = read_curve(log, metric)
                axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
                axis.plot(steps, smooth(values, width), color=color, label=label if index == 0 else None)
                axis.plot(*read_curve(log, f"eval_{metric}"), "o", color=color, markersize=4)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(LABELS.get(metric, metric))
        axis.grid(alpha=0.3)
        if metric in ("success", "valid_calls"):
            axis.set_ylim(-0.03, 1.03)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    pyplot.close(figure)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="label=folder; a label that occurs again adds a seed to it.")
    parser.add_argument("--metrics", nargs="+", default=["success"], help="Metrics of the training log.")
    parser.add_argument("--out", type=Path, required=True, help="Picture to write, .svg or .png.")
    arguments = parser.parse_args()
    runs: dict[str, list[Path]] = {}
    for run in arguments.runs:
        label, _, folder = run.rpartition("=")
        runs.setdefault(label or Path(folder).name, []).append(Path(folder))
    try:
        draw(runs, arguments.metrics, arguments.out)
    except ReportError as error:
        print(f"curves.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
