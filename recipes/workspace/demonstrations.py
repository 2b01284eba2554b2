"""Scripted conversations about the workspace, for the warm start of the tiny model.

The demonstrator is careless: it often stops before the last call and answers with the result of the one before. A
model that imitates it has all the skills and this bad habit, which GRPO then trains away. Now and then the
demonstrator also mistypes an id, reads the error and tries again; the model imitates the correction, not the mistake.
"""

import json
import random
import zlib

from trl_toolgrpo.types import JSONObject, Message, Row

from .environment import WorkspaceEnvironment


def demonstrate(row: Row, slip_rate: float, mistype_rate: float = 0.0, seed: int = 0) -> list[Message]:
    """
    Answer a question of the workspace by its plan.

    Args:
        row (`dict`):
            Row of a task that [`build_workspace`] builds.
        slip_rate (`float`):
            Probability of stopping early, after a call chosen uniformly from all but the last.
        mistype_rate (`float`, *optional*, defaults to `0.0`):
            Probability that a call with an employee id is first made with a wrong one.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the slips, together with the row's id.

    Returns:
        `list[dict]`: the conversation, prompt included. Messages that must not be imitated have `imitate` False.
    """
    randomness = random.Random(zlib.crc32(f"{row['row_id']} {seed}".encode()))
    environment = WorkspaceEnvironment()
    environment.reset(**row)
    messages, answer, plan = list(row["prompt"]), row["answer"], json.loads(row["plan"])
    ids = [person["employee_id"] for person in row["employees"]]
    calls = len(plan)
    if calls > 1 and randomness.random() < slip_rate:
        calls = randomness.randint(1, calls - 1)
    for name, arguments in plan[:calls]:
        if "employee_id" in arguments and randomness.random() < mistype_rate:
            wrong = {"employee_id": mistyped(arguments["employee_id"], ids, randomness)}
            messages += call_messages(environment, name, wrong, imitate=False)
        messages += call_messages(environment, name, arguments)
    if calls < len(plan):
        answer = str(list(json.loads(messages[-1]["content"]).values())[-1])
    return [*messages, {"role": "assistant", "content": answer}]


def mistyped(employee_id: int, employee_ids: list[int], randomness: random.Random) -> int:
    """Return an id with one of its two pairs of digits changed, which belongs to nobody."""
    while True:
        high, low = divmod(employee_id, 100)
        wrong = randomness.choice([100 * randomness.randint(10, 99) + low, 100 * high + randomness.randint(0, 99)])
        if wrong not in employee_ids:
            return wrong


def call_messages(
    environment: WorkspaceEnvironment, name: str, arguments: JSONObject, imitate: bool = True
) -> list[Message]:
    """Return the message of a call and that of its result, which is an error if the call raised."""
    try:
        result = getattr(environment, name)(**arguments)
    except LookupError as error:
        result = {"error": str(error)}
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call], "imitate": imitate},
        {"role": "tool", "name": name, "content": json.dumps(result)},
    ]
