"""The rollouts as the JSON that the page's scripts read.

Every rollout is in the list; as many as fit into the size of the page also have their tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2.utils import htmlsafe_json_dumps

from ..types import JSONObject, JSONValue, Row
from .rollouts import FIGURES, read_rollout_file, short_number
from .tools import Call, calls_of, tool_name
from .vocabulary import Vocabulary


JSON_OPTIONS: JSONObject = {"separators": (",", ":"), "allow_nan": False}
"""How JSON of the page is written. Numbers that are not finite must be replaced by None before."""
FIELDS = ("step", "batch", "group", "rollout", "reward", "assisted", "stop", "tools", "failed", "tokens", "whole")
"""Names of the values in each row of the list. `whole` holds the tokens, or null."""
ROW_SIZE = 100
"""Characters set aside for a row of the list without its tokens."""

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass
class RunData:
    """
    The rollouts of a run that are in the page.

    Args:
        vocabulary ([`Vocabulary`]):
            Texts of their tokens.
        rows (`list[list]`):
            The values of [`FIELDS`] for each rollout, in the order of the log.
        prompts (`dict[tuple[int, ...], int]`):
            Token ids of each prompt, and the number under which `whole` refers to it.
        calls (`list[tuple[int, float | None, Call]]`):
            Number and reward of a rollout with each of its calls.
        without_calls (`list[float]`):
            Rewards of the rollouts without a call.
        total (`int`):
            Rollouts of the log, including those that are not in the list.
    """

    vocabulary: Vocabulary
    rows: list[list[JSONValue]] = field(default_factory=list)
    prompts: dict[tuple[int, ...], int] = field(default_factory=dict)
    calls: list[tuple[int, float | None, Call]] = field(default_factory=list)
    without_calls: list[float] = field(default_factory=list)
    total: int = 0

    @property
    def shown(self) -> int:
        """Number of rollouts with their tokens."""
        return sum(row[-1] is not None for row in self.rows)


def collect_rollouts(files: Mapping[Path, int], vocabulary: Vocabulary, room: int, problems: list[str]) -> RunData:
    """
    Read a rollout log into at most about `room` characters of JSON.

    Of a log whose list alone would take more than a quarter of that, only every second file is read, or every third,
    and so on.

    Args:
        files (`Mapping[Path, int]`):
            Files of the rollout log, and the number of rollouts in each.
        vocabulary ([`Vocabulary`]):
            Gets the tokens.
        room (`int`):
            Characters that may be used.
        problems (`list[str]`):
            Gets a line for each fault of a file.
    """
    data = RunData(vocabulary, total=sum(files.values()))
    most = max(room // (4 * ROW_SIZE), 1)
    listed = list(files)[:: max(math.ceil(data.total / most), 1)]
    room -= ROW_SIZE * sum(files[path] for path in listed)
    rows: list[tuple[int, list[JSONValue]]] = []
    for place in spread_order(len(listed)):
        for rollout in read_rollout_file(listed[place], problems):
            calls, reward = calls_of(rollout["turns"]), rollout["reward"]
            data.calls += [(len(rows), reward, call) for call in calls]
            if reward is not None and not calls:
                data.without_calls.append(reward)
            whole, size = _add_tokens(data, rollout, room)
            room = room - size if whole else 0  # after the first that does not fit, none has its tokens
            rows.append((place, _row(rollout, calls, whole)))
    data.rows = [row for _, row in sorted(rows, key=lambda row: row[0])]
    return data


def spread_order(count: int) -> Sequence[int]:
    """Return the numbers below `count` in an order whose every beginning is spread evenly over them."""
    return sorted(range(count), key=lambda number: number * _GOLDEN % 1)


def _add_tokens(data: RunData, rollout: Row, room: int) -> tuple[JSONObject | None, int]:
    """Return the tokens of a rollout and their size; `None` and 0 if that is more than `room`."""
    ids, prompt = rollout["completion_ids"], tuple(rollout["prompt_ids"])
    if len(ids) > room:
        return None, 0
    texts = data.vocabulary.new_texts([*prompt, *ids])
    masks = zip(rollout["tool_mask"], rollout["forced_mask"], strict=True)
    figures = {name: rollout[column] for name, column in FIGURES.items() if len(rollout[column] or ()) == len(ids) > 0}
    whole = {
        "prompt": data.prompts.get(prompt, len(data.prompts)),
        "tokens": ids,
        "kinds": "".join("0" if not assistant else "2" if forced else "1" for assistant, forced in masks),
        "figures": {name: list(map(short_number, values)) for name, values in figures.items()},
        "turns": [_turn(turn) for turn in rollout["turns"]],
        "rewards": rollout["rewards"],
    }
    if data.vocabulary.tokenizer is None:  # tokens have no texts
        whole["text"] = [rollout["prompt"], rollout["messages"]]
    new = [texts, whole, () if prompt in data.prompts else prompt]
    size = len(htmlsafe_json_dumps(new, **JSON_OPTIONS))
    if size > room:
        return None, 0
    data.vocabulary.texts |= texts
    data.prompts.setdefault(prompt, len(data.prompts))
    return whole, size


def _row(rollout: Row, calls: Sequence[Call], whole: JSONObject | None) -> list[JSONValue]:
    places = [rollout[name] for name in ("step", "batch", "group", "rollout")]
    kind = [rollout["reward"], int(rollout["assisted"]), rollout["stop_reason"]]
    tools = list(dict.fromkeys(map(tool_name, rollout["tools"])))
    failed = sum(call.outcome != "ok" for call in calls)
    return [*places, *kind, tools, failed, len(rollout["completion_ids"]), whole]


def _turn(turn: JSONObject) -> JSONObject:
    rewards = [turn.get("reward"), *(result.get("reward") for result in turn["tool_results"])]
    return {
        "start": turn.get("start", 0),
        "calls": calls_of([turn]),
        "stop": turn.get("stop_reason", "stop"),
        "seconds": turn.get("sample_seconds") or 0,
        "reward": sum(reward for reward in rewards if reward is not None),
    }
