"""MCP servers in tests: a run of them with an executor, a trainer that has them, and what a process holds."""

import contextlib
import os
import sys
import threading
from pathlib import Path

from conftest import chat_tokenizer, config, prompts, script_ours, tiny_model, tool_call

from trl_toolgrpo import ToolCall, ToolGRPOTrainer
from trl_toolgrpo.tools.mcp.servers import MCPTools
from trl_toolgrpo.tools.runtime.executor import ToolExecutor


TESTS = Path(__file__).parent

PLAIN, SDK = str(TESTS / "mcp_plain_server.py"), str(TESTS / "mcp_sdk_server.py")

KEY = "open-sesame-42"

class Run:
    """MCP servers whose tools an executor calls, as in a run."""

    def __init__(self, *servers, timeout=10.0, taken=()):
        self.mcp = MCPTools(servers, taken)
        self.tools = {tool.name: tool for tool in self.mcp.tools}
        self.executor = ToolExecutor(timeout=timeout)
        self.sessions = []

    def submit(self, name, /, **arguments):
        return self.executor.submit(ToolCall("call_0", name, arguments), self.tools[name])

    def call(self, name, /, **arguments):
        return self.submit(name, **arguments).result(timeout=20)

    def rollout(self):
        """Begin a rollout; return a function that calls its tools in order, and its session."""
        session = self.mcp.session()
        tools, own = self.mcp.of_rollout(self.tools, session)

        def call(name, /, **arguments):
            owner = session if name in own else None
            return self.executor.submit(ToolCall("call_0", name, arguments), tools[name], owner).result(timeout=20)

        return call, session

    def close(self):
        self.executor.shutdown()
        self.mcp.close()


def belongings():
    """Threads, child processes and open file descriptors of this process."""
    children = 0
    for task in Path("/proc/self/task").iterdir():  # a child is listed under the thread that started it
        with contextlib.suppress(OSError):  # of a thread that has just ended
            children += len((task / "children").read_text().split())
    return sorted(thread.name for thread in threading.enumerate()), children, len(os.listdir("/proc/self/fd"))


def nothing_new(before):
    """Return whether there is no more of anything than before. There may be less, of what earlier tests left."""
    threads, children, descriptors = belongings()
    return len(threads) <= len(before[0]) and children <= before[1] and descriptors <= before[2]


END = "<|im_end|>"

def server(**options):
    return {"plain": {"command": sys.executable, "args": [PLAIN], "tools": TOOLS, **options}}


TOOLS = ["pid", "note", "notes", "crash", "hang", "garble", "forget"]

def call(name, **arguments):
    return tool_call(name, **arguments) + END


def make_trainer(path, monkeypatch, script, reward=None, *, mcp_servers=None, tools=None, **changes):
    """Return a trainer of a tiny model that writes `script`, and the list of what its reward function has seen."""
    tokenizer = chat_tokenizer()
    seen = []

    def keep(completions, trajectories, mcp_sessions, **kwargs):
        for completion, trajectory, session in zip(completions, trajectories, mcp_sessions, strict=True):
            seen.append(([m["content"] for m in completion if m["role"] == "tool"], trajectory, session))
        return [float(i % 3) for i in range(len(completions))]

    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer),
        reward or keep,
        config(path, **{"logprob_check": "off", "max_completion_length": 600, **changes}),
        prompts(),
        processing_class=tokenizer,
        tools=tools,
        mcp_servers=mcp_servers or server(),
    )
    script_ours(monkeypatch, tokenizer, script)
    return trainer, seen


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]
