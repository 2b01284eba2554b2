"""An MCP server in plain Python, which starts in no time and misbehaves on request."""

import json
import os
import sys
import time


TOOLS = {
    "pid": {},
    "note": {"text": {"type": "string"}},
    "notes": {},
    "cut": {},
    "reset": {},
    "crash": {},
    "hang": {},
    "garble": {},
    "forget": {},
    "name with spaces": {},
}
DESCRIBED = sys.argv[sys.argv.index("--describe") + 1] if "--describe" in sys.argv else "Tool note."
notes: list[str] = []


def send(message):
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)


def listing(names):
    return [
        {
            "name": name,
            "description": DESCRIBED if name == "note" else f"Tool {name}.",
            "inputSchema": {"type": "object", "properties": TOOLS[name], "required": list(TOOLS[name])},
        }
        for name in names
    ]


def call(name, arguments):
    if name == "note":
        notes.append(arguments["text"])
        if "--on-disk" in sys.argv:
            with open("notes.txt", "a") as file:
                file.write(arguments["text"] + "\n")
    if name == "reset":
        notes.clear()
    if name == "crash":
        print("it hurts", file=sys.stderr)
        os._exit(13)
    if name == "hang":
        time.sleep(600)
    if name == "garble":
        print('{"jsonrpc": "2.0", "id": nonsense', flush=True)
        print("not even JSON", flush=True)
    if name == "forget":
        TOOLS.pop("pid", None)
        send({"method": "notifications/tools/list_changed"})
    return {"pid": str(os.getpid()), "notes": " ".join(notes) or "none", "cut": "half \ud83d"}.get(name, "done")


for line in sys.stdin:
    request = json.loads(line)
    method, number = request["method"], request.get("id")
    if number is None:
        continue
    if method == "initialize":
        result = {
            "protocolVersion": request["params"]["protocolVersion"],
            "capabilities": {"tools": {"listChanged": True}},
            "serverInfo": {"name": "plain", "version": "1"},
        }
    elif method == "tools/list":
        result = {"tools": listing(TOOLS)}
    elif method == "tools/call" and request["params"]["name"] in TOOLS:
        text = call(request["params"]["name"], request["params"].get("arguments") or {})
        result = {"content": [{"type": "text", "text": text}]}
    else:
        send({"id": number, "error": {"code": -32601, "message": f"no {method}"}})
        continue
    send({"id": number, "result": result})
