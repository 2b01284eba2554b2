"""What a run has left in its output folder, as far as it can be read.

Whatever is missing, torn or newer than this version becomes a problem in words, and the rest is read all the same.
"""

import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeGuard

from ..errors import ReportError
from ..run_folder.files import HEALTH, METRICS, RUN, RUN_VERSION
from ..types import JSONObject, JSONValue
from .rollouts import find_rollout_files


STATE = "trainer_state.json"


@dataclass
class RunFolder:
    """
    A run as its output folder describes it.

    Args:
        path (`Path`):
            The folder.
        settings (`dict`, *optional*):
            `run.json`; empty if there is none.
        metrics (`list[dict]`, *optional*):
            Logged metrics, each entry with its `step`, in order.
        health (`list[dict]`, *optional*):
            Messages of the health rules in order; `None` if nothing says that they were watching.
        rollouts (`dict[Path, int]`, *optional*):
            Rollout files that can be opened, by step, and the number of rollouts in each.
        problems (`list[str]`, *optional*):
            What could not be read, and why.
    """

    path: Path
    settings: JSONObject = field(default_factory=dict)
    metrics: list[JSONObject] = field(default_factory=list)
    health: list[JSONObject] | None = None
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
        """Return the steps at which a metric was logged, and its values, NaN for one that was not finite (null)."""
        logged = [(entry["step"], entry[metric]) for entry in self.metrics if metric in entry]
        points = [(step, value) for step, value in logged if value is None or _is_number(value)]
        return [step for step, _ in points], [math.nan if value is None else float(value) for _, value in points]

    def evaluations(self) -> list[tuple[str, str]]:
        """
        Return prefix and name of each evaluation set, known by the time it took, which is always logged. The set is
        `("eval_", "")` if it has no name or none is known.
        """
        sets = dict.fromkeys(re.findall(r"^eval_(.+)_runtime$", "\n".join(self._logged), re.MULTILINE))
        plain = [("eval_", "")] if "eval_runtime" in self._logged or not sets else []
        return plain + [(f"eval_{name}_", name) for name in sets]

    def metric_of(self, name: str) -> str:
        """Return a metric without the prefix of its evaluation set."""
        prefixes = [prefix for prefix, _ in self.evaluations() if name.startswith(prefix)]
        return name.removeprefix(max(prefixes, key=len, default=""))

    def metric_names(self) -> list[str]:
        """Return every metric that has a number somewhere, in the order of its first appearance."""
        return [name for name, is_number in self._logged.items() if is_number and name not in ("step", "time")]

    @cached_property
    def _logged(self) -> dict[str, bool]:
        """Names in the log, and whether they have a number somewhere."""
        found: dict[str, bool] = {}
        for entry in self.metrics:
            for name, value in entry.items():
                found[name] = found.get(name, False) or _is_number(value)
        return found


def read_folder(path: str | Path) -> RunFolder:
    """
    Read an output folder.

    Args:
        path (`str` or `Path`):
            The folder.

    Returns:
        [`RunFolder`]: what it holds; `problems` says what could not be read.

    Raises:
        ReportError: if there is no such folder.
    """
    path = Path(path)
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        remedy = "Pass the output folder of a run (`output_dir`)."
        raise ReportError(f"You passed {str(path)!r}, which {problem}.", remedy=remedy)
    run = RunFolder(path)
    run.settings = _read_settings(path, run.problems)
    entries = _read_lines(path / METRICS, run.problems) or _read_state(path, run.problems)
    entries = [entry for entry in entries if isinstance(entry.get("step"), int)]
    run.metrics = sorted(entries, key=lambda entry: entry["step"])
    if (path / HEALTH).is_file() or _is_watched(run.settings):
        entries = _read_lines(path / HEALTH, run.problems)
        run.health = [entry for entry in entries if isinstance(entry.get("rule"), str) and entry.get("level")]
    run.rollouts = find_rollout_files(path, run.problems)
    if run.empty:
        held = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
        problem = f"Nothing of a run was found in {path}: none of {METRICS}, {HEALTH}, {RUN}, {STATE} or rollouts/."
        remedy = "Pass the `output_dir` of a run of ToolGRPOTrainer that has begun to train."
        run.problems.insert(0, f"{problem} It holds {held}. {remedy}")
    return run


def _read_object(path: Path, folder: Path, problems: list[str]) -> JSONObject:
    """Read a file of JSON; return an empty object, and note a problem, if it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__} in place of named fields")
        return content
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{path.relative_to(folder)} cannot be read: {error}.")
        return {}


def _read_settings(folder: Path, problems: list[str]) -> JSONObject:
    settings = _read_object(folder / RUN, folder, problems)
    version = settings.get("version")
    if isinstance(version, int) and version > RUN_VERSION:
        problems.append(
            f"{RUN} is of version {version}, and this version of trl_toolgrpo knows {RUN_VERSION}. Settings are "
            f"shown as they are; upgrade trl_toolgrpo to be sure of them."
        )
    return settings


def _is_watched(settings: JSONObject) -> bool:
    """Return whether the settings say that health rules were watching."""
    config = settings.get("config")
    return bool(settings) and not (isinstance(config, dict) and config.get("health_checks") == "off")


def _read_state(folder: Path, problems: list[str]) -> list[JSONObject]:
    """Read the log in TRL's own `trainer_state.json`, of the folder itself or of its newest checkpoint."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    checkpoints.sort(key=lambda path: -int(path.name.partition("-")[2]))
    for home in (folder, *checkpoints):
        history = _read_object(home / STATE, folder, problems).get("log_history")
        if isinstance(history, list):
            return [entry for entry in history if isinstance(entry, dict)]
    return []


def _read_lines(path: Path, problems: list[str]) -> list[JSONObject]:
    """Read a file with an object on each line; the lines that cannot be read are one problem."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error}.")
        return []
    found, bad = [], []
    for number, line in enumerate(lines, start=1):
        entry = None
        with suppress(ValueError):
            entry = json.loads(line.strip() or "{}")
        if isinstance(entry, dict):
            found.append(entry)
        else:
            bad.append(number)
    if bad:
        why = "; its writer was stopped in the middle of it" if bad == [len(lines)] else ""
        shown = ", ".join(map(str, bad[:5])) + (" and more" if len(bad) > 5 else "")
        problems.append(f"{path.name}: {len(bad)} of {len(lines)} lines cannot be read (line {shown}){why}.")
    return found


def _is_number(value: JSONValue) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def finite(values: Iterable[float]) -> list[float]:
    """Return the values that are neither NaN nor infinite."""
    return [value for value in values if math.isfinite(value)]
