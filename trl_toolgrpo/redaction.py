"""What of a run is a secret, by its name or by where it was given, and texts without it.

The one rule for every file and text that a run leaves: its logs, its model card, what its tools answer and what its
MCP servers say.
"""

import json
import logging
import re
import shlex
import urllib.parse
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


SECRET = "[secret]"

_SHORTEST = 6
# Values that are words of configuration, and variables that hold paths, languages and switches, not secrets.
_TRIVIAL = frozenset(
    {
        *("always", "bearer", "default", "development", "disabled", "enabled", "localhost", "production", "staging"),
        *("testing", "verbose", "warning", "application/json", "text/event-stream"),
        *("changeme", "example", "not-needed", "password", "passwd", "postgres", "secret", "unused"),
    }
)
_PUBLIC = frozenset(
    {
        *("COLORTERM", "DEBUG", "DISPLAY", "EDITOR", "FORCE_COLOR", "HOME", "HOSTNAME", "LANG", "LANGUAGE"),
        *("LOGLEVEL", "LOGNAME", "LOG_LEVEL", "NODE_ENV", "NO_COLOR", "OLDPWD", "PATH", "PWD", "PYTHONHASHSEED"),
        *("PYTHONIOENCODING", "PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONUTF8", "SHELL", "TEMP", "TERM", "TMP"),
        *("TMPDIR", "TZ", "USER", "USERNAME", "VIRTUAL_ENV"),
    }
)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')  # of JSON
_SCHEMES = re.compile(r"(?:basic|bearer|token)\s+", re.IGNORECASE)
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of a name: API_KEY_2, apiKey, X-Api-Key
_PASSWORD = re.compile(
    r"secret(?!ar)|passw|passphrase|passcode|credential|creds$|^cred$|pwd$|^pw$|^pass$|(?:db|my|sql|smtp|ssh|user)pass$"
)
_KEY = re.compile(r"token$|^key$|(?:access|account|api|auth|encryption|master|private|secret|signing|ssh)keys?$")
_LAST = frozenset({"auth", "authorization", "bearer", "cookie", "cookies", "jwt", "pat", "signature", "webhook"})
_PLURAL = frozenset({"access", "api", "auth", "bearer", "hf", "hub", "private", "refresh"})  # API_KEYS, not max_tokens
_PAIRS = frozenset({("connection", "string"), ("webhook", "url")})
# What a vocabulary or a table names so
_OF_VOCABULARY = frozenset(
    {
        *("bos", "eos", "eot", "pad", "unk", "sep", "cls", "mask", "start", "stop", "image", "video", "audio"),
        *("special", "per", "num", "max", "min"),
    }
)
_OF_TABLE = frozenset(
    {
        *("cache", "column", "data", "dataset", "dict", "feature", "field", "foreign", "group", "image", "index"),
        *("json", "label", "metric", "partition", "primary", "prompt", "public", "row", "sort", "text"),
    }
)
# Of a secret, what is none: where it lies, what it is called, how long it is
_ABOUT = frozenset(
    {
        *("at", "budget", "column", "columns", "count", "dir", "directory", "expiration", "expires", "expiry"),
        *("field", "file", "folder", "format", "heads", "ids", "index", "length", "level", "limit", "mask", "name"),
        *("parallelism", "path", "prefix", "rate", "ratio", "size", "suffix", "timeout", "ttl", "type", "types"),
    }
)
_URL_OR_ASSIGNED = re.compile(
    r"""(?P<url>[a-z][a-z0-9+.-]{0,30}://[^\s"'<>`]+?(?=,[a-z][a-z0-9+.-]*://|[\s"'<>`]|$))"""
    r"""|(?<![\w.-])(?P<name>[\w.-]+)(?P<sign>\s*=\s*)(?P<value>"[^"]*"|'[^']*'|[^\s;,&"']+)""",
    re.IGNORECASE,
)
_HEADER = re.compile(r"(?P<name>[\w-]+)(?P<sign>:\s+)(?P<value>(?:(?:basic|bearer|token)\s+)?\S+)", re.IGNORECASE)
_SEVERAL = re.compile(r"(?:key|token|secret|password|credential)s$", re.IGNORECASE)


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
                Strings, dicts, lists and tuples (which become lists) are searched; anything else stays as it is.
        """
        if self._pattern is None:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.data(key): self.data(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.data(inner) for inner in value]
        return value


def secret_values(env: Mapping[str, str], headers: Mapping[str, str], url: str | None) -> list[str]:
    """
    What of a server's configuration is secret.

    Args:
        env (`Mapping[str, str]`):
            Environment variables. Those that every program has, such as `PATH` and `TZ`, are no secrets.
        headers (`Mapping[str, str]`):
            HTTP headers. Of "Bearer xyz", here and there, "xyz" alone is secret too.
        url (`str`, *optional*):
            Its user, password and query values are secret.
    """
    given = [value for name, value in env.items() if name.upper() not in _PUBLIC and not name.startswith("LC_")]
    found = [part for value in (*given, *headers.values()) for part in dict.fromkeys(_leaves(value))]
    if url is not None:
        parts = urllib.parse.urlsplit(url)
        found += [part for part in (parts.username, parts.password) if part]
        found += [value for _, value in urllib.parse.parse_qsl(parts.query)]
    return _worth_hiding(found)


def config_secrets(value: Any) -> list[str]:
    """
    What of a configuration is secret: see [`masked`].

    Args:
        value (`Any`):
            Dicts, lists and strings, nested.
    """
    found: list[str] = []
    masked(value, found=found)
    return _worth_hiding(found)


def argument_secrets(arguments: Sequence[str]) -> list[str]:
    """
    What of a command line is secret: see [`masked_arguments`].

    Args:
        arguments (`Sequence[str]`):
            Script and its arguments.
    """
    found: list[str] = []
    masked_arguments(arguments, found)
    return _worth_hiding(found)


def is_secret_name(name: str) -> bool:
    """
    Whether a variable, option, header or field is named for a secret.

    A word of the name says so, wherever it stands and whatever number or owner follows: `PGPASSWORD`, `DB_PASSWD`,
    `SMTP_PASS`, `OPENAI_API_KEY_2`, `HF_TOKEN_WRITE`, `apiKey`, `X-Api-Key`, `Authorization`. Tokens of a vocabulary
    (`pad_token_id`, `max_tokens`), keys of a table (`sort_key`) and what only tells of a secret (`TOKEN_FILE`,
    `KEY_LENGTH`) are none.

    Args:
        name (`str`):
            The name.
    """
    words = [word.lower() for word in _WORDS.findall(name)]
    if not words or words[-1] in _ABOUT or name.upper() in _PUBLIC:
        return False
    if words[-1] in _LAST or any(_PASSWORD.search(word) for word in words):
        return True
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        of_table = before in (_OF_TABLE if word == "key" else _OF_VOCABULARY) or (word, after) == ("token", "id")
        if (before, word) in _PAIRS or (before in _PLURAL and word in ("keys", "tokens")):
            return True
        if _KEY.search(word) and not of_table:
            return True
    return False


def secret_variables(variables: Mapping[str, str]) -> list[str]:
    """
    Names of the environment variables that hold a secret: by their name, or the login of a URL within.

    Args:
        variables (`Mapping[str, str]`):
            Such as `os.environ`.
    """
    return sorted(name for name, value in variables.items() if name not in _PUBLIC and config_secrets({name: value}))


def masked(value: Any, name: str = "", found: list[str] | None = None) -> Any:
    """
    A configuration without its secrets: what is named for one, at any depth, in strings of JSON, of `name=value` and
    of a header too, and the logins and queries of URLs.

    Args:
        value (`Any`):
            Dicts, lists, tuples and strings, nested; anything else is no secret if its name says nothing.
        name (`str`, *optional*, defaults to `""`):
            What the value is set as.
        found (`list[str]`, *optional*):
            Gets the secrets, short ones included.

    Returns:
        `Any`: a copy of the same form; a secret is `"[secret]"` there, and a URL is as in [`masked_url`].
    """
    found = [] if found is None else found
    plain = isinstance(value, (str, int, float, dict, list, tuple)) and value and value is not True
    if plain and is_secret_name(name):
        found += _leaves(value)
        if isinstance(value, str):  # a file of credentials as JSON, or a URL
            _masked_text(value, found)
        return SECRET
    if isinstance(value, dict):
        return {key: masked(inner, str(key), found) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        inside = [masked(inner, "", found) for inner in value]
        return inside if isinstance(value, list) else tuple(inside)
    return _masked_text(value, found) if isinstance(value, str) else value


def masked_arguments(arguments: Sequence[str], found: list[str] | None = None) -> list[str]:
    """
    A command line without its secrets: the values of options that are named for one, and what [`masked`] finds.

    Args:
        arguments (`Sequence[str]`):
            Script and its arguments.
        found (`list[str]`, *optional*):
            Gets the secrets, short ones included.
    """
    found = [] if found is None else found
    shown: list[str] = []
    awaited = several = False  # whether the option before is named for a secret, or for more than one
    for argument in arguments:
        name, sign, value = argument.partition("=")
        option = re.fullmatch(r"[-+~]*[\w.-]+", name) is not None
        if awaited and not argument.startswith("--"):
            found += _leaves(argument)
            shown.append(SECRET)
        else:
            shown.append(f"{name}={masked(value, name, found)}" if option and sign else masked(argument, found=found))
        if option and name.startswith("-"):
            awaited, several = not sign and is_secret_name(name), _SEVERAL.search(name) is not None
        else:
            awaited = awaited and several
    return shown


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
            Names of loggers; a record is changed by the logger it is made by.
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


def loggers_of(package: str) -> list[str]:
    """Return the names of the loggers that the modules of a package have made."""
    return [name for name in logging.root.manager.loggerDict if f"{name}.".startswith(f"{package}.")]


class _RecordFilter(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self.redactors: weakref.WeakSet[Redactor] = weakref.WeakSet()

    def filter(self, record: logging.LogRecord) -> bool:
        message, trace = record.getMessage(), record.exc_text
        if record.exc_info and not trace:
            trace = logging.Formatter().formatException(record.exc_info)
        shown = message, trace
        for redactor in list(self.redactors):
            shown = redactor.text(shown[0]), shown[1] and redactor.text(shown[1])
        if shown[0] != message:
            record.msg, record.args = shown[0], ()
        if shown[1] != trace:
            record.exc_text, record.exc_info = shown[1], None
        return True


def _worth_hiding(values: Iterable[str]) -> list[str]:
    return [value for value in values if len(value) >= _SHORTEST and value.lower() not in _TRIVIAL]


def _leaves(value: Any) -> Iterable[str]:
    """The values of something that is secret as a whole; of "Bearer xyz", "xyz" too."""
    if isinstance(value, (dict, list, tuple)):
        inner = value.values() if isinstance(value, dict) else value
        return [leaf for part in inner for leaf in _leaves(part)]
    return [str(value), _SCHEMES.sub("", value, count=1)] if isinstance(value, str) else [str(value)]


def _masked_text(text: str, found: list[str]) -> str:
    if text.lstrip().startswith(("{", "[")):
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            data = None
        if (shown := masked(data, found=found)) != data:
            return _encoded(shown)
    header = _HEADER.fullmatch(text)
    if header is not None:
        return _masked_part(header, found)
    return _URL_OR_ASSIGNED.sub(lambda part: _masked_part(part, found), text)


def _masked_part(part: re.Match[str], found: list[str]) -> str:
    """A URL, `name=value` or `name: value` in a text."""
    groups = part.groupdict()
    if groups.get("url"):
        return _masked_login(groups["url"], found)
    name, sign, value = groups["name"], groups["sign"], groups["value"]
    if name.lower() == "key" or not is_secret_name(name):
        return f"{name}{sign}{_masked_text(value, found)}" if "://" in value else part.group()
    found += _leaves(value.strip("\"'"))
    return f"{name}{sign}{SECRET}"


def _masked_login(url: str, found: list[str]) -> str:
    """A URL without its login and query, if it has any. The user is secret if there is no password."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:  # such as an IPv6 address without its end
        return url if "@" not in url else SECRET
    login = parts.netloc.rpartition("@")[0]
    told = [value for name, value in urllib.parse.parse_qsl(parts.fragment) if is_secret_name(name)]
    if not login and not parts.query and not told:
        return url
    # A user alone is a token only where the web has none: `postgres://postgres@host` names no secret
    secret = parts.password or (parts.username if parts.scheme in ("http", "https") else None)
    found += [login, secret, urllib.parse.unquote(secret)] if secret else []
    found += [value for name, value in urllib.parse.parse_qsl(parts.query) if is_secret_name(name)] + told
    return masked_url(url)


def _encoded(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False)


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
        yield shlex.quote(text)
