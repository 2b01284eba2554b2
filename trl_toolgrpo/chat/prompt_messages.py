"""Messages of a data set in the form that chat templates read.

`datasets` gives the structs of a column one set of keys, fills the keys a row does not have with nulls, and turns
integers into floats where another row has a float under the same key; OpenAI's messages have arguments as JSON text
and results without a name. Their meaning is clear, but few templates can read them.
"""

import contextlib
import json
from collections.abc import Mapping

from ..errors import DatasetError
from ..tools.arguments import allows_null
from ..tools.schema_forms import plain_form, type_names
from ..tools.tool import Tool
from ..types import JSONObject, JSONSchema, JSONValue, Message


class PromptMessages:
    """
    Rewrites the messages of prompts for one chat template.

    Args:
        arguments_as_text (`bool`, *optional*, defaults to `False`):
            Whether the template takes the arguments of calls as JSON text, not as an object.
        joins_text (`bool`, *optional*, defaults to `True`):
            Whether a content of nothing but text parts becomes one text; not for a processor, whose templates read
            parts.

    Attributes:
        doubtful (`set[str]`):
            Arguments whose nulls were kept, since no schema describes their objects.
    """

    def __init__(self, arguments_as_text: bool = False, joins_text: bool = True):
        self.arguments_as_text = arguments_as_text
        self.joins_text = joins_text
        self.doubtful: set[str] = set()

    def rewritten(self, prompt: JSONValue, tools: Mapping[str, Tool]) -> JSONValue:
        """
        Return a prompt whose messages mean the same and can be rendered.

        Nulls are dropped with their keys: always in a message, a call or a part of a content; in the arguments of a
        call if the tool's schema does not know the key or allows no null. Whole numbers become integers if the schema
        takes no others. A missing content becomes `""`. Arguments become an object, or JSON text if the template takes
        that. A call without `function` gets one, and a result without a name gets that of the call it answers.

        Args:
            prompt (`str` or `list[dict]`):
                The prompt, which is not modified. Text is returned unchanged.
            tools (`Mapping[str, Tool]`):
                The tools of the prompt, by name.

        Raises:
            DatasetError: for arguments that are neither an object nor the JSON text of one.
        """
        if not isinstance(prompt, list):
            return prompt
        names: dict[str, str] = {}  # of the calls so far, by id; without one, of the only call of the latest turn
        return [message if _is_plain(message) else self._message(message, tools, names) for message in prompt]

    def _message(self, message: Message, tools: Mapping[str, Tool], names: dict[str, str]) -> Message:
        """Return a message rewritten; `names` of calls are read and updated."""
        message = _without_nulls(message)
        message["content"] = self._content(message.get("content", ""))
        calls = message.get("tool_calls")
        if calls is not None:
            message["tool_calls"] = calls = [self._call(call, tools) for call in calls]
            if not calls:
                del message["tool_calls"]
            called = [call["function"].get("name") for call in calls if "function" in call]
            names.pop("", None)
            names.update({call["id"]: name for call, name in zip(calls, called, strict=False) if call.get("id")})
            if len(called) == 1:
                names[""] = called[0]
        if message.get("role") == "tool" and "name" not in message:
            name = names.get(message.get("tool_call_id", ""), names.get(""))
            message.update({} if name is None else {"name": name})
        return message

    def _content(self, content: JSONValue) -> JSONValue:
        """Return a content without nulls, and text parts as one text where that is wanted."""
        if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
            return content
        parts = [_without_nulls(part) for part in content]
        if self.joins_text and all(part.get("type") == "text" for part in parts):
            return "".join(part.get("text", "") for part in parts)
        return parts

    def _call(self, call: JSONValue, tools: Mapping[str, Tool]) -> JSONValue:
        """Return a call with a `function` and arguments as the template takes them."""
        if not isinstance(call, dict):
            return call
        call = _without_nulls(call)
        if "function" not in call and "name" in call:
            function = {key: call.pop(key) for key in ("name", "arguments") if key in call}
            call = {"type": "function", **call, "function": function}
        function = call.get("function")
        if isinstance(function, dict):
            arguments = self._arguments(function.get("name"), function.get("arguments"), tools)
            written = json.dumps(arguments, ensure_ascii=False) if self.arguments_as_text else arguments
            call["function"] = {**_without_nulls(function), "arguments": written}
        return call

    def _arguments(self, name: JSONValue, arguments: JSONValue, tools: Mapping[str, Tool]) -> JSONObject:
        """Return the arguments of a call of the tool `name` as an object that fits its schema."""
        if arguments is None or arguments == "":
            return {}
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):
                found = json.loads(arguments)
                if isinstance(found, dict):
                    return found
        if not isinstance(arguments, dict):
            text = isinstance(arguments, str)
            what = "which are text that is no JSON object" if text else f"of type {type(arguments).__name__}"
            raise DatasetError(
                f"a message calls the tool {name!r} with the arguments {str(arguments)[:200]!r}, {what}.",
                remedy="Write an object, {'argument': value}, or its JSON text",
            )
        tool = tools.get(name) if isinstance(name, str) else None
        if tool is None or not _holds(arguments, type(None), float):
            return arguments
        return self._object(arguments, plain_form(tool.schema["function"]["parameters"]), tool, tool.name)

    def _object(self, value: JSONObject, schema: JSONSchema, tool: Tool, place: str) -> JSONObject:
        """Return an object within arguments, see [`PromptMessages._fitting_value`]."""
        known, more = _properties(schema), schema.get("additionalProperties")
        other = more if isinstance(more, dict) and more else False  # for a key that the schema does not mention
        return {
            key: self._fitting_value(inner, known.get(key, other), tool, f"{place}.{key}")
            for key, inner in value.items()
            if inner is not None or allows_null(known.get(key, other), tool)
        }

    def _fitting_value(self, value: JSONValue, schema: JSONValue, tool: Tool, place: str) -> JSONValue:
        """Return a value within arguments without the nulls that its schema does not allow, and with integers where it
        takes no other numbers."""
        if isinstance(value, list):
            items = schema.get("items") if isinstance(schema, dict) else None
            return [self._fitting_value(inner, items, tool, place) for inner in value]
        if isinstance(value, float) and value.is_integer() and _takes_only_integers(schema):
            return int(value)
        if not isinstance(value, dict):
            return value
        if not _describes_keys(schema):
            if _holds(value, type(None)):
                self.doubtful.add(place)
            return value
        return self._object(value, schema, tool, place)


def _is_plain(message: JSONValue) -> bool:
    """Return whether nothing of a message has to be rewritten."""
    if not isinstance(message, dict):
        return True
    return message.keys() == {"role", "content"} and isinstance(message["content"], str)


def _without_nulls(value: JSONObject) -> JSONObject:
    return {key: inner for key, inner in value.items() if inner is not None}


def _holds(value: JSONValue, *kinds: type) -> bool:
    """Return whether a value of one of some types is among nested dicts and lists."""
    if isinstance(value, dict | list):
        return any(_holds(inner, *kinds) for inner in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, kinds)


def _takes_only_integers(schema: JSONValue) -> bool:
    """Return whether the only numbers that a schema takes are integers."""
    kinds = type_names(schema, {})
    return "integer" in kinds and "number" not in kinds


def _describes_keys(schema: JSONValue) -> bool:
    """Return whether a schema says which keys an object has, or of which type their values are."""
    if not isinstance(schema, dict):
        return False
    more = schema.get("additionalProperties")
    return bool(_properties(schema)) or more is False or (isinstance(more, dict) and bool(more))


def _properties(schema: JSONSchema) -> JSONObject:
    """Return the properties of an object, those of all variants if it has several."""
    found: JSONObject = {}
    variants = [inner for keyword in ("anyOf", "oneOf", "allOf") for inner in schema.get(keyword) or ()]
    for part in (*(_properties(inner) for inner in variants if isinstance(inner, dict)), schema.get("properties")):
        for name, inner in (part or {}).items():
            found[name] = {"anyOf": [found[name], inner]} if name in found and found[name] != inner else inner
    return found
