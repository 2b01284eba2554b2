"""TRL's table of completions (`log_completions`), of anything that a policy, a tool or a reward function may say."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from io import BytesIO

import pandas as pd
from trl.trainer.utils import strip_images_from_messages

from ..redaction import Redactor
from ..tools.results import encodable
from ..types import JSONObject, JSONValue, Message


def storable_logs(logs: Mapping[str, JSONValue], redactor: Redactor) -> dict[str, JSONValue]:
    """
    Return TRL's `_logs` so that its table can be written and printed, without secrets.

    Arrow gives a column one type. The arguments of calls become the JSON text of an object; a column whose values
    still differ in type, or that parquet has no type for, becomes JSON text as a whole. A column that a reward
    function began to log later begins with nulls.

    Args:
        logs (`Mapping[str, JSONValue]`):
            `prompt`, `completion`, `rewards`, `advantages`, `extra` and `images`; they are not changed.
        redactor ([`Redactor`]):
            Keeps secrets out.
    """
    count = len(logs["prompt"])
    texts = {name: _column(logs[name], redactor) for name in ("prompt", "completion")}
    extra = {
        str(name): _column([*[None] * (count - len(values)), *values], redactor)
        for name, values in logs["extra"].items()
    }
    return {**logs, **texts, "extra": extra}


def align_columns(
    pending: dict[str, list[object]], known: Iterable[str], count: int, warn: Callable[[str, str], None]
) -> None:
    """
    Give each column that reward functions log a value for each rollout of a batch, in place.

    Args:
        pending (`dict[str, list]`):
            What was logged of the batch, by column.
        known (`Iterable[str]`):
            Columns that were logged before.
        count (`int`):
            Rollouts of the batch.
        warn (`Callable`):
            Gets a key and a sentence for each column that was logged with another number of values, which are left
            out.
    """
    for name, values in list(pending.items()):
        if len(values) != count:
            warn(
                f"log_extra {name}",
                f"`log_extra({name!r}, ...)` was called with {len(values)} values in all for a batch of {count} "
                f"rollouts; they are left out. Pass one value for each completion, once in a batch",
            )
            pending[name] = [None] * count
    for name in known:
        pending.setdefault(name, [None] * count)


def _column(values: Sequence[object], redactor: Redactor) -> list[JSONValue]:
    """Return values that parquet can hold: as they are, or each that is no text as JSON text."""
    try:
        found = [encodable(_redacted(value, redactor)) for value in values]
        pd.DataFrame({"column": found}).to_parquet(BytesIO())
        return found
    except Exception:  # of Arrow, or of an object that it asks for its values
        return [None if value is None else _redacted_json(value, redactor) for value in values]


def _redacted(value: JSONValue, redactor: Redactor) -> JSONValue:
    """Return a value without secrets; a conversation as TRL prints it: without nulls, arguments as text."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return redactor.data(value)
    return [_redacted_message(message, redactor) for message in strip_images_from_messages(value)]


def _redacted_message(message: Message, redactor: Redactor) -> Message:
    kept = {key: redactor.data(value) for key, value in message.items() if value is not None and key != "tool_calls"}
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        kept["tool_calls"] = [_redacted_call(call, redactor) for call in calls]
    return kept


def _redacted_call(call: object, redactor: Redactor) -> JSONObject:
    call = call if isinstance(call, dict) else {"name": _text(call)}
    function = call.get("function")
    if not isinstance(function, dict):
        function = {"name": call.get("name", "?"), "arguments": call.get("arguments")}
    arguments = redactor.json(_object_text(function.get("arguments")))  # not `data`: it stays JSON
    function = {**redactor.data({**function, "arguments": None}), "arguments": arguments}
    return {**redactor.data({**call, "function": None}), "function": function}


def _object_text(arguments: object) -> str:
    """Return the arguments of a call as the JSON text of an object."""
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            if isinstance(json.loads(arguments), dict):
                return arguments
    if arguments is None or arguments == "":
        return "{}"
    return _json(arguments if isinstance(arguments, dict) else {"arguments": arguments})


def _json(value: object) -> str:
    try:
        return json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # keys that are no text, cycles, depth
        return json.dumps({"text": _text(value)}, ensure_ascii=False)


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # an object of a user
        return f"<{type(value).__name__}>"


def _redacted_json(value: object, redactor: Redactor) -> str:
    return encodable(redactor.text(value) if isinstance(value, str) else redactor.json(_json(value)))
