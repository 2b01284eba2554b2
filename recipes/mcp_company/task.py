"""The MCP task: questions that two real MCP servers answer, `mcp-server-sqlite` and `mcp-server-time`.

Each rollout has an SQLite server of its own, which starts with the company's database. After the rollout, the judge
asks its servers.
"""

import ast
import json
import random
import sqlite3
from pathlib import Path

from datasets import Dataset

from trl_toolgrpo import MCPSession
from trl_toolgrpo.types import JSONObject, JSONValue, Message, Row

from ..task import Task, Verdict, final_answer
from ..workspace.task import FIRST_NAMES, LAST_NAMES


SYSTEM_PROMPT = "Use the tools, one call at a time. Then answer with the value alone."

ZONES = {
    "Berlin": "Europe/Berlin", "Lisbon": "Europe/Lisbon", "Athens": "Europe/Athens", "Cairo": "Africa/Cairo",
    "Lagos": "Africa/Lagos", "Nairobi": "Africa/Nairobi", "Dubai": "Asia/Dubai", "Tokyo": "Asia/Tokyo",
    "Manila": "Asia/Manila", "Bangkok": "Asia/Bangkok", "Chicago": "America/Chicago", "Denver": "America/Denver",
    "Bogota": "America/Bogota", "Lima": "America/Lima", "Sydney": "Australia/Sydney",
}  # fmt: skip

QUESTIONS = {
    "salary": (1, ["What is the salary of {name}?", "Which salary does {name} have?"]),
    "time": (1, ["It is {time} in {city}. What is the time in {other}?"]),
    "change": (2, ["Set the salary of {name} to {new}. What was it before?"]),
}

FAILURES = ('{"error"', "Database error", "Error")

# Share of the people that only held-out questions are about
HELD_OUT_SHARE = 0.3


def people() -> dict[str, int]:
    """Return everybody in the company with their salary, in a random order that is always the same."""
    randomness = random.Random("company")
    names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    salaries = randomness.sample(range(2000, 10_000), len(names))
    return dict(zip(randomness.sample(names, len(names)), salaries, strict=True))


def make_company(folder: str | Path) -> Path:
    """
    Write the folder that each SQLite server starts with, which holds `company.db`.

    Args:
        folder (`str` or `Path`):
            Folder to write.

    Returns:
        `Path`: the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "company.db").unlink(missing_ok=True)
    with sqlite3.connect(folder / "company.db") as database:
        database.execute("CREATE TABLE employees (name TEXT PRIMARY KEY, salary INTEGER)")
        database.executemany("INSERT INTO employees VALUES (?, ?)", people().items())
    database.close()
    return folder


def build_mcp(train_size: int, held_out_size: int, seed: int, folder: str | Path) -> Task:
    """
    Build the task.

    Args:
        train_size, held_out_size (`int`):
            Number of questions in each split.
        seed (`int`):
            Seed of the questions.
        folder (`str` or `Path`):
            Folder to write the company's database to.

    Returns:
        [`Task`]: the task; its judge asks the servers of the rollout it judges.
    """
    make_company(folder)
    splits = {"train": train_size, "held_out": held_out_size}
    rows = {
        split: [make_row(f"{split}-{index}", seed) for index in range(size)] for split, size in splits.items() if size
    }
    held_out = rows.get("held_out", rows["train"][:1])
    return Task(Dataset.from_list(rows["train"]), Dataset.from_list(held_out), None, judge)


def make_row(row_id: str, seed: int) -> JSONObject:
    """
    Return the row of one question.

    Args:
        row_id (`str`):
            Split and number, joined by a hyphen.
        seed (`int`):
            Seed of the question, together with the row's id.

    Returns:
        `dict`: `row_id`, `split`, `prompt`, `difficulty`, `kind`, and the subjects of the question.
    """
    split = row_id.partition("-")[0]
    randomness = random.Random(f"{row_id} {seed}")
    names = list(people())
    held_out = int(HELD_OUT_SHARE * len(names))
    kind = randomness.choice(list(QUESTIONS))
    about = {
        "name": randomness.choice(names[:held_out] if split == "held_out" else names[held_out:]),
        "new": randomness.randint(2000, 9999),
        "time": f"{randomness.randint(0, 23):02}:{randomness.randrange(0, 60, 5):02}",
    }
    about["city"], about["other"] = randomness.sample(list(ZONES), 2)
    difficulty, phrasings = QUESTIONS[kind]
    question = randomness.choice(phrasings).format(**about)
    prompt = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
    return {"row_id": row_id, "split": split, "prompt": prompt, "difficulty": difficulty, "kind": kind, **about}


def judge(completion: list[Message], servers: MCPSession, row: Row) -> Verdict:
    """
    Judge a rollout by its answer and by the state of its servers.

    Args:
        completion (`list[dict]`):
            Its messages after the prompt.
        servers ([`~trl_toolgrpo.MCPSession`]):
            Its servers.
        row (`dict`):
            Its row.

    Returns:
        [`Verdict`]: a success is the right answer, and a database in which exactly what was asked for has changed.
    """
    name, original = row["name"], people()
    wanted = {**original, name: row["new"]} if row["kind"] == "change" else original
    answered = [message for message in completion if message["role"] == "tool"]
    valid_call = any(not message["content"].startswith(FAILURES) for message in answered)
    answer = final_answer(completion).strip()
    if row["kind"] == "time":
        right = answer == time_there(servers.call("convert_time", **time_arguments(row)).content)
    else:
        right = answer == str(original[name])
    found = people_in(servers.call("read_query", query="SELECT name, salary FROM employees").content)
    success = right and found == wanted
    partly = 0.3 * right + 0.2 * (row["kind"] == "change" and found == wanted) + 0.1 * valid_call
    return Verdict(success, 1.0 if success else partly, valid_call)


def people_in(text: str) -> dict[str, int]:
    """Return the people in an answer of the SQLite server, which writes Python literals; none if it is an error."""
    try:
        return {row["name"]: row["salary"] for row in ast.literal_eval(text)}
    except (ValueError, SyntaxError, TypeError, KeyError):
        return {}


def time_arguments(row: Row) -> dict[str, str]:
    """Return the arguments of `convert_time` for a question."""
    return {
        "source_timezone": ZONES[row["city"]],
        "time": row["time"],
        "target_timezone": ZONES[row["other"]],
    }


def time_there(answer: JSONValue) -> str | None:
    """Return hours and minutes at the target in an answer of `convert_time`; `None` if it has none."""
    answer = json.loads(answer) if isinstance(answer, str) and answer.startswith("{") else answer
    return answer["target"]["datetime"][11:16] if isinstance(answer, dict) and "target" in answer else None
