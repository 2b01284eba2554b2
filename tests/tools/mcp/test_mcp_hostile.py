"""MCP servers that break the protocol, over stdio and HTTP: calls fail as data, and later ones are answered."""

import http.server
import json
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import prompts, tool_call
from mcp_hostile_server import ACTS, ERRORS, WRONG
from mcp_runs import Run, logged, make_trainer

from trl_toolgrpo import MCPServer, MCPServerError
from trl_toolgrpo.tools.mcp import connection as mcp_connection
from trl_toolgrpo.tools.mcp import stdio as mcp_stdio


pytest.importorskip("mcp")

HOSTILE = str(Path(__file__).parents[2] / "mcp_hostile_server.py")
LIMIT = 2.0


def server(*args, **options):
    return MCPServer(sys.executable, [HOSTILE, *args], name="hostile", **options)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(mcp_stdio, "_SHUTDOWN_SECONDS", 0.2)
    monkeypatch.setattr(mcp_connection, "_PROBE_TIMEOUT", 1.0)
    monkeypatch.setattr(mcp_stdio, "LONGEST_MESSAGE", 8 * 2**20)


def answers_again(call, seconds=10.0):
    """Return whether a server, or the one that takes its place, answers within the limit."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        result = call("pid")
        if not result.is_error:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("per_rollout", [False, True])
def test_a_call_of_a_server_that_breaks_the_protocol_is_answered_and_so_are_the_next(per_rollout):
    run = Run(server(per_rollout=per_rollout), timeout=LIMIT)
    found = {}
    try:
        for name in ACTS:
            call = run.rollout()[0] if per_rollout else run.call
            started = time.monotonic()
            result = call(name)
            assert time.monotonic() - started < LIMIT + 2, name
            found[name] = result
            # A rollout is lost to a call that ran out of time, as what that does is not known
            lost = per_rollout and result.error_type == "timeout"
            assert answers_again(run.rollout()[0] if lost else call), name
    finally:
        run.close()
    for name in ("garbage", "deep", "deaf", "twice", "asks"):
        assert (found[name].is_error, found[name].content) == (False, "first" if name == "twice" else "done"), name
    for name in ("silent", "deaf_and_silent"):
        assert found[name].error_type == "timeout", name
    for name in ("endless", "huge", "too_huge", "mute", "half"):  # 20 MiB are over the limit of this test
        assert "ended before it answered" in str(found[name].content), name
    for name in (*ERRORS, "result_number", "result_nothing", "result_text", "result_list"):
        assert found[name].error_type == "error" and found[name].seconds < 1, name
        assert "no valid message" in str(found[name].content), name
    for name in set(WRONG) - {"number", "nothing", "text", "list"}:
        result = found[f"result_{name}"]
        assert not result.is_error or "not valid" in str(result.content), name
        assert len(str(result.content)) < 600, name


@pytest.mark.parametrize("per_rollout", [False, True])
@pytest.mark.parametrize(
    "start",
    ["endless", "silent", "deaf", "mute", "list_wrong", "list_null", "list_silent", "initialize_wrong"],
)
def test_a_server_that_breaks_the_protocol_from_the_start_is_an_error_of_construction(start, per_rollout):
    started = time.monotonic()
    with pytest.raises(MCPServerError, match="MCP server 'hostile'"):
        Run(server("--start", start, per_rollout=per_rollout, start_timeout=2.0))
    assert time.monotonic() - started < 12


@pytest.mark.parametrize("per_rollout", [False, True])
@pytest.mark.parametrize("start", ["garbage", "list_garbage", "list_endless", "list_twice", "list_many"])
def test_a_server_that_starts_despite_its_faults_is_used(start, per_rollout):
    run = Run(server("--start", start, per_rollout=per_rollout, start_timeout=20.0))
    try:
        assert not (run.rollout()[0] if per_rollout else run.call)("pid").is_error
        assert len(run.tools) == {"list_endless": 1, "list_many": 301}.get(start, len(ACTS) + 1)
    finally:
        run.close()


@pytest.mark.parametrize("per_rollout", [False, True])
def test_training_and_evaluation_continue(tmp_path, monkeypatch, per_rollout):
    def call(name):
        return tool_call(name) + "<|im_end|>"

    # What each rollout calls: one fault, then something that works
    faults = ("silent", "deaf_and_silent", "half", "garbage")
    script = [[call(fault), call("pid"), call("pid"), "done<|im_end|>"] for fault in faults]
    servers = {"hostile": {"command": sys.executable, "args": [HOSTILE], "per_rollout": per_rollout, "timeout": LIMIT}}
    options = {"max_completion_length": 900, "max_tool_output_tokens": 100, "per_device_eval_batch_size": 4}
    trainer, seen = make_trainer(tmp_path, monkeypatch, script, mcp_servers=servers, **options)
    trainer.train()
    figures = trainer.evaluate(prompts(1))
    assert "eval_reward" in figures and figures["eval_tools/mcp/hostile/restarts"] >= 1.0 and len(seen) == 8
    for row, (_, trajectory, _) in enumerate(seen):
        assert trajectory.stop_reason == "stop" and len(trajectory.turns) == 4
        if per_rollout:  # where a server is shared, a fault of one may fail the calls of others
            kinds = [turn.tool_results[0].error_type for turn in trajectory.turns[:1]]
            assert kinds == [{"silent": "timeout", "deaf_and_silent": "timeout", "half": "error"}.get(faults[row % 4])]
            assert trajectory.turns[2].tool_results[0].error_type == ("abandoned" if row % 4 < 2 else None)
    assert all(value >= 1.0 for value in logged(trainer, "tools/mcp/hostile/restarts"))


# Over HTTP


class Handler(http.server.BaseHTTPRequestHandler):
    """A correct server until a tool is called; the tool's name says how it then breaks the protocol."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.send_error(405)

    do_DELETE = do_GET

    def reply(self, body, kind="application/json", status=200, length=None):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def answer(self, number, result):
        self.reply(json.dumps({"jsonrpc": "2.0", "id": number, "result": result}).encode())

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        method, number = request.get("method"), request.get("id")
        if number is None or method is None:
            return self.reply(b"", status=202)
        if method == "initialize":
            version = request["params"]["protocolVersion"]
            info = {"name": "hostile", "version": "1"}
            result = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info}
            return self.answer(number, result)
        if method == "tools/list":
            schema = {"type": "object", "properties": {}}
            tools = [{"name": name, "inputSchema": schema} for name in ("pid", *HTTP_FAULTS)]
            return self.answer(number, {"tools": tools})
        if method != "tools/call":
            return self.reply(b"{}", status=404)
        name = request["params"]["name"]
        if name == "pid":
            return self.answer(number, {"content": [{"type": "text", "text": "here"}]})
        return HTTP_FAULTS[name](self, number)

    def endless(self, number, kind="application/json"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            self.wfile.write(b"data: " if "event" in kind else b'{"jsonrpc": "2.0", "id": 1, "x": "')
            for _ in range(400):
                self.wfile.write(b"x" * 2**20)
                self.server.sent += 2**20
        except OSError:
            pass

    def cut(self, number):
        self.reply(b'{"jsonrpc": "2.0", "id":', length=1000)
        self.close_connection = True


HTTP_FAULTS = {
    "garbage": lambda self, number: self.reply(b"\xff\x00 garbage"),
    "page": lambda self, number: self.reply(b"<html>busy</html>", kind="text/html"),
    "error_500": lambda self, number: self.reply(b"oops", status=500),
    "error_429": lambda self, number: self.reply(b"", status=429),
    "nothing": lambda self, number: self.reply(b""),
    "wrong": lambda self, number: self.answer(number, 5),
    "wrong_content": lambda self, number: self.answer(number, {"content": "text"}),
    "cut": Handler.cut,
    "endless": Handler.endless,
    "endless_event": lambda self, number: Handler.endless(self, number, "text/event-stream"),
    "no_event": lambda self, number: self.reply(b"event: x\ndata: nonsense\n\n", kind="text/event-stream"),
    "silent": lambda self, number: time.sleep(LIMIT + 2),
}


def test_calls_of_a_server_over_http_that_breaks_the_protocol_are_answered(monkeypatch):
    monkeypatch.setattr(mcp_connection, "LONGEST_MESSAGE", 8 * 2**20)
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads, web.sent = True, 0
    threading.Thread(target=web.serve_forever, daemon=True).start()
    run = Run(MCPServer(url=f"http://127.0.0.1:{web.server_address[1]}/mcp", name="hostile"), timeout=LIMIT)
    try:
        for name in HTTP_FAULTS:
            started = time.monotonic()
            result = run.call(name)
            assert result.is_error and time.monotonic() - started < LIMIT + 2, name
            assert answers_again(run.call), name
        assert web.sent < 2 * 100 * 2**20, "an answer without end is not read to its end"
    finally:
        run.close()
        web.shutdown()
        web.server_close()
