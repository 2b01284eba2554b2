"""Running MCP servers: what their tools answer, and how a run copes when they crash, hang, lie and change."""

import asyncio
import contextlib
import gc
import importlib.util
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import wait_until
from mcp_runs import KEY, PLAIN, SDK, Run, belongings, nothing_new

import trl_toolgrpo
from trl_toolgrpo import ConfigError, MCPServer, MCPServerError, Tool, ToolCall, ToolNameError, ToolRuntimeError
from trl_toolgrpo.tools.mcp import connection as mcp_connection
from trl_toolgrpo.tools.mcp import pool as mcp_pool
from trl_toolgrpo.tools.mcp import stdio as mcp_stdio
from trl_toolgrpo.tools.mcp.servers import MCPTools


pytest.importorskip("mcp")

PACKAGE = Path(trl_toolgrpo.__file__).parent
def plain(*args, **options):
    return MCPServer(sys.executable, [PLAIN, *args], **{"name": "plain", **options})


@pytest.fixture
def run():
    runs = []

    def run(*servers, **options):
        runs.append(Run(*servers, **options))
        return runs[-1]

    yield run
    for made in runs:
        made.close()


@pytest.fixture(scope="module")
def sdk():
    """A server written with the SDK, shared by the tests that leave it as it was."""
    run = Run(MCPServer(sys.executable, [SDK], name="sdk", env={"API_KEY": KEY}))
    yield run
    run.close()


def alive(process):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


# Results


@pytest.mark.parametrize(
    "name, arguments, content",
    [
        ("add", {"a": 2, "b": 3}, "5"),
        ("person", {"name": "Ada"}, {"name": "Ada", "town": "Köln"}),
        ("say_hello", {}, "hello"),
        ("picture", {}, "A dot.\n[image: image/png, 12 kB]"),
        ("pages", {}, "Page one.\n[resource: two, memo://two, text/plain]\nThe end."),
    ],
)
def test_results_as_the_policy_reads_them(sdk, name, arguments, content):
    result = sdk.call(name, **arguments)
    assert (result.content, result.is_error, result.error_type) == (content, False, None)


def test_schemas_are_as_given_and_errors_are_data(sdk):
    assert sdk.tools["add"].description == "Adds two numbers."
    assert sdk.tools["add"].parameters["properties"]["a"] == {"title": "A", "type": "integer"}
    assert sdk.tools["add"].parameters["required"] == ["a", "b"]
    result = sdk.call("fail", reason="because")
    assert result.is_error and result.error_type == "error" and "Error executing tool fail" in result.content
    assert sdk.call("add", a="x", b=1).error_type == "invalid_arguments"


def test_a_call_that_runs_out_of_time_is_cancelled_on_the_server(sdk):
    before = sdk.call("notes").content
    sdk.executor.timeout, kept = 0.3, sdk.executor.timeout
    result = sdk.call("wait", seconds=30.0)
    sdk.executor.timeout = kept
    assert result.error_type == "timeout"
    assert sdk.call("notes").content.split() == [*before.split(), "cancelled"]
    assert sdk.mcp.restarts() == {"sdk": 0}


def test_a_shared_server_is_called_concurrently(sdk):
    started = time.perf_counter()
    results = [sdk.submit("wait", seconds=0.5) for _ in range(16)]
    assert {future.result(20).content for future in results} == {"waited"}
    assert time.perf_counter() - started < 4.0  # 8 s one after the other


def test_a_tool_that_blocks_the_executors_loop_leaves_connections_intact(sdk):
    async def block():
        time.sleep(1.5)

    blocking = Tool("block", "Blocks.", {"type": "object", "properties": {}}, block)
    sdk.executor.timeout, kept = 0.2, sdk.executor.timeout
    assert sdk.executor.submit(ToolCall("c", "block", {}), blocking).result(5).error_type == "timeout"
    time.sleep(1.3)  # the loop is given up a second later
    sdk.executor.timeout = kept
    assert sdk.call("add", a=1, b=1).content == "2"
    assert sdk.mcp.restarts() == {"sdk": 0}


def test_a_shared_tool_can_be_awaited_on_any_loop(sdk):
    assert asyncio.run(sdk.tools["say_hello"].function()).content == "hello"


# Secrets


def test_secrets_in_results_are_masked(sdk):
    assert sdk.call("environment", name="API_KEY").content == "API_KEY is [secret]"
    assert KEY not in repr(sdk.mcp.servers)


def test_errors_and_logs_hold_no_secrets(run, caplog):
    code = "import os, sys; print('no', os.environ['API_KEY'], file=sys.stderr); print(os.environ['API_KEY']); {}"
    caplog.set_level(logging.DEBUG)
    with pytest.raises(MCPServerError) as caught:
        run(MCPServer(sys.executable, ["-c", code.format("sys.exit(4)")], env={"API_KEY": KEY}))
    text = f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}"
    assert KEY not in text and "ended with exit code 4. Its error output ends with:\nno [secret]" in str(caught.value)
    assert "lines to its standard output that are no messages, the first: '[secret]'" in caplog.text
    with pytest.raises(MCPServerError) as caught:
        run(MCPServer(url=f"http://127.0.0.1:9/{KEY}?key={KEY}", headers={"Authorization": f"Bearer {KEY}"}))
    assert KEY not in str(caught.value) and KEY not in caplog.text


# Starting


@pytest.mark.parametrize(
    "server, words",
    [
        (MCPServer("no-such-program"), "its command 'no-such-program' is neither in `PATH` nor next to"),
        (MCPServer("/no/such/program"), "ended with exit code 127.*\n'/no/such/program' cannot be started"),
        (MCPServer(sys.executable, cwd="/no/such/folder"), "did not start: .*No such file"),
        (MCPServer(sys.executable, ["x.py"], per_rollout=True), "(?s)Relative paths are.*can't open file"),
        (MCPServer("sleep", ["60"], start_timeout=0.3), "did not answer within 0.3 seconds"),
        (MCPServer("sh", ["-c", "kill -11 $$"]), "ended with exit code -11"),
        (MCPServer(url="http://127.0.0.1:9/mcp"), "at http://127.0.0.1:9/mcp did not start: All connection"),
    ],
    ids=["missing", "missing path", "missing folder", "relative path", "mute", "signal", "no one there"],
)
def test_a_server_that_does_not_start_is_an_error_with_its_error_output(server, words):
    before = belongings()
    with pytest.raises(MCPServerError, match=words):
        MCPTools([server])
    wait_until(lambda: nothing_new(before))


def test_the_others_end_when_one_does_not_start():
    before = belongings()
    with pytest.raises(MCPServerError, match="no-such-program"):
        MCPTools([plain(), MCPServer("no-such-program")])
    wait_until(lambda: nothing_new(before))


def test_bad_tools_are_errors_at_construction(run):
    with pytest.raises(ConfigError, match=r"named the tool 'not' of the MCP server 'plain'.*Did you mean 'note'"):
        run(plain(tools=["not"]))
    with pytest.raises(ToolNameError, match="would be named 'plain_note'"):
        run(plain(tools=["note"]), taken=["note", "plain_note"])


def test_without_the_sdk_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'trl_toolgrpo\[mcp\]'"):
        MCPTools([plain()])


def test_the_sdk_is_imported_by_two_modules_alone():
    imports = re.compile(r"^(from|import) (mcp|mcp_types|anyio|httpx2)\b", re.MULTILINE)
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if imports.search(path.read_text())}
    assert found == {"tools/mcp/connection.py", "tools/mcp/stdio.py"}, "imported once a server is configured"


# Faults


def test_a_crash_fails_the_calls_in_flight_and_the_next_ones_wait_for_the_restart(run, caplog):
    run = run(plain())
    first = run.call("pid").content
    result = run.call("crash")
    assert result.is_error and result.error_type == "error" and "ended before it answered" in result.content["error"]
    second = run.call("pid")
    assert not second.is_error and second.content != first
    os.kill(int(second.content), signal.SIGKILL)
    wait_until(lambda: run.mcp._restarts["plain"] == 2)
    third = run.call("pid")
    assert not third.is_error and third.content not in (first, second.content)
    assert run.mcp.restarts() == {"plain": 2} and run.mcp.restarts() == {"plain": 0}
    assert "ended with exit code 13. Its error output ends with:\nit hurts" in caplog.text


def test_a_server_that_cannot_be_started_again_is_tried_at_growing_intervals(run, tmp_path, monkeypatch):
    monkeypatch.setattr(mcp_connection, "_FIRST_DELAY", 0.4)
    script = tmp_path / "server.py"
    script.write_text(Path(PLAIN).read_text())
    run = run(MCPServer(sys.executable, [str(script)], name="plain"))
    assert run.call("note", text="x").content == "done"
    script.write_text("import sys; sys.exit('not today')")
    run.call("crash")
    result = run.call("note", text="x")
    assert result.is_error and "not available at the moment" in result.content["error"]
    assert "not today" in result.content["error"]
    script.write_text(Path(PLAIN).read_text())
    wait_until(lambda: not run.call("note", text="x").is_error)
    assert run.mcp.restarts()["plain"] >= 2


def test_a_server_that_hangs_is_started_again(run, monkeypatch):
    monkeypatch.setattr(mcp_connection, "_PROBE_TIMEOUT", 0.3)
    monkeypatch.setattr(mcp_stdio, "_SHUTDOWN_SECONDS", 0.1)
    run = run(plain(), timeout=0.5)
    first = run.call("pid").content
    assert run.call("hang").error_type == "timeout"
    wait_until(lambda: run.mcp._restarts["plain"] == 1)
    run.executor.timeout = 10.0
    assert run.call("pid").content != first
    assert not alive(int(first))


@pytest.mark.parametrize("per_rollout", [False, True])
def test_reward_functions_call_tools_the_policy_does_not_get(run, per_rollout):
    run = run(plain(tools=["note"], per_rollout=per_rollout, reset_tool="reset" if per_rollout else None))
    call, session = run.rollout()
    assert set(run.tools) == {"note"} and call("note", text="x").content == "done"
    assert session.call("notes").content == "x"
    with pytest.raises(ToolNameError, match=r"No MCP server has a tool 'rest'\. The tools are: .*notes.*note\."):
        session.call("rest")
    if per_rollout:  # that one is the pool's
        with pytest.raises(ToolNameError, match="has a tool 'reset'"):
            session.call("reset")


def test_a_server_is_ended_without_being_polled(run, monkeypatch, caplog):
    """`Popen` polls before it signals, and takes the return code that asyncio's watcher waits for."""
    monkeypatch.setattr(mcp_connection, "_PROBE_TIMEOUT", 0.3)
    monkeypatch.setattr(mcp_stdio, "_SHUTDOWN_SECONDS", 0.1)
    polled, poll = [], subprocess.Popen.poll
    monkeypatch.setattr(subprocess.Popen, "poll", lambda self: polled.append(self.pid) or poll(self))
    run = run(plain(), timeout=0.5)
    pid = int(run.call("pid").content)
    assert run.call("hang").error_type == "timeout"
    wait_until(lambda: run.mcp._restarts["plain"] == 1)
    assert not alive(pid) and not polled
    assert "Unknown child process" not in caplog.text


def test_lines_that_are_no_messages_are_passed_over(run, caplog):
    run = run(plain())
    assert [run.call("garble").content for _ in range(3)] == ["done"] * 3
    assert caplog.text.count("lines to its standard output that are no messages") == 1
    assert run.mcp.restarts() == {"plain": 0}


def test_half_an_emoji_is_replaced_in_both_directions(run, caplog):
    """`json.dumps` writes it as an escape, which parsers of JSON refuse or take as they like."""
    run = run(plain())
    assert run.call("cut").content == "half \ufffd"
    assert run.call("note", text="other half \ude00").content == "done"
    assert run.call("notes").content == "other half \ufffd"
    assert run.mcp.restarts() == {"plain": 0} and "no messages" not in caplog.text


def test_a_message_that_cannot_be_written_fails_its_call_and_the_server_is_started_again(run, monkeypatch):
    from mcp_types import JSONRPCRequest

    run = run(plain())
    dump = JSONRPCRequest.model_dump_json

    def refuse(message, **options):
        if "refuse me" in str(message):
            raise RuntimeError("no such line")
        return dump(message, **options)

    monkeypatch.setattr(JSONRPCRequest, "model_dump_json", refuse)
    assert "ended before it answered" in run.call("note", text="refuse me").content["error"]
    assert run.call("notes").content == "none" and run.mcp.restarts() == {"plain": 1}


def test_a_tool_that_vanishes_is_an_error_of_its_calls(run, caplog):
    run = run(plain())
    assert run.call("forget").content == "done"
    wait_until(lambda: "has changed its tools, and no longer has: pid" in caplog.text)
    result = run.call("pid")
    assert result.is_error and result.content == {"error": "The server no longer has the tool `pid`."}
    run.call("forget")
    assert run.call("note", text="x").content == "done" and "pid" in run.tools
    assert caplog.text.count("has changed its tools") == 1


def test_a_server_of_the_newest_protocol_reports_vanished_tools_too(caplog):
    run = Run(MCPServer(sys.executable, [SDK], name="sdk"))
    try:
        assert run.mcp._shared["sdk"]._client.protocol_version >= "2026"
        run.call("forget")
        wait_until(lambda: run.call("add", a=1, b=1).is_error)
    finally:
        run.close()


# Servers of rollouts


def test_rollouts_do_not_see_each_other(run, tmp_path):
    (tmp_path / "given.txt").write_text("given")
    run = run(plain("--on-disk", per_rollout=True, files=str(tmp_path)))
    run.mcp.prepare(2)
    (one, first), (two, second), (_, third) = run.rollout(), run.rollout(), run.rollout()
    assert one("note", text="a").content == "done" and two("note", text="b").content == "done"
    assert (one("notes").content, two("notes").content) == ("a", "b")
    assert first.call("notes").content == "a"
    assert (first.folder("plain") / "notes.txt").read_text() == "a\n"
    assert (second.folder("plain") / "given.txt").read_text() == "given"
    assert third.folder("plain") is None, "who calls nothing gets no server"
    folders, pids = [first.folder("plain"), second.folder("plain")], [one("pid").content, two("pid").content]
    run.mcp.take_back([first, second, third])
    wait_until(lambda: not any(folder.exists() for folder in folders))
    again, session = run.rollout()
    assert again("notes").content == "none" and again("pid").content not in pids
    assert not (session.folder("plain") / "notes.txt").exists()
    assert "The rollout is over" in one("notes").content["error"]


def test_a_server_with_a_reset_tool_is_kept(run, caplog):
    run = run(plain(per_rollout=True, reset_tool="reset"))
    assert "reset" not in run.tools
    call, session = run.rollout()
    call("note", text="a")
    pid = call("pid").content
    run.mcp.take_back([session])
    call, session = run.rollout()
    assert (call("notes").content, call("pid").content) == ("none", pid)
    # One that hangs is not
    call, session = run.rollout()
    run.executor.timeout = 0.5
    assert call("hang").error_type == "timeout"
    run.executor.timeout = 10.0
    run.mcp.take_back([session])
    pool = run.mcp._pools["plain"]
    wait_until(lambda: len(pool._instances) == 2 and len(pool._ready) == 1)


def test_a_server_whose_reset_fails_is_replaced(run, caplog):
    run = run(plain(per_rollout=True, reset_tool="crash"))
    call, session = run.rollout()
    pid = call("pid").content
    run.mcp.take_back([session])
    call, session = run.rollout()
    assert call("pid").content != pid
    assert "was not reset by its tool `crash` (" in caplog.text


def test_a_crash_of_a_rollouts_server_does_not_affect_other_rollouts(run):
    run = run(plain(per_rollout=True))
    (one, _), (two, _) = run.rollout(), run.rollout()
    two("note", text="b")
    assert "ended before it answered" in one("crash").content["error"]
    assert one("notes").content == "none" and two("notes").content == "b"
    assert run.mcp.restarts() == {"plain": 1}


def test_a_rollout_whose_server_does_not_start_gets_an_error_and_tries_again(run, tmp_path):
    script = tmp_path / "server.py"
    script.write_text(Path(PLAIN).read_text())
    run = run(MCPServer(sys.executable, [str(script)], name="plain", per_rollout=True))
    call, session = run.rollout()
    assert call("pid").content.isdigit()
    script.write_text("import sys; sys.exit('not today')")
    run.mcp.take_back([session])
    run.mcp.prepare(3)
    call, session = run.rollout()
    result = call("pid")
    assert result.is_error and "not available at the moment" in result.content["error"]
    assert "not today" in result.content["error"]
    script.write_text(Path(PLAIN).read_text())
    wait_until(lambda: call("pid").content == call("pid").content and not call("pid").is_error)


def test_servers_of_rollouts_are_made_ready_side_by_side_and_reused(run, monkeypatch):
    started = []
    start = mcp_connection.Connection.start
    monkeypatch.setattr(mcp_connection.Connection, "start", lambda self: started.append(self) or start(self))
    run = run(plain(per_rollout=True, reset_tool="reset"))
    for _ in range(3):
        run.mcp.prepare(4)
        rollouts = [run.rollout() for _ in range(4)]
        assert len({call("pid").content for call, _ in rollouts}) == 4
        run.mcp.take_back([session for _, session in rollouts])
    assert len(started) == 4


@pytest.mark.parametrize("options", [{}, {"reset_tool": "reset"}])
def test_servers_beyond_those_prepared_for_end_when_they_are_given_back(run, options):
    run = run(plain(per_rollout=True, **options))
    pool = run.mcp._pools["plain"]
    for count in (5, 2, 3):
        run.mcp.prepare(count)
        rollouts = [run.rollout() for _ in range(count)]
        pids = {call("pid").content for call, _ in rollouts}
        assert len(pids) == count
        run.mcp.take_back([session for _, session in rollouts])
        wait_until(lambda: len(pool._instances) == len(pool._ready) == count)  # noqa: B023
        wait_until(lambda: all(task.done() for task in pool._ready))


def test_a_server_whose_folder_cannot_be_made_fails_its_calls(run, monkeypatch):
    run = run(plain(per_rollout=True))
    (call, _), (other, _) = run.rollout(), run.rollout()
    assert call("pid").content.isdigit()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mcp_pool.tempfile, "mkdtemp", full)
    assert "No space left" in other("pid").content["error"]
    monkeypatch.undo()
    run.mcp.prepare(1)
    assert run.rollout()[0]("pid").content.isdigit()


def test_a_tool_of_a_rollouts_server_needs_a_rollout(run):
    run = run(plain(per_rollout=True))
    assert "outside of a rollout" in run.call("pid").content["error"]
    with pytest.raises(ToolNameError, match=r"No MCP server has a tool 'pidd'. The tools are: pid, note"):
        run.mcp.session().call("pidd")


# Ends


def test_a_closed_run_leaves_no_process_file_or_folder():
    before = belongings()
    run = Run(plain(), plain(name="own", per_rollout=True))
    call, session = run.rollout()
    pids = [run.call("plain_pid").content, call("own_pid").content]
    folder = session.folder("own")
    run.close()
    run.close()
    assert not any(map(alive, map(int, pids))) and not folder.parent.exists()
    with pytest.raises(ToolRuntimeError, match="after the run had ended its servers"):
        asyncio.run(run.tools["plain_pid"].function())
    del call, session, run
    gc.collect()
    wait_until(lambda: nothing_new(before))


def test_servers_end_with_a_run_that_is_killed(tmp_path):
    # The package without its `__init__`s, whose imports would take most of the test's time
    code = f"""
        import asyncio, sys, time, types
        for name in ("trl_toolgrpo", "trl_toolgrpo.tools"):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [{str(PACKAGE.parent)!r} + "/" + name.replace(".", "/")]
        from trl_toolgrpo.tools.mcp.servers import MCPTools
        from trl_toolgrpo.tools.mcp.config import MCPServer
        options = {{"a": False, "own": True}}.items()
        run = MCPTools([MCPServer({sys.executable!r}, [{PLAIN!r}], name=n, per_rollout=own) for n, own in options])
        session = run.session()
        print(session.call("a_pid").content, session.call("own_pid").content, flush=True)
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        process.kill()
        wait_until(lambda: not any(map(alive, pids)))


# Streamable HTTP


def serve(port):
    process = subprocess.Popen([sys.executable, SDK, str(port)], stderr=subprocess.DEVNULL)

    def listens():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(listens, 30)
    return process


def test_a_server_over_http_is_called_and_connected_to_again(run):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = serve(port)
    try:
        run = run(MCPServer(url=f"http://127.0.0.1:{port}/mcp", headers={"Authorization": f"Bearer {KEY}"}))
        assert run.call("add", a=2, b=3).content == "5"
        assert run.call("person", name="Ada").content == {"name": "Ada", "town": "Köln"}
        process.kill()
        process.wait()
        assert run.call("add", a=2, b=3).is_error
        process = serve(port)
        wait_until(lambda: run.call("add", a=2, b=3).content == "5")
        assert run.mcp.restarts()["mcp_127_0_0_1"] >= 1
    finally:
        process.kill()
        process.wait()


# The SDK


def test_the_sdk_has_what_is_used_of_it():
    from mcp.client import streamable_http

    assert mcp_connection._SESSION_LOST in Path(streamable_http.__file__).read_text()

    known = set(logging.root.manager.loggerDict)
    ours = {name for name in mcp_connection.SDK_LOGGERS if not name.startswith("http")}
    assert ours <= known and "httpx2" in known
    assert {name for name in known if name.startswith("mcp.client.") or name == "client"} - ours <= {
        "mcp.client",  # a parent, without records of its own
        "mcp.client.stdio",  # not used
        "mcp.client.sse",
        "mcp.client.caching",
        "mcp.client.auth",
        "mcp.client.auth.oauth2",
    }
