"""The rollout log as tables: files found, opened, and read column by column.

Owns which columns the report reads; the format is that of `rollout_log.py`, whose reader wants a log that is whole.
Here a file that is torn, foreign or newer is a problem in words.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..rollout_log import FOLDER, KEY, VERSION, place_in_log


REQUIRED = ("step", "completion_ids", "logprobs", "tool_mask", "forced_mask")
FIGURES = {"logprob": "logprobs", "ratio": "ratios", "advantage": "advantages", "value": "values"}
"""Figures of each completion token, and the columns that hold them."""
_READ = (
    *REQUIRED, "batch",
    "rollout", "group", "prompt", "messages", "prompt_ids", "stop_reason", "turns", "tools", "rewards",
    "reward", "assisted", "advantages", "values", "ratios",
)  # fmt: skip

# Not all errors of pyarrow are ValueErrors
_UNREADABLE = (OSError, ValueError, pa.ArrowException)


@dataclass(frozen=True)
class RolloutFile:
    """
    A file of the rollout log.

    Args:
        path (`Path`):
            Where it is.
        rows (`int`):
            Rollouts in it.
    """

    path: Path
    rows: int


@dataclass(frozen=True)
class Lists:
    """
    A column of lists.

    Args:
        values (`np.ndarray`):
            All of them, one behind the other.
        offsets (`np.ndarray`):
            Where each begins, and where the last ends; shape (rows + 1,).
    """

    values: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Length of each list, shape (rows,)."""
        return np.diff(self.offsets)

    def row(self, index: int) -> np.ndarray:
        """One of the lists."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]


@dataclass
class RolloutTable:
    """
    Rollouts of one file.

    Args:
        step, batch, group, rollout (`np.ndarray`):
            Integers, shape (rows,); -1 where the file has none.
        reward (`np.ndarray`):
            Weighted sum of rewards; NaN where a rollout is unscored.
        stop_reason, prompt, messages (`list[str]`):
            Texts, empty where the file has none.
        turns, tools, rewards (`list`):
            Records of the turns, names of the tools called, and rewards by function, of each rollout.
        assisted (`list[bool]`):
            Whether the rollout is of an assisted step.
        prompt_ids, completion_ids, tool_mask, forced_mask ([`Lists`]):
            Tokens, and what they are.
        figures (`dict[str, Lists]`):
            Those of [`FIGURES`] that the file has.
    """

    step: np.ndarray
    batch: np.ndarray
    group: np.ndarray
    rollout: np.ndarray
    reward: np.ndarray
    stop_reason: list[str]
    prompt: list[str]
    messages: list[str]
    turns: list[list[dict[str, Any]]]
    tools: list[list[str]]
    rewards: list[dict[str, Any]]
    assisted: list[bool]
    prompt_ids: Lists
    completion_ids: Lists
    tool_mask: Lists
    forced_mask: Lists
    figures: dict[str, Lists]

    def __len__(self) -> int:
        return len(self.step)


def find_rollout_files(folder: Path, problems: list[str]) -> list[RolloutFile]:
    """
    The files of a rollout log that can be opened, by step.

    Args:
        folder (`Path`):
            Output folder of a run.
        problems (`list[str]`):
            Gets a line for each file that cannot be.

    Returns:
        `list[RolloutFile]`: the others.
    """
    import pyarrow.parquet as parquet

    found = []
    paths = (folder / FOLDER).glob("*.parquet")
    for path in sorted(paths, key=lambda path: (place_in_log(path) or (), path.name)):
        try:
            meta = parquet.read_metadata(path)
            names = meta.schema.to_arrow_schema().names
            _check_format((meta.metadata or {}).get(KEY), names)
        except (*_UNREADABLE, RecursionError) as error:
            problems.append(f"{FOLDER}/{path.name} is left out: {_one_line(error)}")
            continue
        found.append(RolloutFile(path, meta.num_rows))
    return found


def _check_format(written: bytes | None, names: list[str]) -> None:
    if written is None:
        raise ValueError("it is no file of a rollout log of trl_toolgrpo.")
    described = json.loads(written)
    version = described.get("version") if isinstance(described, dict) else None
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(
            f"its format is of version {version}, and this version of trl_toolgrpo reads up to {VERSION}. Upgrade "
            f"trl_toolgrpo."
        )
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise ValueError(f"it has no column {', '.join(missing)}.")


def read_tables(files: list[RolloutFile], problems: list[str]) -> Iterator[tuple[RolloutFile, RolloutTable]]:
    """
    The rollouts of each file; files and rows that cannot be read are left out and named.

    Args:
        files (`list[RolloutFile]`):
            What to read, in this order.
        problems (`list[str]`):
            Gets a line for each file with a fault.
    """
    import pyarrow.parquet as parquet

    for file in files:
        name = f"{FOLDER}/{file.path.name}"
        try:
            known = parquet.read_schema(file.path).names
            table = parquet.read_table(file.path, columns=[column for column in _READ if column in known])
            read, dropped = _read_table(table)
        except (*_UNREADABLE, AttributeError, KeyError, TypeError) as error:
            problems.append(f"{name} is left out: {_one_line(error)}")
            continue
        if dropped:
            problems.append(
                f"{name}: {dropped} of {file.rows} rollouts are left out, since their tokens and the figures of these "
                f"differ in number."
            )
        yield file, read


def _read_table(table: Any) -> tuple[RolloutTable, int]:
    """The rollouts of a table whose columns agree in length, and how many do not."""
    lists = ("completion_ids", "logprobs", "tool_mask", "forced_mask")
    length = _lists(table, "completion_ids").lengths
    whole = np.ones(len(table), dtype=bool)
    for column in lists[1:]:
        whole &= _lists(table, column).lengths == length
    table = table.filter(whole)
    rows = len(table)
    completion_ids = _lists(table, "completion_ids")
    figures = {}
    for figure, column in FIGURES.items():
        if column in table.column_names:
            found = _lists(table, column)
            if len(found.values) and np.array_equal(found.lengths, completion_ids.lengths):
                figures[figure] = found
            elif len(found.values):
                figures[figure] = _spread(found, completion_ids)
    integers = {name: _column(table, name, -1) for name in ("step", "group", "rollout")}
    integers["batch"] = [-1 if number is None else number for number in _column(table, "batch", -1)]
    return RolloutTable(
        **{name: np.array(values, dtype=np.int64) for name, values in integers.items()},
        reward=np.array([np.nan if x is None else x for x in _column(table, "reward", None)], dtype=np.float64),
        stop_reason=[str(text or "unknown") for text in _column(table, "stop_reason", "unknown")],
        prompt=_column(table, "prompt", ""),
        messages=_column(table, "messages", ""),
        turns=[_records(text) for text in _column(table, "turns", "[]")],
        tools=[list(names or []) for names in _column(table, "tools", None)],
        rewards=[_decoded(text, {}) for text in _column(table, "rewards", "{}")],
        assisted=[bool(value) for value in _column(table, "assisted", False)],
        prompt_ids=_lists(table, "prompt_ids") if "prompt_ids" in table.column_names else _no_lists(rows),
        completion_ids=completion_ids,
        tool_mask=_lists(table, "tool_mask"),
        forced_mask=_lists(table, "forced_mask"),
        figures=figures,
    ), int((~whole).sum())


def _column(table: Any, name: str, default: Any) -> list[Any]:
    return table[name].to_pylist() if name in table.column_names else [default] * len(table)


def _lists(table: Any, name: str) -> Lists:
    column = table[name].combine_chunks()
    if not hasattr(column, "flatten"):  # a column of nothing but nulls
        return _no_lists(len(table))
    values = column.flatten().to_numpy(zero_copy_only=False)  # without the lists that are null
    lengths = np.array(column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False), dtype=np.int64)
    return Lists(values, np.concatenate([[0], np.cumsum(lengths)]))


def _no_lists(rows: int) -> Lists:
    return Lists(np.zeros(0), np.zeros(rows + 1, dtype=np.int64))


def _spread(found: Lists, tokens: Lists) -> Lists:
    """A figure that some rollouts lack, with NaN for each of their tokens."""
    values = np.full(len(tokens.values), np.nan, dtype=np.float32)
    for row in np.flatnonzero(found.lengths == tokens.lengths).tolist():
        values[tokens.offsets[row] : tokens.offsets[row + 1]] = found.row(row)
    return Lists(values, tokens.offsets)


def _records(text: Any) -> list[dict[str, Any]]:
    """Records of turns, each with lists of records of its calls and results."""
    turns = [turn for turn in _decoded(text, []) if isinstance(turn, dict)]
    for turn in turns:
        for name in ("tool_calls", "tool_results"):
            inner = turn.get(name)
            turn[name] = [part for part in inner if isinstance(part, dict)] if isinstance(inner, list) else []
    return turns


def _decoded(text: Any, default: Any) -> Any:
    """A value written as JSON, NaN as `None`; the default where there is none of its kind."""
    try:
        value = json.loads(text, parse_constant=lambda _: None) if isinstance(text, str) else text
    except ValueError:
        return default
    return value if isinstance(value, type(default)) else default


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
