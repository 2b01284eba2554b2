"""TRL's table of completions (`log_completions`), of anything that a policy, a tool or a reward function may say."""

import json
from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from typing import Any

import pandas as pd
from trl.trainer.utils import strip_images_from_messages

from .redaction import Redactor
from .tools.results import encodable


def storable_logs(logs: Mapping[str, Any], redactor: Redactor) -> dict[str, Any]:
    """
    Return TRL's `_logs` so that its table can be written and printed, without secrets.

    Arrow gives a column one type. The arguments of calls become the JSON text of an object; a column whose values
    differ in type all the same, or that parquet has no type for, becomes JSON text as a whole. A column that a reward
    function began to log later begins with nulls.

    Args:
        logs (`Mapping[str, Any]`):
            `prompt`, `completion`, `rewards`, `advantages`, `extra` and `images`; they are not changed.
        redactor ([`Redactor`]):
            Keeps secrets out.
    """
    count = len(logs["prompt"])
    shown = dict(logs)
    for name in ("prompt", "completion"):
        shown[name] = _column(list(logs[name]), redactor)
    extra = {}
    for name, values in logs["extra"].items():
        missing = [None] * (count - len(values))
        extra[str(name)] = _column([*missing, *values], redactor)
    return {**shown, "extra": extra}


def aligned(pending: dict[Any, list[Any]], known: Iterable[Any], count: int, say: Callable[[str, str], None]) -> None:
    """
    Give each column that reward functions log a value for each rollout of a batch, in place.

    Args:
        pending (`dict[Any, list]`):
            What was logged of the batch, by column.
        known (`Iterable`):
            Columns that were logged before.
        count (`int`):
            Rollouts of the batch.
        say (`Callable`):
            Gets a key and a sentence for each column that was logged with another number of values, which are left
            out.
    """
    for name, values in list(pending.items()):
        if len(values) != count:
            say(
                f"log_extra {name}",
                f"`log_extra({name!r}, ...)` was called with {len(values)} values in all for a batch of {count} "
                f"rollouts; they are left out. Pass one value for each completion, once in a batch",
            )
            pending[name] = [None] * count
    for name in known:
        if name not in pending:
            pending[name] = [None] * count


def _shown(value: Any, redactor: Redactor) -> Any:
    """A value without secrets; a conversation as TRL prints it: without nulls, arguments as text."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return redactor.data(value)
    return [_message(message, redactor) for message in strip_images_from_messages(value)]


def _message(message: dict[str, Any], redactor: Redactor) -> dict[str, Any]:
    kept = {key: redactor.data(value) for key, value in message.items() if value is not None and key != "tool_calls"}
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        kept["tool_calls"] = [_call(call, redactor) for call in calls]
    return kept


def _call(call: Any, redactor: Redactor) -> Any:
    call = call if isinstance(call, dict) else {"name": _text(call)}
    function = call.get("function")
    if not isinstance(function, dict):
        function = {"name": call.get("name", "?"), "arguments": call.get("arguments")}
    arguments = redactor.json(_object_text(function.get("arguments")))  # not `data`: it stays JSON
    function = {**redactor.data({**function, "arguments": None}), "arguments": arguments}
    return {**redactor.data({**call, "function": None}), "function": function}


def _object_text(arguments: Any) -> str:
    if isinstance(arguments, str):
        try:
            if isinstance(json.loads(arguments), dict):
                return arguments
        except (ValueError, RecursionError):
            pass
    if arguments is None or arguments == "":
        arguments = {}
    return _json(arguments if isinstance(arguments, dict) else {"arguments": arguments})


def _json(value: Any) -> str:
    try:
        return json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # keys that are no text, cycles, depth
        return json.dumps({"text": _text(value)}, ensure_ascii=False)


def _text(value: Any) -> str:
    try:
        return str(value)
    except Exception:  # an object of a user
        return f"<{type(value).__name__}>"


def _column(values: list[Any], redactor: Redactor) -> list[Any]:
    """Values that parquet can hold: as they are, or each that is no text as JSON text."""
    try:
        found = [encodable(_shown(value, redactor)) for value in values]
        pd.DataFrame({"column": found}).to_parquet(BytesIO())
        return found
    except Exception:  # of Arrow, or of an object that it asks for its values
        return [None if value is None else _redacted_json(value, redactor) for value in values]


def _redacted_json(value: Any, redactor: Redactor) -> str:
    text = redactor.text(value) if isinstance(value, str) else redactor.json(_json(value))
    return encodable(text)
