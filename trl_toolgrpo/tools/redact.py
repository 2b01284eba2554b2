"""Secrets out of texts: what a server was given in confidence is not repeated.

Owns which values count as secrets and how they are found; fed by the `env`, `headers` and `url` of MCP servers, and
applied to all that comes back from one: results, tool lists, error output, exceptions, log records.
"""

import json
import logging
import re
import urllib.parse
import weakref
from collections.abc import Iterable, Mapping
from typing import Any


SECRET = "[secret]"

_SHORTEST = 6
# Values that are words of configuration, and variables that hold paths, languages and switches, not secrets.
_TRIVIAL = frozenset(
    {
        *("always", "bearer", "default", "development", "disabled", "enabled", "localhost", "production", "staging"),
        *("testing", "verbose", "warning", "application/json", "text/event-stream"),
    }
)
_PUBLIC = frozenset(
    {
        *("COLORTERM", "DEBUG", "DISPLAY", "EDITOR", "FORCE_COLOR", "HOME", "HOSTNAME", "LANG", "LANGUAGE"),
        *("LOGLEVEL", "LOGNAME", "LOG_LEVEL", "NODE_ENV", "NO_COLOR", "PATH", "PWD", "PYTHONHASHSEED"),
        *("PYTHONIOENCODING", "PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONUTF8", "SHELL", "TEMP", "TERM", "TMP"),
        *("TMPDIR", "TZ", "USER", "USERNAME", "VIRTUAL_ENV"),
    }
)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')  # of JSON
_SCHEMES = re.compile(r"(?:basic|bearer|token)\s+", re.IGNORECASE)


class Redactor:
    """
    Replaces secrets.

    Args:
        secrets (`Iterable[str]`, *optional*):
            The values; those of fewer than six characters and plain words of configuration are no secrets.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        spellings = {spelling for secret in secrets for spelling in _spellings(secret)}
        # The longest first: one secret may be part of another.
        pattern = "|".join(re.escape(spelling) for spelling in sorted(spellings, key=len, reverse=True))
        self._pattern = re.compile(pattern) if pattern else None

    def text(self, text: str) -> str:
        """
        A text without the secrets.

        Args:
            text (`str`):
                Any text.
        """
        return self._pattern.sub(SECRET, text) if self._pattern is not None else text

    def json(self, text: str) -> str:
        """
        JSON without the secrets: they are looked for in its strings, keys included, so that it stays JSON.

        Args:
            text (`str`):
                JSON, however deep.
        """
        if self._pattern is None or self._pattern.search(text) is None:
            return text
        return _STRING.sub(lambda found: _encoded(self.text(json.loads(found.group()))), text)

    def data(self, value: Any) -> Any:
        """
        JSON data without the secrets, keys included.

        Args:
            value (`Any`):
                Strings, dicts and lists are searched; anything else is returned as it is.
        """
        if self._pattern is None:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.data(key): self.data(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.data(inner) for inner in value]
        return value


def secret_values(env: Mapping[str, str], headers: Mapping[str, str], url: str | None) -> list[str]:
    """
    What of a server's configuration is secret.

    Args:
        env (`Mapping[str, str]`):
            Environment variables. Those that every program has, such as `PATH` and `TZ`, are no secrets.
        headers (`Mapping[str, str]`):
            HTTP headers; of "Bearer xyz", "xyz" alone is secret too.
        url (`str`, *optional*):
            Its user, password and query values are secret.
    """
    found = [value for name, value in env.items() if name.upper() not in _PUBLIC and not name.startswith("LC_")]
    found += [part for value in headers.values() for part in (value, _SCHEMES.sub("", value, count=1))]
    if url is not None:
        parts = urllib.parse.urlsplit(url)
        found += [part for part in (parts.username, parts.password) if part]
        found += [value for _, value in urllib.parse.parse_qsl(parts.query)]
    return [value for value in found if len(value) >= _SHORTEST and value.lower() not in _TRIVIAL]


def masked_url(url: str) -> str:
    """
    A URL without what in it may be secret.

    Args:
        url (`str`):
            The URL.
    """
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    query = "&".join(f"{name}=..." for name, _ in urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    login = "...@" if "@" in parts.netloc else ""
    return urllib.parse.urlunsplit((parts.scheme, login + host, parts.path, query, ""))


def redact_logs(loggers: Iterable[str], redactor: Redactor) -> None:
    """
    Keeps secrets out of what a library logs, as long as the redactor lives.

    Args:
        loggers (`Iterable[str]`):
            Names of the library's loggers; a record is changed by the logger it is made by.
        redactor ([`Redactor`]):
            Knows the secrets.
    """
    for name in loggers:
        logger = logging.getLogger(name)
        found = [known for known in logger.filters if isinstance(known, _RecordFilter)]
        if not found:
            found = [_RecordFilter()]
            logger.addFilter(found[0])
        found[0].redactors.add(redactor)


class _RecordFilter(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self.redactors: weakref.WeakSet[Redactor] = weakref.WeakSet()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info:
            record.exc_text, record.exc_info = logging.Formatter().formatException(record.exc_info), None
        message = record.getMessage()
        for redactor in list(self.redactors):
            message = redactor.text(message)
            record.exc_text = redactor.text(record.exc_text) if record.exc_text else None
        record.msg, record.args = message, ()
        return True


def _encoded(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _spellings(secret: str) -> Iterable[str]:
    """A secret as it stands, in JSON, in Python's `repr` and in a URL; and the lines of one that has several."""
    for text in (secret, *(line for line in secret.splitlines() if len(line) >= _SHORTEST)):
        yield text
        yield json.dumps(text)[1:-1]
        yield _encoded(text)[1:-1]
        yield repr(text)[1:-1]
        yield urllib.parse.quote(text)
        yield urllib.parse.quote(text, safe="")
        yield urllib.parse.quote_plus(text)
