"""Nothing of a batch stays behind: threads, processes, file descriptors and memory are the same after many."""

import asyncio
import os
import subprocess
import sys
import time
from concurrent.futures import wait
from pathlib import Path

import process_tools
import pytest
from conftest import ScriptedSampler, chat_tokenizer, tool_call
from footprint import Footprint, footprint
from trl.chat_template_utils import add_response_schema, get_training_chat_template

from trl_toolgrpo import Tool, ToolCall
from trl_toolgrpo.chat.tool_chat import ToolChat
from trl_toolgrpo.rollout.loop import RolloutLimits, RolloutLoop, RolloutRequest
from trl_toolgrpo.tools.from_callable import environment_tools, index_tools
from trl_toolgrpo.tools.runtime.executor import ToolExecutor


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the measure is taken from /proc")

ANY = {"type": "object", "properties": {}}
END = "<|im_end|>"


class Environment:
    """Holds a megabyte."""

    def __init__(self):
        self.ballast = bytearray(2**20)

    def weigh(self) -> int:
        """Weighs."""
        return len(self.ballast)


async def later():
    await asyncio.sleep(0.001)
    return "x" * 10_000


async def hang_later():
    await asyncio.sleep(5)


def fail():
    raise SystemExit("y" * 10_000)


PROCESS = Tool("process", "d", ANY, process_tools.where, isolation="process")
TOOLS = [
    Tool("now", "d", ANY, lambda: {"z": ["z" * 100] * 100}),
    Tool("later", "d", ANY, later),
    Tool("fail", "d", ANY, fail),
    Tool("hang", "d", ANY, lambda: time.sleep(0.05), timeout=0.01),
    Tool("hang_later", "d", ANY, hang_later, timeout=0.01),
    PROCESS,
    Tool("crash", "d", ANY, process_tools.fail, isolation="process"),
]


def test_twenty_batches_leave_no_thread_process_file_or_memory():
    tokenizer = chat_tokenizer("qwen3")
    add_response_schema(tokenizer)
    chat = ToolChat(tokenizer, [tokenizer.eos_token_id], get_training_chat_template(tokenizer))
    executor = ToolExecutor(max_concurrent=8, timeout=5.0)
    calls = [tool_call(t.name, **({"how": "_exit"} if t.name == "crash" else {})) for t in TOOLS]
    script = [["".join(calls[:4]) + tool_call("weigh") + END, calls[4] + calls[5] + END, END]] * 3
    script[-1] = [calls[5] + calls[6] + END, END]

    def batch():
        environments = [executor.construct_on_own_thread(Environment) for _ in script]
        sampler = ScriptedSampler(tokenizer, script, chat.stop_ids)
        requests = []
        for environment in environments:
            owned = index_tools(environment_tools(environment))
            requests.append(RolloutRequest([1], index_tools([*TOOLS, *owned.values()]), environment, frozenset(owned)))
        with sampler.open([[1]] * len(script), 4000) as session:
            rollouts = RolloutLoop(session, requests, RolloutLimits(4000, 8, 100, 1), chat, executor).run()
        assert [len(rollout.trajectory.turns) for rollout in rollouts] == [3, 3, 2]
        for environment in environments:
            executor.release(environment)

    def fill_pools():
        # Threads and processes that are done are kept, and those of a call that was given up are not: how many there
        # are is chance. As many calls at once as may ever be make it as many as there may ever be.
        wait([executor.submit(ToolCall("1", "process", {"seconds": 0.5}), PROCESS) for _ in range(8)])
        deadline = time.monotonic() + 5
        while len(executor._idle) < 8:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    for _ in range(5):
        batch()
    fill_pools()
    time.sleep(0.3)  # the last calls that were given up end
    before = footprint()
    for _ in range(20):
        batch()
    fill_pools()
    after = footprint(before)
    executor.shutdown()
    assert after.grown(before) == [], f"before: {before}; after: {after}"
    assert executor.abandoned >= 45 and not executor.stuck


LEAVE_SOMETHING = """
import process_tools
from footprint import footprint
from trl_toolgrpo import Tool
from trl_toolgrpo.tools.runtime.executor import ToolExecutor

before = footprint()
kept = bytearray(before.memory // 10)
kept[::4096] = b"x" * len(kept[::4096])
file = open("/dev/null")
executor = ToolExecutor()
executor.construct_on_own_thread(list)
process = executor._processes._take(Tool("process", "d", {"type": "object"}, process_tools.where, isolation="process"))
print(*footprint().grown(before))
process.end()
executor.shutdown()
"""


def test_the_footprint_shows_threads_processes_files_and_memory():
    # In a process of its own: here, threads that other tests gave up may end between the two measures.
    done = subprocess.run(
        [sys.executable, "-c", LEAVE_SOMETHING],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["threads", "processes", "files", "memory"], done.stderr
    assert Footprint(1, 1, 1, 100).grown(Footprint(2, 1, 1, 99)) == []
