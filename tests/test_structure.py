"""The house rules that a machine can check: imports go one way, public names are described."""

import ast
from pathlib import Path

import pytest

import trl_toolgrpo


PACKAGE = Path(trl_toolgrpo.__file__).parent

# A module imports only from modules before it. The stages: records, tools, rollout, diagnostics and checks, trainer.
ORDER = [
    "version",
    "errors",
    "types",
    "redaction",
    "batch_position",
    "model_settings",
    "config_checks",
    "config",
    "config_parser",
    "rounding",
    "lm_head",
    "tools.schema_forms",
    "tools.types",
    "record_faults",
    "trajectory",
    "tools.results",
    "tools.arguments",
    "tools.functions",
    "tools.prompt",
    "tools.loops",
    "tools.guard",
    "tools.worker",
    "tools.processes",
    "tools.mcp_config",
    "tools.mcp_names",
    "tools.mcp_results",
    "tools.mcp_stdio",
    "tools.mcp_connection",
    "tools.mcp_pool",
    "tools.mcp_session",
    "tools.owners",
    "tools.attempts",
    "tools.mcp",
    "tools.execute",
    "tools.environments",
    "tools.toolset",
    "tools.sandbox_init",
    "tools.sandbox",
    "tools.python",
    "tools",
    "rollout.prompt_messages",
    "rollout.response_templates",
    "rollout.call_notation",
    "rollout.parsing",
    "rollout.control_tokens",
    "rollout.chat",
    "rollout.call_grammar",
    "rollout.noise",
    "rollout.sampler",
    "rollout.constraint",
    "rollout.forcing",
    "rollout.shared_prefix",
    "rollout.packed_linear",
    "rollout.rotary",
    "rollout.model_sampler",
    "rollout.generate_sampler",
    "rollout.backends",
    "rollout.policy_file",
    "rollout.vllm_sampler",
    "rollout.vllm_worker",
    "rollout.vllm_engine",
    "rollout.server_token",
    "rollout.vllm_client",
    "rollout.loop",
    "rollout.budget",
    "rollout.engine",
    "rollout",
    "serve",
    "run_files",
    "run_lock",
    "rollout_tensors",
    "rollout_log",
    "storage_failures",
    "checkpoint",
    "output_folder",
    "sharding",
    "quantized",
    "memory",
    "advantages",
    "value",
    "losses",
    "ratio_statistics",
    "diagnostics",
    "logprob_check",
    "packed_attention",
    "scoring",
    "scoring_trial",
    "correction",
    "shown_in_prompts",
    "prompt_renderer",
    "prompt_checks",
    "inert_prompts",
    "data_checks",
    "policy_checks",
    "template_checks",
    "reference_checks",
    "tool_mentions",
    "reward_checks",
    "progress",
    "log_failures",
    "completions_table",
    "run_log",
    "health",
    "health_updates",
    "health_rollouts",
    "health_watch",
    "live",
    "replay",
    "rollout_tools",
    "assist",
    "critic",
    "reference",
    "identity",
    "merged",
    "sync",
    "grouping",
    "deterministic",
    "given_rollouts",
    "curve_noise",
    "model_card",
    "hub",
    "resume",
    "report.rollouts",
    "report.folder",
    "report.tools",
    "report.vocabulary",
    "report.page_data",
    "report.curves",
    "report.verdict",
    "report.tables",
    "report.page",
    "report.__main__",
    "report",
    "doctor.findings",
    "doctor.surroundings",
    "doctor.script",
    "doctor.chat_questions",
    "doctor.data_questions",
    "doctor.trial",
    "doctor.examination",
    "doctor.__main__",
    "doctor",
    "vllm_rollouts",
    "trainer",
    "",
]


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(name, path):
    """Modules of this package that a module imports, anywhere in it, by their name in `FILES`."""
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


def test_every_module_has_a_place():
    assert sorted(ORDER) == sorted(FILES), "A module was added or removed: give it a place in ORDER."


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_go_one_way(name):
    found = set(imported(name, FILES[name]))
    assert found <= set(FILES)
    for other in found:
        assert ORDER.index(other) < ORDER.index(name), (
            f"`{name or '__init__'}` imports `{other}`, which is to its right."
        )


def test_the_check_of_imports_sees_them():
    assert {"errors", "config", "tools.types", "trainer", "trajectory", "version"} <= set(imported("", FILES[""]))
    assert "tools.execute" in set(imported("rollout.loop", FILES["rollout.loop"]))
    assert "tools.types" in set(imported("tools.execute", FILES["tools.execute"]))


def test_only_the_trainer_wires_stages_together():
    for name in FILES:
        if name not in ("trainer", ""):
            assert "trainer" not in set(imported(name, FILES[name]))
    for name in ("errors", "version"):
        assert not set(imported(name, FILES[name])), f"`{name}` imports nothing of the package."


@pytest.mark.parametrize("name", sorted(FILES))
def test_modules_say_what_they_own(name):
    text = FILES[name].read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{FILES[name]} has no docstring."


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
def test_no_module_is_a_drawer(word):
    assert not [name for name in FILES if word in name.split(".")[-1]]
