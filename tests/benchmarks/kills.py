"""
A run that is killed many times compared with an undisturbed one: `python tests/benchmarks/kills.py --kills 30`.

A run with LoRA, a value head, a merged reference that is synced, tools that take a random time and rollout batches
that feed four optimizer steps each saves a checkpoint at every step. It is killed with SIGKILL at random moments of
its rollouts, updates, syncs and saves, resumed each time, and compared with an undisturbed run: weights, value head,
reference, every logged figure except times, and which rollouts fed which step. Imports are not counted in the times,
since the processes are forked from one that has done them.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from conftest import chat_tokenizer, config, prompts, tiny_model
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from trl_toolgrpo import ToolGRPOTrainer, find_checkpoint


PHASES = ("rollout", "update", "sync", "save")
# Figures of the clock and of the process itself. All others must agree to the last bit.
TIMES = ("time", "seconds", "latency", "per_second", "wait", "runtime", "train_loss", "total_flos", "max_abs_diff")


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: First.
        b: Second.
    """
    time.sleep(random.SystemRandom().random() * 0.03)
    return a + b


def reward(completion_ids: list, **kwargs) -> list[float]:
    """Return rewards that differ within a group, whatever the model writes."""
    return [float((7 * len(ids) + sum(ids)) % 11) for ids in completion_ids]


class Run(ToolGRPOTrainer):
    """Marks each phase when it begins, and logs which rollouts fed each step."""

    def __init__(self, tell, folder, steps):
        self.tell, self.used = tell, []
        tokenizer = chat_tokenizer("qwen3_instruct_2507")
        options = {
            "max_steps": steps, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2,
            "learning_rate": 5e-3, "steps_per_generation": 2, "num_iterations": 2, "max_completion_length": 120,
            "beta": 0.05, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5,
            "advantage_estimator": "gae", "force_rate": 0.5, "force_level": "schema",
            "disable_forcing_in_updates": False, "deterministic_rollouts": True, "seed": 3,
        }  # fmt: skip
        super().__init__(
            tiny_model(tokenizer), reward, config(folder, **options), prompts(7), processing_class=tokenizer,
            tools=[add], callbacks=[_Step(tell)],
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1),
        )  # fmt: skip
        self.rollouts.sample = self._told("rollout", self.rollouts.sample)
        self.reference.sync = self._told("sync", self.reference.sync)

    def _told(self, phase, method):
        def told(*args):
            self.tell(phase)
            return method(*args)

        return told

    def _save_checkpoint(self, *args):
        self.tell("save")
        super()._save_checkpoint(*args)

    def training_step(self, model, inputs, *args):
        self.tell("update")
        return super().training_step(model, inputs, *args)

    def _compute_loss(self, model, inputs):
        rows = zip(inputs["rollout"].tolist(), inputs["completion_ids"].tolist(), strict=True)
        self.used += [hashlib.sha1(repr((self._step // 4, *row)).encode()).hexdigest()[:10] for row in rows]
        return super()._compute_loss(model, inputs)

    def log(self, logs, start_time=None):
        logs["used"], self.used = " ".join(self.used), []
        super().log(logs, start_time)


class _Step(TrainerCallback):
    def __init__(self, tell):
        self.tell = tell

    def on_step_end(self, *args, **kwargs):
        self.tell("step")


def live(pipe, folder: str, steps: int) -> None:
    """Run one process, from its last checkpoint to the end of the run, unless it is killed."""
    log = os.open(f"{folder}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    trainer = Run(lambda phase: pipe.send((phase, time.perf_counter())), folder, steps)
    pipe.send(("loaded", time.perf_counter()))
    checkpoint = find_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    tensors = {f"policy/{name}": p.detach().clone() for name, p in trainer.model.named_parameters()}
    tensors |= {f"reference/{name}": tensor for name, tensor in trainer.reference.synced.state().items()}
    save_file(tensors, f"{folder}.safetensors")
    Path(f"{folder}.json").write_text(json.dumps(trainer.state.log_history))


def follow(context, folder: str, steps: int, stop) -> list[tuple[str, float]]:
    """Start a process and watch it until it ends; `stop(marks)` may return after how many seconds to kill it."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=live, args=(sender, folder, steps))
    process.start()
    sender.close()
    marks: list[tuple[str, float]] = []
    while True:
        try:
            marks.append(receiver.recv())
        except EOFError:
            break
        delay = stop(marks)
        if delay is not None:
            time.sleep(delay)
            process.kill()
            process.join()
            return [*marks, ("killed", time.perf_counter())]
    process.join()
    if process.exitcode:
        raise SystemExit(f"A process failed by itself: {Path(f'{folder}.log').read_text()[-3000:]}")
    return marks


def durations(marks: list[tuple[str, float]]) -> dict[str, float]:
    """Return about how long each phase takes, up to the next mark."""
    pairs = list(itertools.pairwise(marks))
    found = {phase: [after - at for (name, at), (_, after) in pairs if name == phase] for phase in PHASES}
    return {phase: sum(times) / len(times) for phase, times in found.items()}


def compare(one: Path, other: Path) -> dict[str, int]:
    """Return what differs between the results of two runs, and how much was compared."""
    tensors = [load_file(f"{folder}.safetensors") for folder in (one, other)]
    logs = [json.loads(Path(f"{folder}.json").read_text()) for folder in (one, other)]
    assert tensors[0].keys() == tensors[1].keys()
    wrong = [name for name, tensor in tensors[0].items() if not torch.equal(tensor, tensors[1][name])]
    logs = [[{k: v for k, v in e.items() if not any(w in k for w in TIMES)} for e in log] for log in logs]
    figures = sum(map(len, logs[0]))
    used = [" ".join(entry["used"] for entry in log).split() for log in logs]
    return {
        "tensors": len(tensors[0]), "tensors_differ": len(wrong),
        "value_head_tensors": sum("value_head" in name for name in tensors[0]),
        "reference_tensors": sum(name.startswith("reference/") for name in tensors[0]),
        "log_entries": len(logs[0]), "figures": figures,
        "entries_differ": abs(len(logs[0]) - len(logs[1])) + sum(a != b for a, b in zip(*logs, strict=False)),
        "rollout_uses": len(used[0]), "uses_differ": int(used[0] != used[1]),
        "rollouts": len(set(used[1])), "rollouts_by_uses": dict(Counter(Counter(used[1]).values())),
    }  # fmt: skip


def measure(folder: Path, kills: int, steps: int, seed: int) -> dict:
    """Run it undisturbed and killed, and compare the results."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "trl_toolgrpo", "peft", "llguidance"])
    draw = random.Random(seed)
    typical = durations(follow(context, str(folder / "undisturbed"), steps, lambda marks: None))
    done, restarts = dict.fromkeys(PHASES, 0), []
    while True:
        phase = PHASES[sum(done.values()) % len(PHASES)]
        occurrence = 1 + draw.randrange(2)

        def stop(marks, phase=phase, occurrence=occurrence):
            reached = marks[-1][0] == phase and sum(name == phase for name, _ in marks) == occurrence
            return draw.random() * typical[phase] if reached and sum(done.values()) < kills else None

        marks = follow(context, str(folder / "killed"), steps, stop)
        first = {name: at for name, at in reversed(marks)}
        if "step" in first:
            restarts.append(first["step"] - first["loaded"])
        if marks[-1][0] != "killed":
            break
        done[phase] += 1
    return {
        "kills": sum(done.values()), "by_phase": done, "steps": steps,
        "restart_to_first_step_seconds": round(max(restarts), 2),
        **compare(folder / "undisturbed", folder / "killed"),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=None, help="Optimizer steps; three for each kill by default.")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(Path(temporary), given.kills, given.steps or 3 * given.kills, given.seed)
    print(json.dumps({"seed": given.seed, **found}, indent=1))
