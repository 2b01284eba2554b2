"""What a value head costs: step time and peak memory of a run with one against the same run without, each in a process
of its own, over the same text.

    python tests/benchmarks/value.py
"""

import argparse
import json
import resource
import statistics
import tempfile
from typing import Any

from markov import build_model, build_tokenizer, conversations, in_process, ping


def measure(estimator: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train for some steps; gives the median step time in seconds and the peak memory in MiB."""
    import torch
    from datasets import Dataset

    from trl_toolgrpo import ToolGRPOConfig, ToolGRPOTrainer

    torch.set_num_threads(arguments.threads)
    tokenizer = build_tokenizer()
    rows = [{"prompt": messages} for messages in conversations(tokenizer, arguments.prompts, arguments.prompt_tokens)]
    config = ToolGRPOConfig(
        output_dir=tempfile.mkdtemp(),
        advantage_estimator=estimator,
        value_epochs=1 if estimator == "group" else arguments.value_epochs,
        per_device_train_batch_size=arguments.prompts * arguments.samples,
        num_generations=arguments.samples,
        max_completion_length=400,
        max_tool_calling_iterations=2,
        max_steps=arguments.steps,
        learning_rate=0.0,
        logging_steps=1,
        logprob_check="off",
        beta=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = ToolGRPOTrainer(
        build_model(tokenizer),
        lambda completions, **kwargs: [float(index % 3) for index in range(len(completions))],
        config,
        Dataset.from_list(rows * 4),
        processing_class=tokenizer,
        tools=[ping],
    )
    trainer.train()
    times = [log["step_time"] for log in trainer.state.log_history if "step_time" in log]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": statistics.median(times[1:]), "peak_mib": peak}


def main() -> None:
    """Run one after the other, again and again, and print the ratios of the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt_tokens", type=int, default=300)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--value_epochs", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker, arguments)))
        return
    found: dict[str, list[dict[str, float]]] = {"group": [], "group_gae": []}
    for _ in range(arguments.repeats):
        for estimator, results in found.items():
            results.append(in_process(__file__, estimator))
    ratios = {}
    for figure in ("seconds", "peak_mib"):
        medians = {name: statistics.median(result[figure] for result in results) for name, results in found.items()}
        ratios[figure] = medians["group_gae"] / medians["group"]
        print(f"{figure}: {medians['group']:.2f} without a value head, {medians['group_gae']:.2f} with one")
    print(f"step time {ratios['seconds']:.3f}x, peak memory {ratios['peak_mib']:.3f}x")


if __name__ == "__main__":
    main()
