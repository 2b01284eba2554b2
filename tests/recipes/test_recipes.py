"""The recipes: every shipped configuration can be read, runs are resumed, and the tiny model is reproducible."""

import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import TrainerState


RECIPES = Path(__file__).parents[2] / "recipes"
from trl_toolgrpo import CheckpointSaveError, OutputFolderInUseError, ToolGRPOConfig, check_output_dir
from trl_toolgrpo.checkpoints.folder import check_writable
from trl_toolgrpo.recipes import qwen3_tools, resuming
from trl_toolgrpo.recipes.arguments import parse_arguments, read_switches
from trl_toolgrpo.recipes.evaluation import scoreboard
from trl_toolgrpo.recipes.evaluation.results import RunSettings
from trl_toolgrpo.recipes.evaluation.scoreboard import Rates, Scoreboard
from trl_toolgrpo.recipes.models.tiny_qwen3 import TinyModel, build_tiny_model
from trl_toolgrpo.recipes.models.warm_start import WarmStart
from trl_toolgrpo.recipes.resuming import checkpoint_to_resume, flags_that_keep_batches
from trl_toolgrpo.recipes.task import Verdict
from trl_toolgrpo.recipes.workspace.task import build_workspace
from trl_toolgrpo.run_folder import storage_failures
from trl_toolgrpo.run_folder.lock import take_lock


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
def test_an_environment_variable_of_another_type_is_refused(variable):
    with pytest.raises(ValueError, match=f"{variable} is 'perhaps'"):
        read_switches({variable: "perhaps"})


@pytest.mark.parametrize("given", ["true", "True", "false", None])
def test_resuming_starts_from_the_beginning_where_there_is_no_checkpoint(tmp_path, capsys, given):
    flags = [] if given is None else ["--resume_from_checkpoint", given]
    _, training, _ = parse(tmp_path, *flags)
    assert checkpoint_to_resume(training) is None
    said = f"No checkpoint in {tmp_path} yet: starting from the beginning.\n" if given in ("true", "True") else ""
    assert capsys.readouterr().out == said


def test_resuming_takes_the_newest_checkpoint(tmp_path, capsys):
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
    _, training, _ = parse(tmp_path, "--resume_from_checkpoint", "true")
    assert checkpoint_to_resume(training) == str(tmp_path / "checkpoint-10")
    assert f"Resuming from {tmp_path / 'checkpoint-10'}." in capsys.readouterr().out
    _, training, _ = parse(tmp_path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-2"))
    assert checkpoint_to_resume(training) == str(tmp_path / "checkpoint-2")


def board():
    return Scoreboard(SimpleNamespace(judge=None))


def evaluate(scoreboard, folder, step, *right, main_process=True):
    """Record an evaluation of one question for each value of `right`, of difficulty 1, 2 and so on."""
    scoreboard._held_out = [(f"q{n}", n, Verdict(good, float(good), True)) for n, good in enumerate(right, 1)]
    state = TrainerState(global_step=step, is_world_process_zero=main_process)
    scoreboard.on_evaluate(SimpleNamespace(output_dir=folder), state, None)


def begin(scoreboard, folder, step=0):
    scoreboard.on_train_begin(SimpleNamespace(output_dir=folder), TrainerState(global_step=step), None)


def test_a_resumed_run_knows_the_rates_up_to_its_checkpoint(tmp_path):
    first = board()
    begin(first, tmp_path)
    for step, right in ((0, [True, False]), (4, [True, True]), (8, [False, True])):
        evaluate(first, tmp_path, step, *right)
    known = [Rates(0.5, {1: 1.0, 2: 0.0}, 1.0, 0), Rates(1.0, {1: 1.0, 2: 1.0}, 1.0, 4)]
    assert first.evaluations == [*known, Rates(0.5, {1: 0.0, 2: 1.0}, 1.0, 8)]
    (tmp_path / "checkpoint-6").mkdir()
    resumed = board()
    assert resumed.recall(tmp_path / "checkpoint-6") and resumed.evaluations == known
    begin(resumed, tmp_path / "checkpoint-6", step=6)  # an output folder of its own
    elsewhere = board()
    assert elsewhere.recall(tmp_path / "checkpoint-6" / "checkpoint-7") and elsewhere.evaluations == known
    assert not list((tmp_path / "checkpoint-6").glob("*.unfinished"))


def test_a_kill_while_writing_the_rates_keeps_the_previous_ones(tmp_path, monkeypatch):
    first, resumed = board(), board()
    evaluate(first, tmp_path, 0, True)

    def killed(self, text, **kwargs):
        with open(self, "w") as stream:
            stream.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", killed)
        evaluate(first, tmp_path, 4, True)
    assert resumed.recall(tmp_path / "checkpoint-4") and resumed.evaluations == first.evaluations[:1]


@pytest.mark.parametrize("text", [None, '[{"overall": 0.5, "by_diff', "null", "[3]", '[{"overall": 0.5}]'])
def test_missing_or_torn_rates_are_ignored_with_a_warning(tmp_path, caplog, text):
    if text is not None:
        (tmp_path / scoreboard.EVALUATIONS).write_text(text)
    resumed = board()
    assert not resumed.recall(tmp_path / "checkpoint-4") and resumed.evaluations == []
    assert f"The rates before {tmp_path / 'checkpoint-4'} are not known" in caplog.text


def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left")

    first, resumed = board(), board()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", refuse)
        evaluate(first, tmp_path, 0, True)
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert "could not be saved" in caplog.text and "No space left" in caplog.text
    evaluate(first, tmp_path, 4, True)  # the disk has room again
    assert resumed.recall(tmp_path / "checkpoint-4") and resumed.evaluations == first.evaluations
    evaluate(board(), tmp_path / "other", 0, True, main_process=False)
    assert not (tmp_path / "other").exists() and len(caplog.records) == 1
    monkeypatch.setattr(Path, "write_text", refuse)
    begin(resumed, tmp_path, step=4)
    assert board().recall(tmp_path / "checkpoint-4")
    begin(board(), tmp_path)
    assert not board().recall(tmp_path / "checkpoint-4")  # the new run has none


def test_rates_of_an_earlier_run_stay_with_its_checkpoints(tmp_path):
    for number, right in ((1, True), (2, False)):
        evaluate(board(), tmp_path, 0, right)
        (tmp_path / f"earlier-run-{number}").mkdir()  # as the trainer does when the next run begins
        begin(board(), tmp_path)
        os.utime(tmp_path / f"earlier-run-{number}", (number, number))  # long ago
        assert not board().recall(tmp_path / "checkpoint-4")
    evaluate(board(), tmp_path, 0, True)
    begin(board(), tmp_path)  # after a run that left no checkpoint
    assert not board().recall(tmp_path / "checkpoint-4")
    for number, rate in ((1, 1.0), (2, 0.0)):
        earlier = board()
        assert earlier.recall(tmp_path / f"earlier-run-{number}" / "checkpoint-4")
        assert [rates.overall for rates in earlier.evaluations] == [rate]


def test_the_main_process_reads_the_rates_for_all_processes(tmp_path, monkeypatch):
    known = [Rates(0.5, {1: 0.5}, 1.0)]
    monkeypatch.setattr(scoreboard, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    monkeypatch.setattr(scoreboard, "broadcast_object_list", lambda found: [known] if found == [None] else found)
    evaluate(board(), tmp_path, 0, True)
    resumed = board()
    assert resumed.recall(tmp_path / "checkpoint-4") and resumed.evaluations == known


def test_an_unwritable_output_folder_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setattr(qwen3_tools, "build_task", lambda *_: pytest.fail("the run has begun"))
    monkeypatch.setattr(sys, "argv", ["qwen3_tools.py", "--output_dir", str(tmp_path / "taken"), *ON_THIS_MACHINE])
    words = r"Nothing can be written to .*taken\): .* Pass an `output_dir` that can be written to"
    with pytest.raises(CheckpointSaveError, match=words):
        qwen3_tools.main()
    check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    monkeypatch.setattr(storage_failures, "gather_object", lambda found: [CheckpointSaveError("Read-only"), *found])
    with pytest.raises(CheckpointSaveError, match=r"^Read-only$"):  # what the main process has met with
        check_output_dir(SimpleNamespace(output_dir=tmp_path / "new", process_index=1))


def test_an_output_folder_in_use_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(qwen3_tools, "build_task", lambda *_: pytest.fail("the run has begun"))
    monkeypatch.setattr(sys, "argv", ["qwen3_tools.py", "--output_dir", str(tmp_path), *ON_THIS_MACHINE])
    with take_lock(tmp_path), pytest.raises(OutputFolderInUseError, match=r"Wait for it to end, or end it"):
        qwen3_tools.main()
    assert list(tmp_path.iterdir()) == []


def test_settings_of_an_earlier_run_move_with_its_files(tmp_path):
    for number, task in ((1, "mcp"), (2, "bfcl")):
        current = board()
        current.settings = RunSettings(task=task)
        begin(current, tmp_path)
        assert RunSettings.load(tmp_path).task == task
        (tmp_path / f"earlier-run-{number}").mkdir()  # as the trainer does when the next run begins
    begin(board(), tmp_path)
    found = [RunSettings.load(tmp_path / f"earlier-run-{number}" / "checkpoint-4").task for number in (1, 2)]
    assert found == ["mcp", "bfcl"]


def test_a_run_of_two_processes_is_resumed_with_one(tmp_path, capsys):
    _, training, _ = parse(tmp_path)
    stored = {"batch": {"generation_batch_size": 2 * training.generation_batch_size}, "layout": {
        "processes": 2, "steps_per_generation": 1, "gradient_accumulation_steps": 1,
    }}  # fmt: skip
    (tmp_path / "run_identity.json").write_text(json.dumps(stored))
    flags = flags_that_keep_batches(str(tmp_path), training)
    assert f"These flags keep the rollout batches of {tmp_path}: {' '.join(flags)}" in capsys.readouterr().out
    _, changed, _ = parse(tmp_path, *flags)
    assert changed.generation_batch_size == 2 * training.generation_batch_size
    assert changed.gradient_accumulation_steps == changed.steps_per_generation == 2
    assert flags_that_keep_batches(str(tmp_path), changed) == flags_that_keep_batches(None, training) == []
    assert flags_that_keep_batches(str(tmp_path), training, ["--per_device_train_batch_size=64"]) == []  # a flag wins
    (tmp_path / "run_identity.json").write_text('{"batch"')
    assert flags_that_keep_batches(str(tmp_path), training) == []  # torn, which the trainer reports when it resumes


def test_the_main_process_looks_for_the_checkpoint_to_resume(monkeypatch):
    training = SimpleNamespace(resume_from_checkpoint="true", process_index=1, output_dir="nowhere")
    monkeypatch.setattr(resuming, "find_checkpoint", lambda folder: 1 / 0)
    monkeypatch.setattr(resuming, "broadcast_object_list", lambda found: ["checkpoint-7"])
    assert checkpoint_to_resume(training) == "checkpoint-7"


def test_the_tiny_model_is_reproducible_and_kept(tmp_path):
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
