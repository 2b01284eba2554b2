"""The commands on the pages: each names files, flags and extras that exist, and is run here or by a named test."""

import ast
import configparser
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
import trl_toolgrpo
from trl_toolgrpo import ConfigError, serve
from trl_toolgrpo.doctor import __main__ as doctor
from trl_toolgrpo.memory import memory_table
from trl_toolgrpo.recipes import qwen3_tools
from trl_toolgrpo.recipes.evaluation import curves
from trl_toolgrpo.recipes.models import tiny_qwen3 as tiny_model
from trl_toolgrpo.recipes.models.warm_start import WarmStart
from trl_toolgrpo.report import __main__ as report


PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "recipes").glob("*.md")),
]
ON_THIS_MACHINE = ["--bf16", "false", "--use_cpu", "true"]

# Programs that take too long for these tests, each with the file and the test that run the same code
RUN_BY = {
    "tests/benchmarks/rollout.py": ("test_benchmarks.py", "test_a_benchmark_measures_both_sides"),
    "tests/benchmarks/step.py": ("test_benchmarks.py", "test_a_benchmark_measures_both_sides"),
    "tests/benchmarks/gpu.py": ("test_gpu_benchmark.py", "test_the_dry_run_passes_within_a_minute_of_two_cores"),
    "tests/benchmarks/gpu_wheels.py": ("test_gpu_benchmark.py", "test_weights_travel_in_pieces_and_are_converted"),
    "tests/benchmarks/health_runs.py": ("test_health_runs.py", "test_the_command_says_what_it_finds"),
    "tests/benchmarks/hostile_python.py": ("test_commands.py", "test_the_trial_of_hostile_code_runs"),
    "tests/benchmarks/kills.py": ("test_resume.py", "test_a_run_that_is_killed_again_and_again_is_the_same"),
    "tests/benchmarks/report.py": ("test_commands.py", "test_the_benchmark_of_the_report_runs"),
    "recipes/evaluate.py": ("test_evaluate.py", "test_the_command_line"),
    "recipes/mcp_company/servers.py": (
        "test_mcp_task.py", "test_a_failed_install_is_an_error_that_quotes_pip",
    ),
    "recipes/models/smollm2.py": (
        "test_real_model.py", "test_twenty_steps_at_trls_defaults_end_without_an_error_a_fallback_or_an_alarm",
    ),
}  # fmt: skip


def runs(script, file, test):
    """Return whether a test, with its fixtures and helpers, uses a script: by import, or by its file's name."""
    (path,) = (ROOT / "tests").rglob(file)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    stem = Path(script).stem
    names_of_script = {stem, "trl_toolgrpo." + script.removesuffix(".py").replace("/", ".")}
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if names_of_script & {alias.name if isinstance(node, ast.Import) else node.module, import_path(node, alias)}
    }
    looked_at, names = set(), {test}
    while names - looked_at:
        looked_at |= names
        names = {used for name in names for part in defined_as(tree, name) for used in uses(part)}
    return bool(looked_at & (imported | {f"{stem}.py"})) and bool(defined_as(tree, test))


def import_path(node, alias):
    """Return the dotted name that an `import` or a `from ... import` binds."""
    return alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}"


def defined_as(tree, name):
    """Return the definitions of a name in a module."""
    found = [node for node in tree.body if getattr(node, "name", None) == name]
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    return found + [node for node in assigned if name in {getattr(target, "id", None) for target in node.targets}]


def uses(node):
    """Yield the names in a piece of code, those of its arguments, and those of files in its strings."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield Path(part.value).name
        elif isinstance(part, (ast.Name, ast.arg)):
            yield part.id if isinstance(part, ast.Name) else part.arg


@pytest.mark.parametrize("script", RUN_BY)
def test_a_long_program_is_run_by_the_test_that_is_named(script):
    assert (ROOT / script).is_file()
    assert runs(script, *RUN_BY[script]), f"{RUN_BY[script]} does not run {script}."


def test_a_test_of_another_program_is_not_accepted():
    assert not runs("tests/benchmarks/report.py", "test_report_browser.py", "test_verdict_curves_and_tools_are_there")
    assert not runs("recipes/models/smollm2.py", "test_bfcl.py", "test_commands_are_found")
    assert not runs("tests/benchmarks/kills.py", "test_resume.py", "test_no_such_test")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def typed():
    """Yield every command of a page in a bash block or between backticks."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        inline = re.findall(r"`((?:python|pip|accelerate|apt-get|pytest)\s[^`]+|--\w+ [^`]+)`", prose)
        for line in (*lines, *(" ".join(command.split()) for command in inline)):
            for command in line.split(" && "):
                yield pytest.param(command, id=f"{page.name}: {command[:60]}")


COMMANDS = list(typed())


def test_commands_are_found():
    found = [command.values[0] for command in COMMANDS]
    assert len(found) > 20
    for start in ("python3 -m venv", "accelerate launch", ".venv/bin/python -m pytest", "--resume_from_checkpoint"):
        assert any(command.startswith(start) for command in found), start


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_what_exists(command, tmp_path):
    words = shlex.split(command.replace("<output_dir>", str(tmp_path)))
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]  # environment variables of the command
    words[0] = re.sub(r"^\.venv(-vllm)?/bin/", "", words[0]).replace("python3", "python")
    if words[0].startswith("--"):
        assert qwen3_tools.parse_arguments([*words, *ON_THIS_MACHINE], {})
    elif words[:2] == ["accelerate", "launch"]:
        assert words[2] == "--config_file" and (ROOT / words[3]).is_file() and (ROOT / words[4]).is_file()
        assert words[4] == "recipes/qwen3_tools.py"
        config = words.index("--config") + 1
        words[config] = str(ROOT / words[config])
        assert qwen3_tools.parse_arguments([*words[5:], *ON_THIS_MACHINE], {})
    elif words[0] == "pip":
        check_install(words)
    elif words[:2] == ["python", "-c"]:
        exec(words[2], {})
    elif words[:2] == ["python", "-m"]:
        check_module(words[2], words[3:])
    elif words[0] == "python" and words[1].endswith(".py"):
        check_script(words)
    elif words[0] == "ruff":
        assert words[1] == "check" and all((ROOT / path).is_dir() for path in words[2:])
    else:
        assert words[0] in ("apt-get", "mypy")


def check_module(name, words):
    """Check that a program of the package accepts these arguments."""
    if name == "trl_toolgrpo.report":
        assert report.parse_arguments(words)
    elif name == "trl_toolgrpo.doctor":
        given, _ = doctor.parse_arguments(words)
        assert given.config.name == "my_run.yaml" or (ROOT / given.config).is_file()
    elif name == "trl_toolgrpo.serve":
        assert serve.parse_arguments(words).model
    elif name == "trl_toolgrpo.memory":
        assert words == [] and "Qwen3-0.6B" in memory_table()
    elif name == "pytest":
        assert words in ([], ["-m", "vllm", "-n", "0"], ["-m", "long"])
    elif name.startswith("trl_toolgrpo.recipes."):
        check_script(["python", f"{name.removeprefix('trl_toolgrpo.').replace('.', '/')}.py", *words])
    else:
        assert name == "venv" and len(words) == 1


def check_install(words):
    """Check that requirement files and extras exist."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert words[1] == "install" or words[1:] == ["uninstall", "-y", "triton"]
    if "-r" in words:
        assert (ROOT / words[words.index("-r") + 1]).is_file()
    for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
        assert extra in setup["options.extras_require"]


def check_script(words):
    """Check that a script exists, has each flag, and is run by a test in `RUN_BY` or in this file."""
    text = (ROOT / words[1]).read_text(encoding="utf-8")
    for flag in (word for word in words[2:] if word.startswith("--")):
        assert f'"{flag}"' in text
    assert words[1] in ("recipes/evaluation/curves.py", "recipes/qwen3_tools.py", *RUN_BY)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_parse_and_name_what_exists(page):
    import inspect

    fields = set(inspect.signature(trl_toolgrpo.ToolGRPOConfig).parameters)
    arguments = set(inspect.signature(trl_toolgrpo.ToolGRPOTrainer).parameters)
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "trl_toolgrpo":
                assert {alias.name for alias in node.names} <= set(trl_toolgrpo.__all__)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                known = {"ToolGRPOConfig": fields, "ToolGRPOTrainer": arguments}.get(node.func.id)
                assert known is None or {keyword.arg for keyword in node.keywords} <= known


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for name, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not anchor or anchor in anchors(target), f"{name}#{anchor}"


@pytest.mark.slow
def test_a_recipe_runs_and_gives_a_report_and_a_curve(tmp_path, monkeypatch, capsys):
    untrained = tiny_model.TinyModel(warm_start=WarmStart(demonstrations=60, steps=1))
    model = tiny_model.build_tiny_model(tmp_path / "tiny", untrained)
    out = tmp_path / "out"
    sizes = ["--train_size", "8", "--held_out_size", "4", "--per_device_train_batch_size", "8"]
    limits = ["--max_steps", "1", "--max_completion_length", "24", "--logging_steps", "1"]
    where = ["--output_dir", str(out), "--model_name_or_path", str(model), *ON_THIS_MACHINE]
    monkeypatch.setattr(sys, "argv", ["qwen3_tools.py", *sizes, *limits, *where])
    qwen3_tools.main()
    assert "held-out success: " in capsys.readouterr().out.strip().splitlines()[-1]
    assert report.main([str(out)]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert 'data-metric="reward"' in page and "Steps 0 to 1 are logged" in page
    monkeypatch.setattr(
        sys, "argv", ["curves.py", f"run={out}", "--metrics", "success", "--out", str(tmp_path / "a.svg")]
    )
    curves.main()
    assert (tmp_path / "a.svg").stat().st_size > 1000
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert {"ratio/mean", "forced/fraction"} <= set(history[1])


def test_the_trial_of_hostile_code_runs(monkeypatch, capsys):
    """It runs a few of its snippets, and one that is reported as not contained."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    import hostile_python

    found, few = hostile_python.snippets(), ["environment-0", "home-0", "flood-0"]
    monkeypatch.setattr(hostile_python, "snippets", lambda: {name: found[name] for name in few})
    monkeypatch.setattr(sys, "argv", ["hostile_python.py"])
    try:
        hostile_python.main()
    except ConfigError as error:
        pytest.skip(str(error))
    except SystemExit as ended:
        assert ended.code == 0
    assert "3 of 3 contained" in capsys.readouterr().out
    monkeypatch.setattr(hostile_python.Machine, "damage", lambda *args: ["it came out"])
    with pytest.raises(SystemExit) as ended:
        hostile_python.main()
    assert ended.value.code == 1 and "0 of 3 contained" in capsys.readouterr().out


@pytest.mark.slow
def test_the_benchmark_of_the_report_runs(monkeypatch, capsys):
    script = ROOT / "tests" / "benchmarks" / "report.py"
    monkeypatch.setattr(sys, "argv", ["report.py", "--rollouts", "16", "--repeats", "1"])
    runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    assert re.search(r"^16 rollouts, [\d.]+ MB of rollout log$", said, re.MULTILINE)
    assert "MB, 16 rollouts" in said and re.search(r"built in [\d.]+ s", said)
    assert "first paint" in said or "no browser was found" in said
