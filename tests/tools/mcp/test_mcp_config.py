"""MCP servers as users write them, and the names their tools go by."""

import json
import logging
from pathlib import Path

import pytest
from conftest import config

from trl_toolgrpo import ConfigError, MCPServer, ToolNameError
from trl_toolgrpo.run_folder.files import run_redactor
from trl_toolgrpo.tools.mcp.config import read_servers
from trl_toolgrpo.tools.mcp.tool_names import ToolOrigin, choose_tools, identifiers, name_tools


USUAL = """
{"mcpServers": {
    "sqlite": {"command": "mcp-server-sqlite", "args": ["--db-path", "x.db"], "env": {"A": "b"}, "type": "stdio"},
    "remote": {"url": "https://example.org/mcp", "headers": {"Authorization": "Bearer 12345678"}, "type": "http"}
}}
"""


def test_the_configuration_of_mcp_clients_is_read():
    sqlite, remote = read_servers(json.loads(USUAL))
    assert (sqlite.name, sqlite.command, sqlite.args) == ("sqlite", "mcp-server-sqlite", ["--db-path", "x.db"])
    assert sqlite.env == {"A": "b"} and sqlite.transport == "stdio" and not sqlite.per_rollout
    assert (remote.name, remote.transport, remote.url) == ("remote", "streamable_http", "https://example.org/mcp")
    assert read_servers(json.loads(USUAL)["mcpServers"]) == [sqlite, remote]


def test_lists_of_servers_and_dicts_are_read():
    given = [MCPServer("a", name="one"), {"command": Path("/bin/b"), "per_rollout": True}, {"url": "http://h:1/x"}]
    servers = read_servers(given)
    assert [server.name for server in servers] == ["one", "b", "h"]
    assert servers[1].command == "/bin/b" and servers[1].per_rollout
    assert read_servers(None) == [] and read_servers([]) == [] and read_servers({}) == []


@pytest.mark.parametrize("transport", ["streamable_http", "streamable-http", "streamableHttp", "http"])
def test_the_transport_goes_by_several_names(transport):
    assert MCPServer(url="http://localhost/mcp", transport=transport).transport == "streamable_http"


@pytest.mark.parametrize(
    "given, words",
    [
        ({"args": ["x"]}, "neither `command` nor `url`.*Give one of the two"),
        ({"command": "x", "url": "http://y"}, "both `command` and `url`"),
        ({"command": "x", "transport": "pigeon"}, "transport='pigeon'`. The transports are 'stdio' and"),
        ({"url": "http://x", "type": "sse"}, "SSE transport was replaced by streamable HTTP"),
        ({"command": "x", "transport": "http"}, "is reached over 'stdio'"),
        ({"url": "http://x", "transport": "stdio"}, "is reached over 'streamable_http'"),
        ({"command": "x", "headers": {"a": "b"}}, "`headers` without `url`"),
        ({"url": "http://x", "env": {"a": "b"}}, "`env` without `command`"),
        ({"url": "ftp://x"}, "has to begin with http"),
        ({"url": "http://x", "per_rollout": True}, "`per_rollout` and `url`"),
        ({"command": "x", "reset_tool": "reset"}, "`reset_tool` without `per_rollout`"),
        ({"command": "x", "files": "tests"}, "`files` without `per_rollout`"),
        ({"command": "x", "per_rollout": True, "files": "no/such/folder"}, "not a folder that exists"),
        ({"command": "x", "per_rollout": True, "files": "tests", "cwd": "/"}, "`files` and `cwd`"),
        ({"command": ["x", "y"]}, "has to be a string"),
        ({"command": "x", "args": "y"}, "`args` of type str. It has to be a list of strings"),
        ({"command": "x", "env": {"PORT": 8000}}, "`env` of type dict. It has to be a dict of strings. Quote numbers"),
        ({"command": "x", "timeout": 0}, "`timeout=0`. It has to be a positive number"),
        ({"command": "x", "start_timeout": -1}, "`start_timeout=-1`"),
        ({"command": "x", "per_rolout": True}, "key `per_rolout`, which does not exist. Did you mean `per_rollout`"),
        ({"comand": "x"}, "Did you mean `command`"),
        ({"command": "x", "zzz": 1}, "`zzz`, which does not exist. The keys are: command, args"),
        ("mcp-server-time", "as str. Pass an `MCPServer` or a dict"),
    ],
)
def test_arguments_that_cannot_work_are_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        read_servers([given])


@pytest.mark.parametrize("given", ["mcp.json", {"mcpServers": ["x"]}, {"a": "b"}, 3])
def test_other_shapes_are_refused(given):
    with pytest.raises(ConfigError, match="You passed `mcp_servers`"):
        read_servers(given)


def test_the_name_of_the_server_is_in_the_message():
    with pytest.raises(ConfigError, match="the MCP server 'files' with"):
        read_servers({"files": {}})
    with pytest.raises(ConfigError, match="2 MCP servers named 'x'"):
        read_servers([{"command": "x"}, {"command": "/bin/x"}])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--api-key", "abc-123456"],
        ["--token=abc-123456"],
        ["-y", "a-server", "postgresql://me:abc-123456@db.example/main"],
        ["mcp-remote", "https://x.org/mcp?key=abc-123456"],
        ["mcp-remote", "https://x.org", "--header", "Authorization: Bearer abc-123456"],
        ["run", "-e", "GITHUB_TOKEN=abc-123456", "image"],
        ['--config={"password": "abc-123456"}'],
    ],
    ids=" ".join,
)
def test_secrets_of_a_command_are_not_shown(arguments, tmp_path):
    server = MCPServer("x", arguments)
    assert "abc-123456" not in repr(server) and server.args == arguments
    for redactor in (server.redactor, run_redactor(config(tmp_path), [server])):
        assert redactor.text("refused: abc-123456") == "refused: [secret]"


def test_secrets_are_not_shown():
    server = MCPServer("x", ["--key", "opensesame"], env={"API_KEY": "opensesame", "OTHER": "ab"})
    assert repr(server) == (
        "MCPServer(command='x', args=['--key', '[secret]'], env={'API_KEY': '...', 'OTHER': '...'}, "
        "transport='stdio', name='x', start_timeout=60.0)"
    )
    remote = MCPServer(url="http://me:opensesame@host/mcp?key=opensesame", headers={"X": "opensesame"})
    assert "sesame" not in repr(remote) and "sesame" not in str([remote]) and "'X': '...'" in repr(remote)
    with pytest.raises(ConfigError) as caught:
        MCPServer("x", env={"API_KEY": "opensesame"}, url="http://y?key=opensesame")
    assert "sesame" not in str(caught.value)


# Names


def test_names_that_are_no_identifiers_are_mapped():
    names = ["plain", "get-sum", "get.sum", "files/read", "2nd", "größe", "!!", "class_"]
    assert identifiers(names) == {
        "plain": "plain",
        "get-sum": "get_sum",
        "get.sum": "get_sum_2",
        "files/read": "files_read",
        "2nd": "_2nd",
        "größe": "gr_e",
        "!!": "tool",
        "class_": "class_",
    }
    assert identifiers(["a-b", "a_b"]) == {"a-b": "a_b_2", "a_b": "a_b"}


def test_names_have_the_servers_name_before_them_only_where_they_collide(caplog):
    listed = {"one": ["search", "read"], "my server": ["search", "list-all"]}
    with caplog.at_level(logging.WARNING):
        found = name_tools(listed, ["read"])
    assert found == {
        "one_search": ToolOrigin("one", "search"),
        "one_read": ToolOrigin("one", "read"),
        "my_server_search": ToolOrigin("my server", "search"),
        "list_all": ToolOrigin("my server", "list-all"),
    }
    assert len(caplog.records) == 1
    for words in ("`one_read` is 'read' of 'one'", "`list_all` is 'list-all' of 'my server'"):
        assert words in caplog.text
    caplog.clear()
    assert list(name_tools({"one": ["search"]}, ["other"])) == ["search"]
    assert not caplog.records


def test_a_name_that_still_collides_is_refused():
    with pytest.raises(ToolNameError, match="'search' of the MCP server 'one' would be named 'one_search'"):
        name_tools({"one": ["search"]}, ["search", "one_search"])


def test_the_policy_gets_the_chosen_tools():
    tools = {"read": 1, "write": 2, "reset": 3}
    assert choose_tools(MCPServer("x"), tools) == tools
    assert choose_tools(MCPServer("x", tools=["write", "read"]), tools) == {"write": 2, "read": 1}
    assert choose_tools(MCPServer("x", per_rollout=True, reset_tool="reset"), tools) == {"read": 1, "write": 2}
    with pytest.raises(ConfigError, match=r"tool 'wriet' of the MCP server 'x'.*Did you mean 'write'.*It has: read"):
        choose_tools(MCPServer("x", tools=["wriet"]), tools)
    with pytest.raises(ConfigError, match="named the tool 'clear'"):
        choose_tools(MCPServer("x", per_rollout=True, reset_tool="clear"), tools)
