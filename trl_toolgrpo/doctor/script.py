"""The script that would train: found beside the YAML, and asked for its trainer.

Owns the seam between the doctor and a script: a function `make_trainer(arguments)` at the top of the script, which
gives the trainer that this command line asks for. Where it has a parameter `trial`, it gets True, and leaves out what
takes long and writes nothing into the output folder.
"""

import ast
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from transformers import Trainer

from ..errors import (
    ChatTemplateError,
    ConfigError,
    DatasetError,
    DoctorError,
    MCPServerError,
    ToolGRPOError,
    ToolNameError,
    ToolSchemaError,
)
from .findings import FAULT, Finding


MAKER = "make_trainer"
SUBJECTS: dict[type[Exception], str] = {
    ConfigError: "configuration",
    ChatTemplateError: "template",
    ToolNameError: "tools",
    ToolSchemaError: "tools",
    DatasetError: "data",
    MCPServerError: "MCP servers",
}


def find_script(config: Path, given: Path | None = None) -> Path:
    """
    The script a YAML is for: the one given, or the only one beside it that has a `make_trainer`.

    Args:
        config (`Path`):
            The YAML.
        given (`Path`, *optional*):
            The script, if it was named.

    Raises:
        DoctorError: if there is no such script, or there are several.
    """
    if not config.is_file():
        raise DoctorError(f"You passed `--config {config}`, which is no file. Pass the YAML of a recipe.")
    if given is not None:
        if not given.is_file() or not _defines_maker(given):
            raise DoctorError(f"You passed `--script {given}`, which has no function `{MAKER}(arguments)`. {_WRITE}")
        return given
    found = [path for path in sorted(config.parent.glob("*.py")) if _defines_maker(path)]
    if len(found) != 1:
        what = f"there are {', '.join(path.name for path in found)}" if found else "there is none"
        raise DoctorError(
            f"Looking beside {config} for the script with a function `{MAKER}(arguments)`: {what}. Name one with "
            f"--script. {_WRITE}"
        )
    return found[0]


_WRITE = f"`{MAKER}` takes a command line as a list and returns the trainer, ready to train."


def _defines_maker(path: Path) -> bool:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return False
    return any(isinstance(node, ast.FunctionDef) and node.name == MAKER for node in tree.body)


def load_maker(script: Path) -> Callable[[Sequence[str]], Any]:
    """
    The function of a script that makes its trainer, for a trial.

    Args:
        script (`Path`):
            The script, whose folder is put on the path as if it were run.
    """
    sys.path.insert(0, str(script.parent.resolve()))
    spec = importlib.util.spec_from_file_location(script.stem, script)
    if spec is None or spec.loader is None:
        raise DoctorError(f"{script} cannot be imported. Pass a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module
    spec.loader.exec_module(module)
    make = getattr(module, MAKER)
    trial = {"trial": True} if "trial" in inspect.signature(make).parameters else {}
    return lambda arguments: make(arguments, **trial)


def output_folder(arguments: Sequence[str], otherwise: str) -> Path:
    """
    Where a command line or its YAML would have checkpoints, which is not where a trial has its files.

    Args:
        arguments (`Sequence[str]`):
            The command line, with `--config`.
        otherwise (`str`):
            Folder where neither names one.
    """
    given = list(arguments)
    if "--output_dir" in given[:-1]:
        return Path(given[given.index("--output_dir") + 1])
    try:
        written = yaml.safe_load(Path(given[given.index("--config") + 1]).read_text(encoding="utf-8"))
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        written = None
    return Path(str(written.get("output_dir", otherwise)) if isinstance(written, dict) else otherwise)


def construct(make: Callable[[Sequence[str]], Any], arguments: Sequence[str]) -> tuple[Any, Finding | None]:
    """
    The trainer; or why there is none.

    Args:
        make (`Callable`):
            Gives the trainer of a command line.
        arguments (`Sequence[str]`):
            The command line.

    Returns:
        `tuple[Any, Finding | None]`: the trainer, or what is wrong.
    """
    try:
        with _without_hub():
            return make(arguments), None
    except SystemExit:  # argparse has said why
        words = "The command line or the YAML cannot be read; the reason stands above."
        return None, Finding("configuration", FAULT, words, "Correct it, or see the script's --help.")
    except ToolGRPOError as error:
        subject = next((name for kind, name in SUBJECTS.items() if isinstance(error, kind)), "construction")
        return None, Finding(subject, FAULT, *_split(str(error)))
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        if "arguments are not used" in str(error):  # of TrlParser, for a flag or a key that nothing reads
            return None, Finding("configuration", FAULT, words, "Remove what no argument reads, or correct its name.")
        if "template" in str(error):
            return None, Finding("template", FAULT, words, "Use a template TRL ships (trl/chat_templates).")
        traceback.print_exc()
        remedy = "See the traceback above: it comes from the script, or from a library it calls."
        return None, Finding("construction", FAULT, words, remedy)


@contextmanager
def _without_hub() -> Iterator[None]:
    """With `push_to_hub`, making a trainer makes a repository; a look at it does not."""
    trainer: Any = Trainer
    create, trainer.init_hf_repo = trainer.init_hf_repo, lambda *args, **kwargs: None
    try:
        yield
    finally:
        trainer.init_hf_repo = create


def _split(message: str) -> tuple[str, str]:
    """An error's last sentence is what to do."""
    words, dot, remedy = message.strip().rpartition(". ")
    return (words + dot.strip(), remedy) if dot else (message, "")
