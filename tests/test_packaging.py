"""What setup.cfg declares is what the package imports."""

import ast
import configparser
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement


ROOT = Path(__file__).parents[1]

# Modules of distributions that the tests' environment lacks
ELSEWHERE = {"deepspeed": "deepspeed", "vllm": "vllm"}
# Taken along when the user has it, and never needed
OPTIONAL = {"wandb"}


@pytest.fixture(scope="module")
def setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def distributions(text):
    return {Requirement(line).name.lower().replace("_", "-") for line in text.strip().splitlines()}


def imported(statements):
    """Top-level names of the modules that statements import, other than the package's own."""
    names = set()
    for node in statements:
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"trl_toolgrpo"} - OPTIONAL


def distribution_of(module):
    found = metadata.packages_distributions().get(module) or [ELSEWHERE[module]]
    return {name.lower().replace("_", "-") for name in found}


def test_what_is_imported_is_declared(setup):
    required = distributions(setup["options"]["install_requires"])
    extras = set().union(*(distributions(text) for text in setup["options.extras_require"].values()))
    for path in sorted((ROOT / "trl_toolgrpo").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for module in imported(ast.walk(tree)):
            assert distribution_of(module) & (required | extras), f"{path}: {module} is not in setup.cfg"


def test_what_importing_the_trainer_imports_is_required(setup):
    """Whatever is imported at the top of a file that needs no extra is installed with the package."""
    required = distributions(setup["options"]["install_requires"])
    of_extras = {"tools/mcp/connection.py", "tools/mcp/stdio.py"}  # imported once a server is configured
    for path in sorted((ROOT / "trl_toolgrpo").rglob("*.py")):
        if path.relative_to(ROOT / "trl_toolgrpo").as_posix() in of_extras:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for module in imported(tree.body):
            assert distribution_of(module) & required, f"{path}: {module} is imported and not required"


def test_every_folder_of_the_package_is_installed_with_its_files(setup):
    listed = set(setup["options"]["packages"].split())
    roots = {"trl_toolgrpo": ROOT / "trl_toolgrpo", "trl_toolgrpo.recipes": ROOT / "recipes"}
    folders = {}
    for name, root in roots.items():
        for path in root.rglob("__init__.py"):
            if root.name == "recipes" or "recipes" not in path.parts:
                folders[".".join([name, *path.relative_to(root).parts[:-1]])] = path.parent
    assert listed == set(folders)
    shipped = {name: patterns.split(", ") for name, patterns in setup["options.package_data"].items()}
    for name, folder in folders.items():
        for path in folder.rglob("*") if name == "trl_toolgrpo.report" else folder.iterdir():
            if path.suffix in (".yaml", ".jinja", ".html", ".css", ".js", ".typed"):
                patterns = shipped.get(name, ())
                assert any(path.relative_to(folder).match(pattern) for pattern in patterns), path


def test_python_is_what_trl_and_transformers_need(setup):
    declared = Requirement(f"python{setup['options']['python_requires']}").specifier
    for name in ("trl", "transformers", "peft", "accelerate", "datasets", "torch"):
        needed = Requirement(f"python{metadata.metadata(name)['Requires-Python']}").specifier
        for minor in range(8, 20):
            assert not declared.contains(f"3.{minor}") or needed.contains(f"3.{minor}"), name
    newest = {"trl", "transformers"}  # the next lower version of Python is refused by one of them
    lowest = min(minor for minor in range(8, 20) if declared.contains(f"3.{minor}"))
    assert any(
        not Requirement(f"python{metadata.metadata(name)['Requires-Python']}").specifier.contains(f"3.{lowest - 1}")
        for name in newest
    )
    assert f'target-version = "py3{lowest}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_no_package_is_both_required_and_an_extra(setup):
    required = distributions(setup["options"]["install_requires"])
    for extra, text in setup["options.extras_require"].items():
        assert not required & distributions(text), extra
