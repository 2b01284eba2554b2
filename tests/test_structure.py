"""Rules that a machine can check: imports go one way, and public names have docstrings."""

import ast
from pathlib import Path

import pytest

import trl_toolgrpo


PACKAGE = Path(trl_toolgrpo.__file__).parent

# A folder, or a module next to the folders, imports only from those before it.
ORDER = [
    "errors",
    "types",
    "version",
    "redaction",
    "config",
    "trl_hooks",
    "models",
    "tools",
    "chat",
    "validation",
    "sampling",
    "rollout",
    "algorithms",
    "run_folder",
    "update",
    "critic",
    "reference",
    "checkpoints",
    "monitoring",
    "hub",
    "memory",
    "serve",
    "trainer",
    "report",
    "doctor",
    "",  # the package itself, which exports public names
]


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if "recipes" not in path.parts}


def imported(name):
    """Yield the modules of this package that a module imports, anywhere in it, by their name in `FILES`."""
    path = FILES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE.name]
            yield from (".".join(target.split(".")[1:]) for target in targets)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif (node.module or "").split(".")[0] == PACKAGE.name:
                base = []
            else:
                continue
            module = (node.module or "").split(".")
            base = [*base, *(module if node.level else module[1:])]
            base = [part for part in base if part]
            for alias in node.names:  # `from . import errors` names a module, `from .errors import X` does not
                inner = ".".join([*base, alias.name])
                yield inner if inner in FILES else ".".join(base)


def folder(name):
    return name.split(".")[0]


def subfolder(name):
    """The folder that a module is in, by its whole path; a package is in itself."""
    return name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]


def test_every_folder_has_a_place():
    assert sorted(ORDER) == sorted({folder(name) for name in FILES}), "Give the folder a place in ORDER."


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_go_one_way(name):
    for other in imported(name):
        assert other in FILES
        inside = folder(other) == folder(name)
        assert inside or ORDER.index(folder(other)) < ORDER.index(folder(name)), (
            f"`{name or '__init__'}` imports `{other}`, whose folder comes after its own."
        )


def test_folders_within_a_folder_import_one_way():
    arrows = set()
    for name in FILES:
        for other in imported(name):
            if "." in name and folder(name) == folder(other):
                arrows.add((subfolder(name), subfolder(other)))
    assert not {(a, b) for a, b in arrows if a != b and (b, a) in arrows}


def test_no_modules_import_each_other():
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " -> ".join([*open_[open_.index(name) :], name])
        if name in done:
            return
        open_.append(name)
        for other in sorted(set(imported(name)) - {name}):
            visit(other)
        open_.pop()
        done.add(name)

    for name in FILES:
        visit(name)


def test_the_check_finds_known_imports():
    assert {"errors", "config", "tools.tool", "trainer", "rollout.trajectory", "version"} <= set(imported(""))
    assert "tools.runtime.executor" in set(imported("rollout.loop"))
    assert "tools.tool" in set(imported("tools.runtime.executor"))


def test_few_modules_are_outside_the_folders():
    outside = [path.name for path in PACKAGE.glob("*.py")]
    assert len(outside) <= 10, outside


def test_only_the_trainer_wires_the_parts_together():
    for name in set(FILES) - {"trainer", ""}:
        assert "trainer" not in set(imported(name))
    for name in ("errors", "types", "version"):
        assert not set(imported(name)), f"`{name}` imports nothing of the package."


@pytest.mark.parametrize("name", sorted(FILES))
def test_modules_have_docstrings(name):
    assert ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8"))), f"{FILES[name]} has no docstring."


@pytest.mark.parametrize("name", sorted(set(trl_toolgrpo.__all__) - {"__version__"}))
def test_public_names_are_described(name):
    thing = getattr(trl_toolgrpo, name)
    doc = (vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__) or ""
    # A dataclass without a docstring gets its signature for one
    assert doc.strip() and not doc.startswith(f"{name}("), f"`{name}` has no docstring of its own."
    for attribute, value in vars(thing).items():
        if attribute.startswith("_") or not (callable(value) or isinstance(value, (property, classmethod))):
            continue
        inherited = any(hasattr(base, attribute) for base in thing.__mro__[1:])
        function = getattr(value, "__func__", getattr(value, "fget", value))
        assert inherited or (function.__doc__ or "").strip(), f"`{name}.{attribute}` has no docstring."


def test_public_names_are_sorted_and_complete():
    names = [name for name in trl_toolgrpo.__all__ if name != "__version__"]
    assert names == sorted(names)
    imported_names = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(FILES[""].read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported_names == set(trl_toolgrpo.__all__)


@pytest.mark.parametrize("word", ["utils", "helpers", "manager", "misc", "common"])
def test_no_module_has_a_name_without_a_subject(word):
    assert not [name for name in FILES if word in name.split(".")[-1]]
