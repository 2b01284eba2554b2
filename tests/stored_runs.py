"""Metrics of real runs, kept in one small file or read from output folders, for the health rules to judge."""

import gzip
import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import torch

from trl_toolgrpo import ToolGRPOConfig, Trajectory
from trl_toolgrpo.config.fields import default_values
from trl_toolgrpo.monitoring.health.monitor import RunFacts
from trl_toolgrpo.monitoring.health.rollout_rules import DISTINCT, SHORTCUTS, correlation_within_groups, costs
from trl_toolgrpo.monitoring.health.watch import facts_of
from trl_toolgrpo.run_folder.files import METRICS, RUN, read_lines
from trl_toolgrpo.run_folder.rollout_log import FOLDER, find_files, log_files, read_table, rows_of


STORED = Path(__file__).parent / "data" / "healthy_runs.jsonl.gz"

_READ = (
    "step", "loss", "grad_norm", "kl", "entropy", "learning_rate", "reward", "reward_std", "frac_reward_zero_std",
    "policy/moved", "completions/mean_length", "completions/clipped_ratio", "rollout/tokens_per_second",
    "rollout/tool_wait_fraction", "forced/fraction", "forced/loss", "ref/syncs", "ref/tensors_differ", "ref/kl",
    "ratio/mean", "ratio/std", "sampling/logp_diff_mean", "sampling/logp_diff_max", *SHORTCUTS.values(),
)  # fmt: skip
_ENDINGS = ("/calls", "/errors", "/timeouts", "/latency_p50", "/latency_p95")


def _is_read(name):
    return name in _READ or name.startswith(("value/", "rollout/stop/")) or (
        name.startswith("tools/") and (name.count("/") == 1 or name.endswith(_ENDINGS))
    )  # fmt: skip


def _short(value):
    return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else value


def stored(name, entries, facts):
    """A run as it is kept: for each metric that rules read, its value in each step."""
    steps = [entry for entry in entries if "loss" in entry]
    names = sorted({name for entry in steps for name in entry if _is_read(name)})
    missing = {name: [place for place, entry in enumerate(steps) if name not in entry] for name in names}
    return {
        "name": name,
        "facts": {key: value for key, value in asdict(facts).items() if value != getattr(RunFacts(), key)},
        "metrics": {name: [_short(entry.get(name)) for entry in steps] for name in names},
        "missing": {name: places for name, places in missing.items() if places},
    }


def collapsed(run):
    """Whether a run was destroyed by its own updates: three rollout batches in a row earn next to nothing."""
    rewards = [value for value in run["metrics"]["reward"] if value is not None]
    return any(max(rewards[place : place + 3]) <= 0.08 for place in range(len(rewards) - 2))


def keep(runs, path=STORED):
    """Store runs, each as of [`stored`], in place of those of the same names."""
    runs = {run["name"]: run for run in [*_read(path), *runs]}
    text = "".join(json.dumps(run, separators=(",", ":")) + "\n" for run in runs.values())
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def _read(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()] if path.is_file() else []


def load(path=STORED):
    """Runs that are stored: the name, the metrics of each step and the facts of each."""
    for run in _read(path):
        columns, missing = run["metrics"], run["missing"]
        entries = [
            {name: values[place] for name, values in columns.items() if place not in missing.get(name, ())}
            for place in range(len(columns["step"]))
        ]
        yield run["name"], entries, RunFacts(**run["facts"])


def read_folder(folder, dtype=torch.float32):
    """
    Name, metrics and facts of a run from its output folder.

    How reward follows length and repeated calls is computed anew from its rollouts, where they were logged.
    """
    folder = Path(folder)
    entries = [entry for entry in read_lines(folder / METRICS) if "loss" in entry]
    settings = json.loads((folder / RUN).read_text())["config"]
    known = default_values().keys() - {"generation_batch_size"}
    settings = {name: value for name, value in settings.items() if name in known}
    facts = facts_of(ToolGRPOConfig(**settings), torch.nn.Linear(1, 1, dtype=dtype))
    by_step = {entry["step"]: entry for entry in entries}
    paths = log_files(folder) if find_files(folder / FOLDER) else []
    for path in paths:
        rows = list(rows_of(read_table(path)))
        entry = by_step.get(rows[0]["step"] + 1)
        if entry is None:
            continue
        rewards = [math.nan if row["reward"] is None else row["reward"] for row in rows]
        every = zip(*(costs(_trajectory(row)) for row in rows), strict=True)
        for (cost, metric), values in zip(SHORTCUTS.items(), every, strict=True):
            entry.pop(metric, None)
            found = correlation_within_groups(rewards, values, facts.generations, DISTINCT[cost])
            if found is not None:
                entry[metric] = found
    return folder.name, entries, facts


def _trajectory(row):
    return Trajectory.from_dict({field.name: row[field.name] for field in fields(Trajectory)})
