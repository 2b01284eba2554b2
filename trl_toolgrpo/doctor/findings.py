"""What the doctor says: one record for each question.

Owns the vocabulary of the verdict: a fault is a no-go, a note is not.
"""

from dataclasses import dataclass


OK, NOTE, FAULT = "ok", "note", "fault"


@dataclass(frozen=True)
class Finding:
    """
    The answer to one question.

    Args:
        subject (`str`):
            What was looked at.
        state (`str`):
            `"ok"`, `"note"` or `"fault"`.
        words (`str`):
            What was found.
        remedy (`str`, *optional*, defaults to `""`):
            What to do about it.
    """

    subject: str
    state: str
    words: str
    remedy: str = ""
