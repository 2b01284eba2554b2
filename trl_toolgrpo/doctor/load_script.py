"""The script that would train: found next to the YAML, and asked for its trainer.

A script has a function `make_trainer(arguments)` at its top level, which returns the trainer that this command line
asks for. If it has a parameter `trial`, that is True here: the script leaves out what takes long and writes nothing
into the output folder.
"""

import argparse
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import yaml
from transformers import Trainer

from .. import errors
from ..errors import DoctorError, ToolGRPOError
from ..validation.trainable_parameters import check_policy_is_trained
from .result import FAULT, CheckResult, ToolTrainer


MAKER = "make_trainer"
SUBJECTS: dict[type[Exception], str] = {
    errors.ConfigError: "configuration",
    errors.ChatTemplateError: "template",
    errors.ToolNameError: "tools",
    errors.ToolSchemaError: "tools",
    errors.DatasetError: "data",
    errors.MCPServerError: "MCP servers",
}


def find_script(config: Path, given: Path | None = None) -> Path:
    """
    Find the script a YAML is for: the one given, or the only one next to it that has a `make_trainer`.

    Args:
        config (`Path`):
            The YAML.
        given (`Path`, *optional*):
            The script, if it was named.

    Raises:
        DoctorError: if there is no such script, or there are several.
    """
    needed = f"`{MAKER}` takes a command line as a list and returns the trainer, ready to train."
    if not config.is_file():
        raise DoctorError(f"You passed `--config {config}`, which is no file.", remedy="Pass the YAML of a recipe.")
    if given is not None:
        if not _defines_maker(given):
            message = f"You passed `--script {given}`, which has no function `{MAKER}(arguments)`."
            raise DoctorError(message, remedy=f"Write one: {needed}")
        return given
    found = [path for path in sorted(config.parent.glob("*.py")) if _defines_maker(path)]
    if len(found) != 1:
        names = f"there are {', '.join(path.name for path in found)}" if found else "there is none"
        message = f"Looking next to {config} for the script with a function `{MAKER}(arguments)`: {names}."
        raise DoctorError(message, remedy=f"Name one with --script. {needed}")
    return found[0]


def _defines_maker(path: Path) -> bool:
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return re.search(rf"^def {MAKER}\(", text, re.MULTILINE) is not None


def load_maker(script: Path) -> Callable[[Sequence[str]], ToolTrainer]:
    """
    Return the function of a script that makes its trainer, for a trial.

    Args:
        script (`Path`):
            The script, whose folder is put on the path as if it were run.
    """
    sys.path.insert(0, str(script.parent.resolve()))
    spec = importlib.util.spec_from_file_location(script.stem, script)
    if spec is None or spec.loader is None:
        raise DoctorError(f"{script} cannot be imported.", remedy="Pass a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module
    spec.loader.exec_module(module)
    make = getattr(module, MAKER)
    trial = {"trial": True} if "trial" in inspect.signature(make).parameters else {}
    return lambda arguments: make(arguments, **trial)


def output_folder(arguments: Sequence[str], otherwise: str) -> Path:
    """
    Return where a command line or its YAML would put checkpoints, which is not where a trial has its files.

    Args:
        arguments (`Sequence[str]`):
            The command line, with `--config`.
        otherwise (`str`):
            Folder if neither names one.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--output_dir", type=Path)
    given, _ = parser.parse_known_args(arguments)
    if given.output_dir is not None:
        return given.output_dir
    written = yaml.safe_load(given.config.read_text(encoding="utf-8")) if given.config else None
    return Path(str(written.get("output_dir", otherwise)) if isinstance(written, dict) else otherwise)


def construct(script: Path, arguments: Sequence[str]) -> tuple[ToolTrainer, CheckResult | None]:
    """
    Make the trainer of a command line.

    Args:
        script (`Path`):
            The script.
        arguments (`Sequence[str]`):
            The command line.

    Returns:
        `tuple[ToolGRPOTrainer | None, CheckResult | None]`: the trainer, whose policy training would change; or what
        is wrong.
    """
    try:
        with patch.object(Trainer, "init_hf_repo"):  # which would create a repository with `push_to_hub`
            trainer = load_maker(script)(arguments)
        check_policy_is_trained(trainer.model)
        return trainer, None
    except SystemExit:  # argparse has printed why
        message = "The command line or the YAML cannot be read; the reason stands above."
        return None, CheckResult("configuration", FAULT, message, "Correct it, or see the script's --help.")
    except ToolGRPOError as error:
        subject = next((name for kind, name in SUBJECTS.items() if isinstance(error, kind)), "construction")
        return None, CheckResult(subject, FAULT, error.message, error.remedy)
    except Exception as error:
        subject, remedy = "construction", "See the traceback above: it comes from the script or a library it calls."
        if "arguments are not used" in str(error):  # of TrlParser, for a flag or a key that nothing reads
            subject, remedy = "configuration", "Remove what no argument reads, or correct its name."
        elif "template" in str(error):  # of TRL, which has no type of error for it
            subject, remedy = "template", "Use a template TRL ships (trl/chat_templates)."
        else:
            traceback.print_exc()
        return None, CheckResult(subject, FAULT, f"{type(error).__name__}: {error}", remedy)
