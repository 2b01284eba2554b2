"""An output folder like a run's, with made-up figures: for tests of the report and for measuring it.

Nothing in it was trained or sampled, and `run.json` says so.
"""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast


TOOLS = ("find_employee", "get_salary", "send_slack_message")
STOPS = ("stop", "stop", "stop", "stop", "length", "tool_limit", "parse_errors", "tool_overflow")
GROUP = 8


def save_tokenizer(folder, vocabulary):
    """A tokenizer of made-up words; the first few tokens are those a browser could stumble over."""
    words = ["</script><b>", "<|im_end|>\n", "\n", "  ", " \N{SNOWMAN}", "\\u003c"]
    words += [f" word{number}" for number in range(vocabulary - len(words))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[2]))
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


def rollout(random, vocabulary, prompt, place, turns, with_values):
    """One row of a rollout log: turns of sampled tokens, each but the last with a call and its result."""
    ids, tool_mask, forced_mask, records, called = [], [], [], [], []
    for turn in range(turns):
        start, written, answer = len(ids), int(random.integers(20, 80)), int(random.integers(20, 60))
        ids += (random.zipf(1.3, written) % vocabulary).tolist()
        tool_mask += [1] * written
        forced = 3 if random.random() < 0.05 else 0
        forced_mask += [1] * forced + [0] * (written - forced)
        record = {"start": start, "end": len(ids), "stop_reason": "stop", "tool_calls": [], "tool_results": []}
        record |= {"sample_seconds": float(random.exponential(0.4)), "tool_seconds": 0.01, "reward": None}
        if turn < turns - 1:
            name, bad = TOOLS[int(random.integers(len(TOOLS)))], bool(random.random() < 0.08)
            called.append(name)
            call = {"id": f"call_{turn}_0", "name": name, "arguments": {"number": turn}, "error": None}
            result = {"content": "made up", "is_error": bad, "error_type": "timeout" if bad else None, "reward": None}
            result |= {"transient": False, "truncated": False, "seconds": float(random.exponential(0.02))}
            record["tool_calls"], record["tool_results"] = [call], [result]
            ids += (random.zipf(1.3, answer) % vocabulary).tolist()
            tool_mask += [0] * answer
            forced_mask += [0] * answer
        records.append(record)
    count, sampled = len(ids), np.array(tool_mask) * (1 - np.array(forced_mask))
    reward = float(random.choice([0.0, 0.25, 0.5, 1.0]))
    figures = {
        "logprobs": np.where(sampled, -random.exponential(0.5, count), 0.0),
        "advantages": np.where(sampled, random.normal(reward - 0.4, 0.5, count), 0.0),
        "ratios": np.where(sampled, np.exp(random.normal(0.0, 0.05, count)), 1.0),
        "values": np.where(sampled, random.normal(0.4, 0.1, count), 0.0) if with_values else None,
    }
    return {
        **place,
        "prompt": json.dumps([{"role": "user", "content": "a question that was made up"}]),
        "messages": json.dumps([{"role": "assistant", "content": "made up"}]),
        "prompt_ids": prompt,
        "completion_ids": ids,
        "tool_mask": tool_mask,
        "forced_mask": forced_mask,
        "stop_reason": STOPS[int(random.integers(len(STOPS)))],
        "turns": json.dumps(records),
        "tools": called,
        "rewards": json.dumps({"made_up": reward}),
        "reward": reward,
        "assisted": False,
        **figures,
    }


def write_rollouts(path, rows, version=1):
    """One file of a rollout log."""
    kinds = {"logprobs": pyarrow.float32(), "advantages": pyarrow.float32(), "ratios": pyarrow.float32()}
    kinds |= {"values": pyarrow.float32(), "prompt_ids": pyarrow.int32(), "completion_ids": pyarrow.int32()}
    kinds |= {"tool_mask": pyarrow.int8(), "forced_mask": pyarrow.int8()}
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        columns[name] = pyarrow.array(values, type=pyarrow.list_(kinds[name]) if name in kinds else None)
    table = pyarrow.table(columns)
    note = json.dumps({"version": version})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(
        table.replace_schema_metadata({"trl_toolgrpo.rollout_log": note}), path, compression="zstd"
    )


def write_metrics(folder, steps, random):
    """Logged figures of a run that learns."""
    lines = []
    for step in range(1, steps + 1):
        share = step / steps
        entry = {"step": step, "time": 1.7e9 + 20 * step, "loss": float(random.normal(0, 0.02))}
        entry |= {"reward": 0.3 + 0.5 * share + float(random.normal(0, 0.03)), "ratio/mean": 1.0, "ratio/std": 0.03}
        entry |= {"kl": 0.02 * share, "grad_norm": float(random.exponential(0.5)), "entropy": 1.2 - 0.7 * share}
        entry |= {"completions/clipped_ratio": 0.3 - 0.2 * share, "tools/call_frequency": 2.0}
        entry |= {"tools/failure_frequency": 0.08, "tools/find_employee/calls": 40, "learning_rate": 1e-5}
        if step % 10 == 0:
            entry["eval_reward"] = 0.3 + 0.45 * share
        lines.append(json.dumps(entry))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def write_run(folder, rollouts=64, vocabulary=500, turns=4, per_file=64, prompt=120, with_values=True, seed=0):
    """
    A whole output folder.

    Args:
        folder: where to. rollouts, per_file: how many, and how many in each file. vocabulary: tokens. turns: most
        turns of a rollout. prompt: tokens of a prompt. with_values: whether there was a value head. seed: of it all.
    """
    folder, random = Path(folder), np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder, vocabulary)
    settings = {"version": 1, "model": "none: every figure here is made up", "tools": list(TOOLS)}
    settings |= {"config": {"learning_rate": 1e-5}, "versions": {}, "command": ["synthetic_run.py"]}
    (folder / "run.json").write_text(json.dumps(settings))
    write_metrics(folder, max(rollouts // per_file, 10), random)
    (folder / "health.jsonl").write_text("")
    head = random.integers(0, vocabulary, prompt - 10).tolist()
    rows = []
    for number in range(rollouts):
        if number % GROUP == 0:
            question = [*head, *random.integers(0, vocabulary, 10).tolist()]
        place = dict.fromkeys(("step", "batch"), number // per_file)
        place |= {"rollout": number % per_file, "group": number % per_file // GROUP}
        length = int(random.integers(1, turns + 1))
        rows.append(rollout(random, vocabulary, question, place, length, with_values))
        if len(rows) == per_file or number == rollouts - 1:
            write_rollouts(folder / "rollouts" / f"{place['step']:06d}-000.parquet", rows)
            rows = []
    return folder


def data_of(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html)[1])


def rollouts_of(html, run=0):
    """The rows of a run's list, by the names of their values."""
    data = data_of(html)
    return [dict(zip(data["fields"], row, strict=True)) for row in data["runs"][run]["rows"]]
