"""A virtual environment for the MCP servers of a recipe.

It contains only the servers, since they may need another version of the SDK than the trainer
(`mcp-server-sqlite` needs an `mcp` below 2). This installs the servers of `mcp.yaml`:

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
    Install packages in a virtual environment, unless it already has these packages.

    Args:
        folder (`str` or `Path`):
            Folder of the environment.
        packages (`Sequence[str]`):
            Requirements as pip takes them.

    Returns:
        `Path`: the folder of the programs.

    Raises:
        RuntimeError: if a package cannot be installed; it quotes pip.
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
            The servers by name; `{output_dir}` in their settings stands for the output folder.
        packages (`Sequence[str]`, *optional*):
            Packages to install for them.
        folder (`str` or `Path`):
            Folder of their environment.
        training ([`ToolGRPOConfig`]):
            Configuration of the run, for the output folder.

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
