"""Training steps of this package compared with TRL's: same model, prompts, tools and text, each in its own process.

    python tests/benchmarks/step.py --vs trl

Prints the time of the update (scoring, loss and gradients), of the whole step, rollouts included, and the peak memory.
Each micro-batch has the size of one group of rollouts. Sides take turns; figures are medians.
The first line names the processor or card and the dtype.
"""

import argparse
import hashlib
import json
import statistics
import tempfile
from typing import Any

import markov
from cases import DTYPE_HELP, DTYPES, STEP, Case, add_case_flags, estimated_mib, given_case
from machine import machine_line, now
from markov import Worker, build_model, build_tokenizer, conversations, ping, tell, told, trainer_options


FIGURES = ("rollouts", "update", "step")


class EnoughRounds(Exception):
    """Raised when no further step is requested."""


def train(
    backend: str, case: Case, dtype: str, rounds: int, vllm: bool = False, kept: dict[str, Any] | None = None
) -> None:
    """
    Make one optimizer step for each requested round, in a worker.

    Args:
        backend (`str`):
            `"trl"` or `"trl_toolgrpo"`.
        case (`Case`):
            The batch.
        dtype (`str`):
            Key of `DTYPES`.
        rounds (`int`):
            Largest number of rounds.
        vllm (`bool`, *optional*, defaults to `False`):
            Whether vLLM samples.
        kept (`dict`, *optional*):
            Keeps the first rollout batch, on which all later rounds and cases update; by default each round samples
            its own.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from trl_toolgrpo import ToolGRPOConfig, ToolGRPOTrainer

    markov.TOOL_SECONDS = case.tool_ms / 1000
    tokenizer = build_tokenizer(case.turn_tokens)
    prompts = conversations(tokenizer, case.prompts, case.prompt_tokens)
    model = build_model(tokenizer, case.shape, case.turn_tokens, dtype)
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        **case.training_options(),
        "max_steps": rounds,
        "learning_rate": 0.0,  # the text stays the same
        "shuffle_dataset": False,  # and so does its order
        **trainer_options(model, tokenizer, dtype, vllm),
    }
    kind, config = (GRPOTrainer, GRPOConfig) if backend == "trl" else (ToolGRPOTrainer, ToolGRPOConfig)
    trainer: Any = kind(
        model,
        lambda completions, **kwargs: [float(index % 3) for index in range(len(completions))],
        config(**options),
        Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        tools=[ping],
    )
    spent: dict[str, Any] = {}
    if kept is not None:
        keep_rollouts(trainer, backend, kept)
    prepare = trainer._generate

    def generate(*args: Any) -> Any:
        started = now()
        output = prepare(*args)
        spent["rollouts"] = now() - started
        spent["tokens"] = sum(map(len, output[1])) / len(output[1])
        spent["text"] = hashlib.sha256(json.dumps(sorted(output[1])).encode()).hexdigest()
        return output

    trainer._generate = generate

    class Rounds(TrainerCallback):
        """Starts a step when it is requested."""

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if not told():
                raise EnoughRounds
            spent["started"] = now()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            whole = now() - spent.pop("started")
            if backend == "trl_toolgrpo":
                spent["estimated_mib"] = estimated_mib(case, dtype, spent["tokens"])
            tell(step=whole, update=whole - spent["rollouts"], **spent)

    trainer.add_callback(Rounds())
    # The rollouts come with the first micro-batch, which TRL's loop asks for after `on_step_begin`
    try:
        trainer.train()
    except EnoughRounds:
        return
    told()  # that there are no more


def keep_rollouts(trainer: Any, backend: str, kept: dict[str, Any]) -> None:
    """Make a trainer use the rollout batch in `kept`, or store its first one there."""
    owner, name = (trainer, "_generate") if backend == "trl" else (trainer.rollouts, "sample")
    make = getattr(owner, name)

    def make_once(*args: Any) -> Any:
        if "batch" not in kept:
            kept["batch"] = make(*args)
        owner.batch = kept["batch"]  # where this package's trainer looks for it
        return kept["batch"]

    setattr(owner, name, make_once)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vs", choices=["trl", "none"], default="trl")
    add_case_flags(parser, STEP)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help=DTYPE_HELP)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--vllm", action="store_true", help="Both sides sample with vLLM, in the trainer's process.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", choices=["trl", "trl_toolgrpo"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run both sides, one step of each in turn, and print the ratios."""
    arguments = parse_arguments()
    case = given_case(arguments, gradient_checkpointing=arguments.gradient_checkpointing)
    if arguments.worker:
        import torch

        torch.set_num_threads(arguments.threads)
        return train(arguments.worker, case, arguments.dtype, arguments.repeats + 1, arguments.vllm)
    print(machine_line(arguments.dtype), flush=True)
    names = ("dtype", "repeats", "threads")
    flags = [*case.flags(), *(f"--{name}={getattr(arguments, name)}" for name in names)]
    flags += ["--vllm"] * arguments.vllm
    workers = [Worker(__file__, side, flags) for side in ("trl_toolgrpo", *(["trl"] if arguments.vs == "trl" else []))]
    for _ in range(arguments.repeats + 1):  # the first step is a warm-up
        for worker in workers:
            worker.work()
    results = {}
    for worker in workers:
        worker.end()
        found = {name: statistics.median(r[name] for r in worker.found[1:]) for name in FIGURES}
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
        ratios = {name: theirs[name] / ours[name] for name in FIGURES}
        told_ratios = ", ".join(f"{name} {ratio:.1f}x" for name, ratio in ratios.items())
        print(f"times faster than TRL: {told_ratios}; {ours['peak'] / theirs['peak']:.2f}x its peak memory")


if __name__ == "__main__":
    main()
