"""BFCL `simple_python` and `multiple`: 400 and 200 questions of the Berkeley Function Calling Leaderboard. Each has a
function of its own, or two to four functions of which one is right.

The questions come from the installed `bfcl-eval` package, which is not imported, or from a data set on the Hub.
"""

import importlib.util
import json
import random
import re
from functools import partial
from pathlib import Path

from datasets import Dataset, load_dataset

from trl_toolgrpo import Tool
from trl_toolgrpo.types import JSONObject, JSONValue, Message, Row

from ..task import Task, Verdict
from .answers import matches, share_matched


QUESTIONS = "BFCL_v4_{category}.json"
# Name of the same file in the leaderboard's data set on the Hub
HUB_QUESTIONS = {"simple_python": "BFCL_v3_simple.json", "multiple": "BFCL_v3_multiple.json"}
SYSTEM_PROMPT = "Answer with one call of the function you are given, with all arguments it needs."

# The leaderboard uses Python's names of types; `any` says nothing about a value
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None}


class BFCLEnvironment:
    """
    The environment of one question. Its functions are the only tools, and a call of one is recorded and ends the
    rollout.

    Attributes:
        tools (`list[Tool]`):
            The functions of the current question, set by `reset`.
        calls (`list[tuple[str, dict]]`):
            Name and arguments of every call that matched the schema, in order.
    """

    def __init__(self) -> None:
        self.tools: list[Tool] = []
        self.calls: list[tuple[str, JSONObject]] = []

    def reset(self, function: str, **row: object) -> None:
        """
        Prepare for a question.

        Args:
            function (`str`):
                JSON text of the function in the leaderboard's form, or of a list of several.
            row (`dict`):
                The other columns of the data set, which are ignored.
        """
        self.calls, self.tools = [], []
        for name, described in functions_of(function).items():
            parameters, record = to_json_schema(described["parameters"]), partial(self._record, name)
            self.tools.append(Tool(name, described["description"], parameters, record, ends_rollout=True))

    def _record(self, function: str, /, **arguments: JSONValue) -> str:
        self.calls.append((function, arguments))
        return "Done."


def functions_of(function: str) -> dict[str, JSONObject]:
    """Return the functions in a row's JSON text by their names as identifiers."""
    described = json.loads(function)
    return {identifier(one["name"]): one for one in (described if isinstance(described, list) else [described])}


def build_bfcl(
    train_size: int,
    held_out_size: int,
    seed: int = 0,
    dataset_name: str | None = None,
    category: str = "simple_python",
) -> Task:
    """
    Build the task.

    Args:
        train_size, held_out_size (`int`):
            Number of questions in each split, together at most those of the category; the splits are disjoint.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split.
        dataset_name (`str`, *optional*):
            The leaderboard's data set on the Hub, to read if the `bfcl-eval` package is not installed.
        category (`str`, *optional*, defaults to `"simple_python"`):
            `"simple_python"` (400 questions) or `"multiple"` (200).

    Returns:
        [`Task`]: the task. In addition to the columns of every task, its rows hold `function` and `answer`, both
        JSON text, since the schemas of different rows have different shapes.

    Raises:
        ImportError: if there is neither the package nor a data set.
        ValueError: if there are fewer questions than the splits need.
    """
    rows = [_row(question, answer) for question, answer in read_questions(dataset_name, category)]
    if train_size + held_out_size > len(rows):
        raise ValueError(
            f"You asked for {train_size} training and {held_out_size} held-out questions, but there are {len(rows)}. "
            f"Lower --train_size or --held_out_size."
        )
    order = random.Random(seed).sample(rows, len(rows))
    held_out, train = order[:held_out_size], order[held_out_size : held_out_size + train_size]
    return Task(
        Dataset.from_list([{**row, "split": "train"} for row in train]),
        Dataset.from_list([{**row, "split": "held_out"} for row in held_out]),
        BFCLEnvironment,
        judge,
    )


def read_questions(
    dataset_name: str | None = None, category: str = "simple_python"
) -> list[tuple[JSONObject, JSONObject]]:
    """
    Read the questions and their published answers in the leaderboard's form.

    Args:
        dataset_name (`str`, *optional*):
            Data set on the Hub to read if the package is not installed.
        category (`str`, *optional*, defaults to `"simple_python"`):
            Which questions.

    Returns:
        `list[tuple[dict, dict]]`: questions (`id`, `question`, `function`) with their answers (`id`, `ground_truth`).

    Raises:
        ImportError: if there is neither the package nor a data set.
    """
    spec = importlib.util.find_spec("bfcl_eval")
    if spec is not None and spec.submodule_search_locations:
        data, name = Path(spec.submodule_search_locations[0]) / "data", QUESTIONS.format(category=category)
        files = [data / name, data / "possible_answer" / name]
        texts = [file.read_text(encoding="utf-8").splitlines() for file in files]
    elif dataset_name is not None:
        # As text: the schemas of different questions have different shapes, which a table would merge
        parts = [f"hf://datasets/{dataset_name}/{part}{HUB_QUESTIONS[category]}" for part in ("", "possible_answer/")]
        texts = [load_dataset("text", data_files=part, split="train")["text"] for part in parts]
    else:
        raise ImportError(
            "The questions come from the package bfcl-eval, which is not installed. Run "
            "`pip install --no-deps bfcl-eval`, or pass --dataset_name with the leaderboard's data set on the Hub."
        )
    questions, answers = ([json.loads(line) for line in lines if line.strip()] for lines in texts)
    by_id = {answer["id"]: answer for answer in answers}
    return [(question, by_id[question["id"]]) for question in questions]


def _row(question: JSONObject, answer: JSONObject) -> JSONObject:
    """Return a row of the task, without its split. Difficulty is the number of required arguments, from 1 to 3, or the
    number of functions to choose from."""
    functions = question["function"]
    (messages,) = question["question"]
    (truth,) = answer["ground_truth"]
    required = min(max(len(functions[0]["parameters"].get("required", ())), 1), 3)
    return {
        "row_id": question["id"],
        "prompt": [{"role": "system", "content": SYSTEM_PROMPT}, *messages],
        "difficulty": required if len(functions) == 1 else len(functions),
        "function": json.dumps(functions if len(functions) > 1 else functions[0]),
        "answer": json.dumps(truth),
    }


def identifier(name: str) -> str:
    """Return a function's name as an identifier: `math.factorial` becomes `math_factorial`."""
    return re.sub(r"\W", "_", name)


def to_json_schema(schema: JSONObject) -> JSONObject:
    """
    Convert one of the leaderboard's schemas to JSON Schema, nested ones included.

    Args:
        schema (`dict`):
            A schema with types such as `dict`, `float`, `tuple` and `any`.

    Returns:
        `dict`: the schema with types of JSON Schema; `any` has none. The mark `optional` is left out.
    """
    mapped: JSONObject = {}
    for key, value in schema.items():
        if key == "type":
            kind = TYPES.get(value, value)
            mapped.update({} if kind is None else {"type": kind})
        elif key == "properties":
            mapped[key] = {name: to_json_schema(inner) for name, inner in value.items()}
        elif key == "items":
            mapped[key] = to_json_schema(value)
        elif key != "optional":
            mapped[key] = value
    return mapped


def judge(completion: list[Message], environment: BFCLEnvironment, row: Row) -> Verdict:
    """
    Judge a rollout by its calls.

    Args:
        completion (`list[dict]`):
            Its messages after the prompt.
        environment ([`BFCLEnvironment`]):
            Its environment.
        row (`dict`):
            Its row.

    Returns:
        [`Verdict`]: a success is one call, and no other attempt, of the right function with the published arguments.
        Short of that, 0.2 for a first call that matches the schema, and up to 0.4 more for the share of its arguments
        that are right, if the function is.
    """
    if not environment.calls:
        return Verdict(False, 0.0, False)
    ((right, accepted),) = json.loads(row["answer"]).items()
    name, arguments = environment.calls[0]
    if name != identifier(right):
        return Verdict(False, 0.2, True)
    parameters = functions_of(row["function"])[name]["parameters"]
    attempts = sum(len(message.get("tool_calls") or ()) for message in completion)
    success = attempts == 1 and matches(arguments, accepted, parameters)
    share = 0.2 + 0.4 * share_matched(arguments, accepted, parameters)
    return Verdict(success, 1.0 if success else share, True)
