"""Which tools of MCP servers the policy gets, and the names they go by. Pure functions."""

import itertools
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import NamedTuple, TypeVar

from ...errors import ConfigError, ToolNameError
from .config import MCPServer


T = TypeVar("T")

logger = logging.getLogger(__name__)


class ToolOrigin(NamedTuple):
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


def choose_tools(server: MCPServer, tools: dict[str, T]) -> dict[str, T]:
    """
    Return the tools of a server that the policy gets.

    Args:
        server ([`MCPServer`]):
            The server.
        tools (`dict[str, T]`):
            All its tools, by name.

    Returns:
        `dict[str, T]`: those it names in `tools`, or all, without the one that resets it.

    Raises:
        ConfigError: if it names a tool that does not exist.
    """
    wanted = tools if server.tools is None else server.tools
    for name in [*wanted, *filter(None, [server.reset_tool])]:
        if name not in tools:
            close = get_close_matches(name, tools, n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise ConfigError(
                f"You named the tool {name!r} of the MCP server {server.name!r}, which does not have it.",
                remedy=f"{hint}It has: {', '.join(tools) or 'none'}.",
            )
    return {name: tools[name] for name in wanted if name != server.reset_tool}


def name_tools(listed: Mapping[str, Collection[str]], taken: Collection[str]) -> dict[str, ToolOrigin]:
    """
    Name each tool of each server in a run, with the server's name before it where names collide. Names that differ
    from the server's own are logged.

    Args:
        listed (`Mapping[str, Collection[str]]`):
            Names of the tools of each server.
        taken (`Collection[str]`):
            Names of the run's other tools.

    Returns:
        `dict[str, ToolOrigin]`: what each name stands for.

    Raises:
        ToolNameError: if a name collides all the same.
    """
    own = {ToolOrigin(server, tool): name for server in listed for tool, name in identifiers(listed[server]).items()}
    used = Counter([*taken, *own.values()])
    prefixes = identifiers(listed)
    found: dict[str, ToolOrigin] = {}
    for origin, identifier in own.items():
        name = identifier if used[identifier] == 1 else f"{prefixes[origin.server]}_{identifier}"
        if name in found or name in taken:
            raise ToolNameError(
                f"The tool {origin.tool!r} of the MCP server {origin.server!r} would be named {name!r}, which another "
                f"tool is named already.",
                remedy="Give the server another `name`, or choose among its tools with `tools`.",
            )
        found[name] = origin
    renamed = [f"`{name}` is {of.tool!r} of {of.server!r}" for name, of in found.items() if name != of.tool]
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
    Return the tools that the policy does not get, which a reward function may still ask for by their own names.

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


def identifiers(names: Iterable[str]) -> dict[str, str]:
    """
    Return an identifier for each name.

    Args:
        names (`Iterable[str]`):
            Names as servers give them.

    Returns:
        `dict[str, str]`: the identifier of each name: the name itself if it is one, otherwise with "_" for what cannot
        be in one, and with a number where that is in use.
    """
    found = {name: name if name.isascii() and name.isidentifier() else "" for name in names}
    for name in [name for name, identifier in found.items() if not identifier]:
        base = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "tool"
        base = f"_{base}" if base[0].isdigit() else base
        numbered = (f"{base}_{number}" for number in itertools.count(2))
        found[name] = next(new for new in itertools.chain([base], numbered) if new not in found.values())
    return found
