"""BFCL `multi_turn_base`: 200 tasks of the Berkeley Function Calling Leaderboard that a user poses turn by turn, in
worlds that keep their state (a file system, a car, a stock broker, ...).

The worlds and the checker that judges a task are the leaderboard's own. Each turn of the user is a rollout that
continues the conversation so far, in the world as the last turn left it.
"""

import copy
import importlib
import importlib.util
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from datasets import Dataset

from trl_toolgrpo import Tool
from trl_toolgrpo.types import JSONObject, JSONValue, Message, Row

from ..task import Task, Verdict
from .task import read_questions, to_json_schema


CATEGORY = "multi_turn_base"
SYSTEM_PROMPT = "Use the functions to do what the user asks. When it is done, say so in a few words."
CHECKER = "bfcl_eval.eval_checker.multi_turn_eval"

_CHECKS = itertools.count()


@dataclass
class World:
    """
    The state of one task.

    Args:
        entry (`dict`):
            The task in the leaderboard's form.
        truth (`list[list[str]]`):
            For each turn, the calls that solve it.
        tools (`list[Tool]`):
            Methods of the task's classes.
        calls (`list[list[str]]`):
            Calls made in each turn so far, as Python source.
        prompt, history (`list[dict]`):
            Messages before and after the rollout of the current turn.
        ended (`bool`):
            Whether the task is over, after its last turn or after a turn that did not end properly.
    """

    entry: JSONObject
    truth: list[list[str]]
    tools: list[Tool] = field(default_factory=list)
    calls: list[list[str]] = field(default_factory=list)
    prompt: list[Message] = field(default_factory=list)
    history: list[Message] = field(default_factory=list)
    ended: bool = False


class MultiTurnEnvironment:
    """
    The environment of one turn, in the world of its task.

    Args:
        worlds (`dict[str, World]`):
            The world of each task, by its id.

    Attributes:
        tools (`list[Tool]`):
            Methods of the classes of the current task, set by `reset`.
    """

    def __init__(self, worlds: dict[str, World]) -> None:
        self.tools: list[Tool] = []
        self._worlds = worlds

    def reset(self, row_id: str, turn: int, **row: object) -> None:
        """
        Prepare for a turn.

        Args:
            row_id (`str`):
                Id of the task.
            turn (`int`):
                Which of its turns.
            row (`dict`):
                The other columns of the data set, which are ignored.
        """
        world = self._worlds[row_id]
        del world.calls[turn:]
        world.calls.append([])
        self.tools = world.tools


class MultiTurn:
    """
    Tasks of the category, asked turn by turn.

    Args:
        size (`int`):
            Number of tasks, at most 200.
        seed (`int`, *optional*, defaults to `0`):
            Seed of their choice.

    Raises:
        ImportError: if the package `bfcl-eval` is not installed.
        ValueError: if there are fewer tasks.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        questions = read_questions(None, CATEGORY)
        if size > len(questions):
            raise ValueError(f"You asked for {size} tasks, but there are {len(questions)}. Lower --limit.")
        chosen = random.Random(seed).sample(questions, size)
        self.worlds = {entry["id"]: open_world(entry, answer["ground_truth"]) for entry, answer in chosen}
        self.records: list[tuple[str, int, Verdict]] = []

    def task(self) -> Task:
        """Return the first turn as a [`Task`]."""
        first = Dataset.from_list(self._rows(0))
        return Task(first, first, partial(MultiTurnEnvironment, self.worlds), self.judge)

    def turns(self) -> Iterator[list[Message]]:
        """Yield the rows of each turn; the rollouts of one must be judged before the next is taken."""
        for turn in range(max(len(world.entry["question"]) for world in self.worlds.values())):
            rows = self._rows(turn)
            if rows:
                yield rows

    def _rows(self, turn: int) -> list[Message]:
        # A list, since a `Dataset` would merge the arguments of different tools
        rows = []
        for row_id, world in self.worlds.items():
            asked = world.entry["question"]
            if turn < len(asked) and not world.ended:
                before = world.history if turn else [{"role": "system", "content": SYSTEM_PROMPT}]
                world.prompt = [*before, *asked[turn]]
                row = {"row_id": row_id, "split": "held_out", "prompt": world.prompt, "difficulty": len(asked)}
                rows.append({**row, "turn": turn})
        return rows

    def judge(self, completion: list[Message], environment: MultiTurnEnvironment, row: Row) -> Verdict:
        """
        Judge a turn. The leaderboard's checker judges the last one of a task.

        Args:
            completion (`list[dict]`):
                Messages of the rollout.
            environment ([`MultiTurnEnvironment`]):
                Its environment.
            row (`dict`):
                Its row.

        Returns:
            [`Verdict`]: a success only for the last turn of a task that was solved.
        """
        world = self.worlds[row["row_id"]]
        finished = bool(completion) and completion[-1]["role"] == "assistant" and not completion[-1].get("tool_calls")
        world.history = [*world.prompt, *completion]
        called = any(world.calls)
        if finished and row["turn"] + 1 < len(world.entry["question"]):
            return Verdict(False, 0.0, called)
        world.ended = True
        success = finished and check(world)
        verdict = Verdict(success, float(success), called)
        self.records.append((row["row_id"], row["difficulty"], verdict))
        return verdict


def open_world(entry: JSONObject, truth: list[list[str]]) -> World:
    """
    Return the world of a task in its initial state.

    Args:
        entry (`dict`):
            The task in the leaderboard's form.
        truth (`list[list[str]]`):
            For each turn, the calls that solve it.
    """
    backends = importlib.import_module("bfcl_eval.constants.executable_backend_config")
    world = World(entry, truth)
    for name in entry["involved_classes"]:
        instance = getattr(importlib.import_module(backends.CLASS_FILE_PATH_MAPPING[name]), name)()
        if name not in backends.STATELESS_CLASSES:
            instance._load_scenario(copy.deepcopy(entry["initial_config"].get(name, {})), long_context=False)
        for described in _documentation(backends.MULTI_TURN_FUNC_DOC_FILE_MAPPING[name]):
            if described["name"] not in entry.get("excluded_function", ()):
                method = partial(_call, world, getattr(instance, described["name"]))
                parameters = to_json_schema(described["parameters"])
                world.tools.append(Tool(described["name"], described["description"], parameters, method))
    return world


def check(world: World) -> bool:
    """Return whether the calls solve the task, by the leaderboard's checker. It runs them and the right ones in new
    worlds, and compares states and answers after each turn."""
    checker = importlib.import_module(f"{CHECKER}.multi_turn_checker")
    name = f"policy_{next(_CHECKS)}"
    made = [[[call] for call in turn] for turn in world.calls]
    try:
        return bool(checker.multi_turn_checker(made, world.truth, world.entry, CATEGORY, name)["valid"])
    finally:  # the checker never removes its worlds
        played = vars(importlib.import_module(f"{CHECKER}.multi_turn_utils"))
        for variable in [key for key in played if re.match(rf"{name}(_ground_truth)?_eval_", key)]:
            del played[variable]


def _call(world: World, method: Callable[..., object], /, **arguments: JSONValue) -> object:
    world.calls[-1].append(f"{method.__name__}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})")
    return method(**arguments)


def _documentation(name: str) -> list[Message]:
    file = Path(importlib.import_module("bfcl_eval").__path__[0]) / "data" / "multi_turn_func_doc" / name
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
