"""The recipes: every shipped configuration is read as a user's would be, and the tiny model is what it says."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml


RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))

import qwen3_tools
from qwen3_tools import checkpoint_to_resume, flags_that_keep_batches, parse_arguments, read_switches
from scoreboard import Rates, Scoreboard
from tiny_model import TinyModel, build_tiny_model
from warm_start import WarmStart
from workspace import build_workspace

from trl_toolgrpo import ToolGRPOConfig


ON_THIS_MACHINE = ["--bf16", "false", "--use_cpu", "true"]


def parse(tmp_path, *arguments, environment=None):
    return parse_arguments([*arguments, "--output_dir", str(tmp_path)], environment or {})


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_is_read(path, tmp_path):
    recipe, training, model = parse(tmp_path, "--config", str(path), *ON_THIS_MACHINE)
    given = yaml.safe_load(path.read_text())
    found = {**vars(recipe), **vars(model), **vars(training)}
    for name in given:
        assert name in found, f"{path.name} sets {name}, which no argument reads"
    assert isinstance(training, ToolGRPOConfig)
    assert recipe.task in ("workspace", "bfcl", "mcp") and model.model_name_or_path == given["model_name_or_path"]


@pytest.mark.parametrize("path", sorted((RECIPES.parent / "accelerate_configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_launch_configuration_is_read(path):
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(path))
    assert found.num_machines == (2 if path.name == "two_machines.yaml" else 1)
    assert found.num_processes >= found.num_machines
    kinds = {"cpu": "NO", "single_gpu": "NO", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}
    kind = kinds.get(path.stem.partition("_zero")[0], "MULTI_GPU")
    assert found.distributed_type == kind and found.use_cpu == (path.stem == "cpu")


def test_the_tiny_recipe_is_the_default_and_flags_win(tmp_path):
    recipe, training, model = parse(tmp_path)
    assert recipe.task == "workspace" and model.model_name_or_path == "tiny"
    given = yaml.safe_load((RECIPES / "tiny_cpu.yaml").read_text())
    assert training.max_steps == given["max_steps"] and training.learning_rate == given["learning_rate"]
    _, training, _ = parse(tmp_path, "--max_steps", "3", "--learning_rate", "0.5")
    assert training.max_steps == 3 and training.learning_rate == 0.5


def test_environment_variables_set_fields_and_flags_win(tmp_path):
    environment = {
        "PPO_RECORD_AT_SAMPLE": "0",
        "STRICT_TRAJ_KEYS": "false",
        "RL_DISABLE_FORCED": "0",
        "FORCE_RATE": "0.25",
        "ASSIST_WARMUP": "2",
    }
    assert read_switches(environment) == {
        "record_sample_logprobs": False,
        "strict_trajectories": False,
        "disable_forcing_in_updates": False,
        "force_rate": 0.25,
        "assist_warmup_steps": 2,
    }
    _, training, _ = parse(tmp_path, environment={"STRICT_TRAJ_KEYS": "0", "FORCE_RATE": "0.8"})
    assert training.strict_trajectories is False and training.force_rate == 0.8
    _, training, _ = parse(tmp_path, "--strict_trajectories", "true", environment={"STRICT_TRAJ_KEYS": "0"})
    assert training.strict_trajectories is True


@pytest.mark.parametrize("variable", ["PPO_RECORD_AT_SAMPLE", "FORCE_RATE", "ASSIST_WARMUP"])
def test_an_environment_variable_without_sense_is_refused(variable):
    with pytest.raises(ValueError, match=f"{variable} is 'perhaps'"):
        read_switches({variable: "perhaps"})


@pytest.mark.parametrize("given", ["true", "True", "false", None])
def test_resuming_starts_from_the_beginning_where_there_is_no_checkpoint(tmp_path, capsys, given):
    flags = [] if given is None else ["--resume_from_checkpoint", given]
    _, training, _ = parse(tmp_path, *flags)
    assert checkpoint_to_resume(training) is None
    said = f"No checkpoint in {tmp_path} yet: starting from the beginning.\n" if given in ("true", "True") else ""
    assert capsys.readouterr().out == said


def test_resuming_takes_the_newest_checkpoint_and_what_was_known_of_the_start(tmp_path, capsys):
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
    _, training, _ = parse(tmp_path, "--resume_from_checkpoint", "true")
    assert checkpoint_to_resume(training) == str(tmp_path / "checkpoint-10")
    assert f"Resuming from {tmp_path / 'checkpoint-10'}." in capsys.readouterr().out
    _, training, _ = parse(tmp_path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-2"))
    assert checkpoint_to_resume(training) == str(tmp_path / "checkpoint-2")
    first, again = Scoreboard(SimpleNamespace(judge=None)), Scoreboard(SimpleNamespace(judge=None))
    first.evaluations.append(Rates(0.5, {1: 0.75, 2: 0.25}, 1.0, 0))
    first.on_save(training, SimpleNamespace(is_world_process_zero=True, global_step=2), None)
    assert again.recall(tmp_path / "checkpoint-2") and again.evaluations == first.evaluations
    assert not Scoreboard(SimpleNamespace(judge=None)).recall(tmp_path / "checkpoint-10")


def test_a_run_of_two_processes_is_gone_on_from_with_one(tmp_path, capsys):
    _, training, _ = parse(tmp_path)
    stored = {"batch": {"generation_batch_size": 2 * training.generation_batch_size}, "layout": {
        "processes": 2, "steps_per_generation": 1, "gradient_accumulation_steps": 1,
    }}  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(stored))
    flags = flags_that_keep_batches(str(tmp_path), training)
    assert f"Rollout batches stay as they are in {tmp_path}: {' '.join(flags)}" in capsys.readouterr().out
    _, changed, _ = parse(tmp_path, *flags)
    assert changed.generation_batch_size == 2 * training.generation_batch_size
    assert changed.gradient_accumulation_steps == changed.steps_per_generation == 2
    assert flags_that_keep_batches(str(tmp_path), changed) == flags_that_keep_batches(None, training) == []


def test_the_main_process_looks_for_the_checkpoint_to_resume(monkeypatch):
    training = SimpleNamespace(resume_from_checkpoint="true", process_index=1, output_dir="nowhere")
    monkeypatch.setattr(qwen3_tools, "find_checkpoint", lambda folder: 1 / 0)
    monkeypatch.setattr(qwen3_tools, "broadcast_object_list", lambda found: ["checkpoint-7"])
    assert checkpoint_to_resume(training) == "checkpoint-7"


def test_the_tiny_model_is_built_alike_and_kept(tmp_path):
    settings = TinyModel(warm_start=WarmStart(demonstrations=40, steps=2, tools_every=2, batch_size=4))
    first, second = (build_tiny_model(tmp_path / name, settings) for name in ("a", "b"))
    assert (first / "tokenizer.json").read_text() == (second / "tokenizer.json").read_text()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (first, second))
    for name, parameter in one.state_dict().items():
        assert torch.equal(parameter, other.state_dict()[name]), name
    tokenizer = AutoTokenizer.from_pretrained(first)
    messages = build_workspace(1, 0, 0).train[0]["prompt"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    written = (first / "model.safetensors").stat().st_mtime_ns
    build_tiny_model(first, settings)
    assert (first / "model.safetensors").stat().st_mtime_ns == written
