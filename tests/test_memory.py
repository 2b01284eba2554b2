"""The estimate of memory: parameters counted by transformers, known answers, and real runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import chat_tokenizer, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from trl_toolgrpo import ConfigError, ModelShape, estimate_memory
from trl_toolgrpo.memory import QWEN3, memory_table


HERE = Path(__file__).parent


@pytest.mark.parametrize(("name", "published"), [("0.6B", 0.596e9), ("4B", 4.022e9), ("8B", 8.191e9)])
def test_parameters_are_those_of_the_real_models(name, published):
    """Counted by transformers, without the weights."""
    shape = QWEN3[name]
    fields = {key: value for key, value in vars(shape).items()}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**fields))
    assert ModelShape.from_config(model.config) == shape
    own = sum(parameter.numel() for parameter in model.parameters())
    heads_norms = 2 * shape.head_dim * shape.num_hidden_layers  # of queries and keys, which other models lack
    assert shape.parameters == own - heads_norms == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
def test_shapes_of_other_families(kind):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(kind(**sizes, num_attention_heads=4, num_key_value_heads=2))
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    assert ModelShape.from_config(model.config).parameters == model.num_parameters() - biases


def test_lora_parameters_are_those_of_peft():
    model = tiny_model(chat_tokenizer())
    shape = ModelShape.from_config(model.config)
    peft = get_peft_model(model, LoraConfig(r=5, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert shape.lora_parameters(5) == peft.get_nb_trainable_parameters()[0]


def test_an_estimate_by_hand():
    shape = ModelShape(4, 8, 2, 2, 1, 2, 10)
    linear = 2 * (4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 8)
    assert shape.linear_parameters == linear and shape.parameters == linear + 2 * 40 + 5 * 4
    sizes = {"weight_bytes": 4, "rollouts": 6, "num_generations": 3, "prompt_length": 5, "completion_length": 7}
    full = estimate_memory(shape, "full", **sizes)
    assert (full.weights, full.gradients, full.optimizer) == tuple(4 * shape.parameters * n for n in (1, 1, 2))
    tokens = 6 * 7 + 2 * 5  # a group has one prompt
    assert full.cache == tokens * 2 * 2 * 1 * 2 * 2 + 3 * 6 * 10 * 4
    lora = estimate_memory(shape, "lora", lora_rank=3, weight_bytes=2)
    trained = shape.lora_parameters(3)
    assert lora.weights == 2 * shape.parameters + 4 * trained and lora.optimizer == 8 * trained
    qlora = estimate_memory(shape, "qlora", lora_rank=3, weight_bytes=2)
    assert lora.weights - qlora.weights == pytest.approx(linear * (2 - 0.5625))
    ddp = estimate_memory(shape, "full", processes=4, **sizes)
    assert ddp.gradients == 2 * full.gradients and ddp.weights == full.weights
    zero2 = estimate_memory(shape, "full", sharding="gradients", processes=4, **sizes)
    assert zero2.weights == full.weights and zero2.optimizer == full.optimizer / 4
    fsdp = estimate_memory(shape, "full", sharding="parameters", processes=4, compute_bytes=2, **sizes)
    assert fsdp.weights == full.weights / 4 and fsdp.gathered == 2 * shape.parameters
    assert fsdp.rollout == fsdp.weights + fsdp.gathered + fsdp.optimizer + fsdp.cache
    assert full.peak == max(full.update, full.rollout)
    packed = estimate_memory(shape, "full", on_cpu=True, **sizes)
    assert packed.update - full.update == packed.rollout - full.rollout == 4 * linear
    smaller = estimate_memory(shape, "full", gradient_checkpointing=False, **sizes)
    assert smaller.activations > full.activations


@pytest.mark.parametrize("given", [{"method": "dora"}, {"sharding": "half"}])
def test_unknown_methods_and_shardings_are_refused(given):
    with pytest.raises(ConfigError, match="Choose from full, lora, qlora, and from none, gradients, parameters"):
        estimate_memory(QWEN3["8B"], **given)


def test_the_guide_has_the_table():
    assert memory_table() in (HERE.parent / "recipes" / "GUIDE.md").read_text(encoding="utf-8")


@pytest.mark.long
def test_real_runs_stay_within_a_quarter_of_the_estimate(tmp_path):
    """Real runs on the CPU stay within a quarter of the estimate, above and below."""
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HERE / "memory_runs.py"), str(tmp_path)]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = [json.loads(line) for line in output.splitlines() if line.startswith('{"name')]
    assert [entry["name"] for entry in found] == ["full", "lora", "full, checkpointing"]
    for entry in found:
        assert entry["measured"] / entry["estimated"] == pytest.approx(1.0, abs=0.25), entry
