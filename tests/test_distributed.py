"""Several real processes: nothing waits for a count that only one of them has."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).parent


def launch(script, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, str(HERE / script), *arguments], capture_output=True, text=True, timeout=150, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_unequal_rollouts_of_a_sharded_policy_end():
    output = launch("fsdp_rollout.py")
    assert "rank 0 done" in output and "rank 1 done" in output


@pytest.mark.slow
def test_references_of_several_processes(tmp_path):
    """A sharded adapter (FSDP2) is copied, stored and restored; a DDP run syncs alike in both processes."""
    output = launch("reference_processes.py", str(tmp_path))
    found = [json.loads(line) for line in output.splitlines() if line.startswith('{"sharded')]
    assert len(found) == 2 and found[0] == found[1]
    assert found[0]["sharded"]["differ"] == [] and found[0]["sharded"]["tensors"] == 8
    assert found[0]["syncs"] == 2 and found[0]["differ"] == 0


@pytest.mark.slow
def test_unequal_tool_counts_train_together(tmp_path):
    output = launch("ddp_training.py", str(tmp_path))
    found = json.loads(next(line for line in output.splitlines() if line.startswith('{"tools')))
    assert found == {
        "tools/call_frequency": 0.75,  # 6 calls in 8 rollouts
        "tools/add/calls": 6.0,
        "rollout/turns_mean": 14 / 8,
        "forced/fraction": 0.0,
    }
