"""Training in several real processes: results agree, and no process waits for another in vain."""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


HERE = Path(__file__).parent


def launch(script, *arguments, processes=2, alone=None, **variables):
    """Run a script in several processes, and optionally alone at the same time; return what they print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]
    command = [sys.executable, *launcher]
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    environment["PYTHONFAULTHANDLER"] = "1"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    shared = {**options, "env": {**environment, **variables}}
    started = [subprocess.Popen([*command, str(HERE / script), *arguments], **shared)]
    if alone is not None:
        started.append(subprocess.Popen([sys.executable, str(HERE / script), *alone], **options))
    outputs = []
    try:
        for process in started:
            output, errors = process.communicate(timeout=150)
            assert process.returncode == 0, errors[-3000:]
            outputs.append(output)
    finally:
        for process in started:
            process.kill()
    return outputs[0] if alone is None else outputs


@pytest.mark.long
def test_unequal_rollouts_of_a_sharded_policy_do_not_hang():
    output = launch("fsdp_rollout.py")
    assert "rank 0 done" in output and "rank 1 done" in output


@pytest.mark.long
def test_references_are_equal_in_several_processes(tmp_path):
    """A sharded adapter (FSDP2) is copied, saved and restored; a DDP run makes the same syncs in both processes."""
    output = launch("reference_processes.py", str(tmp_path))
    found = [json.loads(line) for line in output.splitlines() if line.startswith('{"sharded')]
    assert len(found) == 2 and found[0] == found[1]
    assert found[0]["sharded"]["differ"] == [] and found[0]["sharded"]["tensors"] == 8
    assert found[0]["syncs"] == 2 and found[0]["differ"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.long)])
def test_unequal_tool_counts_train_together(tmp_path, processes):
    output = launch("ddp_training.py", str(tmp_path), processes=processes)
    found = json.loads(next(line for line in output.splitlines() if line.startswith('{"tools')))
    rollouts = 4 * processes
    assert found == {
        "tools/call_frequency": 6 / rollouts,
        "tools/add/calls": 6.0,
        "rollout/turns_mean": (6 + rollouts) / rollouts,
        "forced/fraction": 0.0,
    }


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_OFFLOAD_PARAMS": "false",
}  # fmt: skip
ZERO2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra deepspeed")


@pytest.mark.long
@pytest.mark.parametrize(
    ("variables", "kind"),
    [
        pytest.param(FSDP2, "FSDP", id="fsdp2"),
        pytest.param({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "FSDP", id="fsdp2 checkpointing"),
        pytest.param(ZERO2, "DEEPSPEED", id="zero2", marks=needs_deepspeed),
        pytest.param(ZERO3, "DEEPSPEED", id="zero3", marks=needs_deepspeed),
    ],
)
@pytest.mark.parametrize("policy", ["full", "lora"])
def test_a_sharded_run_trains_as_one_process_does_and_resumes(tmp_path, variables, kind, policy):
    """With a value head, on the CPU; FSDP2 as in `accelerate_configs/fsdp2.yaml`, DeepSpeed with its files' stages."""
    more = [policy] if policy == "lora" else []
    alone = [str(tmp_path / "one"), *more]
    outputs = launch("sharded_training.py", str(tmp_path / "two"), *more, alone=alone, **variables)
    two, one = (json.loads(output[output.index('{"losses"') :].splitlines()[0]) for output in outputs)
    assert two["type"] == kind and (two["sharded"] > 20) == (variables is not ZERO2) and two["fault"] is None
    assert (two["checkpointed"], two["packed"]) == ("FSDP_ACTIVATION_CHECKPOINTING" in variables, True)
    assert len(one["losses"]) == 4 and two["losses"] == pytest.approx(one["losses"], abs=1e-5, rel=0)
    assert two["resumed"] == two["losses"] and two["differ"] == 0.0
    if policy == "lora":
        assert two["reference"] == 0.0 and two["moved"] > 0 and two["syncs"] == [2, 2]
    assert len(one["norms"]) == 4 and two["norms"] == pytest.approx(one["norms"], rel=1e-4) and min(one["norms"]) > 0
    assert two["unsaved"] == ["checkpoint-4", "checkpoint-1"]  # the main process's disk was full in between


@pytest.mark.long
def test_two_processes_train_as_one_does(tmp_path):
    """The global batch is the same; with a value head, several steps on a batch, and unequal numbers of calls."""
    options = json.dumps({"steps_per_generation": 2, "advantage_estimator": "gae"})
    outputs = launch("same_training.py", str(tmp_path / "two"), options, alone=[str(tmp_path / "one"), options])
    two, one = (json.loads(output[output.index('{"losses"') :].splitlines()[0]) for output in outputs)
    assert len(one["losses"]) == 20 and two["losses"] == pytest.approx(one["losses"], abs=1e-5, rel=0)
    assert two["rewards"] == one["rewards"] and len(one["rewards"]) == 5
    assert any(first != second for first, second in zip(*two["calls"], strict=True))
    assert [first + second for first, second in zip(*two["calls"], strict=True)] == one["calls"][0]
    assert sum(one["calls"][0]) > 5


@pytest.mark.long
def test_a_group_in_two_processes_is_scored_as_in_one(tmp_path):
    """By an estimator that looks at a whole group; one of three groups is spread over both processes."""
    outputs = launch("estimator_processes.py", str(tmp_path / "two"), alone=[str(tmp_path / "one")])
    two, one = (json.loads(output[output.index('{"losses"') :].splitlines()[0]) for output in outputs)
    assert two["batches"] == one["batches"] and two["admitted"] == one["admitted"]
    assert len(one["batches"]) == 5 and {len(batch) for batch in one["batches"]} == {12}
    taken = [[bool(count) for _, count in batch] for batch in one["batches"]]
    shared = [batch[4:8] for batch in taken]  # each process has two of these rollouts
    assert [True] * 4 in shared and [False] * 4 in shared, "seeds give groups of both kinds"
    assert one["admitted"] == pytest.approx([sum(batch[::4]) / 3 for batch in taken])
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5, rel=0) and any(one["losses"])


@pytest.mark.long
def test_two_processes_resume_to_the_bit(tmp_path):
    """Each process restores its own rollouts, metrics and random numbers."""
    output = launch("resume_processes.py", str(tmp_path))
    found = [json.loads(line) for line in output.splitlines() if line.startswith('{"differ')]
    unsaved = ["checkpoint-3", "checkpoint-1"]  # the main process's disk was full at the second
    told = {"refused": True, "unsaved": unsaved, "blocked": True, "in_use": True}
    assert found == [{"differ": 0, "figures": True, "fault": None, **told}] * 2
    names = {path.name for path in (tmp_path / "whole" / "checkpoint-3").iterdir()}
    assert {"progress_0.safetensors", "progress_1.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= names


@pytest.mark.long
def test_each_process_starts_its_own_mcp_servers(tmp_path):
    """Shared servers are shared within a process; counts and restarts are summed over both processes."""
    output = launch("mcp_processes.py", str(tmp_path))
    found = json.loads(next(line for line in output.splitlines() if line.startswith('{"told')))
    (busy, crash), quiet = found["told"][0][:2], found["told"][1]
    assert busy[0].isdigit() and busy[1:] == ["done", "x"]
    assert "ended before it answered" in crash[0] and crash[1].isdigit() and crash[1] != busy[0]
    assert quiet == [[]] * 8
    assert found["tools/pid/calls"] == [4.0, 4.0] and found["tools/note/calls"] == [2.0, 2.0]
    assert found["tools/crash/errors"] == [2.0, 2.0] and sum(found["tools/mcp/shared/restarts"]) >= 2
