"""An environment of their own for the MCP servers of a recipe.

Owns a virtual environment that holds nothing but the servers: the SDK they are written with need not be the one the
trainer uses. (`mcp-server-sqlite` needs an `mcp` below 2.) Feeds `qwen3_tools.py`, and runs on its own:

    python recipes/server_environment.py

which installs the servers of `mcp.yaml`.
"""

import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

import yaml


FOLDER = "outputs/servers"


def make_environment(folder: str | Path, packages: Sequence[str]) -> Path:
    """
    Install packages in a virtual environment; one that was made for the same packages is kept.

    Args:
        folder (`str` or `Path`):
            Where to.
        packages (`Sequence[str]`):
            What to install, as pip takes it.

    Returns:
        `Path`: the folder of the programs.

    Raises:
        RuntimeError: if a package cannot be installed, with pip's words.
    """
    folder = Path(folder).absolute()
    record, wanted = folder / "packages.txt", "\n".join(packages)
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    if record.is_file() and record.read_text() == wanted:
        return programs
    shutil.rmtree(folder, ignore_errors=True)
    print(f"Installing {', '.join(packages)} in {folder}.", flush=True)
    venv.create(folder, with_pip=True)
    command = [programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"pip could not install {', '.join(packages)}:\n{done.stderr.strip()}")
    record.write_text(wanted)
    return programs


if __name__ == "__main__":
    recipe = yaml.safe_load(Path(__file__).with_name("mcp.yaml").read_text())
    print(make_environment(FOLDER, recipe["server_packages"]))
