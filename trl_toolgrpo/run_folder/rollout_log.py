"""The rollout log: every rollout batch of a run, a parquet file for each process, to look at and to train from again.

Files are `rollouts/<step>-<process>.parquet` in the output folder, `<step>.1-<process>.parquet` and so on for further
rollout batches of the same optimizer step; the column `batch` counts the rollout batches of the run.
`datasets.load_dataset("parquet", ...)` opens them too.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..errors import RolloutLogError, TrajectoryError
from ..redaction import Redactor
from ..rollout.trajectory import Trajectory
from ..sampling.record_faults import field_meant_by
from ..tools.results import encodable
from ..types import Batch, JSONObject, JSONValue, Message
from .files import replacement
from .rollout_tensors import keep, restore


logger = logging.getLogger(__name__)

LOG_VERSION = 1
FOLDER = "rollouts"
KEY = b"trl_toolgrpo.rollout_log"
"""Key of the schema metadata that makes a parquet file a rollout log."""

_NAME = re.compile(r"(?P<step>\d{6,})(?:\.(?P<nth>\d+))?-(?P<process>\d{3,})\.parquet")
_TRAJECTORY = tuple(f.name for f in fields(Trajectory))
"""Columns that make a trajectory."""
_JSON = ("prompt", "messages", "turns", "rewards")
_FLOATS = pa.list_(pa.float32())
_TENSORS = pa.list_(pa.struct([("name", pa.string()), ("data", pa.binary())]))

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("batch", pa.int64()),
        ("rollout", pa.int64()),
        ("group", pa.int64()),
        ("prompt", pa.string()),
        ("messages", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("logprobs", _FLOATS),
        ("tool_mask", pa.list_(pa.int8())),
        ("forced_mask", pa.list_(pa.int8())),
        ("stop_reason", pa.string()),
        ("turns", pa.string()),
        ("tools", pa.list_(pa.string())),
        ("rewards", pa.string()),
        ("reward", pa.float32()),
        ("advantages", _FLOATS),
        ("values", _FLOATS),
        ("ratios", _FLOATS),
        ("assisted", pa.bool_()),
        ("place", pa.int32()),
        ("tensors", _TENSORS),
    ]
)
"""Columns of a file; one row is one rollout. Training again needs `place` and `tensors` in addition to the rest."""


@dataclass
class LoggedBatch:
    """
    A rollout batch of one process.

    Args:
        step (`int`):
            Optimizer steps done when it was generated.
        process, processes (`int`):
            Which process, of how many.
        num_generations (`int`):
            Rollouts of a group.
        prompts, completions (`list`):
            Texts or message lists, one for each rollout.
        trajectories (`list[Trajectory]`):
            The rollouts.
        rewards (`list[dict[str, float | None]]`):
            For each rollout the reward of each function.
        totals (`list[float | None]`):
            For each rollout the weighted sum; `None` if it was not scored.
        batches (`list[dict]`):
            The micro-batches it was divided into; their tensor `rollout` says which rows those are.
        metrics (`dict[str, list[float]]`):
            Metrics that were logged with it.
        random (`dict[str, str]`):
            State of the random number generators when it was ready, by device, in hexadecimal.
        number (`int`):
            Number of the rollout batch in the run, counted from 0.
    """

    step: int
    process: int
    processes: int
    num_generations: int
    prompts: Sequence[str | list[Message]]
    completions: Sequence[str | list[Message]]
    trajectories: Sequence[Trajectory]
    rewards: list[dict[str, float | None]]
    totals: list[float | None]
    batches: list[Batch]
    metrics: dict[str, list[float]]
    random: dict[str, str]
    number: int


def file_name(step: int, process: int, nth: int = 0) -> str:
    """
    Return the name of the file of a rollout batch.

    Args:
        step (`int`):
            Optimizer steps done when it was generated.
        process (`int`):
            Index of the process that made it.
        nth (`int`, *optional*, defaults to `0`):
            Number of the rollout batch in that optimizer step.
    """
    return f"{step:06d}{f'.{nth}' if nth else ''}-{process:03d}.parquet"


# Writing


def tabulate(batch: LoggedBatch, redactor: Redactor) -> pa.Table:
    """
    Return the table of a batch as it is written, without ratios yet.

    Args:
        batch ([`LoggedBatch`]):
            The batch.
        redactor ([`Redactor`]):
            Keeps secrets out of the texts.
    """
    order = torch.cat([part["rollout"] for part in batch.batches]).cpu()  # rows by their place in the micro-batches
    place = order.argsort()
    names = {name for part in batch.batches for name, value in part.items() if isinstance(value, Tensor)}
    tensors = {}
    for name in sorted(names - {"rollout"}):
        parts = [part[name].detach().cpu() for part in batch.batches]
        tensors[name] = parts[0] if parts[0].ndim == 0 else torch.cat(parts)[place]
    columns = _columns(batch, tensors)
    for name in _JSON:
        columns[name] = [_storable(redactor.json(text)) for text in columns[name]]
    columns["tools"] = [[encodable(redactor.text(tool)) for tool in tools] for tools in columns["tools"]]
    rows: list[list[JSONObject]] = [[] for _ in batch.trajectories]
    kept = {name: keep(name, tensor, columns, rows) for name, tensor in tensors.items()}
    metadata = {
        "version": LOG_VERSION,
        "processes": batch.processes,
        "micro_batches": len(batch.batches),
        "tensors": kept,
        "metrics": batch.metrics,
        "random": batch.random,
    }
    columns |= {"place": place.tolist(), "tensors": rows}
    arrays = [pa.array(columns[f.name], type=f.type, from_pandas=False) for f in SCHEMA]
    return pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata({KEY: json.dumps(metadata).encode()}))


def _columns(batch: LoggedBatch, tensors: dict[str, Tensor]) -> dict[str, list]:
    trajectories, count = batch.trajectories, len(batch.trajectories)
    first = batch.process * count
    messages = [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in batch.completions]
    return {
        "step": [batch.step] * count,
        "batch": [batch.number] * count,
        "rollout": [first + row for row in range(count)],
        "group": [(first + row) // batch.num_generations for row in range(count)],
        "prompt": [_as_json(prompt) for prompt in batch.prompts],
        "messages": [_as_json(completion) for completion in messages],
        "prompt_ids": [np.array(t.prompt_ids, np.int32) for t in trajectories],
        "completion_ids": [np.array(t.completion_ids, np.int32) for t in trajectories],
        "logprobs": [np.array(t.logprobs, np.float32) for t in trajectories],
        "tool_mask": [np.array(t.tool_mask, np.int8) for t in trajectories],
        "forced_mask": [np.array(t.forced_mask, np.int8) for t in trajectories],
        "stop_reason": [t.stop_reason for t in trajectories],
        "turns": [_as_json([vars(turn) for turn in t.turns]) for t in trajectories],
        "tools": [[call.name for turn in t.turns for call in turn.tool_calls] for t in trajectories],
        "rewards": [json.dumps(rewards) for rewards in batch.rewards],
        "reward": batch.totals,
        "advantages": [_advantages(tensors["advantages"][row], t) for row, t in enumerate(trajectories)],
        "values": [_values(tensors, row, t) for row, t in enumerate(trajectories)],
        "ratios": [None] * count,
        "assisted": ["assist_mask" in tensors] * count,
    }


def _storable(text: str) -> str:
    """Return JSON that can be encoded, with the escape of each lone surrogate, which a tool may return."""
    return re.sub(r"[\ud800-\udfff]", lambda match: f"\\u{ord(match.group()):04x}", text)


def _advantages(advantages: Tensor, trajectory: Trajectory) -> np.ndarray:
    if advantages.ndim == 0:  # of the whole rollout
        return np.array(trajectory.trainable_mask, np.float32) * advantages.float().item()
    return advantages[: len(trajectory.completion_ids)].float().numpy()


def _values(tensors: dict[str, Tensor], row: int, trajectory: Trajectory) -> np.ndarray | None:
    if "old_values" in tensors:
        return tensors["old_values"][row, : len(trajectory.completion_ids)].float().numpy()
    return None if trajectory.values is None else np.array(trajectory.values, np.float32)


def _as_json(value: JSONValue) -> str:
    return json.dumps(value, default=lambda o: vars(o) if hasattr(o, "__dict__") else str(o), ensure_ascii=False)


def with_ratios(table: pa.Table, ratios: Iterable[tuple[Tensor, Tensor]]) -> pa.Table:
    """
    Return a table with the ratios of an update.

    Args:
        table (`pa.Table`):
            From [`tabulate`] or [`read_table`].
        ratios (`Iterable[tuple[Tensor, Tensor]]`):
            For each micro-batch its rows, int64, shape (B,), and a ratio for each token, float, shape (B, T), padded
            on the right.
    """
    lengths = [len(ids) for ids in table["completion_ids"]]
    found = table["ratios"].to_pylist()
    for rows, values in ratios:
        for row, own in zip(rows.tolist(), values.float().cpu().numpy(), strict=True):
            found[row] = own[: lengths[row]]
    place = table.column_names.index("ratios")
    return table.set_column(place, SCHEMA.field("ratios"), pa.array(found, type=_FLOATS))


def write(table: pa.Table, path: Path) -> int:
    """
    Write a table, so that the file is whole or not there.

    Args:
        table (`pa.Table`):
            From [`tabulate`].
        path (`Path`):
            The file.

    Returns:
        `int`: its size in bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacement(path) as part:
        pq.write_table(table, part, compression="zstd", use_dictionary=False, write_statistics=False)
    return path.stat().st_size


# Reading


def find_files(folder: Path, process: int | None = None) -> list[Path]:
    """
    Return the files of a rollout log in a folder, in order of rollout batches and processes; there may be none.

    Args:
        folder (`Path`):
            The folder.
        process (`int`, *optional*):
            Whose files; by default those of all processes.
    """
    placed = [(place_in_log(path), path) for path in folder.glob("*.parquet")]
    found = sorted((place, path) for place, path in placed if place is not None)
    return [path for place, path in found if process in (None, place[2])]


def place_in_log(path: Path) -> tuple[int, int, int] | None:
    """Return the step, rollout batch of that step, and process in a file's name; `None` if it is no file of a log."""
    match = _NAME.fullmatch(path.name)
    return None if match is None else (int(match["step"]), int(match["nth"] or 0), int(match["process"]))


def log_files(folder: str | Path) -> list[Path]:
    """
    Return the files of a rollout log, in order of rollout batches and processes.

    Args:
        folder (`str` or `Path`):
            Output folder of a run, or the folder `rollouts` in it.

    Raises:
        RolloutLogError: if there are none.
    """
    folder = Path(folder)
    inner = folder / FOLDER
    folder = inner if inner.is_dir() else folder
    found = find_files(folder)
    if not found:
        reason = "it has no file <step>-<process>.parquet" if folder.is_dir() else "it is not a folder"
        raise RolloutLogError(
            f"There is no rollout log in {folder}: {reason}.",
            remedy="Pass the `output_dir` of a run that was made with `rollout_log_limit` above 0.",
        )
    return found


def step_of(path: Path) -> int:
    """Return the step in the name of a file of a log."""
    return int(re.match(r"\d+", path.name)[0])  # type: ignore[index]


def batch_files(folder: Path, process: int) -> dict[int, Path]:
    """
    Return the files of one process by the number of their rollout batch. Files that cannot be read are left out.

    Args:
        folder (`Path`):
            Folder of the log.
        process (`int`):
            Index of the process.
    """
    found = {}
    for path in find_files(folder, process):
        with suppress(OSError, pa.ArrowException, KeyError, IndexError):
            found[pq.read_table(path, columns=["batch"])["batch"][0].as_py()] = path
    return found


def read_table(path: str | Path) -> pa.Table:
    """
    Read one file and check it.

    Args:
        path (`str` or `Path`):
            The file.

    Raises:
        RolloutLogError: if it is torn, of a newer version, or no rollout log.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise RolloutLogError(f"There is no {path}.") from error
    except (OSError, pa.ArrowException) as error:
        raise RolloutLogError(
            f"{path} cannot be read, it is torn or not a parquet file: {error}. The other files of the log do not "
            f"depend on it.",
            remedy="Delete this one, or copy it again from where it was written.",
        ) from error
    metadata = details(table, path)
    if metadata["version"] > LOG_VERSION:
        raise RolloutLogError(
            f"{path} has version {metadata['version']} of the rollout log, this package reads version {LOG_VERSION}.",
            remedy="Install a newer trl_toolgrpo.",
        )
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        others = {name: field_meant_by(name, missing) for name in table.column_names if name not in SCHEMA.names}
        hints = " ".join(f"Is `{name}` meant to be `{meant}`?" for name, meant in others.items() if meant)
        raise RolloutLogError(
            f"{path} is not a whole rollout log: columns {', '.join(missing)} are missing.", remedy=hints
        )
    return table


def details(table: pa.Table, path: str | Path = "The table") -> JSONObject:
    """
    Return the metadata of a file: version, processes, micro-batches, tensors, metrics and random number generators.

    Args:
        table (`pa.Table`):
            Its table.
        path (`str` or `Path`, *optional*):
            For the message.

    Raises:
        RolloutLogError: if it is no rollout log.
    """
    with suppress(KeyError, ValueError, TypeError):
        found = json.loads((table.schema.metadata or {})[KEY])
        if isinstance(found["version"], int):
            return found
    raise RolloutLogError(
        f"{path} is a parquet file of something else: it has no metadata `{KEY.decode()}` with a version."
    )


def read_rollouts(folder: str | Path, strict: bool = True) -> Iterator[JSONObject]:
    """
    Read the rollouts of a run, in order, each as a dict of the columns of the log with JSON decoded.

    Args:
        folder (`str` or `Path`):
            Output folder of the run, or the folder `rollouts` in it.
        strict (`bool`, *optional*, defaults to `True`):
            As `strict_trajectories` of [`ToolGRPOConfig`]: `False` logs which rollouts break their contract, and
            yields them with the tokens they have, none of which counts as the policy's.

    Raises:
        RolloutLogError: if there is no log, or one of its files cannot be read.
        TrajectoryError: for a rollout with a missing, short or non-finite field, if `strict`.
    """
    for path in log_files(folder):
        yield from rows_of(check_rollouts(read_table(path), path, strict)[0])


def check_rollouts(table: pa.Table, path: str | Path, strict: bool) -> tuple[pa.Table, list[bool]]:
    """
    Read each rollout of a table as a [`Trajectory`].

    Args:
        table (`pa.Table`):
            From [`read_table`].
        path (`str` or `Path`):
            Its file, for the message.
        strict (`bool`):
            Raise for a rollout that breaks its contract, or mask it out.

    Returns:
        `tuple[pa.Table, list[bool]]`: the table, in which rollouts that were masked out keep the contract, and
        whether each rollout was masked out.

    Raises:
        TrajectoryError: for a rollout with a missing, short or non-finite field, if `strict`.
    """
    columns = table.select([*_TRAJECTORY, "rollout", "advantages"]).to_pydict()
    has_values = any(values is not None for values in columns["values"])
    masked = set()
    for row, number in enumerate(columns["rollout"]):
        name = f"{number} of {path}"
        record = {column: columns[column][row] for column in _TRAJECTORY}
        try:
            _check_logged(record, columns["advantages"][row], name)
        except TrajectoryError as error:
            if strict:
                raise
            logger.warning("Masked out: %s", error)
            masked.add(row)
            kept = {name: record[name] for name in ("prompt_ids", "completion_ids", "stop_reason")}
            trajectory = Trajectory(**kept, logprobs=[], tool_mask=[], forced_mask=[], turns=[])
            trajectory.mask_out()
            zeros = [0.0] * len(trajectory.completion_ids)
            fixed = {**vars(trajectory), "turns": "[]", "advantages": zeros, "values": zeros if has_values else None}
            for column, value in fixed.items():
                columns[column][row] = value
    if masked:
        for column in (*_TRAJECTORY, "advantages"):
            place, kind = table.column_names.index(column), SCHEMA.field(column)
            table = table.set_column(place, kind, pa.array(columns[column], type=kind.type))
    return table, [row in masked for row in range(table.num_rows)]


def _check_logged(record: JSONObject, advantages: list[float] | None, name: str) -> None:
    """Raise where a row of a log, with its turns as JSON, breaks the contract of a rollout."""
    try:
        turns = json.loads(record["turns"])
    except (TypeError, ValueError) as error:
        raise TrajectoryError(f"Rollout {name}: field `turns` cannot be read as JSON: {error}.") from error
    trajectory = Trajectory.from_dict({**record, "turns": turns}, name)
    count = len(trajectory.completion_ids)
    if advantages is not None and len(advantages) != count:
        raise TrajectoryError(
            f"Rollout {name}: field `advantages` has {len(advantages)} values, expected {count}, one per completion "
            f"token."
        )


def rows_of(table: pa.Table) -> Iterator[JSONObject]:
    """Yield the rows of a file with JSON decoded, without the columns that only training again needs."""
    for row in table.drop_columns(["place", "tensors"]).to_pylist():
        yield {name: json.loads(value) if name in _JSON else value for name, value in row.items()}


def tensors_of(table: pa.Table, path: str | Path = "The table") -> dict[str, Tensor]:
    """
    Return the tensors of a rollout batch, in order of the rollouts.

    Args:
        table (`pa.Table`):
            From [`read_table`].
        path (`str` or `Path`, *optional*):
            For the message.

    Returns:
        `dict[str, Tensor]`: each as it was, on the CPU; the first dimension of all but scalars is the rollout.

    Raises:
        RolloutLogError: if the file is not consistent.
    """
    records = details(table, path)["tensors"]
    names = {record["column"] for record in records.values() if "column" in record}
    try:
        return restore(records, {name: table[name].to_pylist() for name in names}, table["tensors"].to_pylist())
    except (ValueError, RuntimeError, TypeError) as error:
        raise RolloutLogError(f"{path} does not fit together: {error}.") from error
