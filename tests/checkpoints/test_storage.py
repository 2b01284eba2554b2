"""Full, read-only and broken disks under each writer of a run; and errors that are not the disk's."""

import errno
import os
import shutil
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import numpy
import pyarrow as pa
import pytest
import torch
from conftest import chat_tokenizer, config, prompts, tiny_model
from datasets import load_dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch.distributed.checkpoint.api import CheckpointException
from transformers import TrainerCallback

from trl_toolgrpo import CheckpointSaveError, ToolGRPOTrainer, find_checkpoint
from trl_toolgrpo.checkpoints.folder import fault_of, publish
from trl_toolgrpo.report.__main__ import main as report
from trl_toolgrpo.run_folder.files import add_line, cut_back, read_lines, write_json
from trl_toolgrpo.run_folder.rollout_log import write
from trl_toolgrpo.run_folder.storage_failures import attempt, is_storage_failure, tolerated


TOKENIZER = chat_tokenizer("qwen3_instruct_2507")
REFUSALS = ["ENOSPC", "EDQUOT", "EROFS", "EIO", "EFBIG"]


def reward(completion_ids, **kwargs):
    return [float((7 * len(ids) + sum(ids)) % 11) for ids in completion_ids]


def start(path, **changes):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "max_completion_length": 8, **changes}
    return ToolGRPOTrainer(
        tiny_model(TOKENIZER), reward, config(path, **options), prompts(5), processing_class=TOKENIZER
    )


class At(TrainerCallback):
    """Calls a function at the end of a step, before its checkpoint is written."""

    def __init__(self, step, call):
        self.step, self.call = step, call

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.call()


# Which errors are the disk's


@pytest.mark.parametrize("name", sorted(errno.errorcode.values()))
def test_is_storage_failure_for_full_read_only_or_broken_disks(name):
    number = getattr(errno, name)
    disk = number in {getattr(errno, refusal) for refusal in REFUSALS}
    assert is_storage_failure(OSError(number, os.strerror(number))) == disk
    assert is_storage_failure(RuntimeError(f"write(): fd 3 failed with {os.strerror(number)}")) == disk
    assert is_storage_failure(Exception(f"{os.strerror(number)} (os error {number})")) == disk


@pytest.mark.parametrize(
    "error",
    [
        OSError("no number"), RuntimeError("Parent directory /nowhere does not exist."), ValueError("File exists"),
        CheckpointSaveError("No space left on device"), ConnectionError("refused"), KeyboardInterrupt(),
        CheckpointException("", {1: (FileNotFoundError(2, "No such file"), None)}),
    ],
    ids=repr,
)  # fmt: skip
def test_bugs_are_no_storage_failures(error):
    assert not is_storage_failure(error)


def test_a_shard_that_one_process_could_not_write_is_known_in_all():
    failures = {0: (ValueError("x"), None), 1: (OSError(errno.ENOSPC, "No space left on device"), None)}
    assert is_storage_failure(CheckpointException("", failures))


WRITERS = {
    "python": lambda path: path.write_bytes(bytes(2**17)),
    "parquet": lambda path: write(pa.table({"a": numpy.random.default_rng(0).random(2**15)}), path),
    "safetensors": lambda path: save_file({"a": torch.zeros(2**15)}, path),
    "tokenizers": lambda path: words().save(str(path)),
    "torch": lambda path: torch.save({"a": torch.zeros(2**15)}, path),
    "torch, small": lambda path: torch.save({f"a{i}": torch.zeros(2**10) for i in range(40)}, path),
    "torch, legacy": lambda path: torch.save({"a": torch.zeros(2**15)}, path, _use_new_zipfile_serialization=False),
    "report": lambda path: write_json(path, {"a": "x" * 2**17}),
}


def words():
    return Tokenizer(models.WordLevel({f"word {index}": index for index in range(5000)}, unk_token="word 0"))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB, for real."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield place
    while place.is_mount():
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_the_error_of_each_writer_is_a_storage_failure(small_disk, name, read_only):
    if read_only:
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(Exception) as refused:
        WRITERS[name](small_disk / "file")
    assert is_storage_failure(refused.value), refused.value
    assert attempt(lambda: WRITERS[name](small_disk / "other"))


@pytest.mark.parametrize("name", WRITERS)
def test_a_missing_folder_is_no_storage_failure(tmp_path, name):
    if name == "parquet":
        pytest.skip("makes the folder")
    with pytest.raises(Exception) as missing:
        WRITERS[name](tmp_path / "nowhere" / "file")
    assert not is_storage_failure(missing.value), missing.value


# A run


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_failed_checkpoint_is_tried_again_at_the_next_one(tmp_path, monkeypatch, caplog, refusal):
    trainer, number = start(tmp_path), getattr(errno, refusal)
    save = torch.save

    def refuse(*args, **kwargs):
        if trainer.state.global_step == 2:
            raise OSError(number, os.strerror(number))
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", refuse)
    trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
    assert f"{tmp_path / 'checkpoint-2'} could not be written: OSError: [Errno {number}]" in caplog.text


@pytest.mark.parametrize("error", [FileNotFoundError(2, "a bug"), PermissionError(13, "no"), RuntimeError("a bug")])
@pytest.mark.parametrize(
    "place", ["torch.save", "trl_toolgrpo.checkpoints.resume.save_file", "trl_toolgrpo.checkpoints.resume.publish"]
)
def test_a_bug_while_saving_ends_the_run(tmp_path, monkeypatch, error, place):
    trainer = start(tmp_path)

    def fail(*args, **kwargs):
        raise error

    trainer.add_callback(At(2, lambda: monkeypatch.setattr(place, fail)))
    with pytest.raises(type(error), match=str(error.args[-1])):
        trainer.train()
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_nothing_is_patched_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """What another thread saves meanwhile meets its own error."""
    trainer = start(tmp_path, max_steps=1)
    before = (torch.save, shutil.copytree, shutil.copyfile, shutil.rmtree)
    found = []

    def save_elsewhere():
        try:
            torch.save({"a": torch.zeros(3)}, tmp_path / "nowhere" / "file")
        except RuntimeError as error:
            found.append(str(error))
        with pytest.raises(OSError, match="full"), tolerated():
            raise OSError(errno.ENOSPC, "full")

    save = trainer._save_rng_state

    def look(output_dir):
        assert (torch.save, shutil.copytree, shutil.copyfile, shutil.rmtree) == before
        thread = threading.Thread(target=save_elsewhere)
        thread.start()
        thread.join()
        found.append("looked")
        save(output_dir)

    monkeypatch.setattr(trainer, "_save_rng_state", look)
    trainer.train()
    assert len(found) == 2 and "does not exist" in found[0] and fault_of(tmp_path / "checkpoint-1") is None


def test_nested_attempts_report_their_own_refusals():
    def full():
        raise OSError(errno.ENOSPC, "full")

    inner = []
    assert attempt(lambda: inner.extend(attempt(full))) == []
    assert inner == ["OSError: [Errno 28] full"]


def test_folders_are_not_flushed_where_the_platform_cannot(tmp_path, monkeypatch):
    """Windows opens none, some file systems flush none; files are flushed, and an error of the disk is raised."""
    opened, real_open, real_fsync = [], os.open, os.fsync

    def open_as_windows_does(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        opened.append(Path(path).name)
        return real_open(path, *args, **kwargs)

    def folder():
        made = tmp_path / "_unfinished" / "checkpoint-1"
        made.mkdir(parents=True)
        (made / "file").write_text("x")
        return made

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_as_windows_does)
        publish(folder(), tmp_path / "checkpoint-1")
    assert fault_of(tmp_path / "checkpoint-1") is None and sorted(opened) == ["file", "manifest.json"]
    for number, told in ((errno.EINVAL, False), (errno.EIO, True)):

        def flush(descriptor, number=number):
            if os.path.isdir(f"/proc/self/fd/{descriptor}"):
                raise OSError(number, os.strerror(number))
            real_fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", flush)
            if told:
                with pytest.raises(OSError, match="Input/output"):
                    publish(folder(), tmp_path / "checkpoint-1")
            else:
                publish(folder(), tmp_path / "checkpoint-1")
    assert fault_of(tmp_path / "checkpoint-1") is None


# The other writers


@pytest.mark.parametrize("name", ["metrics.jsonl", "health.jsonl", "run.json", "README.md", "rollouts"])
def test_a_log_that_cannot_be_written_costs_no_checkpoint(tmp_path, name, caplog):
    """A folder has its name: not an error of the disk, and still not one that ends a run."""
    trainer = start(tmp_path, max_steps=2)

    def block():
        shutil.move(tmp_path / name, tmp_path / "before") if (tmp_path / name).exists() else None
        (tmp_path / name).mkdir() if name != "rollouts" else (tmp_path / name).write_text("in the way")

    trainer.add_callback(At(1, block))
    trainer.train()
    assert trainer.state.global_step == 2 and find_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.parametrize("read_only", [False, True])
def test_a_whole_run_on_a_disk_that_fills_up(small_disk, tmp_path, monkeypatch, caplog, read_only):
    """Checkpoint, logs, model card, model: what is trained is kept elsewhere, and the message says where."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    trainer = start(small_disk, max_steps=2)

    def spoil():
        if read_only:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(small_disk)], check=True)  # above it
        else:
            attempt(lambda: (small_disk / "fill").write_bytes(bytes(2**17)))

    trainer.add_callback(At(1, spoil))
    with pytest.raises(CheckpointSaveError, match=r"was written to .* instead") as refused:
        trainer.train()
    assert trainer.state.global_step == 2 and "tries again at the next checkpoint" in caplog.text
    assert "Read-only" in str(refused.value) if read_only else "Read-only" not in str(refused.value)
    (kept,) = (tmp_path / "elsewhere").rglob("model.safetensors")
    assert str(kept.parent) in str(refused.value)


def test_a_full_disk_at_the_start_is_refused_before_training(small_disk):
    attempt(lambda: (small_disk / "fill").write_bytes(bytes(2**17)))
    trainer = start(small_disk)
    with pytest.raises(CheckpointSaveError, match=r"Nothing can be written to `output_dir`.*No space left"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("how", ["missing", "full"])
def test_no_room_for_temporary_files_is_reported_as_a_full_disk(tmp_path, small_disk, monkeypatch, how):
    trainer = start(tmp_path / "run", max_steps=1)

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def spoil():
        monkeypatch.setattr("trl_toolgrpo.checkpoints.resume.publish", refuse)
        if how == "missing":
            monkeypatch.setattr("tempfile.tempdir", None)
            monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: ["/nowhere"])
        else:
            attempt(lambda: (small_disk / "fill").write_bytes(bytes(2**17)))
            monkeypatch.setattr("tempfile.tempdir", str(small_disk))

    trainer.add_callback(At(1, spoil))
    with pytest.raises(CheckpointSaveError, match=r"No space left on device.*in memory still"):
        trainer.train()


def test_a_file_that_is_replaced_stays_as_it_was_on_a_full_disk(small_disk):
    """And no part is left, which would take the room of what comes after."""
    line = {"step": 1, "text": "x" * 20_000}
    writers = {
        "run.json": lambda path: write_json(path, {"a": "x" * 2**15}),
        "metrics.jsonl": lambda path: cut_back(path, 1),
        "000001-000.parquet": lambda path: write(pa.table({"a": numpy.random.default_rng(0).random(2**15)}), path),
    }
    for name, replace in writers.items():
        add_line(small_disk / name, line)
        (small_disk / "fill").write_bytes(bytes(32 * 2**10))
        with pytest.raises(OSError, match="No space left"):
            replace(small_disk / name)
        assert sorted(path.name for path in small_disk.iterdir()) == sorted(["fill", name])
        assert read_lines(small_disk / name) == [line]
        (small_disk / name).unlink()


def test_torn_tables_and_cards_of_a_full_disk_are_replaced(small_disk, monkeypatch, caplog):
    """The tables of completions, of which a torn one spoils the folder, and the model card."""
    folder, filler = small_disk / "run", small_disk / "filler"
    subprocess.run(["mount", "-o", "remount,size=512k", str(small_disk)], check=True)

    def fill():
        with suppress(OSError), filler.open("wb", 0) as file:
            while True:
                file.write(bytes(4096))

    options = {"save_strategy": "no", "log_completions": True, "num_completions_to_print": 0}
    trainer = start(folder, **options)
    trainer.add_callback(At(1, fill))
    trainer.add_callback(At(2, filler.unlink))
    trainer.train()
    tables = sorted(path.name for path in (folder / "completions").iterdir())
    assert tables == ["completions_00002.parquet", "completions_00003.parquet"]
    assert len(load_dataset("parquet", data_files=str(folder / "completions" / "*"), split="train")) == 8
    assert "could not be shown or stored" in caplog.text
    (folder / "README.md").write_bytes(b"")
    start(folder, **options).train()
    assert (folder / "README.md").read_text().startswith("---\n")


def test_a_report_that_finds_no_room_leaves_the_one_before(small_disk, capsys):
    add_line(small_disk / "metrics.jsonl", {"step": 1, "loss": 1.0})
    (small_disk / "report.html").write_text("before")
    attempt(lambda: (small_disk / "fill").write_bytes(bytes(2**17)))
    assert report([str(small_disk)]) == 1 and "No space left" in capsys.readouterr().err
    assert (small_disk / "report.html").read_text() == "before"
    assert read_lines(small_disk / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), pa.ArrowInvalid("a bug"), KeyError("bug")])
def test_an_error_of_the_log_does_not_hide_that_of_the_run(tmp_path, monkeypatch, caplog, error):
    class Stop(Exception):
        pass

    def fail(*args, **kwargs):
        raise error

    def stop():
        raise Stop("the run's own")

    monkeypatch.setattr("trl_toolgrpo.run_folder.writer.write", fail)
    trainer = start(tmp_path, max_steps=3)
    trainer.add_callback(At(2, stop))
    with pytest.raises(Stop, match="the run's own"):
        trainer.train()
    said = "No rollouts are logged any more" if isinstance(error, OSError) else "A rollout batch could not be logged"
    assert caplog.text.count(said) == 1
    again = start(tmp_path / "again", max_steps=1)
    again.train()
    assert again.state.global_step == 1
