"""A YAML, flag or environment variable that cannot be read is refused in one line that says where it is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from trl import GRPOTrainer


ROOT = Path(__file__).parents[2]
from trl_toolgrpo import ConfigError, ToolGRPOConfig
from trl_toolgrpo.config.checks import TRL_CHOICES
from trl_toolgrpo.recipes import evaluate
from trl_toolgrpo.recipes.arguments import parse_arguments


ON_THIS_MACHINE = ["--bf16", "false", "--use_cpu", "true"]
GIVEN = yaml.safe_load((ROOT / "recipes" / "tiny_cpu.yaml").read_text())


def from_file(tmp_path, **changes):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**GIVEN, **changes}))
    return parse_arguments(["--config", str(path), "--output_dir", str(tmp_path), *ON_THIS_MACHINE], {})


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [
        ("task", "bfcll", "workspace, bfcl, mcp"),
        ("task", "works", "workspace, bfcl, mcp"),
        ("dtype", "float31", "auto, bfloat16, float16, float32"),
        ("dtype", 16, "auto, bfloat16, float16, float32"),
        ("lr_scheduler_type", None, "linear, cosine"),
        ("vllm_mode", "colocated", "colocate, server"),
        ("bnb_4bit_quant_type", "nf5", "fp4, nf4"),
        ("advantage_estimator", "gaee", "group, gae, group_gae"),
        ("force_level", "schemaa", "call, name, schema"),
        ("tool_mention_check", False, "auto, error, warn, off"),
        ("sampler_correction", "cut", "truncate, mask"),
        ("lr_scheduler_type", "liner", "linear, cosine"),
        ("log_level", "loud", "warning"),
        ("loss_type", "grppo", "grpo, bnpo"),
        ("scale_rewards", "grup", "group, batch, none"),
        ("importance_sampling_level", "tokens", "token, sequence"),
        ("multi_objective_aggregation", "sum", "sum_then_normalize"),
    ],
)
def test_a_choice_is_checked_in_a_file_and_on_the_command_line(tmp_path, name, value, choices):
    with pytest.raises(ConfigError, match=f"`{name}(` is |=)'?{value}.*Choose one of .*{choices}"):
        from_file(tmp_path, **{name: value})
    with pytest.raises(ConfigError, match=rf"(--{name}.*invalid choice: |{name}=|{name}.*)'?{value}"):
        parse_arguments([f"--{name}", str(value), *ON_THIS_MACHINE], {})


def test_an_unknown_key_or_flag_is_refused_with_its_place_and_the_closest_name(tmp_path):
    words = r"run\.yaml: there is no argument `learning_rat`. Did you mean learning_rate"
    with pytest.raises(ConfigError, match=words):
        from_file(tmp_path, learning_rat=1e-4)
    with pytest.raises(ConfigError, match=r"run\.yaml: there is no argument `zzzz`. See --help"):
        from_file(tmp_path, zzzz=1)
    for flags in (["--learning_rat", "1e-4"], ["--learning_rat=1e-4"]):
        words = r"On the command line, there is no argument --learning_rat\. Did you mean --learning_rate\?"
        with pytest.raises(ConfigError, match=words):
            parse_arguments([*flags, *ON_THIS_MACHINE], {})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_steps", "lots", "`max_steps` is 'lots': invalid int value"),
        ("max_steps", 1.5, "`max_steps` is 1.5. Write a whole number"),
        ("max_steps", [1], r"`max_steps` is \[1\]. Write a whole number"),
        ("learning_rate", True, "`learning_rate` is True. Write a number"),
        ("use_cpu", "maybe", "`use_cpu` is 'maybe': .*expected one of yes/no"),
        ("train_size", {"a": 1}, "`train_size` is {'a': 1}. Write a whole number"),
        ("chat_template_kwargs", "enable_thinking", "chat_template_kwargs='enable_thinking'.*a mapping"),
        ("model_init_kwargs", "[1]", "model_init_kwargs=.*a mapping"),
        ("generation_kwargs", [1], "`generation_kwargs` is .*a mapping"),
        ("accelerator_config", "nowhere", "accelerator_config='nowhere'.*a mapping.*path of a JSON file"),
        ("task", None, "`task` is None. Choose one of workspace, bfcl, mcp"),
        ("server_folder", None, "`server_folder` is None. Write text"),
        ("use_cpu", None, "`use_cpu` is None. Write true or false"),
        ("accelerator_config", {"split_batchs": True}, "AcceleratorConfig.* 'split_batchs'"),
        ("train_size", None, "`train_size` is None. Write a whole number"),
        ("force_rate", None, "`force_rate` is None. Write a number"),
        ("mcp_servers", "{bad", "mcp_servers='{bad'`, which is not JSON"),
    ],
)
def test_a_value_of_another_type_is_refused_with_one_line(tmp_path, name, value, words):
    with pytest.raises(ConfigError, match=words) as caught:
        from_file(tmp_path, **{name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    if name in ("max_steps", "use_cpu") and value is not None:
        with pytest.raises(ConfigError, match=f"On the command line, argument --{name}"):
            parse_arguments([f"--{name}", str(value), *ON_THIS_MACHINE], {})


def test_what_trls_parser_accepts_is_accepted(tmp_path):
    changes = {"lora_target_modules": "all-linear", "server_packages": "one", "max_steps": 3.0, "use_cpu": "yes"}
    recipe, training, model = from_file(tmp_path, **changes, sampler_correction=None, learning_rate="1e-4")
    assert model.lora_target_modules in ("all-linear", ["all-linear"]) and recipe.server_packages == ["one"]
    assert (training.learning_rate, training.sampler_correction, training.use_cpu) == (1e-4, None, True)
    assert type(from_file(tmp_path, train_size=20.0)[0].train_size) is int
    flags = ["--chat_template_kwargs", '{"enable_thinking": false}', "--learning-rate", "0.5", "--report_to", "none"]
    _, training, _ = parse_arguments([*flags, *ON_THIS_MACHINE], {"FORCE_RATE": "0.5"})
    assert training.chat_template_kwargs == {"enable_thinking": False}
    assert (training.learning_rate, training.force_rate) == (0.5, 0.5)


def test_a_broken_yaml_is_refused_by_name(tmp_path):
    for text, words in (
        ("a: [1", "is no YAML"),
        ("- a", "must contain a YAML mapping"),
        ("task: bfcl\nseed: 1\ntask: mcp", "`task` occurs 2 times"),
        ("on: 1", "there is no argument `on`"),
        ("5: 1", "there is no argument `5`"),
    ):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(ValueError, match=words):
            parse_arguments(["--config", str(tmp_path / "run.yaml")], {})
    for flags in (["--config", str(tmp_path / "none.yaml")], ["--config"]):
        with pytest.raises(ConfigError, match="Name a YAML"):
            parse_arguments(flags, {})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"num_generations": 3}, r"num_generations=3.*has 8 rollouts.*to one of 2, 4, 8.*a multiple of 3"),
        ({"max_steps": "lots"}, "max_steps='lots'`, which is text. Pass a whole number"),
        ({"force_rate": "0.5"}, "force_rate='0.5'`, which is text. Pass a number"),
        ({"deterministic_rollouts": "false"}, "which is text. Pass true or false"),
        ({"reward_weights": "1"}, "which is text. Pass a list"),
        ({"gradient_checkpointing_kwargs": "{bad"}, "Pass a mapping"),
        ({"lr_scheduler_kwargs": [1]}, "of type list. Pass a mapping"),
        ({"model_init_kwargs": 5}, "of type int. Pass a mapping"),
        ({"temperature": None}, "temperature=None`, which is of type NoneType. Pass a number"),
        ({"max_steps": None}, "Pass a whole number"),
        ({"force_rate": None}, "force_rate=None.*Pass a number"),
        ({"record_sample_logprobs": None}, "record_sample_logprobs=None.*Pass true or false"),
        ({"num_iterations": 0}, "num_iterations=0`; it must be at least 1"),
        ({"steps_per_generation": 0}, "steps_per_generation=0`; it must be at least 1"),
        ({"generation_batch_size": 0}, "generation_batch_size=0`; it must be at least 1"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps=-1`; it must be at least 1"),
        ({"chat_template_kwargs": "enable_thinking"}, "Pass a mapping"),
    ],
)
def test_a_configuration_in_python_is_checked_in_the_same_way(tmp_path, value, words):
    options = {"per_device_train_batch_size": 8, "num_generations": 4, "use_cpu": True, "bf16": False, **value}
    with pytest.raises(ConfigError, match=words):
        ToolGRPOConfig(str(tmp_path), **options)


def test_equivalent_values_are_accepted(tmp_path):
    import numpy

    config = ToolGRPOConfig(
        tmp_path, per_device_train_batch_size=numpy.int64(8), learning_rate=1, max_steps=3.0, use_cpu=1, bf16=False,
        lr_scheduler_kwargs="{}", run_name=3, num_generations=4.0, max_completion_length=16.0, seed=1.0,
        steps_per_generation=2.0, top_k=None, top_p=None, max_grad_norm=None,
    )  # fmt: skip
    assert config.lr_scheduler_kwargs == {} and config.generation_batch_size == 16
    whole = [getattr(config, name) for name in ("num_generations", "max_completion_length", "seed", "max_steps")]
    assert whole == [4, 16, 1, 3] and {type(value) for value in [*whole, config.generation_batch_size]} == {int}


def test_the_list_of_trls_choices_is_complete():
    import inspect

    tree = ast.parse(inspect.getsource(inspect.getmodule(GRPOTrainer)))
    compared = {name: set() for name in TRL_CHOICES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr in compared:
            texts = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
            compared[node.left.attr].update(texts)
    assert compared == {name: set(choices) for name, choices in TRL_CHOICES.items()}, "TRL reads other values"


def parsers():
    for path in sorted([*(ROOT / "trl_toolgrpo").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ArgumentParser"):
                yield pytest.param(node, id=path.name)


@pytest.mark.parametrize("call", parsers())
def test_no_command_line_takes_abbreviations(call):
    assert any(keyword.arg == "allow_abbrev" and keyword.value.value is False for keyword in call.keywords)


def test_an_abbreviation_is_refused(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_arguments(["--model", "tiny", "--temp", "0.5"])
    assert "--temp" in capsys.readouterr().err
    assert evaluate.parse_arguments(["--model", "tiny", "--temperature", "0.5"]).temperature == 0.5


def test_the_program_reports_a_wrong_flag_in_one_line():
    command = [sys.executable, "recipes/qwen3_tools.py", "--learning_rate", "fast"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    said = [line for line in ended.stderr.splitlines() if "learning_rate" in line]
    assert ended.returncode == 2 and len(said) == 1 and "invalid float value: 'fast'" in said[0]
    assert "usage" not in ended.stderr and "Traceback" not in ended.stderr
