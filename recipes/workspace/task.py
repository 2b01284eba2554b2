"""The workspace task: questions about a company that only its database can answer.

A question needs one, two or three dependent calls. A rollout is judged by its final answer and by the state of the
database.
"""

import json
import random
import re
from functools import partial
from itertools import product

from datasets import Dataset

from trl_toolgrpo.types import JSONObject, Message, Row

from ..task import Task, Verdict, final_answer
from .environment import WorkspaceEnvironment, progress


SYSTEM_PROMPT = "Use the tools, one call at a time. Then answer with the value alone."

FIRST_NAMES = [
    "Ada", "Boris", "Chloe", "Dario", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Liam", "Mira",
    "Nadia", "Omar", "Petra", "Quinn", "Ravi",
]
LAST_NAMES = [
    "Abadi", "Brandt", "Chen", "Duarte", "Egede", "Fontana", "Garcia", "Holt", "Ivanova", "Jensen", "Kato",
    "Lund", "Moreau", "Novak", "Okafor",
]

QUESTIONS = {
    "employee_id": (1, ["What is the employee id of {subject}?", "Which employee id does {subject} have?"]),
    "salary": (2, ["What is the salary of {subject}?", "Which salary does {subject} have?"]),
    "manager": (2, ["Who is the manager of {subject}?", "Which manager does {subject} have?"]),
    "manager_salary": (
        3,
        ["What is the salary of the manager of {subject}?", "Which salary does the manager of {subject} have?"],
    ),
    "slack_salary": (
        3,
        [
            "Send the salary of {subject} to {recipient} on Slack. What is it?",
            "Slack {recipient} the salary of {subject}. What is it?",
        ],
    ),
}

# Of the 18 x 15 names, 9000 ids and 800 salaries, this share belongs only to the held-out split
HELD_OUT_SHARE = 0.2
COMPANY_SIZE = 6


def judge(completion: list[Message], environment: WorkspaceEnvironment, row: Row) -> Verdict:
    """
    Judge a rollout by its final answer and by the state it left.

    Args:
        completion (`list[dict]`):
            Its messages after the prompt.
        environment ([`WorkspaceEnvironment`]):
            Its environment.
        row (`dict`):
            Its row.

    Returns:
        [`Verdict`]: a success is the right answer, and exactly the messages that were asked for, if any. Otherwise the
        reward is half the share of the dependent calls that were made in order. Rewards of turns are subtracted.
    """
    plan = json.loads(row["plan"])
    wanted = [(step[1]["recipient"], step[1]["text"]) for step in plan if step[0] == "send_slack_message"]
    right = answers(final_answer(completion), row["answer"], row["employees"], row["subject"])
    success = right and environment.outbox == wanted
    reward = 1.0 if success else progress(environment.calls, plan)
    return Verdict(success, reward - environment.rewarded, bool(environment.calls))


def answers(text: str, expected: str, employees: list[Message], subject: str) -> bool:
    """
    Return whether a text gives the expected value and no other candidate.

    Args:
        text (`str`):
            The assistant's answer, from the bare value to a whole sentence.
        expected (`str`):
            A number or a full name.
        employees (`list[dict]`):
            The people of the company; naming another one than expected is a wrong answer.
        subject (`str`):
            The person in question, who may be named.

    Returns:
        `bool`: whether the answer is right.
    """
    if expected.isdigit():
        return set(re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d{3})", "", text))) == {expected}
    others = {employee["name"] for employee in employees} - {expected, subject}
    return expected in text and not any(name in text for name in others)


def build_workspace(
    train_size: int, held_out_size: int, seed: int = 0, difficulty: int | None = None, turn_rewards: bool = False
) -> Task:
    """
    Build the task.

    Args:
        train_size (`int`):
            Number of training rows.
        held_out_size (`int`):
            Number of held-out rows; their names, ids and salaries occur in no training row.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the rows. The division into splits does not depend on it.
        difficulty (`int`, *optional*):
            Ask only questions that need this number of calls.
        turn_rewards (`bool`, *optional*, defaults to `False`):
            Reward each dependent call in the turn that makes it, and the rest at the end, instead of everything at the
            end. The sum is the same.

    Returns:
        [`Task`]: the task. In addition to the columns of every task, its rows hold `kind`, `subject`, `answer`, `plan`
        (JSON, the dependent calls in order) and `employees` (the rows of the database).

    Raises:
        ValueError: if no question needs this number of calls.
    """
    kinds = [kind for kind, (calls, _) in QUESTIONS.items() if difficulty in (None, calls)]
    if not kinds:
        raise ValueError(
            f"You asked for questions of difficulty {difficulty}, but there are only those of difficulty "
            f"{', '.join(map(str, sorted({calls for calls, _ in QUESTIONS.values()})))}."
        )
    train, held_out = _rows("train", train_size, seed, kinds), _rows("held_out", held_out_size, seed, kinds)
    environment = partial(WorkspaceEnvironment, turn_rewards)
    return Task(Dataset.from_list(train), Dataset.from_list(held_out), environment, judge)


def _rows(split: str, size: int, seed: int, kinds: list[str]) -> list[Message]:
    pools = [
        _share([f"{first} {last}" for first, last in product(FIRST_NAMES, LAST_NAMES)], split),
        _share(list(range(1000, 10_000)), split),
        _share(list(range(20_000, 100_000, 100)), split),
    ]
    randomness = random.Random(f"{split}-{seed}")
    return [_row(f"{split}-{i}", kinds[i % len(kinds)], pools, randomness) for i in range(size)]


def _share(values: list, split: str) -> list:
    shuffled = random.Random(len(values)).sample(values, len(values))
    cut = round(len(values) * HELD_OUT_SHARE)
    return shuffled[:cut] if split == "held_out" else shuffled[cut:]


def _row(row_id: str, kind: str, pools: list[list], randomness: random.Random) -> JSONObject:
    names, ids, salaries = (randomness.sample(pool, COMPANY_SIZE) for pool in pools)
    employees = [
        {
            "employee_id": ids[i],
            "name": names[i],
            "salary": salaries[i],
            "manager_id": randomness.choice(ids[:i] + ids[i + 1 :]),
        }
        for i in range(COMPANY_SIZE)
    ]
    subject, recipient = employees[0], employees[1]
    manager = next(person for person in employees if person["employee_id"] == subject["manager_id"])
    find = ["find_employee", {"name": subject["name"]}]
    salary = ["get_salary", {"employee_id": subject["employee_id"]}]
    boss = ["get_manager", {"employee_id": subject["employee_id"]}]
    boss_salary = ["get_salary", {"employee_id": manager["employee_id"]}]
    send = ["send_slack_message", {"recipient": recipient["name"], "text": str(subject["salary"])}]
    plan, answer = {
        "employee_id": ([find], subject["employee_id"]),
        "salary": ([find, salary], subject["salary"]),
        "manager": ([find, boss], manager["name"]),
        "manager_salary": ([find, boss, boss_salary], manager["salary"]),
        "slack_salary": ([find, salary, send], subject["salary"]),
    }[kind]
    difficulty, phrasings = QUESTIONS[kind]
    question = randomness.choice(phrasings).format(subject=subject["name"], recipient=recipient["name"])
    return {
        "row_id": row_id,
        "split": row_id.partition("-")[0],
        "prompt": [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}],
        "difficulty": difficulty,
        "kind": kind,
        "subject": subject["name"],
        "answer": str(answer),
        "plan": json.dumps(plan),
        "employees": randomness.sample(employees, COMPANY_SIZE),
    }
