"""The arguments of a recipe, read from the command line, its YAML and environment variables."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig

from trl_toolgrpo import ConfigError, ToolGRPOConfig, ToolGRPOParser
from trl_toolgrpo.types import JSONObject

from .mcp_company.servers import FOLDER


DEFAULT_CONFIG = Path(__file__).with_name("tiny_cpu.yaml")


def read_truth(text: str) -> bool:
    """Read a truth value: 0, 1, true or false, in any case."""
    if text.strip().lower() not in ("0", "1", "true", "false"):
        raise ValueError("it is neither 0, 1, true nor false")
    return text.strip().lower() in ("1", "true")


# Environment variable -> the field of `ToolGRPOConfig` that it sets unless a flag or the YAML does, and its reader
SWITCHES: dict[str, tuple[str, Callable[[str], object]]] = {
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
            For `workspace`: ask only questions that need this number of calls, 1 to 3.
        turn_rewards (`bool`, *optional*, defaults to `False`):
            For `workspace`: reward each dependent call in the turn that makes it, for the estimators `"gae"` and
            `"group_gae"`.
        dataset_name (`str`, *optional*):
            For `bfcl`: data set on the Hub to read if the `bfcl-eval` package is not installed.
        sample_every (`int`, *optional*, defaults to `20`):
            Optimizer steps between two sample conversations on the console; 0 prints none.
        mcp_servers (`dict`, *optional*):
            MCP servers in the shape of `mcpServers`; `{output_dir}` in it stands for the output folder. On the command
            line, as JSON.
        server_packages (`list[str]`, *optional*):
            Packages of the servers, installed with pip in `server_folder`, an environment of their own.
        server_folder (`str`, *optional*, defaults to `"outputs/servers"`):
            Folder of that environment.
    """

    task: str = field(
        default="workspace", metadata={"help": "What to train on.", "choices": ["workspace", "bfcl", "mcp"]}
    )
    train_size: int = field(default=2000, metadata={"help": "Number of training questions."})
    held_out_size: int = field(default=120, metadata={"help": "Number of held-out questions."})
    question_seed: int = field(default=0, metadata={"help": "Seed of the questions, or of the split."})
    difficulty: int | None = field(
        default=None, metadata={"help": "For workspace: only questions that need this number of calls, 1 to 3."}
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
    mcp_servers: JSONObject | str | None = field(
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
                    f"You passed `mcp_servers={self.mcp_servers!r}`, which is not JSON: {error}.",
                    remedy="Pass the `mcpServers` of an MCP client's configuration.",
                ) from error


def parse_arguments(
    arguments: Sequence[str], environment: Mapping[str, str]
) -> tuple[RecipeArguments, ToolGRPOConfig, ModelConfig]:
    """
    Read the command line. A flag takes precedence over the YAML, the YAML over an environment variable.

    Args:
        arguments (`Sequence[str]`):
            The command line without the program; `--config` defaults to `tiny_cpu.yaml`.
        environment (`Mapping[str, str]`):
            Environment variables.

    Returns:
        `tuple[RecipeArguments, ToolGRPOConfig, ModelConfig]`: the arguments.

    Raises:
        ValueError: for an environment variable that cannot be the value of its field.
        ConfigError: for an unknown key or flag, a value of another type, or one that is not among the choices.
    """
    parts = [text.split("=", 1) if text.startswith("--config=") else [text] for text in arguments]
    arguments = [part for pair in parts for part in pair]
    if "--config" not in arguments:
        arguments = ["--config", str(DEFAULT_CONFIG), *arguments]
    parser = ToolGRPOParser((RecipeArguments, ToolGRPOConfig, ModelConfig))
    parser.set_defaults_with_config(**read_switches(environment))
    return parser.parse_args_and_config(arguments)


def read_switches(environment: Mapping[str, str]) -> dict[str, object]:
    """
    Read the fields that environment variables set.

    Args:
        environment (`Mapping[str, str]`):
            Environment variables.

    Returns:
        `dict[str, object]`: value of each field that a variable sets.

    Raises:
        ValueError: for a variable that cannot be the value of its field.
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
