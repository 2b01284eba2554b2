"""The secrets of a run, found by their names or by where they were given, and kept out of texts.

This is the one rule for every file and text that a run leaves: its logs, its model card, and the results of its tools
and MCP servers. Scanners of source code look for the formats of known keys; here a secret is whatever the run was
given as one.
"""

import contextlib
import json
import logging
import re
import shlex
import urllib.parse
import weakref
from collections.abc import Iterable, Mapping, Sequence

from .types import JSONValue, map_texts


SECRET = "[secret]"

_SHORTEST = 6
# Values that are words of a configuration, and variables that hold paths, languages and switches: no secrets.
_PLAIN_WORDS = re.compile(
    "always|bearer|changeme|default|development|disabled|enabled|example|localhost|not-needed|passwd|password|postgres|"
    "production|secret|staging|testing|unused|verbose|warning|application/json|text/event-stream",
    re.IGNORECASE,
)
_HARMLESS = re.compile(
    "COLORTERM|DEBUG|DISPLAY|EDITOR|FORCE_COLOR|HOME|HOSTNAME|LANG|LANGUAGE|LOGLEVEL|LOGNAME|LOG_LEVEL|NODE_ENV|"
    "NO_COLOR|OLDPWD|PATH|PWD|PYTHONHASHSEED|PYTHONIOENCODING|PYTHONPATH|PYTHONUNBUFFERED|PYTHONUTF8|SHELL|TEMP|TERM|TMP|"
    "TMPDIR|TZ|USER|USERNAME|VIRTUAL_ENV"
)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')  # of JSON
_SCHEMES = re.compile(r"(?:basic|bearer|token)\s+", re.IGNORECASE)
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of a name: API_KEY_2, apiKey, X-Api-Key
# The patterns below match the words of a name, in lower case and with spaces between them. These endings say that the
# name describes a secret (its place, its name, its length) and does not hold it.
_ABOUT = re.compile(
    r"\b(?:at|budget|columns?|count|dir|directory|expiration|expires|expiry|field|file|folder|format|heads|ids|index|"
    r"length|level|limit|mask|name|parallelism|path|prefix|rate|ratio|size|suffix|timeout|ttl|types?)$"
)
_SECRET_WORDS = re.compile(
    r"secret(?!ar)|passw|passphrase|passcode|credential|creds\b|\bcred\b|pwd\b|\bpw\b|\bpass\b|"
    r"(?:db|my|sql|smtp|ssh|user)pass\b|\b(?:auth|authorization|bearer|cookies?|jwt|pat|signature|webhook)$|"
    r"\bconnection string\b|\bwebhook url\b|\b(?:access|api|auth|bearer|hf|hub|private|refresh) (?:keys|tokens)\b"
)
_KEY = r"token\b|(?:access|account|api|auth|encryption|master|private|secret|signing|ssh)keys?\b"
_SECRET_KEY = re.compile(rf"{_KEY}|\bkey\b")
# Tokens of a vocabulary and keys of a table.
_OTHER_KEY = re.compile(
    r"\btoken id\b|"
    rf"\b(?:bos|eos|eot|pad|unk|sep|cls|mask|start|stop|image|video|audio|special|per|num|max|min) [a-z]*(?:{_KEY})|"
    r"\b(?:cache|column|data|dataset|dict|feature|field|foreign|group|image|index|json|label|metric|partition|primary|"
    r"prompt|public|row|sort|text) key\b"
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
    Replaces secrets in texts and data by `"[secret]"`.

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
        Return a text without the secrets.

        Args:
            text (`str`):
                Any text.
        """
        return self._pattern.sub(SECRET, text) if self._pattern is not None else text

    def json(self, text: str) -> str:
        """
        Return JSON without the secrets: they are looked for in its strings, keys included, so that it stays JSON.

        Args:
            text (`str`):
                JSON, however deep.
        """
        if self._pattern is None or self._pattern.search(text) is None:
            return text
        return _STRING.sub(lambda found: _encoded(self.text(json.loads(found.group()))), text)

    def data(self, value: JSONValue) -> JSONValue:
        """
        Return JSON data without the secrets, keys included.

        Args:
            value (`object`):
                Strings, dicts, lists and tuples (which become lists) are searched; anything else stays as it is.
        """
        return value if self._pattern is None else map_texts(self.text, value)


def secret_values(env: Mapping[str, str], headers: Mapping[str, str], url: str | None) -> list[str]:
    """
    Return the secrets of a server's configuration.

    Args:
        env (`Mapping[str, str]`):
            Environment variables. Those that every program has, such as `PATH` and `TZ`, are no secrets.
        headers (`Mapping[str, str]`):
            HTTP headers. Of "Bearer xyz", here and there, "xyz" alone is secret too.
        url (`str`, *optional*):
            Its user, password and query values are secret.
    """
    given = [value for name, value in env.items() if not (_HARMLESS.fullmatch(name.upper()) or name.startswith("LC_"))]
    found = [part for value in (*given, *headers.values()) for part in dict.fromkeys(_leaves(value))]
    parts = urllib.parse.urlsplit(url or "")
    found += [part for part in (parts.username, parts.password) if part]
    found += [value for _, value in urllib.parse.parse_qsl(parts.query)]
    return _worth_hiding(found)


def config_secrets(value: JSONValue) -> list[str]:
    """
    Return the secrets of a configuration: see [`masked`].

    Args:
        value (`object`):
            Dicts, lists and strings, nested.
    """
    found: list[str] = []
    masked(value, found=found)
    return _worth_hiding(found)


def argument_secrets(arguments: Sequence[str]) -> list[str]:
    """
    Return the secrets of a command line: see [`masked_arguments`].

    Args:
        arguments (`Sequence[str]`):
            Script and its arguments.
    """
    found: list[str] = []
    masked_arguments(arguments, found)
    return _worth_hiding(found)


def is_secret_name(name: str) -> bool:
    """
    Return whether a variable, option, header or field is named for a secret.

    A word of the name says so, wherever it stands and whatever number or owner follows: `PGPASSWORD`, `DB_PASSWD`,
    `SMTP_PASS`, `OPENAI_API_KEY_2`, `HF_TOKEN_WRITE`, `apiKey`, `X-Api-Key`, `Authorization`. Tokens of a vocabulary
    (`pad_token_id`, `max_tokens`), keys of a table (`sort_key`) and what only tells of a secret (`TOKEN_FILE`,
    `KEY_LENGTH`) are none.

    Args:
        name (`str`):
            The name.
    """
    words = " ".join(_WORDS.findall(name)).lower()
    if _HARMLESS.fullmatch(name.upper()) or _ABOUT.search(words):
        return False
    return bool(_SECRET_WORDS.search(words) or _SECRET_KEY.search(_OTHER_KEY.sub("", words)))


def secret_variables(variables: Mapping[str, str]) -> list[str]:
    """
    Return the names of the environment variables that hold a secret: by their name, or the login of a URL within.

    Args:
        variables (`Mapping[str, str]`):
            Such as `os.environ`.
    """
    return sorted(
        name for name, value in variables.items() if not _HARMLESS.fullmatch(name) and config_secrets({name: value})
    )


def masked(value: JSONValue, name: str = "", found: list[str] | None = None) -> JSONValue:
    """
    Return a configuration without its secrets: what is named for one, at any depth, in strings of JSON, of
    `name=value` and of a header too, and the logins and queries of URLs.

    Args:
        value (`object`):
            Dicts, lists, tuples and strings, nested; anything else is no secret if its name says nothing.
        name (`str`, *optional*, defaults to `""`):
            What the value is set as.
        found (`list[str]`, *optional*):
            Gets the secrets, short ones included.

    Returns:
        `object`: a copy of the same form; a secret is `"[secret]"` there, and a URL is as in [`masked_url`].
    """
    found = [] if found is None else found
    filled = isinstance(value, (str, int, float, dict, list, tuple)) and value and value is not True
    if filled and is_secret_name(name):
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
    Return a command line without its secrets: the values of options that are named for one, and what [`masked`] finds.

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
    Return a URL without what in it may be secret.

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
    Keep secrets out of what a library logs, as long as the redactor lives.

    Args:
        loggers (`Iterable[str]`):
            Names of loggers; a record is changed by the logger it is made by.
        redactor ([`Redactor`]):
            Knows the secrets.
    """
    _record_filter.redactors.add(redactor)
    for name in loggers:
        logging.getLogger(name).addFilter(_record_filter)  # does nothing where it has been added


def loggers_of(package: str) -> list[str]:
    """Return the names of the loggers that the modules of a package have made."""
    return [name for name in logging.root.manager.loggerDict if f"{name}.".startswith(f"{package}.")]


class _RecordFilter(logging.Filter):
    """Takes the secrets of all redactors that live out of messages and tracebacks."""

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


_record_filter = _RecordFilter()


def _worth_hiding(values: Iterable[str]) -> list[str]:
    return [value for value in values if len(value) >= _SHORTEST and not _PLAIN_WORDS.fullmatch(value)]


def _leaves(value: JSONValue) -> Iterable[str]:
    """Return the values of something that is secret as a whole; of "Bearer xyz", "xyz" too."""
    if isinstance(value, (dict, list, tuple)):
        inner = value.values() if isinstance(value, dict) else value
        return [leaf for part in inner for leaf in _leaves(part)]
    return [str(value), _SCHEMES.sub("", value, count=1)] if isinstance(value, str) else [str(value)]


def _masked_text(text: str, found: list[str]) -> str:
    if text.lstrip().startswith(("{", "[")):
        with contextlib.suppress(ValueError, RecursionError):
            data = json.loads(text)
            if (shown := masked(data, found=found)) != data:
                return _encoded(shown)
    if (header := _HEADER.fullmatch(text)) is not None:
        return _masked_part(header, found)
    return _URL_OR_ASSIGNED.sub(lambda part: _masked_part(part, found), text)


def _masked_part(part: re.Match[str], found: list[str]) -> str:
    """Return a URL, `name=value` or `name: value` of a text without its secrets."""
    groups = part.groupdict()
    if groups.get("url"):
        return _masked_login(groups["url"], found)
    name, sign, value = groups["name"], groups["sign"], groups["value"]
    if name.lower() == "key" or not is_secret_name(name):
        return f"{name}{sign}{_masked_text(value, found)}" if "://" in value else part.group()
    found += _leaves(value.strip("\"'"))
    return f"{name}{sign}{SECRET}"


def _masked_login(url: str, found: list[str]) -> str:
    """Return a URL without its login and query, if it has any. The user is secret if there is no password."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:  # such as an IPv6 address without its end
        return url if "@" not in url else SECRET
    login = parts.netloc.rpartition("@")[0]
    in_fragment = [value for name, value in urllib.parse.parse_qsl(parts.fragment) if is_secret_name(name)]
    if not login and not parts.query and not in_fragment:
        return url
    # A user alone is a token only where the web has none: `postgres://postgres@host` names no secret
    secret = parts.password or (parts.username if parts.scheme in ("http", "https") else None)
    found += [login, secret, urllib.parse.unquote(secret)] if secret else []
    found += [value for name, value in urllib.parse.parse_qsl(parts.query) if is_secret_name(name)] + in_fragment
    return masked_url(url)


def _encoded(data: JSONValue) -> str:
    return json.dumps(data, ensure_ascii=False)


def _spellings(secret: str) -> Iterable[str]:
    """Yield a secret as it stands, in JSON, in Python's `repr` and in a URL; and the lines of one that has several."""
    for text in (secret, *(line for line in secret.splitlines() if len(line) >= _SHORTEST)):
        yield from (text, repr(text)[1:-1], json.dumps(text)[1:-1], _encoded(text)[1:-1], shlex.quote(text))
        yield from (urllib.parse.quote(text), urllib.parse.quote(text, safe=""), urllib.parse.quote_plus(text))
