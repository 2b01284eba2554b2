"""Faults of records that come from elsewhere: fields that are misnamed, short, of another type or not finite."""

import difflib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeGuard


_ALIASES = {
    "old_log_probs": "logprobs",
    "old_logprobs": "logprobs",
    "old_per_token_logps": "logprobs",
    "sampling_per_token_logps": "logprobs",
    "log_probs": "logprobs",
    "env_mask": "tool_mask",
    "response_ids": "completion_ids",
}


def field_meant_by(name: object, known: Sequence[str]) -> str | None:
    """Return the field that a misnamed one probably stands for; `None` if none is close."""
    close = _ALIASES.get(str(name)) or next(iter(difflib.get_close_matches(str(name), known, n=1)), None)
    return close if close in known else None


def is_finite_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a number, and neither NaN nor infinite."""
    # By comparison: `math.isfinite` overflows for huge integers
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_count(value: object) -> bool:
    """Return whether a value is a non-negative `int`, and no `bool`: a token id, an index, a number of steps."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def list_faults(name: str, value: object) -> Iterator[str]:
    """Yield a fault if a field is not a list; `name` is the field as the message calls it."""
    if not isinstance(value, (list, tuple)):
        yield f"field {name} expected a list, got {type(value).__name__}."


def length_faults(name: str, values: Sequence[object], count: int, per: str) -> Iterator[str]:
    """Yield a fault if a list does not have `count` values, one for each `per`."""
    if len(values) != count:
        yield f"field {name} has {len(values)} values, expected {count}, one per {per}."


def item_faults(
    name: str, values: Sequence[object], expected: str, is_sound: Callable[[object], bool]
) -> Iterator[str]:
    """Yield a fault for each value that is not what was `expected`."""
    for position, value in enumerate(values):
        if not is_sound(value):
            yield f"field {name} expected {expected}, got {value!r} at position {position}."


def figure_faults(name: str, values: object, count: int, per: str, most: float = math.inf) -> Iterator[str]:
    """Yield a fault unless `values` is a list of `count` finite numbers of at most `most`, one for each `per`."""
    if not isinstance(values, (list, tuple)):
        yield from list_faults(name, values)
        return
    expected = "finite values" if most == math.inf else f"finite values of at most {most}"
    yield from length_faults(name, values, count, per)
    yield from item_faults(name, values, expected, lambda value: is_finite_number(value) and value <= most)


def is_flag(value: object) -> bool:
    return is_count(value) and value in (0, 1)


def is_duration(value: object) -> bool:
    return is_finite_number(value) and value >= 0
