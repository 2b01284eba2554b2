"""A virtual environment for the MCP servers of a recipe.

It holds nothing but the servers, since the SDK they are written with need not be the one the trainer uses.
(`mcp-server-sqlite` needs an `mcp` below 2.) This installs the servers of `mcp.yaml`:

    python -m trl_toolgrpo.recipes.mcp_company.servers
"""

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

import yaml

from trl_toolgrpo import ToolGRPOConfig
from trl_toolgrpo.types import JSONObject


FOLDER = "outputs/servers"


def make_environment(folder: str | Path, packages: Sequence[str]) -> Path:
    """
    Install packages in a virtual environment, unless it was already made for the same packages.

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
    command = [str(programs / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"pip could not install {', '.join(packages)}:\n{done.stderr.strip()}")
    record.write_text(wanted)
    return programs


def resolve_servers(
    servers: JSONObject | None, packages: Sequence[str] | None, folder: str | Path, training: ToolGRPOConfig
) -> JSONObject | None:
    """
    Return the MCP servers of a recipe, with their packages installed and first on the path.

    Args:
        servers (`dict`, *optional*):
            The servers by name; `{output_dir}` in it stands for the output folder.
        packages (`Sequence[str]`, *optional*):
            What to install for them.
        folder (`str` or `Path`):
            Where to.
        training ([`ToolGRPOConfig`]):
            Gives the output folder.

    Returns:
        `dict`, *optional*: the servers by name.
    """
    if servers is None:
        return None
    if packages:
        with training.main_process_first(desc="installing the MCP servers"):
            programs = make_environment(folder, packages)
        os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    output_dir = json.dumps(str(Path(str(training.output_dir)).absolute()))[1:-1]
    return json.loads(json.dumps(servers).replace("{output_dir}", output_dir))


if __name__ == "__main__":
    recipe = yaml.safe_load(Path(__file__).parents[1].joinpath("mcp.yaml").read_text())
    print(make_environment(FOLDER, recipe["server_packages"]))
