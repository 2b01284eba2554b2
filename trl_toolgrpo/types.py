"""Names for the plain data that passes between the parts: messages, rows, schemas.

They are dictionaries whose values chat templates, data sets and JSON leave open.
"""

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
