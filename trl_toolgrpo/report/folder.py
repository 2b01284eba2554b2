"""What a run has left in its output folder, as far as it can be read.

Owns the reading of metrics, health messages and settings, and the finding of rollout files. Whatever is missing, torn
or newer than this version becomes a problem in words, and the rest is read all the same.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ReportError
from ..run_files import HEALTH, METRICS, RUN
from ..run_files import VERSION as RUN_VERSION
from .rollouts import find_rollout_files


STATE = "trainer_state.json"


@dataclass
class RunFolder:
    """
    A run as its folder tells of it.

    Args:
        path (`Path`):
            The folder.
        settings (`dict`):
            `run.json`; empty if there is none.
        metrics (`list[dict]`):
            Logged figures, each with its `step`, in order.
        health (`list[dict]`, *optional*):
            Messages of the health rules in order; `None` if nothing says that they were watching.
        rollouts (`list[RolloutFile]`):
            Rollout files that can be opened, by step.
        problems (`list[str]`):
            What could not be read, and why.
    """

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    health: list[dict[str, Any]] | None = None
    rollouts: dict[Path, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Last part of the folder's path."""
        return self.path.resolve().name

    @property
    def empty(self) -> bool:
        """Whether nothing of a run was found."""
        return not (self.settings or self.metrics or self.health or self.rollouts)

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps at which a metric was logged, and its values there; NaN where it was not finite (null in the file)."""
        logged = [(entry["step"], entry[metric]) for entry in self.metrics if metric in entry]
        points = [(step, value) for step, value in logged if value is None or _is_number(value)]
        return [step for step, _ in points], [math.nan if value is None else float(value) for _, value in points]

    def evaluations(self) -> list[tuple[str, str]]:
        """Prefix and name of each evaluation set, by the time it took, which is always logged; one without a name, or
        of which that is not known, is `("eval_", "")`."""
        logged = dict.fromkeys(name for entry in self.metrics for name in entry)
        names = [name[len("eval_") : -len("_runtime")] for name in logged if re.fullmatch("eval_.+_runtime", name)]
        plain = [("eval_", "")] if "eval_runtime" in logged or not names else []
        return plain + [(f"eval_{name}_", name) for name in names]

    def metric_of(self, name: str) -> str:
        """A metric without the prefix of the evaluation set it is of."""
        prefixes = [prefix for prefix, _ in self.evaluations() if name.startswith(prefix)]
        return name[len(max(prefixes, key=len, default="")) :]

    def metric_names(self) -> list[str]:
        """Every metric that has a number somewhere, in the order of its first appearance."""
        names = {name for entry in self.metrics for name, value in entry.items() if _is_number(value)}
        order = dict.fromkeys(name for entry in self.metrics for name in entry)
        return [name for name in order if name in names and name not in ("step", "time")]


def read_folder(path: str | Path) -> RunFolder:
    """
    Read an output folder.

    Args:
        path (`str` or `Path`):
            The folder.

    Returns:
        [`RunFolder`]: what it holds; `problems` tells what could not be read.

    Raises:
        ReportError: if there is no such folder.
    """
    path = Path(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ReportError(f"You passed {str(path)!r}, which {what}. Pass the output folder of a run (`output_dir`).")
    run = RunFolder(path)
    run.settings = _read_settings(path / RUN, run.problems)
    run.metrics = _read_metrics(path, run.problems)
    run.health = _read_health(path, run)
    run.rollouts = find_rollout_files(path, run.problems)
    if run.empty:
        held = sorted(entry.name for entry in path.iterdir())
        shown = f"It holds {', '.join(held[:6])}{' and more' if len(held) > 6 else ''}." if held else "It is empty."
        run.problems.insert(
            0,
            f"Nothing of a run was found in {path}: none of {METRICS}, {HEALTH}, {RUN}, {STATE} or a folder "
            f"rollouts/. {shown} Pass the `output_dir` of a run of ToolGRPOTrainer that has begun to train.",
        )
    return run


def _read_settings(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"it holds a {type(settings).__name__} in place of named fields")
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read: {error}. The settings of the run are not shown.")
        return {}
    if "layout" in settings:  # of a checkpoint, whose file of that name says what must match to resume from it
        return {}
    version = settings.get("version")
    if isinstance(version, int) and version > RUN_VERSION:
        problems.append(
            f"{path.name} is of version {version}, and this version of trl_toolgrpo knows {RUN_VERSION}. Settings are "
            f"shown as they stand; upgrade trl_toolgrpo to be sure of them."
        )
    return settings


def _read_metrics(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    entries = list(_read_lines(path / METRICS, problems))
    if not entries:
        entries = _read_state(path, problems)
    entries = [entry for entry in entries if isinstance(entry.get("step"), int)]
    return sorted(entries, key=lambda entry: entry["step"])


def _read_state(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The log of TRL's own `trainer_state.json`, of the folder itself or of its newest checkpoint."""
    checkpoints = [
        (int(number), entry / STATE)
        for entry in path.glob("checkpoint-*")
        if (number := entry.name.partition("-")[2]).isdigit()
    ]
    for state in [path / STATE, *(file for _, file in sorted(checkpoints, reverse=True))]:
        if state.is_file():
            try:
                history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
                return [entry for entry in history if isinstance(entry, dict)]
            except (OSError, ValueError, KeyError, TypeError) as error:
                where = state.relative_to(path)
                problems.append(f"{where} cannot be read: {type(error).__name__}: {error}.")
    return []


def _read_health(path: Path, run: RunFolder) -> list[dict[str, Any]] | None:
    file = path / HEALTH
    if not file.is_file():
        watched = run.settings.get("config", {})
        off = not run.settings or (isinstance(watched, dict) and watched.get("health_checks") == "off")
        return None if off else []
    found = _read_lines(file, run.problems)
    return [entry for entry in found if isinstance(entry.get("rule"), str) and entry.get("level")]


def _read_lines(path: Path, problems: list[str]) -> Iterable[dict[str, Any]]:
    """The objects of a file with one on each line; what cannot be read is one problem."""
    if not path.is_file():
        return
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error}.")
        return
    bad = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line) if line.strip() else {}
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            yield entry
        else:
            bad.append(number)
    if bad:
        why = "; its writer was stopped in the middle of it" if bad == [len(lines)] else ""
        shown = ", ".join(map(str, bad[:5])) + (" and more" if len(bad) > 5 else "")
        problems.append(f"{path.name}: {len(bad)} of {len(lines)} lines cannot be read (line {shown}){why}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def finite(values: Iterable[float]) -> list[float]:
    """The values that are neither NaN nor infinite."""
    return [value for value in values if math.isfinite(value)]
