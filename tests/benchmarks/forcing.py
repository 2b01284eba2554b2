"""The cost of forcing: its share of rollout time on SmolLM2-135M-Instruct and BFCL questions, at every level.

    python tests/benchmarks/forcing.py
"""

import argparse
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path


RECIPES = Path(__file__).parents[2] / "recipes"
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.chat_template_utils import add_response_schema

from trl_toolgrpo.chat.tool_chat import ToolChat
from trl_toolgrpo.recipes.bfcl.task import BFCLEnvironment, build_bfcl
from trl_toolgrpo.recipes.models.smollm2 import convert_smollm2
from trl_toolgrpo.rollout.forcing import CallPrefixes, Forcing
from trl_toolgrpo.rollout.loop import RolloutLimits, RolloutLoop, RolloutRequest
from trl_toolgrpo.sampling import model_sampler
from trl_toolgrpo.sampling.constraint import CallConstraints, GrammarConstraint
from trl_toolgrpo.tools.runtime.executor import ToolExecutor


class Timed:
    """Sums up the time spent in a function."""

    def __init__(self, function, seconds, name):
        self.function, self.seconds, self.name = function, seconds, name

    def __call__(self, *args, **kwargs):
        started = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds[self.name] += time.perf_counter() - started

    def __get__(self, instance, owner):
        return lambda *args, **kwargs: self(instance, *args, **kwargs)


def main() -> None:
    """Print seconds and share for each level."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="outputs/smollm2", help="Folder of the converted model; made if missing.")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = convert_smollm2(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    add_response_schema(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chat = ToolChat(tokenizer, [tokenizer.eos_token_id])
    rows = list(build_bfcl(arguments.questions, 0).train)
    requests = []
    for row in [row for row in rows for _ in range(arguments.samples)]:
        environment = BFCLEnvironment()
        environment.reset(**row)
        tools = {tool.name: tool for tool in environment.tools}
        schemas = [tool.schema for tool in environment.tools]
        text = tokenizer.apply_chat_template(row["prompt"], tools=schemas, add_generation_prompt=True, tokenize=False)
        requests.append(RolloutRequest(chat.encode(text), tools))
    limits = RolloutLimits(96, 1, 64, 0)
    prefixes, constraints = CallPrefixes(chat), CallConstraints(chat)
    seconds: dict[str, float] = defaultdict(float)
    Forcing.begin_turn = Timed(Forcing.begin_turn, seconds, "forcing")
    GrammarConstraint.accept = Timed(GrammarConstraint.accept, seconds, "forcing")
    model_sampler.constrain = Timed(model_sampler.constrain, seconds, "forcing")
    executor = ToolExecutor(timeout=5.0)
    for level in ("none", "call", "name", "schema", "schema"):
        torch.manual_seed(0)
        seconds.clear()
        sampler = model_sampler.ModelSampler(model, [tokenizer.eos_token_id], tokenizer.pad_token_id, 1.0, nullcontext)
        forcing = Forcing(
            prefixes, 0.0 if level == "none" else 1.0, level, 0, None, constraints if level == "schema" else None
        )
        started = time.perf_counter()
        with sampler.open([request.prompt_ids for request in requests], 96) as session:
            rollouts = RolloutLoop(session, requests, limits, chat, executor, forcing).run()
        total = time.perf_counter() - started
        tokens = sum(sum(rollout.trajectory.tool_mask) for rollout in rollouts)
        print(
            f"force_level {level:6}: {total:6.2f} s for {tokens:5d} tokens, {seconds['forcing']:.3f} s of it forcing: "
            f"{seconds['forcing'] / total:.2%}"
        )
    executor.shutdown()


if __name__ == "__main__":
    main()
