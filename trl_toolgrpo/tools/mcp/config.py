"""What an MCP server is and how it is reached, as users write it. Nothing is started here."""

import itertools
import re
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...redaction import Redactor, argument_secrets, masked_url, secret_values
from ...types import JSONObject


# What other programs call them -> what they are called here.
_TRANSPORTS = {
    "stdio": "stdio",
    **dict.fromkeys(("streamable_http", "streamable-http", "streamableHttp", "http"), "streamable_http"),
}
_KEYS = {"type": "transport", "perRollout": "per_rollout", "startTimeout": "start_timeout", "resetTool": "reset_tool"}
_TEXTS = ("command", "url", "cwd", "name", "files", "reset_tool")
_COLLECTIONS = {"args": list, "tools": list, "env": dict, "headers": dict}  # of strings


@dataclass
class MCPServer:
    """
    A server of the Model Context Protocol whose tools the policy can call: a command that is started and talked to
    over its standard streams, or a URL.

    The values of `env` and `headers` are kept secret: they are not shown by `repr`, and where a server repeats one, in
    a result, in its tool list or in an error, `[secret]` stands instead. Names such as `PATH` and `TZ` are exempt.

    Args:
        command (`str`, *optional*):
            Program to start, by its path or as found in `PATH` or next to the running Python.
        args (`list[str]`, *optional*):
            Its arguments.
        env (`dict[str, str]`, *optional*):
            Its environment variables, in addition to a few such as `PATH` and `HOME`. It inherits no others.
        cwd (`str`, *optional*):
            Its working directory.
        url (`str`, *optional*):
            Address of a server that runs already, instead of a command.
        headers (`dict[str, str]`, *optional*):
            HTTP headers for it.
        transport (`str`, *optional*):
            `"stdio"` or `"streamable_http"`; follows from `command` or `url`.
        name (`str`, *optional*):
            Name in messages, metrics and, where the names of tools collide, in theirs; by default made from the
            command or the URL.
        tools (`list[str]`, *optional*):
            Names of the server's tools that the policy gets; all of them by default.
        per_rollout (`bool`, *optional*, defaults to `False`):
            Whether each rollout gets a server of its own, for servers that have a state. Each is started in an empty
            folder of its own, unless `cwd` is given, so paths in `args` must be absolute. The time
            limit of a rollout's first call covers what is left of the start.
        files (`str`, *optional*):
            With `per_rollout`: a folder whose content each server's own folder starts with.
        reset_tool (`str`, *optional*):
            With `per_rollout`: tool of the server, without arguments, that resets it to its first state. The policy
            does not get it. Without one, a server is replaced by a new one after its rollout.
        timeout (`float`, *optional*):
            Time limit of one call in seconds, instead of `ToolGRPOConfig.tool_timeout`.
        start_timeout (`float`, *optional*, defaults to `60.0`):
            Time limit for its start, or the connection to it.

    Raises:
        ConfigError: for arguments that contradict each other or are out of range.
    """

    command: str | None = None
    args: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    cwd: str | None = None
    url: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    transport: str | None = None
    name: str = ""
    tools: list[str] | None = None
    per_rollout: bool = False
    files: str | None = None
    reset_tool: str | None = None
    timeout: float | None = None
    start_timeout: float = 60.0

    def __post_init__(self) -> None:
        for option in _TEXTS:
            if isinstance(getattr(self, option), Path):
                setattr(self, option, str(getattr(self, option)))
        checks = (self._type_problems, self._transport_problems, self._option_problems)
        for given, reason, remedy in itertools.chain.from_iterable(check() for check in checks):
            who = f"the MCP server {self.name!r}" if self.name else "an MCP server"
            raise ConfigError(f"You passed {who} with {given}. {reason}", remedy=remedy)
        self.transport = "stdio" if self.command is not None else "streamable_http"
        self.name = self.name or _default_name(self)

    def _type_problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield what cannot work: what was given, why it cannot work, and the remedy. Each relies on those before."""
        for option, kind in {**dict.fromkeys(_TEXTS, str), **_COLLECTIONS}.items():
            value = getattr(self, option)
            entries = [*value, *value.values()] if isinstance(value, dict) else value
            fits = isinstance(value, kind) and all(isinstance(entry, str) for entry in entries)
            if value is not None and not fits:
                form = "string" if kind is str else f"{kind.__name__} of strings"
                given = f"`{option}` of type {type(value).__name__}"  # the value itself may be a secret
                yield given, f"It has to be a {form}.", "Quote numbers."

    def _transport_problems(self) -> Iterator[tuple[str, str, str]]:
        needed, other, transport = "command", "url", "stdio"
        if self.command is None:
            needed, other, transport = "url", "command", "streamable_http"
        if (self.command is None) == (self.url is None):
            given = "both `command` and `url`" if self.url is not None else "neither `command` nor `url`"
            yield given, "A server is either started by a command or reached at a URL.", "Give one of the two."
        if self.transport is not None and self.transport not in _TRANSPORTS:
            note = " (the SSE transport was replaced by streamable HTTP)" if self.transport == "sse" else ""
            reason = f"The transports are 'stdio' and 'streamable_http'{note}."
            yield f"`transport={self.transport!r}`", reason, "Correct it, or leave it out."
        if _TRANSPORTS.get(self.transport or transport) != transport:
            given = f"`{needed}` and `transport={self.transport!r}`"
            yield given, f"A server with a `{needed}` is reached over {transport!r}.", "Leave out `transport`."
        for option in ("headers",) if needed == "command" else ("args", "env", "cwd", "files"):
            if getattr(self, option):
                yield f"`{option}` without `{other}`", f"It only makes sense for a `{other}`.", "Leave it out."
        if self.url is not None and self.per_rollout:
            reason = "A server of its own for each rollout has to be started by a command."
            yield "`per_rollout` and `url`", reason, "Give a `command`, or share the server."
        if self.url is not None and urllib.parse.urlsplit(self.url).scheme not in ("http", "https"):
            yield f"`url={masked_url(self.url)!r}`", "It has to begin with http:// or https://.", ""

    def _option_problems(self) -> Iterator[tuple[str, str, str]]:
        for option in ("files", "reset_tool"):
            if getattr(self, option) is not None and not self.per_rollout:
                reason = "A server that all rollouts share is not reset between them."
                yield f"`{option}` without `per_rollout`", reason, "Set `per_rollout=True`, or leave it out."
        if self.files is not None and self.cwd is not None:
            yield "`files` and `cwd`", "The files go to a folder that is made for each server.", "Leave out one."
        if self.files is not None and not Path(self.files).is_dir():
            yield f"`files={self.files!r}`", "It is not a folder that exists.", "Correct the path."
        for option in ("timeout", "start_timeout"):
            value = getattr(self, option)
            if value is not None and not value > 0:
                yield f"`{option}={value}`", "It has to be a positive number of seconds.", ""

    @property
    def secrets(self) -> list[str]:
        """The secrets in the server's environment, headers, address and arguments."""
        return secret_values(self.env, self.headers, self.url) + argument_secrets(self.args)

    @cached_property
    def redactor(self) -> Redactor:
        """What keeps the server's secrets out of texts."""
        return Redactor(self.secrets)

    def __repr__(self) -> str:
        hidden = {option: dict.fromkeys(getattr(self, option), "...") for option in ("env", "headers")}
        shown = {option.name: getattr(self, option.name) for option in fields(self)}
        shown |= {**hidden, "url": self.url and masked_url(self.url)}
        shown = {name: value for name, value in shown.items() if value not in (None, [], {}, False)}
        return self.redactor.text(f"MCPServer({', '.join(f'{name}={value!r}' for name, value in shown.items())})")


def read_servers(given: Mapping[str, Any] | Iterable[object] | None) -> list[MCPServer]:
    """
    Return the servers that a user has written down.

    Args:
        given (`list` or `dict`, *optional*):
            [`MCPServer`]s and dicts of its arguments; or a dict of those by name, which may be the value of
            `mcpServers` (or `servers`), as in the configuration files of MCP clients.

    Returns:
        `list[MCPServer]`: the servers, each with a name of its own.

    Raises:
        ConfigError: for anything else, and two servers of one name.
    """
    if given is None:
        return []
    if isinstance(given, Mapping):
        key = next(iter(given), None)
        if len(given) == 1 and key in ("mcpServers", "mcp_servers", "servers"):
            given = given[key]
        if not isinstance(given, Mapping) or not all(isinstance(entry, Mapping) for entry in given.values()):
            raise ConfigError(
                "You passed `mcp_servers` as a dict that does not hold a dict for each server.",
                remedy="Pass {'mcpServers': {'<name>': {'command': ..., 'args': [...]}}}, or a list of servers.",
            )
        servers = [_from_dict(entry, name) for name, entry in given.items()]
    elif isinstance(given, Iterable) and not isinstance(given, (str, bytes)):
        servers = [entry if isinstance(entry, MCPServer) else _from_dict(entry) for entry in given]
    else:
        raise ConfigError(
            f"You passed `mcp_servers` of type {type(given).__name__}.",
            remedy="Pass a list of `MCPServer`s, or the dict {'mcpServers': {...}} of an MCP client's configuration.",
        )
    for name, count in Counter(server.name for server in servers).items():
        if count > 1:
            remedy = "Give each a `name` of its own."
            raise ConfigError(f"You passed {count} MCP servers named {name!r}.", remedy=remedy)
    return servers


def _from_dict(entry: object, name: str | None = None) -> MCPServer:
    who = f"the MCP server {name!r}" if name else "an MCP server"
    if not isinstance(entry, Mapping):
        remedy = "Pass an `MCPServer` or a dict with `command` or `url`."
        raise ConfigError(f"You passed {who} as {type(entry).__name__}.", remedy=remedy)
    known = [option.name for option in fields(MCPServer)]
    arguments: JSONObject = {} if name is None else {"name": str(name)}
    for key, value in entry.items():
        option = _KEYS.get(key, key)
        if option not in known:
            close = get_close_matches(str(key), [*known, *_KEYS], n=1, cutoff=0.5)
            hint = f"Did you mean `{close[0]}`? " if close else ""
            remedy = f"{hint}The keys are: {', '.join(known)}."
            raise ConfigError(f"You passed {who} with the key `{key}`, which does not exist.", remedy=remedy)
        if value is not None:
            arguments[option] = value
    return MCPServer(**arguments)


def _default_name(server: MCPServer) -> str:
    text = urllib.parse.urlsplit(server.url).hostname if server.url is not None else Path(str(server.command)).stem
    name = re.sub(r"[^\w\-]+", "_", text or "", flags=re.ASCII).strip("_-")
    return name if name and not name[0].isdigit() else f"mcp_{name}"
