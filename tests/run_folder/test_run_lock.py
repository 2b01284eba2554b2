"""One output folder, one run: who holds it, and what happens to the files of an earlier run there."""

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import chat_tokenizer, config, prompts, tiny_model, wait_until
from huggingface_hub import HfApi
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_toolgrpo import CheckpointSaveError, OutputFolderInUseError, ToolGRPOTrainer, find_checkpoint, read_rollouts
from trl_toolgrpo.checkpoints.folder import fault_of
from trl_toolgrpo.report.__main__ import main as report
from trl_toolgrpo.run_folder.files import read_lines
from trl_toolgrpo.run_folder.lock import LOCK, job_id, take_lock


HERE = Path(__file__).parents[1]
TOKENIZER = chat_tokenizer("qwen3_instruct_2507")


def reward(completion_ids, **kwargs):
    return [float((7 * len(ids) + sum(ids)) % 11) for ids in completion_ids]


def start(path, callbacks=None, lora=None, **changes):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "max_completion_length": 8, **changes}
    return ToolGRPOTrainer(
        tiny_model(TOKENIZER), reward, config(path, **options), prompts(5), processing_class=TOKENIZER,
        callbacks=callbacks, peft_config=lora,
    )  # fmt: skip


class At(TrainerCallback):
    """Calls a function at the end of the first step."""

    def __init__(self, call):
        self.call = call

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.call()


def contents(folder):
    """Every file in a folder with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK and "earlier-run" not in str(path.relative_to(folder))
    }


# Who holds it


@pytest.fixture
def live_run(tmp_path):
    """A run of another process, which waits in its second step; the process."""
    (tmp_path / "wait").touch()
    command = [sys.executable, str(HERE / "run_lock_processes.py"), str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        for line in process.stdout:
            if "under way" in line:
                break
        yield process
        process.kill()


def test_a_second_run_in_the_folder_is_refused_and_changes_nothing(tmp_path, live_run):
    folder = tmp_path / "run"
    wait_until((folder / "rollouts" / "000001-000.parquet").exists)  # written by a thread of that run
    before = contents(folder)
    holder = f"process {live_run.pid} on {socket.gethostname()}, since"
    said = rf"{folder}\), which a run that is under way writes to: {holder}"
    for resume in (None, True, str(folder / "checkpoint-1")):
        with pytest.raises(OutputFolderInUseError, match=said):
            start(folder).train(resume_from_checkpoint=resume)
    with pytest.raises(OutputFolderInUseError):  # also where nothing is saved
        start(tmp_path / "run" / ".." / "run", save_strategy="no").train()
    assert contents(folder) == before and not (folder / "earlier-run-1").exists()
    (tmp_path / "wait").unlink()
    assert "ended 3" in live_run.stdout.read() and live_run.wait() == 0
    assert not (folder / LOCK).exists() and find_checkpoint(folder) == folder / "checkpoint-3"
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [1, 2, 3, 3]


def test_the_folder_of_a_run_that_was_killed_is_free_at_once(tmp_path, live_run):
    folder = tmp_path / "run"
    live_run.send_signal(signal.SIGKILL)
    live_run.wait()
    resumed = start(folder, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3 and not (folder / LOCK).exists()


def test_a_forked_process_does_not_hold_the_lock(tmp_path):
    """Data loaders and tools are forked, and may outlive a run that is killed."""
    lock = take_lock(tmp_path)
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(OutputFolderInUseError):
        take_lock(tmp_path)
    lock.forget()  # as the death of the process does
    take_lock(tmp_path).release()
    os.write(done[1], b"x")
    os.waitpid(child, 0)


def test_two_concurrent_runs_in_one_process_are_refused(tmp_path):
    found = []

    def begin():
        with pytest.raises(OutputFolderInUseError, match=f"process {os.getpid()} on"):
            start(tmp_path).train()
        found.append(True)

    start(tmp_path, [At(begin)]).train()
    assert found == [True] and not (tmp_path / LOCK).exists()


def test_a_folder_is_free_again_after_an_error(tmp_path):
    def fail():
        raise KeyError("of a callback")

    with pytest.raises(KeyError, match="of a callback"):
        start(tmp_path, [At(fail)]).train()
    assert not (tmp_path / LOCK).exists()
    resumed = start(tmp_path)
    resumed.train(resume_from_checkpoint=find_checkpoint(tmp_path))
    assert resumed.state.global_step == 2


def test_one_trainer_and_two_trainers_can_train_in_turn(tmp_path):
    first = start(tmp_path)
    first.train()
    first.train()
    first.args.max_steps = 3
    first.train(resume_from_checkpoint=True)
    assert first.state.global_step == 3 and (tmp_path / "earlier-run-1").is_dir()
    second = start(tmp_path, max_steps=4)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4 and not (tmp_path / "earlier-run-2").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES])
def test_a_file_system_without_locks_is_logged_once(tmp_path, monkeypatch, caplog, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    trainer = start(tmp_path)
    trainer.train()
    trainer.train()
    assert trainer.state.global_step == 2
    said = [r.message for r in caplog.records if "cannot be locked" in r.message]
    assert len(said) == 1 and str(tmp_path) in said[0] and os.strerror(number) in said[0]


def test_a_platform_without_locks_is_logged_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert take_lock(tmp_path) is None and take_lock(tmp_path) is None
    assert caplog.text.count("cannot be locked: ") == 1


def test_a_lock_file_removed_before_locking_is_created_anew(tmp_path, monkeypatch):
    """Its holder has removed the file between its being opened and locked."""
    holder, flock, taken = take_lock(tmp_path), fcntl.flock, []

    def late(*args):
        if not taken:
            taken.append(True)
            holder.release()
        return flock(*args)

    monkeypatch.setattr(fcntl, "flock", late)
    lock = take_lock(tmp_path)
    with pytest.raises(OutputFolderInUseError):
        take_lock(tmp_path)
    lock.release()
    lock.release()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, None),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}, None),
        ({"TORCHELASTIC_RUN_ID": "job-7", "SLURM_JOB_ID": "3"}, "torchrun job-7"),
        ({"SLURM_JOB_ID": "3", "SLURM_STEP_ID": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "1"}, "slurm 3.0"),
        ({"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}, "node1:29500"),
    ],
)
def test_job_id_of_each_launcher(variables, expected):
    assert job_id(variables) == expected


def test_a_lock_of_the_same_job_on_another_machine_is_accepted(tmp_path, monkeypatch):
    """The job began on that machine, and the file system has not noticed yet that the machine is gone."""
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    lock = take_lock(tmp_path)
    with pytest.raises(OutputFolderInUseError, match=f"process {os.getpid()} on"):
        take_lock(tmp_path)
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    assert take_lock(tmp_path) is None
    monkeypatch.setenv("SLURM_JOB_ID", "4")
    with pytest.raises(OutputFolderInUseError):
        take_lock(tmp_path)
    lock.release()


def test_an_empty_lock_file_is_held_by_another_process(tmp_path):
    lock = take_lock(tmp_path)
    (tmp_path / LOCK).write_text("{")
    with pytest.raises(OutputFolderInUseError, match="writes to: another process"):
        take_lock(tmp_path)
    lock.release()


# What an earlier run has left


def test_all_files_of_an_earlier_run_move_unchanged(tmp_path, caplog):
    first = start(tmp_path, log_completions=False)
    first.train()
    first.save_model()
    first.save_state()
    assert report([str(tmp_path)]) == 0
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "model.safetensors").write_text("pushed")
    (tmp_path / "completions").mkdir()
    (tmp_path / "completions" / "completions_00001.parquet").write_text("TRL's")
    (tmp_path / "runs" / "today").mkdir(parents=True)
    (tmp_path / "runs" / "today" / "events").write_text("TensorBoard's")
    (tmp_path / "notes.txt").write_text("the user's")
    before = contents(tmp_path)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        start(tmp_path, max_steps=1).train()
    moved = tmp_path / "earlier-run-1"
    kept = contents(moved)
    assert {**kept, "notes.txt": b"the user's"} == before
    names = {path.name for path in moved.iterdir()}
    assert names >= {
        "checkpoint-1", "checkpoint-2", "rollouts", "metrics.jsonl", "run.json", "report.html", "README.md", "hub",
        "completions", "runs", "model.safetensors", "trainer_state.json",
    }  # fmt: skip
    said = next(record.getMessage() for record in caplog.records if "A new run begins" in record.getMessage())
    assert str(moved) in said and all(name in said for name in names)
    assert (tmp_path / "notes.txt").exists() and len(list(read_rollouts(moved))) > 0
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 1]
    resumed = start(tmp_path / "resumed", max_steps=3)
    resumed.train(resume_from_checkpoint=str(moved / "checkpoint-2"))
    assert resumed.state.global_step == 3
    start(tmp_path, max_steps=1).train()
    assert contents(moved) == kept and (tmp_path / "earlier-run-2" / "checkpoint-1").is_dir()


def test_a_new_run_has_the_folder_that_trl_logs_completions_to(tmp_path):
    start(tmp_path, max_steps=1).train()
    start(tmp_path, max_steps=1, log_completions=True, num_completions_to_print=0).train()
    assert (tmp_path / "completions" / "completions_00001.parquet").is_file()


@pytest.mark.parametrize("kind", ["without checkpoints", "of TRL", "of logs alone", "with an adapter"])
def test_each_kind_of_earlier_run_is_kept(tmp_path, kind):
    if kind == "of TRL":
        options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "use_cpu": True, "bf16": False}
        sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8}
        trl = GRPOConfig(str(tmp_path), report_to="none", **options, **sizes)
        GRPOTrainer(tiny_model(TOKENIZER), reward, trl, prompts(5), processing_class=TOKENIZER).train()
    elif kind == "of logs alone":
        (tmp_path / "health.jsonl").write_text('{"step": 1}\n')
    else:
        lora = LoraConfig(r=4, target_modules=["q_proj"]) if kind == "with an adapter" else None
        trainer = start(tmp_path, lora=lora, save_strategy="no" if kind == "without checkpoints" else "steps")
        trainer.train()
        trainer.save_model()
    before = contents(tmp_path)
    start(tmp_path, max_steps=1, save_strategy="no").train()
    assert before and contents(tmp_path / "earlier-run-1") == before


def test_files_of_the_user_do_not_move(tmp_path):
    start(tmp_path).train()
    names = ["README.md", "ds_config.json", "my-config.json", "adapter_plan.txt", "model_notes.txt", "tokenizers.txt"]
    for name in names:
        (tmp_path / name).write_text("the user's")
    start(tmp_path, max_steps=1).train()
    assert all((tmp_path / name).read_text() == "the user's" for name in names)
    assert not {path.name for path in (tmp_path / "earlier-run-1").iterdir()} & set(names)


@pytest.mark.parametrize("moves", [0, 2])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("later", ["a new run", "resumed"])
def test_an_earlier_run_stays_whole_where_a_move_is_cut_off(tmp_path, monkeypatch, moves, error, later):
    start(tmp_path, log_completions=True).train()
    before, replace, done = contents(tmp_path), os.replace, []

    def cut_off(source, target):
        if "earlier-run" in str(target):
            done.append(target)
            if len(done) > moves:
                raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut_off)
    if isinstance(error, OSError):
        with pytest.raises(CheckpointSaveError, match="cannot be moved"):
            start(tmp_path, log_completions=True).train()
        assert contents(tmp_path) == before
    else:
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path, log_completions=True).train()
    monkeypatch.undo()
    if later == "resumed":
        trainer = start(tmp_path, log_completions=True, max_steps=3)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 3 and not list(tmp_path.glob("*earlier-run*"))
    else:
        start(tmp_path, log_completions=True).train()
        assert contents(tmp_path / "earlier-run-1") == before and len(list(tmp_path.glob("*earlier-run*"))) == 1


def test_files_written_after_an_interrupted_move_are_kept_apart(tmp_path):
    start(tmp_path, max_steps=1).train()
    (tmp_path / "_earlier-run-1" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "_earlier-run-1" / "checkpoint-1" / "trainer_state.json").write_text("of the first")
    before = contents(tmp_path / "checkpoint-1")
    start(tmp_path, max_steps=1).train()
    assert (tmp_path / "earlier-run-1" / "checkpoint-1" / "trainer_state.json").read_text() == "of the first"
    assert contents(tmp_path / "earlier-run-2" / "checkpoint-1") == before


@pytest.mark.parametrize("asked_for", ["True", "checkpoint-2", "latest"])
def test_a_linked_checkpoint_belongs_to_the_folder_of_its_link(tmp_path, asked_for):
    folder = tmp_path / "run"
    start(folder).train()
    (tmp_path / "disk").mkdir()
    shutil.move(folder / "checkpoint-2", tmp_path / "disk" / "checkpoint-2")
    (folder / "checkpoint-2").symlink_to(tmp_path / "disk" / "checkpoint-2")
    (folder / "latest").symlink_to("checkpoint-1")
    trainer = start(folder, max_steps=3)
    trainer.train(resume_from_checkpoint=True if asked_for == "True" else str(folder / asked_for))
    assert trainer.state.global_step == 3 and not (folder / "earlier-run-1").exists()


def test_an_ended_run_adds_nothing_to_the_next_one(tmp_path):
    first = start(tmp_path, max_steps=1)
    first.train()
    start(tmp_path, max_steps=1).train()
    before = contents(tmp_path)
    first.evaluate(prompts(4))
    assert contents(tmp_path) == before


def test_a_folder_without_a_run_stays_as_it_is(tmp_path):
    for name in ("README.md", "config.json", "hub"):
        (tmp_path / name).mkdir() if name == "hub" else (tmp_path / name).write_text("the user's")
    start(tmp_path, max_steps=1, save_strategy="no").train()
    assert not (tmp_path / "earlier-run-1").exists() and (tmp_path / "config.json").read_text() == "the user's"


def test_a_model_that_the_adapter_is_based_on_stays(tmp_path):
    trainer = start(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    lora = LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path=str(tmp_path))
    trained = start(tmp_path, lora=lora, max_steps=1)
    for adapter in trained.model.peft_config.values():
        adapter.base_model_name_or_path = str(tmp_path)
    trained.train()
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "config.json").is_file()
    assert (tmp_path / "earlier-run-1" / "metrics.jsonl").is_file()


def test_a_run_resumed_from_elsewhere_deletes_nothing_of_another(tmp_path):
    start(tmp_path / "one").train()
    start(tmp_path / "two", max_steps=3).train()
    before = contents(tmp_path / "two")
    start(tmp_path / "two", max_steps=3).train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-1"))
    assert contents(tmp_path / "two" / "earlier-run-1") == before
    start(tmp_path / "two", max_steps=4).train(resume_from_checkpoint=True)
    assert not (tmp_path / "two" / "earlier-run-2").exists()


def test_a_foreign_folder_named_hub_is_moved_and_not_deleted(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **kwargs: None)
    trainer = start(tmp_path)
    trainer.train()
    trainer.hub_model_id = "someone/run"
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "thesis.tex").write_text("the user's")
    trainer.push_to_hub()
    assert (tmp_path / "earlier-run-1" / "hub" / "thesis.tex").read_text() == "the user's"
    assert "was not written by this run" in caplog.text
    pushed = {path.name for path in (tmp_path / "hub").iterdir()}
    assert "model.safetensors" in pushed and "thesis.tex" not in pushed
    (tmp_path / "hub" / "stale.safetensors").touch()
    resumed = start(tmp_path, max_steps=3)
    resumed.hub_model_id = "someone/run"
    resumed.train(resume_from_checkpoint=True)
    for _ in range(2):  # what the run itself has published is written anew
        resumed.push_to_hub()
        assert {path.name for path in (tmp_path / "hub").iterdir()} == pushed
    assert not (tmp_path / "earlier-run-2").exists()


def test_the_report_takes_no_settings_from_a_checkpoint(tmp_path, capsys):
    start(tmp_path / "run").train()
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "copy")
    assert report([str(tmp_path / "copy")]) == 0
    page = (tmp_path / "copy" / "report.html").read_text()
    assert "frozen weights" not in page and json.loads((tmp_path / "copy" / "run_identity.json").read_text())["layout"]
    assert fault_of(tmp_path / "copy") is None
