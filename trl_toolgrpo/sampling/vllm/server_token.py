"""The token that a rollout server and its clients share: whoever has it may load weights and request turns."""

import hmac
import ipaddress
import os

from ...errors import ConfigError


VARIABLE = "TRL_TOOLGRPO_SERVER_TOKEN"
"""Environment variable that holds it on both sides; a command line would show it to every user of a machine."""
HOW_TO_SET = (
    f"Set the environment variable {VARIABLE} to the same secret for the server and for the run, such as one made by "
    f"`export {VARIABLE}=$(python -c 'import secrets; print(secrets.token_urlsafe(32))')`"
)


def server_token() -> str | None:
    """
    Return the token in the environment variable; `None` if there is none.

    Raises:
        ConfigError: for a value that cannot be sent in a header.
    """
    token = os.environ.get(VARIABLE, "").strip()
    if not token:
        return None
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"The value of the environment variable {VARIABLE} cannot be sent: it holds spaces or characters that are "
            f"not printable ASCII.",
            remedy=f"{HOW_TO_SET}.",
        )
    return token


def is_loopback(host: str) -> bool:
    """Return whether only processes of this machine can reach a server that listens on an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def header_of(token: str) -> dict[str, str]:
    """Return the header that carries the token in a request."""
    return {"Authorization": f"Bearer {token}"}


def is_shown(token: str, header: str | None) -> bool:
    """Return whether a request's `Authorization` header shows the token, in time that does not depend on it."""
    expected = header_of(token)["Authorization"]
    return hmac.compare_digest(expected.encode(), (header or "").encode("utf-8", "surrogateescape"))
