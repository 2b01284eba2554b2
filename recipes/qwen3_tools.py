"""Train a language model to call tools with GRPO: one script for every recipe of this folder.

Without `--config` it runs `tiny_cpu.yaml`, which needs no download.

    python recipes/qwen3_tools.py
    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/qwen3_tools.py --config recipes/bfcl.yaml
"""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_toolgrpo import ToolGRPOConfig, ToolGRPOTrainer, check_output_dir
from trl_toolgrpo.recipes.arguments import SWITCHES, RecipeArguments, parse_arguments
from trl_toolgrpo.recipes.bfcl import build_bfcl
from trl_toolgrpo.recipes.evaluation.conversation import SampleConversation
from trl_toolgrpo.recipes.evaluation.results import RunSettings
from trl_toolgrpo.recipes.evaluation.scoreboard import Scoreboard, comparison
from trl_toolgrpo.recipes.mcp_company import build_mcp
from trl_toolgrpo.recipes.mcp_company.servers import resolve_servers
from trl_toolgrpo.recipes.models import resolve_model
from trl_toolgrpo.recipes.resuming import checkpoint_to_resume, flags_that_keep_batches
from trl_toolgrpo.recipes.task import Task
from trl_toolgrpo.recipes.workspace import build_workspace


def build_task(recipe: RecipeArguments, training: ToolGRPOConfig) -> Task:
    """Build the task that the arguments name."""
    if recipe.task == "mcp":
        folder = Path(str(training.output_dir)) / "company"
        with training.main_process_first(desc="writing the company's database"):
            return build_mcp(recipe.train_size, recipe.held_out_size, recipe.question_seed, folder)
    if recipe.task == "bfcl":
        return build_bfcl(recipe.train_size, recipe.held_out_size, recipe.question_seed, recipe.dataset_name)
    sizes = recipe.train_size, recipe.held_out_size
    return build_workspace(*sizes, recipe.question_seed, recipe.difficulty, recipe.turn_rewards)


def build_trainer(
    task: Task, recipe: RecipeArguments, training: ToolGRPOConfig, model: ModelConfig, trial: bool = False
) -> tuple[ToolGRPOTrainer, Scoreboard]:
    """Build the trainer, for a trial with an untrained tiny model, and the scoreboard that is its reward function."""
    scoreboard = Scoreboard(task)
    # For the rates before training, with the model prepared as it will be trained. A replay samples nothing.
    training.eval_on_start = training.replay is None
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        **(training.model_init_kwargs or {}),
    }
    trainer = ToolGRPOTrainer(
        model=resolve_model(model, training, recipe.task, trial),
        reward_funcs=scoreboard,
        args=training,
        train_dataset=task.train,
        eval_dataset=task.held_out,
        environment_factory=task.environment_factory,
        mcp_servers=resolve_servers(recipe.mcp_servers, recipe.server_packages, recipe.server_folder, training),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        callbacks=[scoreboard, SampleConversation(scoreboard, recipe.sample_every)],
    )
    return trainer, scoreboard


def make_trainer(arguments: Sequence[str], trial: bool = False) -> ToolGRPOTrainer:
    """
    Build the trainer that a command line asks for. `python -m trl_toolgrpo.doctor` calls this.

    Args:
        arguments (`Sequence[str]`):
            The command line without the program.
        trial (`bool`, *optional*, defaults to `False`):
            Build it for an examination: files go to a temporary folder, and the tiny model is hardly warm-started.

    Returns:
        [`~trl_toolgrpo.ToolGRPOTrainer`]: the trainer, ready to train.
    """
    recipe, training, model = parse_arguments(arguments, os.environ)
    if trial:
        if model.model_name_or_path == "tiny":
            print("For this trial the tiny model gets one step of its warm start, so its rollouts mean little.")
        training.output_dir = tempfile.mkdtemp(prefix="trial-")
        atexit.register(shutil.rmtree, training.output_dir, ignore_errors=True)
    return build_trainer(build_task(recipe, training), recipe, training, model, trial)[0]


def main() -> None:
    """Run the recipe."""
    try:
        recipe, training, model = parse_arguments(sys.argv[1:], os.environ)
    except ValueError as error:  # a line, not a traceback
        print(f"qwen3_tools.py: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    if training.process_index == 0:
        for name, _ in SWITCHES.values():
            print(f"{name}: {getattr(training, name)}", flush=True)
    check_output_dir(training)  # before models are loaded and tasks are built
    checkpoint = checkpoint_to_resume(training)
    flags = flags_that_keep_batches(checkpoint, training, sys.argv[1:])
    if flags:
        recipe, training, model = parse_arguments([*sys.argv[1:], *flags], os.environ)
    trainer, scoreboard = build_trainer(build_task(recipe, training), recipe, training, model)
    scoreboard.settings = RunSettings.of(recipe, training, model)  # for `evaluate.py`
    if checkpoint is not None and scoreboard.recall(Path(checkpoint)):
        training.eval_on_start = False  # the run did that when it began
    trainer.train(resume_from_checkpoint=checkpoint)
    if scoreboard.evaluations and scoreboard.evaluations[-1].step < trainer.state.global_step:
        trainer.evaluate()
    trainer.save_model(training.output_dir)
    trainer.save_state()
    trainer.end()
    if training.process_index == 0 and scoreboard.evaluations:
        evaluations = scoreboard.evaluations
        assisted = [rates for rates in evaluations[1:] if rates.step == training.assist_warmup_steps]
        print(comparison(evaluations[0], evaluations[-1], assisted[0] if assisted else None), flush=True)


if __name__ == "__main__":
    main()
