"""Train a language model to call tools with GRPO. One script for every recipe of this folder.

Owns the command line; the task comes from `workspace.py` or `bfcl.py`, the model from a folder, the Hub,
`tiny_model.py` or `smollm2.py`, and the trainer from `trl_toolgrpo`. Without `--config` it runs `tiny_cpu.yaml`, which
needs no download.

    python recipes/qwen3_tools.py
    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/qwen3_tools.py --config recipes/bfcl.yaml
"""

import ctypes
import ctypes.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bfcl import build_bfcl
from conversation import SampleConversation
from scoreboard import Scoreboard, comparison
from smollm2 import convert_smollm2
from task import Task
from tiny_model import TinyModel, build_tiny_model
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config
from workspace import build_workspace

from trl_toolgrpo import ToolGRPOConfig, ToolGRPOTrainer, find_checkpoint


DEFAULT_CONFIG = Path(__file__).with_name("tiny_cpu.yaml")


def read_truth(text: str) -> bool:
    """A truth value as people write it: 0, 1, true or false."""
    if text.strip().lower() not in ("0", "1", "true", "false"):
        raise ValueError("it is neither 0, 1, true nor false")
    return text.strip().lower() in ("1", "true")


# Environment variable -> field of `ToolGRPOConfig` it sets, unless a flag or the YAML does.
SWITCHES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "PPO_RECORD_AT_SAMPLE": ("record_sample_logprobs", read_truth),
    "STRICT_TRAJ_KEYS": ("strict_trajectories", read_truth),
    "RL_DISABLE_FORCED": ("disable_forcing_in_updates", read_truth),
    "FORCE_RATE": ("force_rate", float),
    "ASSIST_WARMUP": ("assist_warmup_steps", int),
}


@dataclass
class RecipeArguments:
    """
    Arguments of the recipe itself; those of the trainer, the model, LoRA and quantization are TRL's.

    Args:
        task (`str`, *optional*, defaults to `"workspace"`):
            `"workspace"` (questions to a company's database) or `"bfcl"` (Berkeley Function Calling Leaderboard).
        train_size, held_out_size (`int`, *optional*, default to `2000` and `120`):
            Number of questions in each split. For `bfcl`, at most 400 together.
        question_seed (`int`, *optional*, defaults to `0`):
            Seed of the questions, or of the split.
        difficulty (`int`, *optional*):
            For `workspace`: only questions that need so many calls, 1 to 3.
        dataset_name (`str`, *optional*):
            For `bfcl`: data set on the Hub that is read when the `bfcl-eval` package is not installed.
        sample_every (`int`, *optional*, defaults to `20`):
            Optimizer steps between two sample conversations on the console; 0 prints none.
    """

    task: str = field(
        default="workspace", metadata={"help": "What to train on.", "choices": ["workspace", "bfcl"]}
    )
    train_size: int = field(default=2000, metadata={"help": "Number of training questions."})
    held_out_size: int = field(default=120, metadata={"help": "Number of held-out questions."})
    question_seed: int = field(default=0, metadata={"help": "Seed of the questions, or of the split."})
    difficulty: int | None = field(
        default=None, metadata={"help": "For workspace: only questions that need so many calls, 1 to 3."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "For bfcl without the bfcl-eval package: a data set on the Hub."}
    )
    sample_every: int = field(
        default=20, metadata={"help": "Optimizer steps between two sample conversations; 0 prints none."}
    )


def parse_arguments(
    arguments: Sequence[str], environment: Mapping[str, str]
) -> tuple[RecipeArguments, ToolGRPOConfig, ModelConfig]:
    """
    Read the command line: a flag wins over the YAML, the YAML over an environment variable, that over the default.

    Args:
        arguments (`Sequence[str]`):
            The command line without the program; `--config` defaults to `tiny_cpu.yaml`.
        environment (`Mapping[str, str]`):
            Environment variables.

    Returns:
        `tuple[RecipeArguments, ToolGRPOConfig, ModelConfig]`: the arguments.

    Raises:
        ValueError: for an environment variable that is neither true nor false, or an unknown key in the YAML.
    """
    arguments = [part for argument in arguments for part in _split_config(argument)]
    if "--config" not in arguments:
        arguments = ["--config", str(DEFAULT_CONFIG), *arguments]
    parser = TrlParser((RecipeArguments, ToolGRPOConfig, ModelConfig))
    parser.set_defaults_with_config(**read_switches(environment))
    return parser.parse_args_and_config(arguments)


def _split_config(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def read_switches(environment: Mapping[str, str]) -> dict[str, Any]:
    """
    Fields set by environment variables.

    Args:
        environment (`Mapping[str, str]`):
            Environment variables.

    Returns:
        `dict[str, Any]`: value of each field that a variable sets.

    Raises:
        ValueError: for a variable whose text is no value of its field.
    """
    values = {}
    for variable, (name, read) in SWITCHES.items():
        if variable in environment:
            try:
                values[name] = read(environment[variable])
            except ValueError as error:
                raise ValueError(
                    f"The environment variable {variable} is {environment[variable]!r}, which cannot be the value of "
                    f"`{name}`: {error}. Correct it, or unset it and pass --{name}."
                ) from error
    return values


def build_task(recipe: RecipeArguments) -> Task:
    """The task the arguments ask for."""
    if recipe.task == "bfcl":
        return build_bfcl(recipe.train_size, recipe.held_out_size, recipe.question_seed, recipe.dataset_name)
    return build_workspace(recipe.train_size, recipe.held_out_size, recipe.question_seed, recipe.difficulty)


def resolve_model(model: ModelConfig, training: ToolGRPOConfig) -> str:
    """
    Folder or Hub id of the model; `tiny` and `smollm2` are built in the output folder, if they are not there yet.

    Args:
        model (`ModelConfig`):
            Names the model.
        training ([`ToolGRPOConfig`]):
            Output folder and seed.

    Returns:
        `str`: what the trainer loads.
    """
    name = model.model_name_or_path
    if name is None:
        raise ValueError(
            "No model was named. Pass --model_name_or_path with a folder, a Hub id, `tiny` or `smollm2`, or set "
            "model_name_or_path in the YAML."
        )
    if name not in ("tiny", "smollm2"):
        return name
    folder = Path(training.output_dir) / name
    with training.main_process_first(desc=f"building the model `{name}`"):
        if name == "tiny":
            return str(build_tiny_model(folder, TinyModel(seed=training.seed)))
        return str(convert_smollm2(folder))


def build_trainer(
    task: Task, recipe: RecipeArguments, training: ToolGRPOConfig, model: ModelConfig
) -> tuple[ToolGRPOTrainer, Scoreboard]:
    """The trainer, ready to train, and the scoreboard that is its reward function."""
    scoreboard = Scoreboard(task)
    training.eval_on_start = True  # the rates before training, with the model prepared as it will be trained
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        **(training.model_init_kwargs or {}),
    }
    trainer = ToolGRPOTrainer(
        model=resolve_model(model, training),
        reward_funcs=scoreboard,
        args=training,
        train_dataset=task.train,
        eval_dataset=task.held_out,
        environment_factory=task.environment_factory,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        callbacks=[scoreboard, SampleConversation(scoreboard, recipe.sample_every)],
    )
    return trainer, scoreboard


def checkpoint_to_resume(training: ToolGRPOConfig) -> str | None:
    """
    The checkpoint that `--resume_from_checkpoint` asks for.

    Args:
        training ([`ToolGRPOConfig`]):
            `resume_from_checkpoint` is a folder, or `true` for the newest whole checkpoint of `output_dir`.

    Returns:
        `str` or `None`: its folder; `None` to start from the beginning, also if there is no checkpoint yet.
    """
    asked_for = str(training.resume_from_checkpoint)
    if asked_for.lower() in ("none", "false"):
        return None
    if asked_for.lower() != "true":
        return asked_for
    found = find_checkpoint(training.output_dir)
    if training.process_index == 0:
        print(
            f"No checkpoint in {training.output_dir} yet: starting from the beginning."
            if found is None
            else f"Resuming from {found}.",
            flush=True,
        )
    return None if found is None else str(found)


def keep_freed_memory() -> None:
    """
    Have glibc keep memory it was given back, up to 1 GiB a piece.

    By default each large tensor is mapped anew and its pages are cleared one by one, which on a CPU takes up to a
    third of an update with a large vocabulary.
    """
    libc = ctypes.util.find_library("c")
    mallopt = getattr(ctypes.CDLL(libc), "mallopt", None) if libc else None
    if mallopt is not None:
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main() -> None:
    """Run the recipe."""
    recipe, training, model = parse_arguments(sys.argv[1:], os.environ)
    if training.use_cpu:
        keep_freed_memory()
    if training.process_index == 0:
        for name, _ in SWITCHES.values():
            print(f"{name}: {getattr(training, name)}", flush=True)
    checkpoint = checkpoint_to_resume(training)
    trainer, scoreboard = build_trainer(build_task(recipe), recipe, training, model)
    if checkpoint is not None and scoreboard.recall(Path(checkpoint)):
        training.eval_on_start = False  # that was done when the run began
    trainer.train(resume_from_checkpoint=checkpoint)
    if scoreboard.evaluations[-1].step < trainer.state.global_step:
        trainer.evaluate()
    trainer.save_model(training.output_dir)
    trainer.save_state()
    trainer.end()
    if training.process_index == 0:
        evaluations = scoreboard.evaluations
        assisted = [rates for rates in evaluations[1:] if rates.step == training.assist_warmup_steps]
        print(comparison(evaluations[0], evaluations[-1], assisted[0] if assisted else None), flush=True)


if __name__ == "__main__":
    main()
