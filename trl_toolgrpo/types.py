"""Names for the plain data that passes between the parts: messages, rows, schemas; and a walk over it.

They are dictionaries whose values chat templates, data sets and JSON leave open.
"""

from collections.abc import Callable
from typing import Any, TypeAlias


JSONValue: TypeAlias = Any
"""Anything that `json` reads or writes."""

JSONObject: TypeAlias = dict[str, Any]
"""A JSON object: the arguments of a call, a line of a log, a server's configuration."""

JSONSchema: TypeAlias = dict[str, Any]
"""A JSON schema, or the description of a function that holds one."""

Message: TypeAlias = dict[str, Any]
"""A chat message: `role`, `content` and, where there are any, `tool_calls`, `tool_call_id` and `name`."""

Row: TypeAlias = dict[str, Any]
"""A row of a data set, by column."""

Batch: TypeAlias = dict[str, Any]
"""A (micro-)batch of TRL's: padded tensors of shape (B, P), (B, T) or (B,) by name, and lists of B things."""


def map_texts(change: Callable[[str], str], value: JSONValue) -> JSONValue:
    """
    Return a copy of JSON data in which each string is changed, keys included.

    Args:
        change (`Callable`):
            Gets a string, and returns the one for its place.
        value (`Any`):
            Dicts, lists, tuples (which become lists) and strings, nested; anything else stays as it is.

    Raises:
        RecursionError: if it is nested too deep.
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {map_texts(change, key): map_texts(change, inner) for key, inner in value.items()}
    return [map_texts(change, inner) for inner in value] if isinstance(value, (list, tuple)) else value
