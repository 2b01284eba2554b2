"""The cost of an option of training: step time and peak memory of a run with it, compared with the run without it.

Each has a process of its own and the same text. The benchmarks of the value head and of the reference use it.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from markov import build_model, build_tokenizer, conversations, ping


def measure(changes: dict[str, Any], arguments: argparse.Namespace) -> dict[str, float]:
    """Train for some steps, and return the median step time in seconds and the peak memory in MiB."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig

    from trl_toolgrpo import ToolGRPOConfig, ToolGRPOTrainer

    torch.set_num_threads(arguments.threads)
    tokenizer = build_tokenizer()
    rows = [{"prompt": messages} for messages in conversations(tokenizer, arguments.prompts, arguments.prompt_tokens)]
    options = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": arguments.prompts * arguments.samples,
        "num_generations": arguments.samples,
        "max_completion_length": 400,
        "max_tool_calling_iterations": 2,
        "max_steps": arguments.steps,
        "learning_rate": 0.0,
        "logging_steps": 1,
        "logprob_check": "off",
        "beta": 0.0,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
    }
    changes = dict(changes)
    rank = changes.pop("lora_rank", None)
    trainer = ToolGRPOTrainer(
        build_model(tokenizer),
        lambda completions, **kwargs: [float(index % 3) for index in range(len(completions))],
        ToolGRPOConfig(**{**options, **changes}),
        Dataset.from_list(rows * 4),
        processing_class=tokenizer,
        tools=[ping],
        peft_config=None if rank is None else LoraConfig(r=rank, target_modules="all-linear"),
    )
    trainer.train()
    times = [log["step_time"] for log in trainer.state.log_history if "step_time" in log]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": statistics.median(times[1:]), "peak_mib": peak}


def compare(without: dict[str, Any], given: dict[str, Any], what: str, arguments: argparse.Namespace) -> None:
    """Train without the option and with it in turn, several times, and print the ratios of the medians."""
    found: list[list[dict[str, float]]] = [[], []]
    for _ in range(arguments.repeats):
        for changes, results in zip((without, given), found, strict=True):
            options = json.dumps({"changes": changes, **vars(arguments)})
            done = subprocess.run([sys.executable, __file__, options], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            results.append(json.loads(done.stdout.splitlines()[-1]))
    ratios = {}
    for figure in ("seconds", "peak_mib"):
        plain, costly = (statistics.median(result[figure] for result in results) for results in found)
        ratios[figure] = costly / plain
        print(f"{figure}: {plain:.2f} without {what}, {costly:.2f} with it")
    print(f"{what}: step time {ratios['seconds']:.3f}x, peak memory {ratios['peak_mib']:.3f}x", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sizes of the compared runs to a command line."""
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt_tokens", type=int, default=300)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(measure(given["changes"], argparse.Namespace(**given))))
