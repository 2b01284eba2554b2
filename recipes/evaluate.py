"""Evaluate a base model, a trained adapter or a model on the Hub: success by task and difficulty, with intervals.

The rollouts are those of the trainer's own evaluation, sampled as in training. What a run was trained on and how its
rollouts were sampled is read from its output folder.

    python recipes/evaluate.py --model outputs/tiny_cpu
    python recipes/evaluate.py --model Qwen/Qwen3-0.6B --task workspace simple_python multiple multi_turn_base
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, get_quantization_config

from trl_toolgrpo import ToolGRPOConfig, ToolGRPOTrainer
from trl_toolgrpo.recipes.bfcl import MultiTurn, build_bfcl
from trl_toolgrpo.recipes.evaluation.results import RunSettings, TaskResult, as_table, write_json
from trl_toolgrpo.recipes.evaluation.scoreboard import Scoreboard
from trl_toolgrpo.recipes.models import resolve_model
from trl_toolgrpo.recipes.task import Task
from trl_toolgrpo.recipes.workspace import build_workspace


TASKS: dict[str, Callable[[int, RunSettings], Task]] = {
    "workspace": lambda size, run: build_workspace(1, size, run.question_seed, run.difficulty),
    "simple_python": lambda size, run: build_bfcl(0, size, run.question_seed),
    "multiple": lambda size, run: build_bfcl(0, size, run.question_seed, category="multiple"),
}
MULTI_TURN = "multi_turn_base"
TASK_OF_RECIPE = {"workspace": "workspace", "bfcl": "simple_python"}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """
    Read the command line.

    Args:
        arguments (`Sequence[str]`):
            The command line without the program.

    Returns:
        `argparse.Namespace`: the arguments; those left out are `None`, and are filled in from the run.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Output folder, model folder, Hub id, `tiny` or `smollm2`.")
    parser.add_argument("--task", nargs="+", choices=[*TASKS, MULTI_TURN], help="By default that of the run.")
    parser.add_argument("--limit", type=int, help="Questions of each task; by default as many as the run held out.")
    parser.add_argument("--question_seed", type=int, help="Seed of the questions.")
    parser.add_argument("--temperature", type=float, help="By default that of the run, or 1.")
    parser.add_argument("--max_completion_length", type=int, help="Tokens of a rollout, tool results included.")
    parser.add_argument("--max_tool_calling_iterations", type=int, help="Turns with calls of a rollout.")
    parser.add_argument("--batch_size", type=int, default=32, help="Rollouts at a time.")
    parser.add_argument("--dtype", help="Of the weights; by default float32 on a CPU and bfloat16 on a GPU.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the sampling.")
    parser.add_argument("--output", type=Path, help="JSON file; by default `evaluation.json` in the model's folder.")
    return parser.parse_args(arguments)


def settings_of(given: argparse.Namespace) -> RunSettings:
    """Return the run's settings, overridden by those of the command line."""
    run = RunSettings.load(given.model)
    names = ("question_seed", "temperature", "max_completion_length", "max_tool_calling_iterations")
    changes = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    return replace(run, **changes, **({} if given.limit is None else {"held_out_size": given.limit}))


def load_policy(
    name: str, dtype: str, run: RunSettings | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """
    Load a model and its tokenizer.

    Args:
        name (`str`):
            Folder or Hub id of a model or of an adapter, whose base model is loaded too.
        dtype (`str`):
            Of the weights.
        run ([`RunSettings`], *optional*):
            Tells how the base model of an adapter was quantized while the adapter was trained.

    Returns:
        `tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]`: model and tokenizer.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    try:
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
    except ValueError:  # no adapter
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), tokenizer
    names = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")
    settings = {name: getattr(run, name) for name in names} if run is not None else {}
    quantization = get_quantization_config(ModelConfig(dtype=dtype, **settings))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=quantization)
    return PeftModel.from_pretrained(model, name), tokenizer


def build_evaluator(
    task: Task,
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    run: RunSettings,
    given: argparse.Namespace,
    folder: str,
) -> tuple[ToolGRPOTrainer, Scoreboard]:
    """Build a trainer, which only evaluates, and the scoreboard that records its evaluations."""
    scoreboard = Scoreboard(task)
    on_cpu = not torch.cuda.is_available()
    args = ToolGRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=2,
        num_generations=2,
        num_generations_eval=1,
        per_device_eval_batch_size=given.batch_size,
        temperature=run.temperature,
        max_completion_length=run.max_completion_length,
        max_tool_calling_iterations=run.max_tool_calling_iterations,
        chat_template_kwargs=run.chat_template_kwargs,
        use_cpu=on_cpu,
        bf16=not on_cpu,
        seed=given.seed,
        report_to="none",
    )
    trainer = ToolGRPOTrainer(
        model=policy,
        reward_funcs=scoreboard,
        args=args,
        train_dataset=task.held_out,
        eval_dataset=task.held_out,
        processing_class=tokenizer,
        environment_factory=task.environment_factory,
        callbacks=[scoreboard],
    )
    return trainer, scoreboard


def evaluate(
    name: str,
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    run: RunSettings,
    given: argparse.Namespace,
) -> TaskResult:
    """
    Evaluate on one task.

    Args:
        name (`str`):
            Its name.
        policy, tokenizer:
            What [`load_policy`] gives.
        run ([`RunSettings`]):
            Questions and sampling.
        given (`argparse.Namespace`):
            The command line.

    Returns:
        [`TaskResult`]: the result, the same in every process.

    Raises:
        ValueError: for `multi_turn_base` in several processes, since a turn continues in the world of the one before.
    """
    with tempfile.TemporaryDirectory() as folder:
        if name != MULTI_TURN:
            task = TASKS[name](run.held_out_size, run)
            trainer, scoreboard = build_evaluator(task, policy, tokenizer, run, given, folder)
            trainer.evaluate()
            return TaskResult.of(name, scoreboard.records)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"You asked for {MULTI_TURN} in several processes. Run it in one, with `python`.")
        tasks = MultiTurn(run.held_out_size, run.question_seed)
        trainer, _ = build_evaluator(tasks.task(), policy, tokenizer, run, given, folder)
        for rows in tasks.turns():
            trainer.evaluate(eval_dataset=rows)
        return TaskResult.of(name, tasks.records)


def main() -> None:
    """Run the command line."""
    given = parse_arguments(sys.argv[1:])
    run = settings_of(given)
    output = given.output or Path(given.model if Path(given.model).is_dir() else "outputs") / "evaluation.json"
    training = ToolGRPOConfig(output_dir="outputs", use_cpu=True, bf16=False, seed=given.seed)
    name = resolve_model(ModelConfig(model_name_or_path=given.model), training, run.task)
    dtype = given.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    policy, tokenizer = load_policy(name, dtype, run)
    if given.task is None and run.task not in TASK_OF_RECIPE:
        raise ValueError(f"{given.model} was trained on {run.task!r}, which is not evaluated here. Pass --task.")
    tasks = given.task or [TASK_OF_RECIPE[run.task]]
    results = [evaluate(task, policy, tokenizer, run, given) for task in tasks]
    if int(os.environ.get("RANK", "0")) == 0:
        write_json(output, given.model, {**asdict(run), "seed": given.seed}, results)
        Console().print(as_table(given.model, results))
        print(f"Written to {output}.", flush=True)


if __name__ == "__main__":
    main()
