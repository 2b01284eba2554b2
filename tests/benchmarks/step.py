"""Training steps of this package against TRL's: the same model, prompts, tools and text, each in a process of its own.

    python tests/benchmarks/step.py --vs trl

Prints the time of the update (scoring, loss and gradients), of the whole step, rollouts included, and the peak memory.
Groups of rollouts are divided over micro-batches, one group's worth in each. Sides take turns; figures are medians.
"""

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from typing import Any

from markov import Worker, build_model, build_tokenizer, conversations, device_options, ping, tell, told


TOLD = ("rollouts", "tokens", "text")


def train(backend: str, arguments: argparse.Namespace) -> None:
    """Worker: one optimizer step for each round."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from trl_toolgrpo import ToolGRPOConfig, ToolGRPOTrainer

    torch.set_num_threads(arguments.threads)
    tokenizer = build_tokenizer()
    prompts = conversations(tokenizer, arguments.prompts, arguments.prompt_tokens)
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": arguments.samples,
        "gradient_accumulation_steps": arguments.prompts,
        "num_generations": arguments.samples,
        "max_completion_length": arguments.turns * 128,
        "max_tool_calling_iterations": arguments.turns - 1,
        "max_steps": arguments.repeats + 1,
        "learning_rate": 0.0,  # the text stays the same
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    model = build_model(tokenizer)
    options |= device_options(model, tokenizer)
    kind, config = (GRPOTrainer, GRPOConfig) if backend == "trl" else (ToolGRPOTrainer, ToolGRPOConfig)
    trainer: Any = kind(
        model,
        lambda completions, **kwargs: [float(index % 3) for index in range(len(completions))],
        config(**options),
        Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        tools=[ping],
    )
    spent = {}
    prepare = trainer._generate

    def generate(*args: Any) -> Any:
        started = time.perf_counter()
        output = prepare(*args)
        spent["rollouts"] = time.perf_counter() - started
        spent["tokens"] = sum(map(len, output[1])) / len(output[1])
        spent["text"] = hashlib.sha256(json.dumps(sorted(output[1])).encode()).hexdigest()
        return output

    trainer._generate = generate

    class Rounds(TrainerCallback):
        """Steps begin when they are asked for."""

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            told()
            spent["started"] = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            whole = time.perf_counter() - spent["started"]
            tell(step=whole, update=whole - spent["rollouts"], **{name: spent[name] for name in TOLD})

    trainer.add_callback(Rounds())
    # The rollouts come with the first micro-batch, which TRL's loop asks for behind `on_step_begin`
    trainer.train()


def main() -> None:
    """Run both, one step of each at a time, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vs", choices=["trl", "none"], default="trl")
    for flag, value in (("prompts", 2), ("samples", 8), ("turns", 3), ("prompt_tokens", 600), ("repeats", 3)):
        parser.add_argument(f"--{flag}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", choices=["trl", "trl_toolgrpo"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return train(arguments.worker, arguments)
    names = ("prompts", "samples", "turns", "prompt_tokens", "repeats", "threads")
    flags = [f"--{name}={getattr(arguments, name)}" for name in names]
    workers = [Worker(__file__, side, flags) for side in ("trl_toolgrpo", *(["trl"] if arguments.vs == "trl" else []))]
    for _ in range(arguments.repeats + 1):  # the first step is a warm-up
        for worker in workers:
            worker.work()
    results = {}
    for worker in workers:
        worker.end()
        found = {name: statistics.median(r[name] for r in worker.found[1:]) for name in ("rollouts", "update", "step")}
        results[worker.name] = found = {**found, "peak": worker.found[-1]["peak_mib"]}
        print(
            f"{worker.name:>12}: rollouts {found['rollouts']:.2f} s, update {found['update']:.2f} s, step "
            f"{found['step']:.2f} s, peak memory {found['peak']:.0f} MiB, completions of "
            f"{worker.found[-1]['tokens']:.0f} tokens"
        )
    if len({found["text"] for worker in workers for found in worker.found}) > 1:
        raise SystemExit("The two trainers wrote different tokens: the ratios would mean nothing.")
    if len(results) == 2:
        ours, theirs = results["trl_toolgrpo"], results["trl"]
        ratios = {name: theirs[name] / ours[name] for name in ("rollouts", "update", "step")}
        told_ratios = ", ".join(f"{name} {ratio:.1f}x" for name, ratio in ratios.items())
        print(f"times faster than TRL: {told_ratios}; {ours['peak'] / theirs['peak']:.2f}x its peak memory")


if __name__ == "__main__":
    main()
