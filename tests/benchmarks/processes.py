"""Throughput of rollouts in two processes on two cores, compared with one process pinned to one of them.

    python tests/benchmarks/processes.py

Each process samples and trains on as many rollouts per batch as the single one does, with a real SQLite tool, so that
two make twice as much. Runs of one and of two alternate. Figures are medians of the tokens per second of all
processes.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE))

WORKER = "--worker"


def worker(folder: str, steps: int, rollouts: int) -> None:
    """Run one process on a core of its own; the first process prints the figures of each step after the first."""
    rank = int(os.environ.get("RANK", "0"))
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})

    import torch
    from conftest import chat_tokenizer, config, tiny_model

    from trl_toolgrpo import ToolGRPOTrainer
    from trl_toolgrpo.recipes.workspace.environment import WorkspaceEnvironment
    from trl_toolgrpo.recipes.workspace.task import build_workspace

    torch.set_num_threads(1)
    tokenizer = chat_tokenizer()
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "head_dim": 64}
    task = build_workspace(256, 0)
    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer, **shape),
        lambda completion_ids, **kwargs: [float(sum(ids) % 11) for ids in completion_ids],
        config(
            folder, max_steps=steps, per_device_train_batch_size=rollouts, num_generations=8,
            max_completion_length=192, learning_rate=0.0, logprob_check="off",
        ),
        task.train,
        processing_class=tokenizer,
        environment_factory=WorkspaceEnvironment,
    )  # fmt: skip
    trainer.train()
    if rank == 0:
        log = [entry for entry in trainer.state.log_history if "rollout/tokens_per_second" in entry][1:]
        print(json.dumps([entry["rollout/tokens_per_second"] for entry in log]), flush=True)
    trainer.end()


def run(processes: int, steps: int, rollouts: int) -> list[float]:
    """Return the tokens per second of all processes together, for each step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, __file__, WORKER, folder, str(steps), str(rollouts)]
        output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(next(line for line in output.splitlines() if line.startswith("[")))


def main() -> None:
    """Alternate one and two processes, and print the ratio of their medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=16, help="Of each process and batch.")
    arguments = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("Two cores are needed.")
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(arguments.repeats):
        for processes, rates in found.items():
            rates += run(processes, arguments.steps, arguments.rollouts)
    one, two = (statistics.median(found[processes]) for processes in (1, 2))
    for processes, rates in found.items():
        middle = statistics.median(rates)
        print(f"{processes} process(es): {middle:.0f} tokens/s ({min(rates):.0f} to {max(rates):.0f})")
    print(f"two processes: {two / one:.2f}x of one", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        worker(sys.argv[2], *map(int, sys.argv[3:5]))
    else:
        main()
