"""Checkpoints without a trainer: what states come back as, who gets them, and what is refused."""

import errno
import json
import logging
import shutil

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from bare_run import bare_run
from conftest import chat_tokenizer, prompts
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, IterableDataset
from trl.trainer.utils import RepeatSampler

from trl_toolgrpo import CheckpointError, CheckpointSaveError, ConfigError, find_checkpoint
from trl_toolgrpo.checkpoints.folder import UNFINISHED, fault_of, publish
from trl_toolgrpo.checkpoints.resume import Checkpoints


TOKENIZER = chat_tokenizer()


class Part:
    """A part with a state."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


@pytest.fixture
def make(tmp_path):
    """Return a function that makes a run of four micro-batches a rollout batch, and its checkpoints."""

    def made(of_run=None, of_process=None, **options):
        options = {
            "per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2,
            "max_steps": 9, **options,
        }  # fmt: skip
        run = bare_run(tmp_path, TOKENIZER, **options)
        run.train_dataset = prompts(5)
        return run, Checkpoints(run, {"one": Part(of_run)}, {"own": Part(of_process)})

    return made


def save(run, checkpoints, write=lambda: None, step=2, rescue=lambda: "It is lost."):
    """Write a checkpoint as the trainer does, at a step."""
    run.state.global_step = step

    def write_state():
        run.state.save_to_json(str(checkpoints.staging / f"checkpoint-{step}" / "trainer_state.json"))
        write()

    return checkpoints.save(write_state, None, also=lambda folder: None, keep=set(), rescue=rescue)


def parts_of(checkpoints):
    return checkpoints._of_run["one"], checkpoints._of_process["own"]


# States


def bits(dtype):
    """Tensors of a dtype, NaN and the sign of zero among them where there are any."""
    values = torch.tensor([0.0, -0.0, float("nan"), -float("inf"), 1 / 3]).to(dtype)
    return {"row": values, "scalar": values[-1], "none": values[:0], "turned": torch.stack([values, values]).T}


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)
def test_nested_states_come_back_to_the_bit(make, tmp_path, dtype):
    tensors = bits(dtype)
    plain = {"figures": [0.1, -0.0, 3, None, True], "words": "ä", "nothing": {}, "tensor": ["no", "tensor"]}
    state = {
        "deep": [{"er": [tensors, 1]}, {"tensor": {"a": 1}}],
        "a/b": tensors["row"], "a": {"b": tensors["row"].flip(0)},
    }  # fmt: skip
    run, checkpoints = make({**state, **plain}, plain)
    checkpoints.begin(None)
    save(run, checkpoints)
    run, checkpoints = make()
    folder = checkpoints.begin(str(tmp_path / "checkpoint-2"))
    checkpoints.load(folder)
    found, own = (part.state for part in parts_of(checkpoints))
    assert own == plain and {name: found[name] for name in plain} == plain
    assert found["deep"][0]["er"][1] == 1 and found["deep"][1] == {"tensor": {"a": 1}}
    pairs = [(found["a/b"], state["a/b"]), (found["a"]["b"], state["a"]["b"])]
    pairs += [(found["deep"][0]["er"][0][name], tensor) for name, tensor in tensors.items()]
    for tensor, expected in pairs:
        assert (tensor.dtype, tensor.shape, tensor.device) == (expected.dtype, expected.shape, expected.device)
        assert torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (tensor, expected)))


def test_the_place_in_a_rollout_batch_comes_back(make, tmp_path):
    run, checkpoints = make()
    checkpoints.begin(None)
    run.step, run.micro_batches = 6, [{"advantages": torch.tensor([float(n)]), "kind": "x"} for n in range(4)]
    run.training_metrics["reward"] += [1.0, 2.0]
    run.unlogged_loss, run.last_logged_step = torch.tensor(0.25), 1
    save(run, checkpoints, step=3)
    run, checkpoints = make()
    run.training_metrics["of an earlier run"].append(1.0)
    run.state.global_step = 3
    checkpoints.load(checkpoints.begin(str(tmp_path / "checkpoint-3")))
    assert (run.step, run.batch_number, run.micro_batch_index, run.batch_in_use) == (6, 1, 2, True)
    assert run.next_micro_batch == {"advantages": torch.tensor([2.0]), "kind": "x"}
    assert run.training_metrics == {"reward": [1.0, 2.0]}
    run.training_metrics["new"].append(1.0)
    data = DataLoader(range(3))
    assert checkpoints.begin_epoch(data, 0) and (run.unlogged_loss, run.last_logged_step) == (torch.tensor(0.25), 1)
    assert checkpoints.begin_epoch(data, 0) and run.unlogged_loss == 0.25, "it is taken up once"


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_order_of_the_data_is_that_of_the_epoch(make, processes):
    run, checkpoints = make()
    run.state.max_steps = 9
    sampler, undisturbed = (RepeatSampler(range(10), 1, seed=3) for _ in range(2))
    orders = [list(undisturbed) for _ in range(3)]
    data = DataLoader(range(10), batch_size=2, sampler=sampler)
    prepared = prepare_data_loader(data, num_processes=processes, process_index=0, put_on_device=False)
    assert checkpoints.begin_epoch(prepared, 2) and list(sampler) == orders[2]
    assert checkpoints.begin_epoch(DataLoader(Stream()), 2), "a stream has no order to be brought to"


def test_a_state_of_one_process_needs_the_same_layout(make, tmp_path, caplog):
    """The place is then as many rollout batches later as there were."""
    run, checkpoints = make("of all", "of one")
    checkpoints.begin(None)
    run.step = 8
    save(run, checkpoints, step=4)
    for options, own, step in (
        ({}, "of one", 8),
        ({"per_device_train_batch_size": 8, "steps_per_generation": 2, "gradient_accumulation_steps": 1}, "", 4),
        ({"per_device_train_batch_size": 2, "steps_per_generation": 8, "gradient_accumulation_steps": 4}, "", 16),
    ):
        run, checkpoints = make("", "", **options)
        run.state.global_step = 4
        checkpoints.load(checkpoints.begin(str(tmp_path / "checkpoint-4")))
        one, other = parts_of(checkpoints)
        assert (one.state, other.state, run.step) == ("of all", own, step)
    assert caplog.text.count("Resumed with another layout") == 2


def test_a_new_training_begins_anew(make, tmp_path):
    run, checkpoints = make()
    checkpoints.begin(None)
    save(run, checkpoints)
    run.step, run.micro_batches = 3, [{}]
    assert checkpoints.begin(None) is None and (run.step, run.micro_batches) == (0, None)
    assert not checkpoints.continues_folder and (tmp_path / "earlier-run-1" / "checkpoint-2").is_dir()


# Writes that fail


def full():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_torn_write_leaves_earlier_checkpoints(make, tmp_path, caplog):
    run, checkpoints = make({"figure": 1})
    checkpoints.begin(None)
    save(run, checkpoints)
    with caplog.at_level(logging.ERROR):
        save(run, checkpoints, full, step=3)
    assert "checkpoint-3 could not be written" in caplog.text and "The run goes on" in caplog.text
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-2" and not (tmp_path / UNFINISHED).exists()
    parts_of(checkpoints)[0].state = {"figure": 2}
    save(run, checkpoints, step=4)
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-4" and fault_of(tmp_path / "checkpoint-2") is None


def test_a_kill_while_writing_leaves_earlier_checkpoints(make, tmp_path, caplog):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    run, checkpoints = make({"figure": 1})
    checkpoints.begin(None)
    save(run, checkpoints)
    with pytest.raises(Killed):
        save(run, checkpoints, kill, step=3)
    assert checkpoints.staging is None and (tmp_path / UNFINISHED / "checkpoint-3").is_dir()
    run, checkpoints = make()
    checkpoints.load(checkpoints.begin(True))
    assert parts_of(checkpoints)[0].state == {"figure": 1} and checkpoints.continues_folder
    assert f"Skipped {tmp_path / UNFINISHED / 'checkpoint-3'}" in caplog.text


def test_the_last_checkpoint_has_to_be_written(make):
    run, checkpoints = make()
    checkpoints.begin(None)
    with pytest.raises(CheckpointSaveError, match=r"No space left.*It was written to a safe place\."):
        save(run, checkpoints, full, step=9, rescue=lambda: "It was written to a safe place.")


def test_a_state_that_is_no_plain_data_ends_the_run(make, tmp_path):
    run, checkpoints = make({"object": object()})
    checkpoints.begin(None)
    with pytest.raises(ConfigError, match=r"cannot keep .*, a object, as one/object"):
        save(run, checkpoints)
    assert find_checkpoint(tmp_path) is None


def test_a_push_waits_until_the_checkpoint_is_in_its_place(make, tmp_path):
    run, checkpoints = make()
    checkpoints.begin(None)
    assert not checkpoints.ask_for_push()
    asked = []
    assert save(run, checkpoints, lambda: asked.append(checkpoints.ask_for_push())) == tmp_path / "checkpoint-2"
    assert asked == [True] and save(run, checkpoints, step=3) is None


# Another form


def rewritten(tmp_path, change):
    """Change the states of a checkpoint, and make it whole again."""
    folder = tmp_path / "checkpoint-2"
    moved = tmp_path / UNFINISHED / folder.name
    moved.parent.mkdir(exist_ok=True)
    shutil.move(folder, moved)
    change(moved)
    publish(moved, folder)
    return folder


def as_before(folder):
    """What version 0.1.0 wrote: tensors of the batch by name, and one record."""
    batch = {"batch/0/completion_ids": torch.ones(4, 3, dtype=torch.int64), "loss": torch.tensor(0.0)}
    record = {"step": 2, "carried": {}, "packs": None, "unmoved": False, "batches": [{}], "metrics": {},
              "last_logged": 0, "forced_shares": [], "sync_report": None}  # fmt: skip
    save_file(batch, folder / "progress_0.safetensors", {"progress": json.dumps(record)})


def as_0_1_0(folder):
    as_before(folder)
    (folder / "run_identity.json").rename(folder / "run.json")


def without_a_part(folder):
    file = folder / "progress_0.safetensors"
    save_file(load_file(file), file, {"states": json.dumps({"place": {}, "one": None})})


@pytest.mark.parametrize(
    ("change", "missing"), [(as_before, "one, own"), (as_0_1_0, "one, own"), (without_a_part, "own")]
)
@pytest.mark.parametrize("named", [True, False])
def test_a_checkpoint_in_another_form_is_refused_by_name(make, tmp_path, change, missing, named):
    run, checkpoints = make()
    checkpoints.begin(None)
    save(run, checkpoints)
    folder = rewritten(tmp_path, change)
    run, checkpoints = make("kept")
    told = rf"{folder}, which another version .*progress_0\.safetensors has no state of {missing}\."
    with pytest.raises(CheckpointError, match=told) as refused:
        checkpoints.begin(str(folder) if named else True)
    assert "Resume with that version, or start a new run" in refused.value.remedy
    assert parts_of(checkpoints)[0].state == "kept"


# What the user has passed


class Counter:
    """Has a state of its own."""

    def __init__(self, state=None):
        self.state = {"count": 1, "baseline": torch.ones(2)} if state is None else state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


class OtherCounter(Counter):
    pass


def with_given(run, thing):
    return Checkpoints(run, {}, {}, {"advantage estimator": thing})


def test_the_state_of_what_was_passed_is_resumed_for_its_class_alone(make, tmp_path, caplog):
    run, _ = make()
    checkpoints = with_given(run, Counter({"count": 7, "pair": (1, 2), "baseline": torch.tensor([0.5])}))
    checkpoints.begin(None)
    save(run, checkpoints)
    for kind, count in ((Counter, 7), (OtherCounter, 1)):
        run, _ = make()
        run.state.global_step = 2
        given = kind()
        resumed = with_given(run, given)
        resumed.load(resumed.begin(str(tmp_path / "checkpoint-2")))
        assert given.state["count"] == count
        assert ("begins anew" in caplog.text) == (kind is OtherCounter)
        if kind is Counter:
            assert given.state["pair"] == [1, 2] and given.state["baseline"].device.type == "cpu"


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"per": {7: 0.3}}, "cannot keep 7, a int, as a key of .*Counter/per"),
        ({"seen": {1, 2}}, r"cannot keep \{1, 2\}, a set, as .*Counter/seen"),
        ({"rows": [1, object]}, "a type, as .*Counter/rows/1"),
    ],
)
def test_a_state_that_no_checkpoint_can_keep_is_refused_at_construction(make, state, named):
    with pytest.raises(ConfigError, match=named):
        with_given(make()[0], Counter(state))


def test_a_model_is_no_state(make):
    assert not with_given(make()[0], torch.nn.Linear(2, 2))._given
