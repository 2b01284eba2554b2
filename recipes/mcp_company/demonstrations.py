"""Scripted conversations with the servers of the company, for the warm start of the tiny model."""

import json
import random
import zlib
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from trl_toolgrpo.types import JSONObject, JSONValue, Message, Row

from .task import people, time_arguments, time_there


ZONE = (
    "{} IANA timezone name (e.g., {}). Use 'Etc/UTC' as local timezone if no {} timezone provided by the user."
)
TOOLS = [
    ("read_query", "Execute a SELECT query on the SQLite database", {"query": "SELECT SQL query to execute"}),
    (
        "write_query",
        "Execute an INSERT, UPDATE, or DELETE query on the SQLite database",
        {"query": "SQL query to execute"},
    ),
    (
        "convert_time",
        "Convert time between timezones",
        {
            "source_timezone": ZONE.format("Source", "'America/New_York', 'Europe/London'", "source"),
            "time": "Time to convert in 24-hour format (HH:MM)",
            "target_timezone": ZONE.format("Target", "'Asia/Tokyo', 'America/San_Francisco'", "target"),
        },
    ),
]


def demonstrate(row: Row, slip_rate: float, seed: int = 0) -> list[Message]:
    """
    Answer a question with the servers' tools, but carelessly.

    Args:
        row (`dict`):
            The question.
        slip_rate (`float`):
            Probability of leaving out the change that was asked for.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the slips, together with the row's id.

    Returns:
        `list[dict]`: the conversation, prompt included.
    """
    randomness = random.Random(zlib.crc32(f"{row['row_id']} {seed}".encode()))
    where = f"WHERE name = '{row['name']}'"
    if row["kind"] == "time":
        result = converted(**time_arguments(row))
        messages = _call("convert_time", result, **time_arguments(row))
        answer = str(time_there(result))
    else:
        answer = str(people()[row["name"]])
        messages = _call("read_query", f"[{{'salary': {answer}}}]", query=f"SELECT salary FROM employees {where}")
        if row["kind"] == "change" and randomness.random() >= slip_rate:
            query = f"UPDATE employees SET salary = {row['new']} {where}"
            messages += _call("write_query", "[{'affected_rows': 1}]", query=query)
    return [*row["prompt"], *messages, {"role": "assistant", "content": answer}]


def converted(source_timezone: str, time: str, target_timezone: str) -> str:
    """Return the answer of `convert_time`."""
    hours, minutes = map(int, time.split(":"))
    source = datetime.now(ZoneInfo(source_timezone)).replace(hour=hours, minute=minutes, second=0, microsecond=0)
    target = source.astimezone(ZoneInfo(target_timezone))
    apart = ((target.utcoffset() or timedelta()) - (source.utcoffset() or timedelta())).total_seconds() / 3600
    answer = {"source": _moment(source_timezone, source), "target": _moment(target_timezone, target)}
    return json.dumps({**answer, "time_difference": f"{apart:+.1f}h"}, indent=2)


def demonstration_tools() -> list[Message]:
    """Return the servers' tools as the servers describe them."""
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": description,
                "parameters": {
                    "type": "object",
                    "properties": {name: {"type": "string", "description": text} for name, text in arguments.items()},
                    "required": list(arguments),
                },
            },
        }
        for name, description, arguments in TOOLS
    ]


def _call(name: str, result: str, **arguments: JSONValue) -> list[Message]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": name, "content": result},
    ]


def _moment(zone: str, when: datetime) -> JSONObject:
    return {
        "timezone": zone,
        "datetime": when.isoformat(timespec="seconds"),
        "day_of_week": when.strftime("%A"),
        "is_dst": bool(when.dst()),
    }
