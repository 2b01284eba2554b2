"""Settings that vary over a model's layers, and what a cache keeps of a token."""

import json

import pytest
import torch
import transformers
from conftest import add, chat_tokenizer, config, prompts
from transformers import AutoModelForCausalLM

from trl_toolgrpo import ModelShape, ToolGRPOTrainer, estimate_memory
from trl_toolgrpo.checkpoints.run_identity import describe_model
from trl_toolgrpo.models.model_settings import layer_settings, model_setting, stored_values
from trl_toolgrpo.rollout.cache_budget import bytes_per_token
from trl_toolgrpo.sampling.choice import unsupported_reason
from trl_toolgrpo.sampling.vllm.client import model_shape


SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {**SMALL, "head_dim": 8}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA4 = {
    **{**HEADS, **MIXED, "global_head_dim": 16, "sliding_window": 20},
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61},
}
MODELS = {
    "Qwen3": HEADS,
    "Phi3": SMALL,
    "GPT2": {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "Gemma4Text": GEMMA4,
    "Gemma4Text shared": {**GEMMA4, "num_kv_shared_layers": 2},
    "Gemma4Text keys as values": {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "Gemma3nText": {
        **{**HEADS, **MIXED, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8},
        **{"vocab_size_per_layer_input": 61, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4},
    },
    "DeepseekV3": {
        **{**SMALL, "moe_intermediate_size": 16, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2},
        **{"topk_group": 1, "num_experts_per_tok": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4},
        **{"qk_nope_head_dim": 6, "v_head_dim": 10, "first_k_dense_replace": 1},
    },
    "Lfm2": {**SMALL, "layer_types": ["conv", "full_attention"] * 2},
    "Jamba": {
        **{**SMALL, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2},
        **{"expert_layer_offset": 1, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
    },
    "FalconH1": {
        **{**HEADS, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
        "mamba_n_groups": 1,
    },
}
GEMMA4S = [name for name in MODELS if name.startswith("Gemma4")]


def build(name, **changes):
    torch.manual_seed(0)
    settings = getattr(transformers, f"{name.split()[0]}Config")(**{**MODELS[name], **changes})
    return AutoModelForCausalLM.from_config(settings)


@torch.no_grad()
def kept(model, count):
    """Numbers that the model's own cache keeps after so many tokens."""
    layers = model(input_ids=torch.arange(count)[None] + 3, use_cache=True).past_key_values.layers
    parts = [part for layer in layers for part in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return sum(part.numel() for part in parts if part is not None)


@pytest.mark.parametrize("name", MODELS)
def test_a_token_costs_what_a_cache_keeps_of_it(tmp_path, name):
    model = build(name)
    cost = kept(model, 11) - kept(model, 10)
    assert stored_values(model.config) == cost > 0
    assert bytes_per_token(config(tmp_path), model) == 4 * cost


def test_settings_of_layers_that_differ():
    settings = build("Gemma4Text").config
    assert model_setting(settings, "head_dim") == [8, 16, 8, 16]
    assert model_setting(settings, "num_key_value_heads") == 2 and model_setting(settings, "no_such", 7) == 7
    assert layer_settings(settings, "num_key_value_heads") == [2] * 4
    settings.allow_global_per_layer_attribute_access = True  # which would give the value of some layers for all
    assert model_setting(settings, "head_dim") == [8, 16, 8, 16]


@pytest.mark.parametrize("name", GEMMA4S)
def test_a_model_whose_layers_differ_is_described(name):
    model = build(name)
    assert unsupported_reason(model, list(range(5, 13))) is None  # it has the fast sampler
    described = describe_model(model)
    assert json.loads(json.dumps(described)) == described and described["head_dim"] == [8, 16, 8, 16]
    assert model_shape(model.config)["hidden_size"] == 32
    shape = ModelShape.from_config(model.config)
    assert shape.cached_values == stored_values(model.config)
    few, many = (estimate_memory(shape, "lora", completion_length=count).cache for count in (100, 101))
    assert many - few == 64 * stored_values(model.config) * 2  # 64 rollouts, bfloat16


@pytest.mark.parametrize("name", GEMMA4S)
@pytest.mark.parametrize("changes", [{}, {"rollout_cache_gib": 0.1}])
def test_a_gemma_4_trains(tmp_path, name, changes):
    tokenizer = chat_tokenizer()
    size = len(tokenizer)
    model = build(
        name, vocab_size=size, vocab_size_per_layer_input=size, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    model.config._name_or_path = "tiny"
    before = [parameter.detach().clone() for parameter in model.parameters()]
    options = {"max_completion_length": 12, "max_steps": 2, "logprob_check": "always", "num_iterations": 2, **changes}
    trainer = ToolGRPOTrainer(
        model,
        lambda completion_ids, **kwargs: [float(sum(ids) % 7) for ids in completion_ids],
        config(tmp_path, **options),
        prompts(4),
        processing_class=tokenizer,
        tools=[add],
    )
    trainer.train()
    assert trainer.state.log_history[0]["ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert trainer.rollouts.engine._supported
