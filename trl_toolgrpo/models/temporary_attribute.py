"""An attribute with another value for a while: of a model, its configuration, or the arguments that TRL reads."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def temporary_attribute(owner: object, name: str, value: object) -> Iterator[None]:
    """
    Give an attribute another value while this is open.

    Args:
        owner (`object`):
            What has the attribute.
        name (`str`):
            Name of the attribute.
        value (`object`):
            Its value until this is closed.
    """
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
