"""The answer to one question of the doctor."""

from dataclasses import dataclass
from typing import Any, TypeAlias


ToolTrainer: TypeAlias = Any
"""A [`ToolGRPOTrainer`]. The trainer may import everything, and so nothing imports its class."""

OK, NOTE, FAULT = "ok", "note", "fault"
"""States of a result: a fault is a no-go, a note is not."""


@dataclass(frozen=True)
class CheckResult:
    """
    The answer to one question.

    Args:
        subject (`str`):
            What was looked at.
        state (`str`):
            `"ok"`, `"note"` or `"fault"`.
        message (`str`):
            What was found.
        remedy (`str`, *optional*, defaults to `""`):
            What to do about it.
    """

    subject: str
    state: str
    message: str
    remedy: str = ""
