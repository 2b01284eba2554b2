"""Which tools of MCP servers the policy gets, and the names they go by.

Owns the way from a server's names to the run's and back; fed by `mcp.py`. Pure functions.
"""

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ..errors import ConfigError, ToolNameError
from .mcp_config import MCPServer


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ToolOrigin:
    """
    Where a tool comes from.

    Args:
        server (`str`):
            Name of its server.
        tool (`str`):
            Its name there.
    """

    server: str
    tool: str


def choose_tools(server: MCPServer, tools: dict[str, Any]) -> dict[str, Any]:
    """
    The tools of a server that the policy gets.

    Args:
        server ([`MCPServer`]):
            The server.
        tools (`dict[str, Any]`):
            All its tools, by name.

    Returns:
        `dict[str, Any]`: those it names in `tools`, or all, without the one that resets it.

    Raises:
        ConfigError: if it names a tool that does not exist.
    """
    wanted = tools if server.tools is None else server.tools
    for name in [*wanted, *([server.reset_tool] if server.reset_tool else ())]:
        if name not in tools:
            close = get_close_matches(name, tools, n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise ConfigError(
                f"You named the tool {name!r} of the MCP server {server.name!r}, which does not have it. {hint}"
                f"It has: {', '.join(tools) or 'none'}."
            )
    return {name: tools[name] for name in wanted if name != server.reset_tool}


def name_tools(listed: Mapping[str, Collection[str]], taken: Collection[str]) -> dict[str, ToolOrigin]:
    """
    The name that each tool of each server goes by in a run, with the server's name before it where names collide.
    Names that differ from the server's own are logged.

    Args:
        listed (`Mapping[str, Collection[str]]`):
            Names of the tools of each server.
        taken (`Collection[str]`):
            Names of the run's other tools.

    Returns:
        `dict[str, ToolOrigin]`: what each name stands for.

    Raises:
        ToolNameError: if a name is still another tool's.
    """
    own = {server: identifiers(names) for server, names in listed.items()}
    used = Counter([*taken, *(identifier for names in own.values() for identifier in names.values())])
    prefixes = identifiers(listed)
    found: dict[str, ToolOrigin] = {}
    renamed = []
    for server, names in own.items():
        for tool, identifier in names.items():
            name = identifier if used[identifier] == 1 else f"{prefixes[server]}_{identifier}"
            if name in found or name in taken:
                raise ToolNameError(
                    f"The tool {tool!r} of the MCP server {server!r} would be named {name!r}, which another tool is "
                    f"named already. Give the server another `name`, or choose among its tools with `tools`."
                )
            found[name] = ToolOrigin(server, tool)
            if name != tool:
                renamed.append(f"`{name}` is {tool!r} of {server!r}")
    if renamed:
        logger.warning(
            "Tools of MCP servers whose name is no identifier, or is another tool's too, go by another one: %s.",
            "; ".join(renamed),
        )
    return found


def tools_left_out(
    listed: Mapping[str, Collection[str]], chosen: Mapping[str, Collection[str]], named: Collection[str]
) -> dict[str, ToolOrigin]:
    """
    The tools that the policy does not get, which a reward function may still ask for by their own names.

    Args:
        listed, chosen (`Mapping[str, Collection[str]]`):
            Names of the tools of each server: all that a run may call, and those the policy gets.
        named (`Collection[str]`):
            Names that stand for another tool.

    Returns:
        `dict[str, ToolOrigin]`: what each name stands for; one that two servers have stands for none.
    """
    left = [(tool, server) for server, tools in listed.items() for tool in sorted(tools) if tool not in chosen[server]]
    count = Counter(tool for tool, _ in left)
    return {tool: ToolOrigin(server, tool) for tool, server in left if count[tool] == 1 and tool not in named}


def identifiers(names: Iterable[str], taken: Collection[str] = ()) -> dict[str, str]:
    """
    An identifier for each name.

    Args:
        names (`Iterable[str]`):
            Names as servers give them.
        taken (`Collection[str]`, *optional*, defaults to `()`):
            Identifiers that are in use.

    Returns:
        `dict[str, str]`: identifier of each name: the name itself if it is one, or else with "_" for what cannot be in
        one, and with a number where that is in use.
    """
    names = list(dict.fromkeys(names))
    found = {name: name for name in names if name.isascii() and name.isidentifier()}
    used = {*taken, *found.values()}
    for name in names:
        if name not in found:
            base = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "tool"
            base = f"_{base}" if base[0].isdigit() else base
            number = 1
            while (identifier := base if number == 1 else f"{base}_{number}") in used:
                number += 1
            found[name] = identifier
            used.add(identifier)
    return {name: found[name] for name in names}
