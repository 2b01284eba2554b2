"""What an MCP server is and how it is reached, as users write it.

Owns `MCPServer` and the usual `mcpServers` shape; starts nothing. Fed by the trainer's `mcp_servers`.
"""

import re
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..redaction import Redactor, argument_secrets, masked_url, secret_values


# What other programs call them -> what they are called here.
_TRANSPORTS = {
    "stdio": "stdio",
    "streamable_http": "streamable_http",
    "streamable-http": "streamable_http",
    "streamableHttp": "streamable_http",
    "http": "streamable_http",
}
_KEYS = {"type": "transport", "perRollout": "per_rollout", "startTimeout": "start_timeout", "resetTool": "reset_tool"}
_MASK = "..."


@dataclass
class MCPServer:
    """
    A server of the Model Context Protocol whose tools the policy can call: a command that is started and talked to
    over its standard streams, or a URL.

    The values of `env` and `headers` are kept secret: they are not shown by `repr`, and where a server repeats one, in
    a result, in its tool list or in an error, `[secret]` stands instead. Names such as `PATH` and `TZ` are exempt.

    Args:
        command (`str`, *optional*):
            Program to start, by its path or as found in `PATH` or beside the running Python.
        args (`list[str]`, *optional*):
            Its arguments.
        env (`dict[str, str]`, *optional*):
            Its environment variables, beside a few such as `PATH` and `HOME`; the others of the run are not inherited.
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
            folder of its own, unless `cwd` is given, so that arguments that are paths have to be absolute. The time
            limit of a rollout's first call covers what is left of the start.
        files (`str`, *optional*):
            With `per_rollout`: a folder whose content each server's own folder starts with.
        reset_tool (`str`, *optional*):
            With `per_rollout`: tool of the server that takes it back to its beginning, without arguments. The policy
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
        self._check_transport()
        self._check_types()
        self.name = self.name or _default_name(self)
        for option in ("files", "reset_tool"):
            if getattr(self, option) is not None and not self.per_rollout:
                self._refuse(
                    f"`{option}` without `per_rollout`",
                    "A server that all rollouts share is not reset between them. Set `per_rollout=True`, or leave it "
                    "out.",
                )
        if self.files is not None and self.cwd is not None:
            self._refuse("`files` and `cwd`", "The files go to a folder that is made for each server. Leave out one.")
        if self.files is not None and not Path(self.files).is_dir():
            self._refuse(f"`files={self.files!r}`", "It is not a folder that exists. Correct the path.")
        for option in ("timeout", "start_timeout"):
            value = getattr(self, option)
            if value is not None and not value > 0:
                self._refuse(f"`{option}={value}`", "It has to be a positive number of seconds.")

    def _check_transport(self) -> None:
        if (self.command is None) == (self.url is None):
            given = "both `command` and `url`" if self.command is not None else "neither `command` nor `url`"
            self._refuse(given, "A server is either started by a command or reached at a URL. Give one of the two.")
        if self.transport is not None and self.transport not in _TRANSPORTS:
            reason = " (the SSE transport was replaced by streamable HTTP)" if self.transport == "sse" else ""
            self._refuse(
                f"`transport={self.transport!r}`",
                f"The transports are 'stdio' and 'streamable_http'{reason}. Correct it, or leave it out.",
            )
        known = "stdio" if self.command is not None else "streamable_http"
        if _TRANSPORTS.get(self.transport or known) != known:
            field_name = "command" if known == "stdio" else "url"
            self._refuse(
                f"`{field_name}` and `transport={self.transport!r}`",
                f"A server with a `{field_name}` is reached over {known!r}. Leave out `transport`.",
            )
        self.transport = known
        for option in ("headers",) if known == "stdio" else ("args", "env", "cwd", "files"):
            if getattr(self, option):
                need = "url" if known == "stdio" else "command"
                self._refuse(f"`{option}` without `{need}`", f"It only makes sense for a `{need}`. Leave it out.")
        if self.per_rollout and known != "stdio":
            self._refuse(
                "`per_rollout` and `url`",
                "A server of its own for each rollout has to be started by a command. Give a `command`, or share the "
                "server.",
            )
        if self.url is not None and urllib.parse.urlsplit(str(self.url)).scheme not in ("http", "https"):
            self._refuse(f"`url={masked_url(str(self.url))!r}`", "It has to begin with http:// or https://.")

    def _check_types(self) -> None:
        for option, kind in (("args", list), ("tools", list), ("env", dict), ("headers", dict)):
            value = getattr(self, option)
            entries = [] if value is None else [*value, *(value.values() if isinstance(value, dict) else ())]
            words = "list of strings" if kind is list else "dict of strings"
            if value is not None and not (isinstance(value, kind) and all(isinstance(e, str) for e in entries)):
                # The value itself may be a secret.
                self._refuse(f"`{option}` of type {type(value).__name__}", f"It has to be a {words}; quote numbers.")
        for option in ("command", "url", "cwd", "name", "files", "reset_tool"):
            value = getattr(self, option)
            if isinstance(value, Path):
                setattr(self, option, str(value))
            elif value is not None and not isinstance(value, str):
                self._refuse(f"`{option}={value!r}`", "It has to be a string.")

    def _refuse(self, given: str, what_to_do: str) -> None:
        who = f"the MCP server {self.name!r}" if self.name else "an MCP server"
        raise ConfigError(f"You passed {who} with {given}. {what_to_do}")

    @property
    def secrets(self) -> list[str]:
        """What of the server's configuration is secret: of its environment, headers, address and arguments."""
        return secret_values(self.env, self.headers, self.url) + argument_secrets(self.args)

    @cached_property
    def redactor(self) -> Redactor:
        """Keeps the server's secrets out of texts."""
        return Redactor(self.secrets)

    def __repr__(self) -> str:
        shown = []
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in ("env", "headers"):
                value = dict.fromkeys(value, _MASK)
            elif option.name == "url" and value is not None:
                value = masked_url(value)
            if value not in (None, [], {}, False):
                shown.append(f"{option.name}={value!r}")
        return self.redactor.text(f"{type(self).__name__}({', '.join(shown)})")


def read_servers(given: Any) -> list[MCPServer]:
    """
    The servers a user has written down.

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
        for key in ("mcpServers", "mcp_servers", "servers"):
            if set(given) == {key}:
                given = given[key]
        if not isinstance(given, Mapping) or not all(isinstance(entry, Mapping) for entry in given.values()):
            raise ConfigError(
                "You passed `mcp_servers` as a dict that does not hold a dict for each server. Pass "
                "{'mcpServers': {'<name>': {'command': ..., 'args': [...]}}}, or a list of servers."
            )
        servers = [_from_dict(entry, name) for name, entry in given.items()]
    elif isinstance(given, Iterable) and not isinstance(given, (str, bytes)):
        servers = [entry if isinstance(entry, MCPServer) else _from_dict(entry) for entry in given]
    else:
        raise ConfigError(
            f"You passed `mcp_servers` of type {type(given).__name__}. Pass a list of `MCPServer`s, or the dict "
            f"{{'mcpServers': {{...}}}} of an MCP client's configuration."
        )
    names = [server.name for server in servers]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"You passed {names.count(name)} MCP servers named {name!r}. Give each a `name` of its own."
            )
    return servers


def _from_dict(entry: Any, name: str | None = None) -> MCPServer:
    who = f"the MCP server {name!r}" if name else "an MCP server"
    if not isinstance(entry, Mapping):
        raise ConfigError(
            f"You passed {who} as {type(entry).__name__}. Pass an `MCPServer` or a dict with `command` or `url`."
        )
    known = [option.name for option in fields(MCPServer)]
    arguments: dict[str, Any] = {} if name is None else {"name": str(name)}
    for key, value in entry.items():
        option = _KEYS.get(key, key)
        if option not in known:
            close = get_close_matches(str(key), [*known, *_KEYS], n=1, cutoff=0.5)
            hint = f"Did you mean `{close[0]}`? " if close else ""
            raise ConfigError(
                f"You passed {who} with the key `{key}`, which does not exist. {hint}The keys are: {', '.join(known)}."
            )
        if value is not None:
            arguments[option] = value
    return MCPServer(**arguments)


def _default_name(server: MCPServer) -> str:
    text = urllib.parse.urlsplit(server.url).hostname if server.url is not None else Path(str(server.command)).stem
    name = re.sub(r"[^\w\-]+", "_", text or "", flags=re.ASCII).strip("_-")
    return name if name and not name[0].isdigit() else f"mcp_{name}"
