"""The files of a rollout log, and the rollouts in them.

The reader in `rollout_log.py` insists on a log that is whole. This one turns a file that is torn, foreign or newer
into a problem to show, and reads the rest.
"""

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from ..errors import RolloutLogError
from ..run_folder.rollout_log import FOLDER, LOG_VERSION, SCHEMA, details, place_in_log
from ..types import JSONValue, Row


FIGURES = {"logprob": "logprobs", "ratio": "ratios", "advantage": "advantages", "value": "values"}
"""Figures of each completion token, and the columns that hold them."""

_LISTS = ("completion_ids", "logprobs", "tool_mask", "forced_mask")
_COLUMNS = [name for name in SCHEMA.names if name not in ("place", "tensors")]

# Not all errors of pyarrow are ValueErrors
_UNREADABLE = (OSError, ValueError, pa.ArrowException)


def find_rollout_files(folder: Path, problems: list[str]) -> dict[Path, int]:
    """
    Return the files of a rollout log that can be opened, by step, and the number of rollouts in each.

    Args:
        folder (`Path`):
            Output folder of a run.
        problems (`list[str]`):
            Gets a line for each file that cannot be opened.
    """
    found = {}
    paths = (folder / FOLDER).glob("*.parquet")
    for path in sorted(paths, key=lambda path: (place_in_log(path) or (), path.name)):
        try:
            meta = parquet.read_metadata(path)
            version = details(meta.schema.to_arrow_schema().empty_table(), "it")["version"]
            if version > LOG_VERSION:
                raise RolloutLogError(
                    f"its format has version {version}, and this version of trl_toolgrpo reads up to {LOG_VERSION}.",
                    remedy="Upgrade trl_toolgrpo.",
                )
        except (*_UNREADABLE, RecursionError) as error:
            problems.append(f"{FOLDER}/{path.name} is left out: {_one_line(error)}")
            continue
        found[path] = meta.num_rows
    return found


def read_rollout_file(path: Path, problems: list[str]) -> list[Row]:
    """
    Read the rollouts of a file, each as a row of the log with its turns and rewards decoded.

    Args:
        path (`Path`):
            The file.
        problems (`list[str]`):
            Gets a line if the file or some of its rollouts cannot be read. These are left out.
    """
    name = f"{FOLDER}/{path.name}"
    try:
        rows = parquet.read_table(path, columns=_COLUMNS).select(_COLUMNS).to_pylist()
        rollouts = [_rollout(row) for row in rows if _is_whole(row)]
    except (*_UNREADABLE, AttributeError, KeyError, TypeError) as error:
        problems.append(f"{name} is left out: {_one_line(error)}")
        return []
    if len(rollouts) < len(rows):
        problems.append(
            f"{name}: {len(rows) - len(rollouts)} of {len(rows)} rollouts are left out, since they do not have a "
            f"log-prob and mask entries for each token."
        )
    return rollouts


def _is_whole(row: Row) -> bool:
    lists = [row[name] for name in _LISTS if isinstance(row[name], list)]
    return len(lists) == len(_LISTS) and len(set(map(len, lists))) == 1


def _rollout(row: Row) -> Row:
    rollout = row | {"reward": short_number(row["reward"])}
    rollout["rewards"] = _decoded(rollout["rewards"], {})
    rollout["turns"] = [turn for turn in _decoded(rollout["turns"], []) if isinstance(turn, dict)]
    for turn in rollout["turns"]:
        for name in ("tool_calls", "tool_results"):
            inner = turn.get(name)
            turn[name] = [part for part in inner if isinstance(part, dict)] if isinstance(inner, list) else []
    return rollout


def _decoded(text: str, default: JSONValue) -> JSONValue:
    """Read a value written as JSON, with short numbers; return the default unless it is of its type."""
    try:
        value = json.loads(text, parse_constant=lambda _: None, parse_float=lambda text: short_number(float(text)))
    except ValueError:
        return default
    return value if isinstance(value, type(default)) else default


def short_number(value: float | None) -> float | None:
    """Return a number with four digits; `None` if it is not finite."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
