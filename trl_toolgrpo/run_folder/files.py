"""The plain files of a run in its output folder: its settings (`run.json`), and the JSON lines of `metrics.jsonl` and
`health.jsonl`, which are added during the run.
"""

import json
import math
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import get_token
from trl import GRPOConfig

from ..config.fields import changed_fields
from ..redaction import Redactor, argument_secrets, config_secrets, masked_arguments, secret_variables
from ..tools.mcp.config import MCPServer
from ..tools.results import encodable
from ..types import JSONObject
from ..version import __version__


RUN = "run.json"
METRICS = "metrics.jsonl"
HEALTH = "health.jsonl"
PUBLISHED = "hub"
"""Folder for what is pushed to the Hub."""
CARD = "README.md"
RUN_VERSION = 1

_IS_CARD = re.compile(r"\s*---\n(.*\n)*?(library_name|base_model):")
"""How a model card begins, and no other page does."""


def add_line(path: Path, record: JSONObject) -> None:
    """
    Add a line of JSON to a file. Numbers that are not finite become null, which any reader of JSON takes.

    Args:
        path (`Path`):
            The file.
        record (`dict`):
            What to add.
    """
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(finite))


def _line(record: JSONObject) -> str:
    return encodable(json.dumps(record, default=str, ensure_ascii=False)) + "\n"


def read_lines(path: Path) -> list[JSONObject]:
    """
    Return the lines of a file; none if there is no such file. A line that a kill has cut short is left out.

    Args:
        path (`Path`):
            The file.
    """
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict)]


def cut_back(path: Path, step: int) -> None:
    """
    Drop the lines after a step.

    Args:
        path (`Path`):
            The file; it may be missing.
        step (`int`):
            The last step whose lines stay.
    """
    if path.is_file():
        kept = [record for record in read_lines(path) if record.get("step", 0) <= step]
        replace_text(path, "".join(map(_line, kept)))


def holds_other_page(folder: Path) -> bool:
    """
    Return whether the `README.md` of a folder is not a model card, and must not be overwritten.

    Args:
        folder (`Path`):
            The folder.
    """
    file = folder / CARD
    if not file.is_file():
        return file.exists()
    page = file.read_text(encoding="utf-8", errors="replace")
    return bool(page.strip()) and not _IS_CARD.match(page)  # a full disk leaves an empty one


@contextmanager
def other_page_aside(folder: Path) -> Iterator[None]:
    """
    Rename a `README.md` that is not a model card to `.README.md.kept` while open.

    Args:
        folder (`Path`):
            Its folder.
    """
    file, kept = folder / CARD, folder / f".{CARD}.kept"
    aside = holds_other_page(folder) and not kept.exists()
    if aside:
        os.replace(file, kept)
    try:
        yield
    finally:
        if aside:
            file.unlink(missing_ok=True)
            os.replace(kept, file)


def run_redactor(args: GRPOConfig, servers: Iterable[MCPServer] = ()) -> Redactor:
    """
    Return what knows the secrets of a run: those of its configuration, command line, environment and MCP servers, and
    the token that is stored for the Hub.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration.
        servers (`Iterable[MCPServer]`, *optional*):
            The run's servers.
    """
    configured = {field.name: getattr(args, field.name) for field in fields(args)}
    served = [secret for server in servers for secret in server.secrets]
    return Redactor(config_secrets(configured) + process_secrets() + served)


def process_secrets() -> list[str]:
    """Return the secrets of this process: of its command line and environment, and the stored token for the Hub."""
    variables = {name: os.environ[name] for name in secret_variables(os.environ)}
    return config_secrets([variables, {"token": get_token()}]) + argument_secrets(sys.argv)


def describe_start(
    args: GRPOConfig, model: str | None, reward_funcs: Sequence[str], tools: Sequence[str], redactor: Redactor
) -> JSONObject:
    """
    Return what a run was started with, as `run.json` holds it.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration; the fields that were set are kept.
        model (`str`, *optional*):
            Name of the model.
        reward_funcs, tools (`Sequence[str]`):
            Names of the reward functions and the tools.
        redactor ([`Redactor`]):
            Keeps secrets out.
    """
    libraries = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
    versions = {library: version(library) for library in libraries}
    return redactor.data(
        {
            "version": RUN_VERSION,
            "model": model,
            "reward_funcs": list(reward_funcs),
            "tools": list(tools),
            "config": {name: value for name, value in changed_fields(args).items() if not name.endswith("_token")},
            "versions": {"trl_toolgrpo": __version__, **versions, "python": platform.python_version()},
            "command": masked_arguments(sys.argv),
        }
    )


def write_json(path: Path, record: JSONObject) -> None:
    """
    Write a file of JSON, so that it is whole or not there.

    Args:
        path (`Path`):
            The file.
        record (`dict`):
            What to write.
    """
    replace_text(path, json.dumps(record, indent=1, ensure_ascii=False))


def replace_text(path: Path, text: str) -> None:
    """
    Write a file of text, so that it is whole or what it was before.

    Args:
        path (`Path`):
            The file.
        text (`str`):
            What to write.
    """
    with replacement(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """
    Yield a path to write to, which replaces a file at the end; if the disk refuses, no part of it is left.

    Args:
        path (`Path`):
            The file.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
