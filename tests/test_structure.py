"""Rules that a machine can check: imports go one way, public names have docstrings, private names stay private, and
the trainer is one class with thin hooks."""

import ast
from pathlib import Path

import pytest
from trl import GRPOTrainer

import trl_toolgrpo
from trl_toolgrpo.trl_hooks import OVERRIDDEN, RELIED_ON, RESPONSE_PARSER


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
    "memory",
    "tools",
    "chat",
    "validation",
    "sampling",
    "rollout",
    "run_folder",
    "algorithms",
    "update",
    "critic",
    "reference",
    "checkpoints",
    "monitoring",
    "hub",
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


# Private names

# What is read of libraries beyond their public interfaces outside `trl_hooks`, and of our own classes from outside
PRIVATE_NAMES_READ = {
    "config.checks": {"GRPOConfig._VALID_DICT_FIELDS"},  # `trl_hooks` comes after `config`
    "config.fields": {"args._passed", "args._begun_with"},  # of `ToolGRPOConfig`, defined there
    "models.quantized": {"bitsandbytes.functional._convert_weight_packed_for_cpu_inverse"},
    "reference.merged": {"holder._modules", "holder._parameters", "layer._caches"},  # of `nn.Module` and PEFT
    "report.tools": {"Call._fields"},  # of a named tuple
    "algorithms.batch_advantages": {"scored._asdict"},  # of a named tuple
    "sampling.choice": {"nn.modules.conv._ConvNd"},
    "sampling.packed_linear": {
        "torch.cpu._is_amx_tile_supported",
        "torch.ops.mkl._mkl_linear",
        "torch.ops.mkl._mkl_reorder_linear_weight",
        "torch.ops.mkldnn._linear_pointwise",
        "torch.ops.mkldnn._reorder_linear_weight",
    },
    "sampling.shared_prefix": {
        "torch.ops.aten._scaled_dot_product_efficient_attention",
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
    },
    "sampling.vllm.client": {"engine._connect"},  # by a constructor of its class
    "sampling.vllm.policy_weights": {"module._non_persistent_buffers_set"},  # of `nn.Module`
    "tools.mcp.connection": {"mcp.client._transport"},
    "tools.mcp.servers": {"asyncio._get_running_loop"},
    "tools.mcp.stdio": {"self._process._transport"},  # of asyncio
    "tools.python_sandbox.sandbox": {"sys._base_executable"},
    "tools.python_sandbox.sandbox_init": {"os._exit"},
    "tools.runtime.environments": {"scored_class._plain_class"},  # of a class made there
    "tools.runtime.supervisor": {"os._exit"},
}

# Private names of a library's class that a class derived from it reads through `self`
INHERITED = {
    "ToolGRPOParser": {"_actions", "_get_value", "_option_string_actions"},  # of argparse
    "ToolGRPOTrainer": {*OVERRIDDEN, *RELIED_ON},
    "_TolerantParser": set(RESPONSE_PARSER),
}

TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
CLASSES = {node.name: node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
HOOKS = [
    node for node in CLASSES["ToolGRPOTrainer"].body if isinstance(node, ast.FunctionDef) and node.name in OVERRIDDEN
]


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def is_own(node):
    """Whether an attribute is one of the object or class whose method reads it."""
    return ast.unparse(node.value) in ("self", "cls", "super()")


def private_names_read(tree):
    """Yield the private names of other objects and modules that a module names, as expressions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node):
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "attrgetter",
            "delattr",
            "getattr",
            "hasattr",
            "object",  # of `patch`
            "setattr",
            "temporary_attribute",
        ):
            for name in node.args[1:2]:
                owner = ast.unparse(node.args[0])
                if isinstance(name, ast.Constant) and is_private(str(name.value)) and owner not in ("self", "cls"):
                    yield f"{owner}.{name.value}"
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[-1], *(alias.name for alias in node.names)]
            if is_private(names[0]):
                yield node.module
            yield from (f"{node.module}.{name}" for name in names[1:] if is_private(name))


def defined_names(node):
    """Names that a class gives to its methods, and to attributes of itself and its objects."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(part.name)
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            found.add(part.id)
        elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and is_own(part):
            found.add(part.attr)
    bases = (ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases)
    return found.union(*(defined_names(CLASSES[base]) for base in bases if base in CLASSES))


def lines_of_code(function):
    """Number of lines that the body of a function takes, without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return len({line for statement in body for line in range(statement.lineno, statement.end_lineno + 1)})


@pytest.mark.parametrize("name", sorted(set(FILES) - {"trl_hooks"}))
def test_private_names_are_read_by_their_owner_alone(name):
    assert set(private_names_read(TREES[name])) == PRIVATE_NAMES_READ.get(name, set()), (
        "Give what is read a public name; private names of TRL, transformers and FSDP belong in `trl_hooks`."
    )


def test_hooks_of_libraries_are_known_in_one_module():
    assert not set(PRIVATE_NAMES_READ) - set(FILES)
    names = {name.split(".")[-1] for name in private_names_read(TREES["trl_hooks"])}
    assert {"_attn_implementation", "_coerce", "_dist", "_get_fsdp_state", "_log_metrics"} <= names


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_classes_define_what_they_read_of_themselves(name):
    read = {
        node.attr
        for node in ast.walk(CLASSES[name])
        if isinstance(node, ast.Attribute) and is_private(node.attr) and is_own(node)
    }
    assert read <= defined_names(CLASSES[name]) | INHERITED.get(name, set())


def test_names_of_classes_are_unique():
    names = [node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert len(names) == len(CLASSES), "`defined_names` finds bases by their names."


# The trainer


def test_one_class_is_a_trainer():
    bases = {name: [ast.unparse(base) for base in node.bases] for name, node in CLASSES.items()}
    derived = {name: base for name, found in bases.items() for base in found if base.endswith("Trainer")}
    assert derived == {"ToolGRPOTrainer": "GRPOTrainer"}
    ours = [kind for kind in trl_toolgrpo.ToolGRPOTrainer.__mro__ if kind.__module__.startswith(PACKAGE.name)]
    assert ours == [trl_toolgrpo.ToolGRPOTrainer] and trl_toolgrpo.ToolGRPOTrainer.__bases__ == (GRPOTrainer,)


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)
def test_hooks_hand_over_to_parts(hook):
    assert lines_of_code(hook) <= 24, f"ToolGRPOTrainer.{hook.name} does work that belongs in a part."


def test_all_hooks_are_counted():
    assert {hook.name for hook in HOOKS} == set(OVERRIDDEN)
    assert lines_of_code(ast.parse('def f():\n    """Doc."""\n    if a:\n\n        b()\n    c(\n    )').body[0]) == 5
