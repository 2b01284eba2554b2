"""Resuming exactly: what a checkpoint holds, when it is whole, which run it belongs to, and runs that are killed."""

import json
import logging
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import chat_tokenizer, config, prompts, tiny_model
from datasets import Dataset
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_toolgrpo import CheckpointError, CheckpointSaveError, ToolGRPOTrainer, find_checkpoint, keep_batch_size
from trl_toolgrpo.checkpoints import folder as checkpoint
from trl_toolgrpo.checkpoints.folder import (
    UNFINISHED,
    check_shared,
    check_whole,
    clear_away,
    fault_of,
    publish,
    set_aside,
)
from trl_toolgrpo.checkpoints.resume import _with_tensors
from trl_toolgrpo.checkpoints.run_identity import describe_dataset, describe_model, describe_run, differences
from trl_toolgrpo.hub.push import HubPublisher
from trl_toolgrpo.reference.adapter import describe_adapter


TIMES = ("time", "seconds", "per_second", "wait", "runtime", "train_loss", "total_flos", "max_abs_diff")
TOKENIZER = chat_tokenizer("qwen3_instruct_2507")


class Watched(ToolGRPOTrainer):
    """Notes what each micro-batch consists of."""

    def _compute_loss(self, model, inputs):
        self.used = [*getattr(self, "used", []), inputs["completion_ids"].tolist()]
        return super()._compute_loss(model, inputs)


def reward(completion_ids, **kwargs):
    return [float((7 * len(ids) + sum(ids)) % 11) for ids in completion_ids]


def start(path, kind=Watched, model=None, data=None, lora=None, dtype=torch.float32, **changes):
    """Two epochs of two rollout batches; each batch feeds four steps, and every second step is logged."""
    options = {
        "max_steps": 10, "save_strategy": "steps", "save_steps": 1, "logging_steps": 2, "learning_rate": 1e-2,
        "steps_per_generation": 2, "num_iterations": 2, "max_completion_length": 12, "seed": 3, **changes,
    }  # fmt: skip
    random.seed(len(str(path)))
    return kind(
        model or tiny_model(TOKENIZER).to(dtype), reward, config(path, **options), data or prompts(5), prompts(1),
        processing_class=TOKENIZER, peft_config=lora,
    )  # fmt: skip


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.2)
SETTINGS = {
    "all": (LORA, {
        "deterministic_rollouts": True, "advantage_estimator": "gae", "beta": 0.1, "sync_ref_model": True,
        "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.5, "value_learning_rate": 1e-2,
    }),
    "bfloat16": (LORA, {
        "dtype": torch.bfloat16, "advantage_estimator": "gae", "beta": 0.1, "sync_ref_model": True,
        "ref_model_sync_steps": 3, "value_learning_rate": 1e-2, "gradient_accumulation_steps": 2, "max_steps": 7,
    }),
    "full": (None, {"beta": 0.0}),
    "trl": (None, {"record_sample_logprobs": False}),
}  # fmt: skip


def figures(trainer):
    return [{k: v for k, v in e.items() if not any(w in k for w in TIMES)} for e in trainer.state.log_history]


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_same(one, other):
    for (name, found), expected in zip(other.model.named_parameters(), one.model.parameters(), strict=True):
        assert torch.equal(found, expected), name
    states = [trainer.optimizer.state_dict()["state"] for trainer in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key][n], states[1][key][n]) for key in states[0] for n in states[0][key])
    assert figures(one) == figures(other)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Undisturbed runs, made when first asked for."""
    made = {}

    def get(name):
        if name not in made:
            lora, changes = SETTINGS[name]
            made[name] = start(tmp_path_factory.mktemp(name), lora=lora, **changes)
            made[name].train()
        return made[name]

    return get


@pytest.mark.parametrize(
    ("name", "step"), [("all", 3), ("all", 4), ("all", 9), ("full", 1), ("full", 8), ("trl", 5), ("bfloat16", 3)]
)
def test_a_resumed_run_is_the_same_to_the_bit(runs, tmp_path, name, step):
    """From the middle and the end of a rollout batch, and into a second epoch."""
    whole, (lora, changes) = runs(name), SETTINGS[name]
    checkpoint = Path(whole.args.output_dir) / f"checkpoint-{step}"
    resumed = start(tmp_path, lora=lora, **changes)
    torch.manual_seed(99)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(whole, resumed)
    taken = step * whole.args.gradient_accumulation_steps
    assert resumed.used == whole.used[taken:]
    if whole.reference.synced is not None:
        assert logged(resumed, "ref/syncs")[-1] == logged(whole, "ref/syncs")[-1] > 1
        for key, tensor in whole.reference.synced.state().items():
            assert torch.equal(tensor, resumed.reference.synced.state()[key]), key
    progress = load_file(checkpoint / "progress_0.safetensors")
    assert any(key.startswith("place/batches/") for key in progress) == (taken % 4 != 0)


def test_a_run_that_has_ended_trains_no_further(runs, tmp_path, caplog):
    checkpoint = str(Path(runs("full").args.output_dir) / "checkpoint-10")
    resumed = start(tmp_path, **SETTINGS["full"][1])
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_same(runs("full"), resumed)
    assert resumed.state.global_step == 10 and not hasattr(resumed, "used")
    assert "All 10 steps of this run have been taken: nothing is trained." in caplog.text
    resumed.args.max_steps = 11
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 11 and len(resumed.used) == 1


def test_the_same_trainer_resumes_where_it_was(runs, tmp_path):
    """A trainer that has trained before carries nothing over."""
    whole = runs("full")
    used = start(tmp_path, max_steps=3, **SETTINGS["full"][1])
    used.train()
    used.args.max_steps, used.used = 10, []
    used.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-6"))
    assert_same(whole, used)
    assert used.used == whole.used[6:]


def test_a_checkpoint_of_trl_is_resumed(tmp_path, caplog):
    options = GRPOConfig(**{**vars_of(config(tmp_path / "a", max_steps=1, save_strategy="steps", save_steps=1))})
    GRPOTrainer(tiny_model(TOKENIZER), reward, options, prompts(5), processing_class=TOKENIZER).train()
    assert find_checkpoint(tmp_path / "a") == tmp_path / "a" / "checkpoint-1"
    resumed = start(tmp_path / "b", max_steps=2, steps_per_generation=1, num_iterations=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert resumed.state.global_step == 2 and "was not written by this trainer" in caplog.text


def vars_of(args):
    names = ("output_dir", "per_device_train_batch_size", "num_generations", "max_completion_length", "max_steps",
             "report_to", "save_strategy", "save_steps", "bf16", "use_cpu", "disable_tqdm")  # fmt: skip
    return {name: getattr(args, name) for name in names}


# Whole or torn


@pytest.fixture
def run_dir(runs, tmp_path):
    """Three checkpoints of a run."""
    for step in (1, 2, 10):
        shutil.copytree(Path(runs("full").args.output_dir) / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "is missing": lambda folder: (folder / "model.safetensors").unlink(),
    "bytes, expected": lambda folder: os.truncate(folder / "optimizer.pt", 100),
    "it has no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "JSONDecodeError": lambda folder: os.truncate(folder / "manifest.json", 20),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_torn_checkpoint_is_named_and_skipped(run_dir, caplog, fault):
    torn = run_dir / "checkpoint-10"
    assert find_checkpoint(run_dir) == torn
    DAMAGE[fault](torn)
    assert find_checkpoint(run_dir) == run_dir / "checkpoint-2"
    assert f"Skipped {torn}" in caplog.text and fault in caplog.text
    with pytest.raises(CheckpointError, match=rf"{torn}, which is not a whole checkpoint: .*{fault}"):
        start(run_dir).train(resume_from_checkpoint=str(torn))


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(run_dir, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    assert find_checkpoint(empty) is None and find_checkpoint(empty / "nowhere") is None
    with pytest.raises(CheckpointError, match="No valid checkpoint found in output directory"):
        start(empty).train(resume_from_checkpoint=True)
    for step in (1, 2, 10):
        DAMAGE["is missing"](run_dir / f"checkpoint-{step}")
    with pytest.raises(CheckpointError, match="No valid checkpoint found"):
        start(run_dir).train(resume_from_checkpoint=True)


def test_resume_from_true_takes_the_newest_whole_checkpoint(runs, run_dir):
    DAMAGE["is missing"](run_dir / "checkpoint-10")
    resumed = start(run_dir, **SETTINGS["full"][1])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.used == runs("full").used[2:]
    assert_same(runs("full"), resumed)
    assert fault_of(run_dir / "checkpoint-10") is None  # the torn one was replaced


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["rng", "flush", "rename"])
def test_a_run_that_ends_while_saving_leaves_the_checkpoint_before(tmp_path, monkeypatch, caplog, moment):
    trainer = start(tmp_path, max_steps=2)

    def end(*args, **kwargs):
        raise Killed

    class Arm(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                target = {"rng": (trainer, "_save_rng_state"), "flush": (os, "fsync"), "rename": (os, "replace")}
                monkeypatch.setattr(*target[moment], end)

    trainer.add_callback(Arm())
    with pytest.raises(Killed):
        trainer.train()
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1"]
    assert (tmp_path / UNFINISHED / "checkpoint-2").is_dir()
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert f"Skipped {tmp_path / UNFINISHED / 'checkpoint-2'}" in caplog.text
    resumed = start(tmp_path, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert fault_of(tmp_path / "checkpoint-2") is None and not (tmp_path / UNFINISHED).exists()


def test_a_new_run_sets_earlier_checkpoints_aside(tmp_path, caplog):
    """They are set aside, whatever their number, and none of them is resumed from or cleared away."""
    options = {"save_total_limit": 1, "save_steps": 2, "steps_per_generation": 1, "num_iterations": 1}
    start(tmp_path, max_steps=4, **options).train()
    first = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt")["state"][0]["exp_avg"]
    start(tmp_path, max_steps=2, learning_rate=1e-3, **options).train()
    assert f"are now in {tmp_path / 'earlier-run-1'}" in caplog.text
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    kept = tmp_path / "earlier-run-1" / "checkpoint-4"
    assert fault_of(kept) is None and torch.equal(torch.load(kept / "optimizer.pt")["state"][0]["exp_avg"], first)
    resumed = start(tmp_path, max_steps=3, learning_rate=1e-3, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3 and not (tmp_path / "earlier-run-2").exists()
    start(tmp_path, max_steps=1, save_strategy="no").train()
    assert (tmp_path / "earlier-run-2" / "checkpoint-3").is_dir() and find_checkpoint(tmp_path) is None


def test_a_base_model_stays_where_the_adapter_looks_for_it(tmp_path):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert set_aside(tmp_path, tmp_path / "checkpoint-2") == tmp_path / "earlier-run-1"
    assert (tmp_path / "checkpoint-2").is_dir() and (tmp_path / "earlier-run-1" / "checkpoint-1").is_dir()
    assert set_aside(tmp_path, tmp_path / "checkpoint-2") is None


def test_publishing_replaces_what_is_there(tmp_path):
    for text in ("old", "new"):
        folder = tmp_path / UNFINISHED / "checkpoint-3"
        (folder / "part").mkdir(parents=True)
        (folder / "part" / "file").write_text(text)
        publish(folder, tmp_path / "checkpoint-3")
    assert (tmp_path / "checkpoint-3" / "part" / "file").read_text() == "new"
    assert fault_of(tmp_path / "checkpoint-3") is None and not (tmp_path / UNFINISHED).exists()
    assert json.loads((tmp_path / "checkpoint-3" / "manifest.json").read_text())["files"].keys() == {"part/file"}


@pytest.mark.parametrize("then", ["find", "name", "save"])
def test_a_kill_while_a_checkpoint_is_replaced_loses_none(tmp_path, monkeypatch, then):
    target, replace = tmp_path / "checkpoint-3", os.replace

    def written(text):
        folder = tmp_path / UNFINISHED / target.name
        folder.mkdir(parents=True)
        (folder / "file").write_text(text)
        return folder

    def end(source, place):
        if place == target:
            raise Killed
        replace(source, place)

    publish(written("old"), target)
    monkeypatch.setattr(os, "replace", end)
    with pytest.raises(Killed):
        publish(written("new"), target)
    monkeypatch.undo()
    assert not target.exists()
    if then == "find":
        assert find_checkpoint(tmp_path) == target
    elif then == "name":
        check_whole(target)
    else:
        start(tmp_path, max_steps=1).train()
        target = tmp_path / "earlier-run-1" / target.name
    assert (target / "file").read_text() == "old" and fault_of(target) is None


def test_checksums_are_written_and_read_on_request_alone(run_dir, monkeypatch, caplog):
    """Sizes tell a torn checkpoint; a file whose content has changed is known by the checksums of its checkpoint."""
    read, checksum = [], zlib.crc32
    monkeypatch.setattr(checkpoint.zlib, "crc32", lambda *args: read.append(args) or checksum(*args))
    newest, before = run_dir / "checkpoint-10", run_dir / "checkpoint-2"
    assert find_checkpoint(run_dir) == find_checkpoint(run_dir, checksums=True) == newest
    check_whole(newest)
    assert read == []
    checkpoint.add_checksums(newest)
    assert len(read) > 5 and find_checkpoint(run_dir, checksums=True) == newest
    flip(newest / "model.safetensors")
    assert find_checkpoint(run_dir) == newest and find_checkpoint(run_dir, checksums=True) == before
    assert f"Skipped {newest}" in caplog.text and "model.safetensors is not what was written" in caplog.text
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was written"):
        checkpoint.add_checksums(newest)


def test_a_checkpoint_with_checksums_is_found_and_resumed(runs, run_dir):
    """The manifest lists `bytes` and `crc32` of each file."""
    folder = run_dir / "checkpoint-2"
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json"]
    listed = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "crc32": zlib.crc32(file.read_bytes())}
        for file in files
    }
    (folder / "manifest.json").write_text(json.dumps({"files": listed}, indent=1))
    shutil.rmtree(run_dir / "checkpoint-10")
    assert find_checkpoint(run_dir) == find_checkpoint(run_dir, checksums=True) == folder
    resumed = start(run_dir, **SETTINGS["full"][1])
    resumed.train(resume_from_checkpoint=True)
    assert_same(runs("full"), resumed)


def test_machines_with_output_folders_of_their_own_are_refused(tmp_path, monkeypatch):
    start(tmp_path, max_steps=1).train()
    check_shared(tmp_path, True)
    assert not list(tmp_path.glob(".shared-*"))
    elsewhere = tmp_path / "other machine"
    monkeypatch.setattr(checkpoint, "_PROBE_SECONDS", 0.2)
    probe = elsewhere / "probe"
    monkeypatch.setattr(checkpoint, "gather_object", lambda seen: [*seen, seen[0] and checkpoint._appears(probe)])
    with pytest.raises(CheckpointSaveError, match=r"run of 2 processes, 1 of which do not see.*all machines share"):
        check_shared(tmp_path, True)
    trainer = start(tmp_path, max_steps=1)
    trainer.accelerator = SimpleNamespace(
        num_processes=2, is_main_process=True, unwrap_model=trainer.accelerator.unwrap_model
    )
    with pytest.raises(CheckpointSaveError, match="run of 2 processes"):
        trainer.train()


def test_torn_checkpoints_are_cleared_away_first(run_dir):
    DAMAGE["is missing"](run_dir / "checkpoint-10")
    clear_away(run_dir, None, set())
    clear_away(run_dir, 3, set())
    assert len(list(run_dir.glob("checkpoint-*"))) == 3
    clear_away(run_dir, 2, {run_dir / "checkpoint-1"})
    assert {path.name for path in run_dir.iterdir()} == {"checkpoint-1", "checkpoint-2"}
    clear_away(run_dir, 1, {run_dir / "checkpoint-1"})
    assert {path.name for path in run_dir.iterdir()} == {"checkpoint-1"}


def test_a_limit_keeps_the_last_and_the_best(tmp_path):
    """The best one is identified by its final place, not by where it was written."""
    trainer = start(
        tmp_path, max_steps=3, save_total_limit=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True, per_device_eval_batch_size=4,
    )  # fmt: skip
    losses = iter([1.0, 3.0, 2.0])
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: {**evaluate(*args, **kwargs), "eval_loss": next(losses)}
    kept = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            kept.append({path.name for path in tmp_path.glob("checkpoint-*")})

    trainer.add_callback(Look())
    trainer.train()
    assert kept == [{"checkpoint-1"}, {"checkpoint-2"}, {"checkpoint-2", "checkpoint-3"}]
    best = str(tmp_path / "checkpoint-2")
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == trainer.state.best_model_checkpoint == best


def test_a_pushed_checkpoint_is_in_its_final_place(tmp_path, monkeypatch):
    pushed = []

    def push(self, folder):
        pushed.append((folder, fault_of(Path(folder))))

    monkeypatch.setattr(HubPublisher, "push_checkpoint", push)
    trainer = start(tmp_path, max_steps=1)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "create_model_card", lambda **kwargs: None)
    trainer.train()
    assert pushed == [(str(tmp_path / "checkpoint-1"), None)]


# Another run


def another_base():
    return tiny_model(TOKENIZER, seed=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": lambda: tiny_model(TOKENIZER, hidden_size=64)}, r"model: hidden_size \(value\): 32 .* 64 here"),
        ({"model": lambda: tiny_model(TOKENIZER, num_hidden_layers=3)}, r"model: num_hidden_layers \(value\): 2 .* 3"),
        ({"model": another_base}, r"model: frozen weights \(checksum of content\)"),
        ({"lora": LoraConfig(r=8, target_modules=["q_proj", "v_proj"])}, r"adapter: r \(value\): 4 in .* 8 here"),
        ({"lora": LoraConfig(r=4, target_modules=["q_proj"])}, r"target_modules .*, 'v_proj'\] .*\['q_proj'\]"),
        ({"data": prompts(5, "goodbye")}, r"dataset: content \(checksum of content\)"),
        ({"data": prompts(6)}, r"dataset: rows \(value\): 5 in the checkpoint, 6 here"),
        ({"per_device_train_batch_size": 8}, r"batch: generation_batch_size.* Here `per_device_train_batch_size=4`"),
        ({"seed": 4}, r"batch: seed \(value\): 3 in the checkpoint, 4 here"),
        ({"num_generations": 2}, r"batch: num_generations \(value\): 4 in the checkpoint, 2 here"),
        ({"num_iterations": 1}, r"optimizer steps per rollout batch \(value\): 4\.0 in the checkpoint, 2\.0 here"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused(runs, tmp_path, changes, message):
    lora, options = SETTINGS["all"]
    given = {"lora": lora, **options, **changes}
    if "model" in given:
        given["model"] = given["model"]()
    other = start(tmp_path, **given)
    checkpoint = Path(runs("all").args.output_dir) / "checkpoint-4"
    with pytest.raises(CheckpointError, match=rf"{checkpoint}, which belongs to another run\. .*{message}"):
        other.train(resume_from_checkpoint=str(checkpoint))


def test_another_number_of_processes_is_accepted_between_rollout_batches(runs, tmp_path, caplog):
    """As far as one process can tell: what the checkpoint of two would say is written into a copy."""
    for step in (4, 5):
        folder = tmp_path / f"checkpoint-{step}"
        shutil.copytree(Path(runs("full").args.output_dir) / folder.name, folder)
        record = json.loads((folder / "run_identity.json").read_text())
        record["layout"]["processes"] = 2
        (folder / "run_identity.json").write_text(json.dumps(record))
        (folder / "manifest.json").unlink()
        publish(shutil.move(folder, tmp_path / UNFINISHED / folder.name), folder)
    with pytest.raises(CheckpointError, match=r"middle of a rollout batch.*processes \(value\): 2 .* 1 here.*of 4\."):
        start(tmp_path, **SETTINGS["full"][1]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    resumed = start(tmp_path, **SETTINGS["full"][1])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "Resumed with another layout" in caplog.text and resumed._step == 10


def test_a_checkpoint_in_an_unknown_form_is_refused_before_it_is_loaded(runs, tmp_path):
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(Path(runs("full").args.output_dir) / folder.name, folder)
    tensors = load_file(folder / "progress_0.safetensors")
    save_file(tensors, folder / "progress_0.safetensors", {"progress": json.dumps({"step": 5, "packs": None})})
    (folder / "manifest.json").unlink()
    publish(shutil.move(folder, tmp_path / UNFINISHED / folder.name), folder)
    resumed = start(tmp_path, **SETTINGS["full"][1])
    before = {name: tensor.clone() for name, tensor in resumed.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"{folder}, which another version of trl_toolgrpo wrote.*has no state"):
        resumed.train(resume_from_checkpoint=str(folder))
    assert all(torch.equal(tensor, before[name]) for name, tensor in resumed.model.state_dict().items())
    assert find_checkpoint(tmp_path) == folder, "nothing was moved"


def test_another_number_of_processes_is_refused_with_deepspeed(runs, tmp_path):
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(Path(runs("full").args.output_dir) / folder.name, folder)
    record = json.loads((folder / "run_identity.json").read_text())
    record["layout"]["processes"] = 2
    (folder / "run_identity.json").write_text(json.dumps(record))
    resumed = start(tmp_path, **SETTINGS["full"][1])
    resumed.is_deepspeed_enabled = True
    resumed.checkpoints._identity = describe_run(resumed.args, resumed.model, resumed.train_dataset)
    with pytest.raises(CheckpointError, match="whose optimizer states are divided over 2 processes, in 1"):
        resumed.checkpoints._check_same_run(folder)


def test_a_checkpoint_of_the_model_alone_says_that_the_rest_begins_anew(tmp_path, caplog):
    options = {"save_only_model": True, "steps_per_generation": 1, "num_iterations": 1}
    start(tmp_path, max_steps=1, **options).train()
    start(tmp_path, max_steps=2, **options).train(resume_from_checkpoint=True)
    assert "was written with `save_only_model=True`: optimizer, learning rate" in caplog.text


@pytest.mark.parametrize(
    ("source", "own", "expected"),
    [  # rollout batch, processes, micro-batches in one batch and in one step; micro-batch, processes
        ((64, 1, 1, 1), (64, 1), None),  # the same
        ((64, 2, 1, 1), (32, 2), None),
        ((128, 2, 1, 1), (64, 1), (64, 2, 2)),
        ((64, 1, 1, 1), (64, 2), (32, 1, 1)),
        ((64, 1, 4, 2), (16, 4), (8, 1, 2)),  # two optimizer steps for each batch as before
        ((96, 3, 4, 4), (8, 1), (8, 12, 12)),
        ((96, 1, 1, 1), (64, 4), (24, 1, 1)),
        ((10, 1, 1, 1), (10, 4), None),  # 10 rows cannot be dealt out to 4
    ],
)
def test_batches_keep_their_size_with_other_processes(tmp_path, source, own, expected):
    size, processes, steps, accumulated = source
    layout = {"processes": processes, "steps_per_generation": steps, "gradient_accumulation_steps": accumulated}
    stored = {"batch": {"generation_batch_size": size}, "layout": layout}
    (tmp_path / "run_identity.json").write_text(json.dumps(stored))
    micro_batch, world = own
    asked = SimpleNamespace(
        per_device_train_batch_size=micro_batch, world_size=world, generation_batch_size=micro_batch * world,
        steps_per_generation=1, gradient_accumulation_steps=1,
    )  # fmt: skip
    found = keep_batch_size(tmp_path, asked)
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    assert found == ({} if expected is None else dict(zip(names, expected, strict=True)))
    if found:
        assert found["per_device_train_batch_size"] * world * found["steps_per_generation"] == size
        assert found["steps_per_generation"] * accumulated == found["gradient_accumulation_steps"] * steps
    (tmp_path / "run_identity.json").unlink()
    assert keep_batch_size(tmp_path, asked) == {}


def test_a_run_is_described_by_model_adapter_and_data(tokenizer):
    streamed = prompts(5).to_iterable_dataset()
    assert describe_dataset(streamed) == {"columns": ["prompt"]}
    assert describe_dataset(prompts(200)) == describe_dataset(prompts(200)) != describe_dataset(prompts(200, "x"))
    assert describe_dataset(Dataset.from_dict({"prompt": []}))["rows"] == 0
    one, other = describe_model(tiny_model(tokenizer)), describe_model(tiny_model(tokenizer, seed=1))
    assert one == other and one["frozen weights"] is None  # what is trained is in the checkpoint
    found = list(differences({"modules_to_save": None, "r": 4}, {"modules_to_save": ["x"], "r": 4, "new": 1}))
    assert found == ["modules_to_save (value): None in the checkpoint, ['x'] here"]
    assert describe_adapter(LORA.to_dict())["target_modules"] == ["q_proj", "v_proj"]


def noisy(batch):
    """Another text each time a row is read."""
    says = [[{"role": "user", "content": f"{row[0]['content']} {random.random()}"}] for row in batch["prompt"]]
    return {**batch, "prompt": says}


def test_a_data_set_with_a_random_transform_is_resumed(tmp_path):
    data = prompts(5)
    start(tmp_path, data=data.with_transform(noisy), max_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed = start(tmp_path, data=data.with_transform(noisy), max_steps=3)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 3
    other = start(tmp_path, data=prompts(5, "other").with_transform(noisy), max_steps=3)
    with pytest.raises(CheckpointError, match="content"):
        other.train(resume_from_checkpoint=checkpoint)


def test_a_data_set_is_known_by_what_is_stored(tmp_path):
    from datasets import Features, Image, Value

    def pictures(folder, shades, embed=False):
        folder.mkdir(exist_ok=True)
        paths = [str(folder / f"{number}.png") for number in range(len(shades))]
        for path, shade in zip(paths, shades, strict=True):
            Path(path).write_bytes(bytes([shade]))  # no picture: it is never decoded
        held = [{"bytes": Path(path).read_bytes(), "path": None} if embed else path for path in paths]
        features = Features({"prompt": Value("string"), "image": Image()})
        return Dataset.from_dict({"prompt": ["a"] * len(shades), "image": held}, features=features)

    one = describe_dataset(pictures(tmp_path / "a", [1, 2, 3]))
    assert one == describe_dataset(pictures(tmp_path / "b", [1, 2, 3]))  # the same files on another machine
    embedded = [describe_dataset(pictures(tmp_path / "c", shades, True)) for shades in ([1, 2], [1, 2], [1, 3])]
    assert embedded[0] == embedded[1] != embedded[2]
    rows = prompts(40)
    assert describe_dataset(rows.with_transform(noisy)) == describe_dataset(rows) == describe_dataset(
        rows.with_format("torch")
    )
    shuffled = rows.shuffle(seed=1)
    assert describe_dataset(shuffled) == describe_dataset(rows.shuffle(seed=1).with_transform(noisy))
    assert describe_dataset(shuffled) != describe_dataset(rows) != describe_dataset(rows.select(range(39, -1, -1)))
    assert describe_dataset(rows.select(range(30))) != describe_dataset(rows.select(range(1, 31)))
    stream = rows.to_iterable_dataset()
    assert describe_dataset(stream) == describe_dataset(stream.shuffle(seed=2))


# Nowhere to write to


@pytest.fixture
def small_files():
    """Limit the size of files for real, as a full disk would: `limit(bytes)`; 0 lifts it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size or before[0], before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_run_goes_on_when_a_checkpoint_cannot_be_written(tmp_path, monkeypatch, caplog, small_files, name):
    """The disk takes all but the last byte of a file; the checkpoint before stays, the next one is made."""
    trainer = start(tmp_path, max_steps=3)
    save = GRPOTrainer._save_checkpoint

    def on_a_full_disk(self, *args):
        if self.state.global_step == 2:
            small_files((tmp_path / "checkpoint-1" / name).stat().st_size - 1)
        try:
            save(self, *args)
        finally:
            small_files(0)

    monkeypatch.setattr(GRPOTrainer, "_save_checkpoint", on_a_full_disk)
    with caplog.at_level(logging.ERROR):
        trainer.train()
    logs = {"rollouts", "metrics.jsonl", "run.json"}
    assert {path.name for path in tmp_path.iterdir()} - logs == {"checkpoint-1", "checkpoint-3", "README.md"}
    assert fault_of(tmp_path / "checkpoint-1") is None and fault_of(tmp_path / "checkpoint-3") is None
    assert f"{tmp_path / 'checkpoint-2'} could not be written: " in caplog.text
    assert "tries again at the next checkpoint" in caplog.text


def test_a_checkpoint_that_could_not_be_replaced_is_put_back(tmp_path, monkeypatch, caplog):
    trainer, replace = start(tmp_path, max_steps=1), os.replace
    trainer.train()

    def full(source, place):
        if Path(place) == tmp_path / "checkpoint-1" and UNFINISHED in str(source) and "replaced" not in str(source):
            raise OSError(28, "No space left on device")
        replace(source, place)

    monkeypatch.setattr(os, "replace", full)
    trainer.state.max_steps, trainer.control.should_training_stop = 9, False
    with caplog.at_level(logging.ERROR):
        trainer._save_checkpoint(trainer.model, None)
    assert "Checkpoints that were there before are still valid" in caplog.text
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-1" and not (tmp_path / UNFINISHED).exists()


def test_checkpoints_that_cannot_be_removed_do_not_end_the_run(tmp_path, monkeypatch, caplog):
    taken = tmp_path / "checkpoint-1"
    monkeypatch.setattr("trl_toolgrpo.checkpoints.resume.clear_away", lambda *args: os.mkdir(taken))
    trainer = start(tmp_path, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2 and "beyond `save_total_limit` could not be removed" in caplog.text


def test_a_checkpoint_without_the_part_of_a_process_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_PROBE_SECONDS", 0.2)
    (tmp_path / "progress_0.safetensors").touch()
    checkpoint.check_parts(tmp_path, 1)
    with pytest.raises(OSError, match=r"the part of process 1 \(progress_1\.safetensors\) cannot be seen"):
        checkpoint.check_parts(tmp_path, 2)


def in_flat_form(folder):
    """Write the states of the parts as version 0.1.0 did: one record, and tensors by prefix."""
    file = folder / "progress_0.safetensors"
    with safe_open(file, "pt") as stored:
        states = _with_tensors(json.loads(stored.metadata()["states"]), load_file(file))
    place, ratios, carried = states["place"], states["ratios"], states["carried metrics"]
    tensors = {"loss": place["loss"], **{f"ratio/{name}": tensor for name, tensor in ratios.items()}}
    batches = []
    for index, batch in enumerate(place["batches"]):
        batches.append({name: value for name, value in batch.items() if not isinstance(value, torch.Tensor)})
        found = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        tensors |= {f"batch/{index}/{name}": value for name, value in found.items()}
    record = {
        "step": place["step"], "batches": batches, "metrics": place["metrics"], "last_logged": place["last_logged"],
        "carried": carried["of_batch"], "forced_shares": carried["forced"], "packs": states["packing"]["active"],
        "unmoved": states["reference"]["unmoved"], "sync_report": states["reference"]["report"],
    }  # fmt: skip
    save_file(tensors, file, {"progress": json.dumps(record)})


@pytest.mark.parametrize("step", [3, 4])
def test_a_checkpoint_of_version_0_1_0_is_resumed_to_the_bit(runs, tmp_path, step):
    whole, (lora, changes) = runs("all"), SETTINGS["all"]
    folder, staged = tmp_path / f"checkpoint-{step}", tmp_path / UNFINISHED / f"checkpoint-{step}"
    shutil.copytree(Path(whole.args.output_dir) / folder.name, staged)
    in_flat_form(staged)
    (staged / "run_identity.json").rename(staged / "run.json")  # as 0.1.0 called it
    (staged / "manifest.json").unlink()
    publish(staged, folder)
    resumed = start(tmp_path, lora=lora, **changes)
    resumed.train(resume_from_checkpoint=str(folder))
    assert_same(whole, resumed)


def test_the_last_checkpoint_has_to_be_written(tmp_path, monkeypatch):
    trainer = start(tmp_path, max_steps=2)
    save = torch.save

    def full(*args, **kwargs):
        if trainer.state.global_step == 2:
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointSaveError, match=r"No space left on device.*trainer\.save_model\(folder\)"):
        trainer.train()
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-1" and not (tmp_path / UNFINISHED).exists()


def test_a_run_whose_last_checkpoint_fails_leaves_its_model_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    trainer = start(tmp_path / "run", max_steps=1)

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.run, "state_dict", full)
    with pytest.raises(CheckpointSaveError, match=r"No space left.*was written to .*; `hf upload run ") as refused:
        trainer.train()
    kept = Path(re.search(r"written to (\S+) instead", str(refused.value))[1])
    assert kept.is_relative_to(tmp_path / "elsewhere") and (kept / "model.safetensors").is_file()


def test_a_bug_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    trainer = start(tmp_path, max_steps=1)
    monkeypatch.setattr(trainer.run, "state_dict", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path):
    trainer = start(tmp_path)
    (tmp_path / UNFINISHED).write_text("in the way")
    with pytest.raises(CheckpointSaveError, match=r"Nothing can be written to `output_dir`.*has not started"):
        trainer.train()
    assert trainer.state.global_step == 0
    start(tmp_path, save_strategy="no", max_steps=1).train()


# Killed


@pytest.mark.long
def test_a_run_that_is_killed_again_and_again_is_the_same(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "kills.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "4", "--steps", "16", "--seed", "0"],
        capture_output=True, text=True, timeout=250, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["by_phase"] == {"rollout": 1, "update": 1, "sync": 1, "save": 1}
    assert found["tensors"] > 40 and found["value_head_tensors"] == 4 and found["reference_tensors"] == 6
    assert found["log_entries"] == 17 and found["rollouts_by_uses"] == {"2": 32}
    assert (found["tensors_differ"], found["entries_differ"], found["uses_differ"]) == (0, 0, 0)
    assert found["restart_to_first_step_seconds"] < 20
