"""What long trainings with MCP servers leave: threads, processes, file descriptors and memory.

    python tests/benchmarks/mcp_soak.py --kills 20 --batches 200

First a training in which the server is killed at every step, then one of many batches with a server for each rollout.
Prints the counts, and ends with an error if a call was not counted or anything is left.
"""

import argparse
import contextlib
import gc
import io
import logging
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
from footprint import footprint
from mcp_runs import END, belongings, call, logged, make_trainer, server


def quietly(trainer):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer.train()


def kill_at_every_step(steps: int) -> None:
    """Kill the server before each step of a training."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        script = [[call("pid"), call("note", text="x"), f"done{END}"]]
        killed = []

        def reward(completions, **kwargs):
            pids = {m["content"] for c in completions for m in c if m["role"] == "tool" and m["content"].isdigit()}
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
                    killed.append(pid)
            return [float(i % 3) for i in range(len(completions))]

        trainer, _ = make_trainer(Path(folder), patch, script, reward, max_steps=steps)
        quietly(trainer)
        calls, errors = (
            sum(sum(logged(trainer, f"tools/{tool}/{figure}")) for tool in ("pid", "note"))
            for figure in ("calls", "errors")
        )
        restarts = sum(logged(trainer, "tools/mcp/plain/restarts")) + trainer.rollouts.tools.mcp.restarts()["plain"]
        print(f"killed {len(killed)} times in {steps} steps:", end=" ")
        print(f"{calls:.0f} calls, {errors:.0f} errors, {restarts:.0f} restarts")
        assert calls == 8 * steps and len(killed) == restarts == steps


def many_batches(batches: int) -> None:
    """Train with a server for each rollout, reset by a tool, and a shared one that crashes in each batch."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        script = [[call("own_note", text="x"), call("plain_pid"), f"done{END}"]]
        script += [[call("own_notes"), call("plain_note", text="x"), call("crash"), f"done{END}"], *script]
        own = {"own": {**server(per_rollout=True)["plain"], "reset_tool": "reset", "tools": ["note", "notes"]}}
        shared = {"plain": {**server()["plain"], "tools": ["pid", "crash", "note", "notes"]}}
        figures, seen = [], 0

        def reward(completions, **kwargs):
            nonlocal seen
            seen += 1
            if seen % 5 == 0:
                found = footprint()  # garbage collected, free memory given back
                figures.append((found.threads, found.processes, found.files, found.memory / 2**20))
            return [float(i % 3) for i in range(len(completions))]

        servers = {**own, **shared}
        trainer, _ = make_trainer(Path(folder), patch, script, reward, mcp_servers=servers, max_steps=batches)
        quietly(trainer)
        errors = sum(logged(trainer, "tools/crash/errors"))
        restarts = sum(logged(trainer, "tools/mcp/plain/restarts")) + trainer.rollouts.tools.mcp.restarts()["plain"]
        print(f"{batches} batches: {errors:.0f} crashes, {restarts:.0f} restarts")
        windows = [figures[len(figures) // 10 : 3 * len(figures) // 10], figures[4 * len(figures) // 5 :]]
        early, late = ([statistics.median(column) for column in zip(*window, strict=True)] for window in windows)
        for name, medians in (("early", early), ("late", late)):
            print(
                "{} (medians): {:g} threads, {:g} children, {:g} file descriptors, {:.0f} MB".format(name, *medians)
            )
        assert all(now <= then + 1 for then, now in zip(early[:3], late[:3], strict=True)), "something piles up"
        assert late[3] <= 1.02 * early[3], "memory piles up"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="Steps of the training whose server is killed.")
    parser.add_argument("--batches", type=int, default=200, help="Batches of the training that is watched.")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    kill_at_every_step(1)  # start now what libraries start once for a process
    gc.collect()
    time.sleep(2.0)
    before = belongings()
    kill_at_every_step(arguments.kills)
    many_batches(arguments.batches)
    deadline = time.monotonic() + 20
    while belongings() != before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.5)
    print(f"before: {before}\nafter:  {belongings()}")
    assert belongings() == before


if __name__ == "__main__":
    main()
