"""Train a language model to call tools with GRPO. One script for every recipe of this folder.

Owns the command line; the task comes from `workspace.py`, `bfcl.py` or `mcp_task.py`, the model from a folder, the
Hub, `tiny_model.py` or `smollm2.py`, and the trainer from `trl_toolgrpo`. Without `--config` it runs `tiny_cpu.yaml`,
which needs no download.

    python recipes/qwen3_tools.py
    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/qwen3_tools.py --config recipes/bfcl.yaml
"""

import atexit
import ctypes
import ctypes.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from bfcl import build_bfcl
from command_line import RecipeParser
from conversation import SampleConversation
from evaluation import RunSettings
from mcp_task import build_mcp
from scoreboard import Scoreboard, comparison
from server_environment import FOLDER, make_environment
from smollm2 import convert_smollm2
from task import Task
from tiny_model import TinyModel, build_tiny_model
from trl import ModelConfig, get_peft_config, get_quantization_config
from warm_start import WarmStart
from workspace import build_workspace

from trl_toolgrpo import (
    ConfigError,
    OutputFolderInUseError,
    ToolGRPOConfig,
    ToolGRPOTrainer,
    find_checkpoint,
    keep_batch_size,
)
from trl_toolgrpo.checkpoint import same_error, why_not_writable
from trl_toolgrpo.run_lock import take_lock


DEFAULT_CONFIG = Path(__file__).with_name("tiny_cpu.yaml")

# The tiny model by the task it is for
TINY: dict[str, Callable[..., TinyModel]] = {
    "workspace": TinyModel,
    "bfcl": TinyModel,
    "mcp": partial(TinyModel, task="mcp", warm_start=WarmStart(demonstrations=2000, steps=400, batch_size=8)),
}


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
            `"workspace"` (questions to a company's database), `"bfcl"` (Berkeley Function Calling Leaderboard) or
            `"mcp"` (questions that two MCP servers answer).
        train_size, held_out_size (`int`, *optional*, default to `2000` and `120`):
            Number of questions in each split. For `bfcl`, at most 400 together.
        question_seed (`int`, *optional*, defaults to `0`):
            Seed of the questions, or of the split.
        difficulty (`int`, *optional*):
            For `workspace`: only questions that need so many calls, 1 to 3.
        turn_rewards (`bool`, *optional*, defaults to `False`):
            For `workspace`: reward each of the dependent calls in the turn that makes it, for the estimators
            `"gae"` and `"group_gae"`.
        dataset_name (`str`, *optional*):
            For `bfcl`: data set on the Hub that is read when the `bfcl-eval` package is not installed.
        sample_every (`int`, *optional*, defaults to `20`):
            Optimizer steps between two sample conversations on the console; 0 prints none.
        mcp_servers (`dict`, *optional*):
            MCP servers in the shape of `mcpServers`; `{output_dir}` in it stands for the output folder. On the command
            line, as JSON.
        server_packages (`list[str]`, *optional*):
            Packages of the servers, installed with pip in `server_folder`, an environment of their own.
        server_folder (`str`, *optional*, defaults to `"outputs/servers"`):
            Where that is.
    """

    task: str = field(
        default="workspace", metadata={"help": "What to train on.", "choices": ["workspace", "bfcl", "mcp"]}
    )
    train_size: int = field(default=2000, metadata={"help": "Number of training questions."})
    held_out_size: int = field(default=120, metadata={"help": "Number of held-out questions."})
    question_seed: int = field(default=0, metadata={"help": "Seed of the questions, or of the split."})
    difficulty: int | None = field(
        default=None, metadata={"help": "For workspace: only questions that need so many calls, 1 to 3."}
    )
    turn_rewards: bool = field(
        default=False, metadata={"help": "For workspace: reward each dependent call in the turn that makes it."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "For bfcl without the bfcl-eval package: a data set on the Hub."}
    )
    sample_every: int = field(
        default=20, metadata={"help": "Optimizer steps between two sample conversations; 0 prints none."}
    )
    mcp_servers: dict | str | None = field(
        default=None, metadata={"help": "MCP servers in the shape of mcpServers; on the command line as JSON."}
    )
    server_packages: list[str] | None = field(
        default=None, metadata={"help": "Packages of the servers, installed in an environment of their own."}
    )
    server_folder: str = field(default=FOLDER, metadata={"help": "Where that environment is."})

    def __post_init__(self) -> None:
        if isinstance(self.mcp_servers, str):
            try:
                self.mcp_servers = json.loads(self.mcp_servers)
            except ValueError as error:
                raise ConfigError(
                    f"You passed `mcp_servers={self.mcp_servers!r}`, which is no JSON: {error}. Pass the `mcpServers` "
                    f"of an MCP client's configuration."
                ) from error


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
        ValueError: for an environment variable that is neither true nor false.
        ConfigError: for an unknown key or flag, a value of another type and one that is none of the choices.
    """
    parts = [text.split("=", 1) if text.startswith("--config=") else [text] for text in arguments]
    arguments = [part for pair in parts for part in pair]
    if "--config" not in arguments:
        arguments = ["--config", str(DEFAULT_CONFIG), *arguments]
    parser = RecipeParser((RecipeArguments, ToolGRPOConfig, ModelConfig))
    parser.set_defaults_with_config(**read_switches(environment))
    return parser.parse_args_and_config(arguments)


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


def build_task(recipe: RecipeArguments, training: ToolGRPOConfig) -> Task:
    """The task the arguments ask for."""
    if recipe.task == "mcp":
        folder = Path(training.output_dir) / "company"
        with training.main_process_first(desc="writing the company's database"):
            return build_mcp(recipe.train_size, recipe.held_out_size, recipe.question_seed, folder)
    if recipe.task == "bfcl":
        return build_bfcl(recipe.train_size, recipe.held_out_size, recipe.question_seed, recipe.dataset_name)
    sizes = recipe.train_size, recipe.held_out_size
    return build_workspace(*sizes, recipe.question_seed, recipe.difficulty, recipe.turn_rewards)


def resolve_servers(recipe: RecipeArguments, training: ToolGRPOConfig) -> Any:
    """
    The MCP servers, with their packages installed and found first.

    Args:
        recipe ([`RecipeArguments`]):
            Names the servers.
        training ([`ToolGRPOConfig`]):
            Output folder.

    Returns:
        `dict`, *optional*: the servers by name.
    """
    if recipe.mcp_servers is None:
        return None
    if recipe.server_packages:
        with training.main_process_first(desc="installing the MCP servers"):
            programs = make_environment(recipe.server_folder, recipe.server_packages)
        os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    folder = json.dumps(str(Path(training.output_dir).absolute()))[1:-1]
    return json.loads(json.dumps(recipe.mcp_servers).replace("{output_dir}", folder))


def resolve_model(model: ModelConfig, training: ToolGRPOConfig, task: str = "workspace", trial: bool = False) -> str:
    """
    Folder or Hub id of the model; `tiny` and `smollm2` are built in the output folder, if they are not there yet.

    Args:
        model (`ModelConfig`):
            Names the model.
        training ([`ToolGRPOConfig`]):
            Output folder and seed.
        task (`str`, *optional*, defaults to `"workspace"`):
            What `tiny` is warm-started on.
        trial (`bool`, *optional*, defaults to `False`):
            Cut the warm start short.

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
            settings = TINY[task](seed=training.seed)
            if trial:
                untrained = replace(settings.warm_start, demonstrations=500, steps=1)
                settings = replace(settings, warm_start=untrained)
            return str(build_tiny_model(folder, settings))
        return str(convert_smollm2(folder))


def build_trainer(
    task: Task, recipe: RecipeArguments, training: ToolGRPOConfig, model: ModelConfig, trial: bool = False
) -> tuple[ToolGRPOTrainer, Scoreboard]:
    """The trainer, ready to train (for a trial: its tiny model untrained), and the scoreboard that is its reward."""
    scoreboard = Scoreboard(task)
    # The rates before training, with the model prepared as it will be trained; a replay samples nothing
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
        mcp_servers=resolve_servers(recipe, training),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        callbacks=[scoreboard, SampleConversation(scoreboard, recipe.sample_every)],
    )
    return trainer, scoreboard


def make_trainer(arguments: Sequence[str], trial: bool = False) -> ToolGRPOTrainer:
    """
    The trainer a command line asks for; this is what `python -m trl_toolgrpo.doctor` examines.

    Args:
        arguments (`Sequence[str]`):
            The command line without the program.
        trial (`bool`, *optional*, defaults to `False`):
            For a look at it: files go to a temporary folder, and the tiny model gets no warm start to speak of.

    Returns:
        [`~trl_toolgrpo.ToolGRPOTrainer`]: the trainer, ready to train.
    """
    recipe, training, model = parse_arguments(arguments, os.environ)
    if trial:
        if model.model_name_or_path == "tiny":
            print("The tiny model gets one step of its warm start here: what its rollouts say means little.")
        training.output_dir = tempfile.mkdtemp(prefix="trial-")
        atexit.register(shutil.rmtree, training.output_dir, ignore_errors=True)
    return build_trainer(build_task(recipe, training), recipe, training, model, trial)[0]


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
    found: Any = None
    if training.process_index == 0:  # the others take what it found
        found = find_checkpoint(training.output_dir)
        begins = f"No checkpoint in {training.output_dir} yet: starting from the beginning."
        print(begins if found is None else f"Resuming from {found}.", flush=True)
    (found,) = broadcast_object_list([found])
    return None if found is None else str(found)


def flags_that_keep_batches(
    checkpoint: str | None, training: ToolGRPOConfig, arguments: Sequence[str] = ()
) -> list[str]:
    """
    Flags with which rollout batches stay as they are in a checkpoint, which may be of more or fewer processes; none
    where the command line says how large batches are.
    """
    changes = {} if checkpoint is None else keep_batch_size(checkpoint, training)
    given = {argument.partition("=")[0].removeprefix("--") for argument in arguments}
    if given & {*changes, "generation_batch_size"}:
        return []
    if changes.get("steps_per_generation") == changes.get("gradient_accumulation_steps"):
        changes.pop("steps_per_generation", None)  # as it is by default
    flags = [text for name, value in changes.items() for text in (f"--{name}", str(value))]
    if flags and training.process_index == 0:
        print(f"Rollout batches stay as they are in {checkpoint}: {' '.join(flags)}", flush=True)
    return flags


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


def check_output_dir(training: ToolGRPOConfig) -> None:
    """
    Check the output folder before models are loaded and tasks are made.

    Args:
        training ([`ToolGRPOConfig`]):
            Configuration of the run.

    Raises:
        OutputFolderInUseError: if another run writes to it.
        CheckpointSaveError: if it cannot be written to.
    """
    folder = Path(str(training.output_dir))
    in_use = problem = None
    if training.process_index == 0:
        try:
            with take_lock(folder) or nullcontext():
                problem = why_not_writable(folder)
        except OutputFolderInUseError as error:
            in_use = error
    same_error(in_use, OutputFolderInUseError)
    same_error(problem)


def main() -> None:
    """Run the recipe."""
    try:
        recipe, training, model = parse_arguments(sys.argv[1:], os.environ)
    except ValueError as error:  # a line, not a traceback
        print(f"qwen3_tools.py: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    if training.use_cpu:
        keep_freed_memory()
    if training.process_index == 0:
        for name, _ in SWITCHES.values():
            print(f"{name}: {getattr(training, name)}", flush=True)
    check_output_dir(training)
    checkpoint = checkpoint_to_resume(training)
    flags = flags_that_keep_batches(checkpoint, training, sys.argv[1:])
    if flags:
        recipe, training, model = parse_arguments([*sys.argv[1:], *flags], os.environ)
    trainer, scoreboard = build_trainer(build_task(recipe, training), recipe, training, model)
    scoreboard.settings = RunSettings.of(recipe, training, model)  # for `evaluate.py`
    if checkpoint is not None and scoreboard.recall(Path(checkpoint)):
        training.eval_on_start = False  # that was done when the run began
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
