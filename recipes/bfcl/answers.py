"""Check calls against the published answers of the Berkeley Function Calling Leaderboard.

The rules are those of the leaderboard's own AST checker for Python
(https://gorilla.cs.berkeley.edu/blogs/8_berkeley_function_calling_leaderboard.html).

A published answer lists the accepted values of each parameter. An empty string among them means that the parameter may
be left out. A float parameter accepts integers, an integer parameter no floats. Strings are compared without case,
spaces and most punctuation, lists element by element. The fields of a dict have accepted values of their own. A value
may also have the type of the accepted values instead of the declared one, since some answers are names of variables.
"""

import re

from trl_toolgrpo.types import JSONObject, JSONValue


TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}

_IGNORED = re.compile(r"[ ,./\-_*^]")


def matches(arguments: JSONObject, accepted: dict[str, list], parameters: JSONObject) -> bool:
    """
    Return whether the arguments of a call are right.

    Args:
        arguments (`dict`):
            Arguments of the call.
        accepted (`dict[str, list]`):
            Accepted values of each parameter.
        parameters (`dict`):
            Schema of the function as the leaderboard writes it.

    Returns:
        `bool`: whether every argument is accepted, and no required one is missing.
    """
    if any(name not in arguments for name in parameters.get("required", [])):
        return False
    if any("" not in values for name, values in accepted.items() if name not in arguments):
        return False
    return share_matched(arguments, accepted, parameters) == 1.0


def share_matched(arguments: JSONObject, accepted: dict[str, list], parameters: JSONObject) -> float:
    """
    Compute the share of right arguments among those given and those missing.

    Args:
        arguments, accepted, parameters:
            As in [`matches`].

    Returns:
        `float`: between 0 and 1; 1 for a call without arguments of a function that needs none.
    """
    properties = parameters["properties"]
    missing = [name for name, values in accepted.items() if name not in arguments and "" not in values]
    right = [
        name in properties and name in accepted and value_matches(value, accepted[name], properties[name])
        for name, value in arguments.items()
    ]
    return sum(right) / max(len(right) + len(missing), 1) if right or missing else 1.0


def value_matches(value: JSONValue, accepted: list, schema: JSONObject) -> bool:
    """
    Return whether an argument has one of the accepted values.

    Args:
        value (`object`):
            The argument.
        accepted (`list`):
            Accepted values.
        schema (`dict`):
            Schema of the parameter as the leaderboard writes it.

    Returns:
        `bool`: whether it is accepted.
    """
    declared = TYPES[schema["type"]]
    inner = TYPES[schema["items"]["type"]] if declared is list and "items" in schema else None
    if schema["type"] == "float" and type(value) is int:
        value = float(value)
    if not _has_type(value, accepted, declared, inner):
        return False
    written_otherwise = _type_of(accepted) not in (None, declared)
    if written_otherwise or declared in (int, float, bool):
        return value in accepted
    if declared is str:
        return _normalized(value) in [_normalized(entry) for entry in accepted if isinstance(entry, str)]
    if declared is dict:
        return any(_dict_matches(value, entry) for entry in accepted if entry != "")
    if inner is dict:
        return any(_dicts_match(value, entry) for entry in accepted)
    return _all_normalized(value) in [_all_normalized(entry) for entry in accepted]


def _has_type(value: JSONValue, accepted: list, declared: type, inner: type | None) -> bool:
    if type(value) is not declared:
        return type(value) is _type_of(accepted)
    if inner is None or not isinstance(value, list):
        return True
    return any(
        not isinstance(entry, list) or all(type(item) in (inner, _type_of(entry)) for item in value)
        for entry in accepted
    )


def _type_of(accepted: list) -> type | None:
    """Return the type of the first accepted value that is not the mark of an optional parameter."""
    return next((type(entry) for entry in accepted if entry != ""), None)


def _normalized(value: JSONValue) -> JSONValue:
    return _IGNORED.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value


def _all_normalized(values: JSONValue) -> list:
    return [_normalized(value) for value in values]


def _dict_matches(value: JSONObject, accepted: dict[str, list]) -> bool:
    if any("" not in values for name, values in accepted.items() if name not in value):
        return False
    return all(
        name in accepted and _normalized(entry) in _all_normalized(accepted[name]) for name, entry in value.items()
    )


def _dicts_match(values: list[JSONObject], accepted: list[dict[str, list]]) -> bool:
    if len(values) != len(accepted):
        return False
    return all(
        isinstance(entry, dict) and entry != "" and _dict_matches(value, entry)
        for value, entry in zip(values, accepted, strict=True)
    )
