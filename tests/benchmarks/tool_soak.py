"""What two hundred batches of a training leave, with tools that work, fail, hang, crash and run code.

    python tests/benchmarks/tool_soak.py
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import process_tools
import pytest
from conftest import chat_tokenizer, config, prompts, scripted_model_sampler, tiny_model, tool_call
from footprint import footprint
from transformers import TrainerCallback

from trl_toolgrpo import Tool, ToolGRPOTrainer, python_tool


END = "<|im_end|>"
ANY = {"type": "object", "properties": {}}


async def later():
    await asyncio.sleep(0.01)
    return "later"


async def hang_later():
    await asyncio.sleep(9)


def fail():
    raise SystemExit("no")


class Notebook:
    """An environment with a method."""

    def reset(self, **kwargs):
        self.lines = []

    def note(self) -> int:
        """Note a line."""
        self.lines.append("x" * 1000)
        return len(self.lines)


class Watch(TrainerCallback):
    """Measures the process at regular steps."""

    def __init__(self, warm_up: int, every: int):
        self.warm_up, self.every, self.first, self.last = warm_up, every, None, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.warm_up or (state.global_step - self.warm_up) % self.every == 0:
            time.sleep(0.5)  # calls that were given up end
            self.last = footprint(self.first)
            self.first = self.first or (self.last if state.global_step >= self.warm_up else None)
            print(f"after {state.global_step} batches: {self.last}", flush=True)


def main() -> None:
    """Train, and print the measurements before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=20)
    arguments = parser.parse_args()
    tools = [
        Tool("now", "d", ANY, lambda: ["z" * 100] * 50),
        Tool("later", "d", ANY, later),
        Tool("fail", "d", ANY, fail),
        Tool("large", "d", ANY, lambda: "x" * 50_000_000),
        Tool("hang", "d", ANY, lambda: time.sleep(0.2), timeout=0.05),
        Tool("hang_later", "d", ANY, hang_later, timeout=0.05),
        Tool("process", "d", ANY, process_tools.where, isolation="process"),
        Tool("crash", "d", ANY, process_tools.act, isolation="process"),
        python_tool(seconds=1.0),
    ]
    given = {"crash": {"act": "crash"}, "python": {"code": "sum(range(10))"}}
    calls = [tool_call(name, **given.get(name, {})) for name in (*(tool.name for tool in tools), "note")]
    script = [["".join(calls[start : start + 3]) + END, f"done{END}"] for start in (0, 3, 6, 7)]
    watch = Watch(arguments.warm_up, max(1, (arguments.batches - arguments.warm_up) // 6))
    tokenizer = chat_tokenizer("qwen3")
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        trainer = ToolGRPOTrainer(
            tiny_model(tokenizer),
            lambda completions, **kwargs: [random.random() for _ in completions],
            config(folder, max_completion_length=1500, max_steps=arguments.batches, logging_steps=50),
            prompts(),
            processing_class=tokenizer,
            tools=tools,
            environment_factory=Notebook,
            callbacks=[watch],
        )
        scripted_model_sampler(patch, tokenizer, script)
        trainer.train()
        executor = trainer.rollouts.tools.executor
        print(f"calls given up: {executor.abandoned}, of which still running: {len(executor.stuck)}")
    grown = watch.last.grown(watch.first)
    print(f"first: {watch.first}\nlast:  {watch.last}\nmemory: {watch.last.memory / watch.first.memory - 1:+.2%}")
    print(f"grown: {', '.join(grown) or 'nothing'}")
    sys.exit(bool(grown))


if __name__ == "__main__":
    main()
