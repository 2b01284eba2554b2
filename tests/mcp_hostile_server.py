"""An MCP server in plain Python that breaks the protocol: one way for each of its tools, or from the start."""

import json
import os
import sys
import time


START = sys.argv[sys.argv.index("--start") + 1] if "--start" in sys.argv else ""
output = sys.stdout.buffer


def write(data):
    output.write(data)
    output.flush()


def send(message):
    write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")


def answer(number, text="done"):
    send({"id": number, "result": {"content": [{"type": "text", "text": text}]}})


def result(number, value):
    send({"id": number, "result": value})


def wait_for_ever():
    while True:
        time.sleep(600)


def garbage(number):
    write(os.urandom(2**20) + b"\n\xff\xfe\x00\n\r\n{}\n[]\n5\nnull\n" + b'"' * 1000 + b"\n")
    answer(number)


def deep(number):
    write(b'{"jsonrpc": "2.0", "id": 1, "result": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n")
    answer(number)


def endless(number):
    while True:
        write(b"x" * 2**20)


def huge(number):
    answer(number, "y" * (20 * 2**20))


def too_huge(number):
    answer(number, "y" * (80 * 2**20))


def silent(number):
    return None


def deaf(number):
    os.close(0)
    answer(number)
    wait_for_ever()


def deaf_and_silent(number):
    os.close(0)
    wait_for_ever()


def mute(number):
    os.close(1)
    wait_for_ever()


def wrong_id(number):
    for other in (number + 1000, str(number), -1, None, 1.5, [1], {"a": 1}):
        answer(other)


def twice(number):
    answer(number, "first")
    answer(number, "second")
    result(number, 5)


def half(number):
    write(b'{"jsonrpc": "2.0", "id": %d, "result": {"content": [' % number)
    os._exit(3)


def chatter(number):
    for index in range(20_000):
        send({"method": "notifications/message", "params": {"level": "info", "data": f"line {index}"}})
        send({"method": "notifications/nonsense", "params": [index]})
    answer(number)


def asks(number):
    send({"id": 7, "method": "sampling/createMessage", "params": {"messages": [], "maxTokens": 1}})
    send({"id": 8, "method": "roots/list"})
    send({"id": "x", "method": "nonsense", "params": {"a": 1}})
    answer(number)


def relists(number):
    for _ in range(2000):
        send({"method": "notifications/tools/list_changed"})
    answer(number)


WRONG = {
    "number": 5,
    "nothing": None,
    "text": "text",
    "list": [],
    "empty": {},
    "content_text": {"content": "text"},
    "content_null": {"content": None},
    "content_kind": {"content": [{"type": "nonsense"}]},
    "content_short": {"content": [{"type": "text"}]},
    "content_number": {"content": [{"type": "text", "text": 5}]},
    "content_image": {"content": [{"type": "image", "data": "\u0000 no base64", "mimeType": "x"}]},
    "content_resource": {"content": [{"type": "resource", "resource": {"uri": "no uri", "blob": "%"}}]},
    "error_text": {"content": [{"type": "text", "text": "no"}], "isError": "perhaps"},
    "structured": {"content": [], "structuredContent": "no object"},
    "structured_numbers": {"content": [], "structuredContent": {"a": float("nan"), "b": 10**400}},
}
ERRORS = {"error_null": None, "error_word": "no", "error_short": {}, "error_code": {"code": "x", "message": 5}}
ACTS = {
    function.__name__: function
    for function in (
        garbage, deep, endless, huge, too_huge, silent, deaf, deaf_and_silent, mute, wrong_id, twice, half, chatter,
        asks, relists,
    )
}  # fmt: skip
ACTS |= {f"result_{name}": (lambda number, value=value: result(number, value)) for name, value in WRONG.items()}
ACTS |= {name: (lambda number, e=error: send({"id": number, "error": e})) for name, error in ERRORS.items()}
TOOLS = ["pid", *ACTS]


def tools_listed():
    schema = {"type": "object", "properties": {}}
    return [{"name": name, "description": f"Tool {name}.", "inputSchema": schema} for name in TOOLS]


def listing(number, params):
    if START == "list_garbage":
        write(b"garbage\n" * 10)
    if START == "list_wrong":
        return result(number, {"tools": "none"})
    if START == "list_null":
        return result(number, None)
    if START == "list_endless":  # a cursor that never ends
        return result(number, {"tools": tools_listed()[:1], "nextCursor": "again"})
    if START == "list_silent":
        return None
    if START == "list_twice":
        return result(number, {"tools": tools_listed() * 2})
    if START == "list_none":
        return result(number, {"tools": []})
    if START == "list_many":
        many = [{**tools_listed()[0], "name": f"tool_{index}"} for index in range(300)]
        return result(number, {"tools": [*tools_listed()[:1], *many]})
    return result(number, {"tools": tools_listed()})


def serve():
    for line in sys.stdin:
        request = json.loads(line)
        method, number = request["method"], request.get("id")
        if number is None:
            continue
        if method == "initialize":
            if START == "initialize_wrong":
                result(number, {"protocolVersion": 5})
                continue
            result(
                number,
                {
                    "protocolVersion": request["params"]["protocolVersion"],
                    "capabilities": {"tools": {"listChanged": True}},
                    "serverInfo": {"name": "hostile", "version": "1"},
                },
            )
        elif method == "tools/list":
            listing(number, request.get("params") or {})
        elif method == "tools/call" and request["params"]["name"] == "pid":
            answer(number, str(os.getpid()))
        elif method == "tools/call":
            ACTS[request["params"]["name"]](number)
        else:
            send({"id": number, "error": {"code": -32601, "message": f"no {method}"}})


if __name__ == "__main__":
    if START == "garbage":
        write(os.urandom(2**20) + b"\n")
    if START == "endless":
        endless(0)
    if START == "silent":
        wait_for_ever()
    if START == "deaf":
        os.close(0)
        wait_for_ever()
    if START == "mute":
        os.close(1)
        wait_for_ever()
    serve()
