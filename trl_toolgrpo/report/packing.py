"""Rollouts as bytes that a browser unpacks: chunks of a few dozen, decoded when one of them is opened.

Owns the format of a chunk and the size of them all together; `page/data.js` reads it. A chunk is a header in JSON
(4 bytes of its length before it) and columns of numbers: tokens as numbers of the vocabulary, what each token is, and
its figures as half-precision floats. The high bytes of a column come before its low bytes, which compresses better.
"""

import base64
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .rollouts import FIGURES, Lists, RolloutFile, RolloutTable, read_tables
from .tools import ToolStatistics, calls_of, tool_name
from .vocabulary import Vocabulary


CHUNK = 48
"""Rollouts in a chunk."""
AROUND = 60
"""Characters around a chunk, and about as many for the text and the id of a token."""
TOOL, SAMPLED, FORCED = 0, 1, 2
"""What a token is: tool output and template text, sampled by the policy, or forced."""


@dataclass
class Index:
    """What the list of rollouts shows and filters by, one entry in each column for each rollout."""

    step: list[int] = field(default_factory=list)
    batch: list[int] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    rollout: list[int] = field(default_factory=list)
    reward: list[float | None] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    tools: list[list[str]] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    assisted: list[int] = field(default_factory=list)


@dataclass
class PackedRun:
    """
    The rollouts of a run, packed.

    Args:
        chunks (`list[str]`):
            Compressed chunks in base64, in the order of the index.
        index ([`Index`]):
            One entry for each rollout.
        sizes (`list[int]`):
            Rollouts of each chunk.
        tools ([`ToolStatistics`]):
            Of the files that were read.
        total (`int`):
            Rollouts of the log, those left out for their size included.
    """

    chunks: list[str]
    index: Index
    sizes: list[int]
    tools: ToolStatistics
    total: int

    @property
    def shown(self) -> int:
        """Rollouts that are packed."""
        return len(self.index.step)


def pack_run(
    files: Sequence[RolloutFile], vocabulary: Vocabulary, budget: int, keep_text: bool, problems: list[str]
) -> PackedRun:
    """
    Pack the rollouts of a run, at most `budget` characters of them with what the list and the token texts take.

    Files are taken in an order that is spread evenly over the run wherever it stops.

    Args:
        files (`Sequence[RolloutFile]`):
            The rollout log.
        vocabulary ([`Vocabulary`]):
            Numbers the tokens.
        budget (`int`):
            Most characters.
        keep_text (`bool`):
            Whether prompts and messages are kept as texts too, for tokens that have none.
        problems (`list[str]`):
            Gets a line for each file with a fault.
    """
    parts: list[tuple[int, list[tuple[str, Index]]]] = []
    tools, spent, known = ToolStatistics(), 0, len(vocabulary.ids)
    order = [files[place] for place in spread_order(len(files))]
    places = {file.path: place for place, file in enumerate(files)}
    for file, table in read_tables(order, problems):
        tools.add(table)
        packed = list(_pack_table(table, vocabulary, keep_text))
        spent += AROUND * (len(vocabulary.ids) - known)
        known = len(vocabulary.ids)
        fitting = []
        for chunk, rows in packed:  # of the first file that does not fit, what does
            size = len(chunk) + AROUND + len(json.dumps(vars(rows)))
            if spent + size > budget:
                break
            spent += size
            fitting.append((chunk, rows))
        parts.append((places[file.path], fitting))
        if len(fitting) < len(packed):
            break
    index, chunks, sizes = Index(), [], []
    for _, packed in sorted(parts, key=lambda part: part[0]):
        for chunk, rows in packed:
            chunks.append(chunk)
            sizes.append(len(rows.step))
            for name, column in vars(index).items():
                column.extend(getattr(rows, name))
    return PackedRun(chunks, index, sizes, tools, sum(file.rows for file in files))


def spread_order(count: int) -> list[int]:
    """The numbers below `count`, each beginning of them spread evenly over all (the van der Corput sequence)."""
    bits = max(count - 1, 1).bit_length()
    reversed_bits = (int(format(number, f"0{bits}b")[::-1], 2) for number in range(2**bits))
    return [number for number in reversed_bits if number < count]


def _pack_table(table: RolloutTable, vocabulary: Vocabulary, keep_text: bool) -> Iterator[tuple[str, Index]]:
    for start in range(0, len(table), CHUNK):
        rows = range(start, min(start + CHUNK, len(table)))
        packed = gzip.compress(pack_chunk(table, rows, vocabulary, keep_text), compresslevel=6, mtime=0)
        yield base64.b64encode(packed).decode("ascii"), _index(table, rows)


def _index(table: RolloutTable, rows: range) -> Index:
    rewards = [float(table.reward[row]) for row in rows]
    return Index(
        step=[int(table.step[row]) for row in rows],
        batch=[int(table.batch[row]) for row in rows],
        group=[int(table.group[row]) for row in rows],
        rollout=[int(table.rollout[row]) for row in rows],
        reward=[round(reward, 4) if np.isfinite(reward) else None for reward in rewards],
        stop=[table.stop_reason[row] for row in rows],
        tools=[list(dict.fromkeys(map(tool_name, table.tools[row]))) for row in rows],
        failed=[sum(status != "ok" for _, status, _ in calls_of(table.turns[row])) for row in rows],
        tokens=[int(table.completion_ids.lengths[row]) for row in rows],
        assisted=[int(table.assisted[row]) for row in rows],
    )


def pack_chunk(table: RolloutTable, rows: range, vocabulary: Vocabulary, keep_text: bool) -> bytes:
    """
    The bytes of a chunk, before compression.

    Args:
        table ([`RolloutTable`]):
            Where the rollouts are.
        rows (`range`):
            Which of them.
        vocabulary ([`Vocabulary`]):
            Numbers the tokens.
        keep_text (`bool`):
            Whether to add prompts and messages as texts.
    """
    prompts: dict[bytes, int] = {}
    prompt_of = [prompts.setdefault(table.prompt_ids.row(row).tobytes(), len(prompts)) for row in rows]
    first = {number: row for row, number in reversed(list(zip(rows, prompt_of, strict=True)))}
    unique = [table.prompt_ids.row(first[number]) for number in range(len(prompts))]
    prompt_tokens = vocabulary.number(np.concatenate(unique)) if unique else np.zeros(0, dtype=np.int64)
    tokens = vocabulary.number(_part(table.completion_ids, rows))
    wide = bool(max(prompt_tokens.max(initial=0), tokens.max(initial=0)) > 0xFFFF)
    assistant, forced = _part(table.tool_mask, rows) != 0, _part(table.forced_mask, rows) != 0
    kinds = np.where(forced & assistant, FORCED, np.where(assistant, SAMPLED, TOOL))
    figures = {name: _part(table.figures[name], rows) for name in FIGURES if name in table.figures}
    if "ratio" in figures:
        figures["ratio"] = figures["ratio"].astype(np.float64) - 1.0  # half precision is fine only near 0
    records = [
        {
            "tokens": int(table.completion_ids.lengths[row]),
            "prompt": number,
            "turns": [_turn(turn) for turn in table.turns[row]],
            "rewards": table.rewards[row],
            **({"text": [table.prompt[row], table.messages[row]]} if keep_text else {}),
        }
        for row, number in zip(rows, prompt_of, strict=True)
    ]
    header = {
        "wide": wide,
        "prompts": [len(prompt) for prompt in unique],
        "figures": list(figures),
        "rollouts": records,
    }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    width = ">u4" if wide else ">u2"
    columns = [_planes(prompt_tokens.astype(width)), _planes(tokens.astype(width)), kinds.astype(np.uint8).tobytes()]
    with np.errstate(over="ignore"):
        columns += [_planes(values.astype(">f2")) for values in figures.values()]
    return len(text).to_bytes(4, "big") + text + b"".join(columns)


def _part(column: Lists, rows: range) -> np.ndarray:
    """The values of neighbouring rows."""
    return column.values[column.offsets[rows.start] : column.offsets[rows.stop]]


def _planes(values: np.ndarray) -> bytes:
    """Big-endian numbers, their first bytes before their second ones, and so on."""
    return values.view(np.uint8).reshape(-1, values.dtype.itemsize).T.tobytes()


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"start": turn.get("start", 0), "end": turn.get("end", 0), "calls": calls_of([turn])}
    if turn.get("stop_reason", "stop") != "stop":
        found["stop"] = turn["stop_reason"]
    if turn.get("sample_seconds"):
        found["seconds"] = round(turn["sample_seconds"], 3)
    rewards = [result.get("reward") for result in turn.get("tool_results") or ()]
    total = sum(reward for reward in [turn.get("reward"), *rewards] if reward is not None)
    return {**found, "reward": total} if total else found
