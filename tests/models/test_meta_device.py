"""Tensors on the meta device have no values: whatever brings one into a run is refused by name at construction."""

import pytest
import torch
from conftest import config, prompts, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, Qwen3Config

from trl_toolgrpo import ConfigError, ToolGRPOTrainer


def lora(**options):
    return LoraConfig(r=2, target_modules=["q_proj"], **options)


def whole(tokenizer):
    with torch.device("meta"):
        return tiny_model(tokenizer)


def a_layer(tokenizer):
    model = tiny_model(tokenizer)
    model.model.layers[1].mlp.to("meta")
    return model


def a_buffer(tokenizer):
    model = tiny_model(tokenizer)
    model.model.rotary_emb.to("meta")
    return model


def an_adapter(tokenizer):
    return get_peft_model(tiny_model(tokenizer), lora(), low_cpu_mem_usage=True)


MODELS = {
    whole: "model.embed_tokens.weight",
    a_layer: "model.layers.1.mlp.gate_proj.weight",
    a_buffer: "model.rotary_emb.inv_freq",
    an_adapter: "self_attn.q_proj.lora_A.default.weight",
}


def start(path, model, reward=None, tokenizer=None, **changes):
    peft_config = changes.pop("peft_config", None)
    return ToolGRPOTrainer(
        model, reward or (lambda completions, **kwargs: [0.0, 1.0, 2.0, 3.0]), config(path, **changes), prompts(),
        processing_class=tokenizer, peft_config=peft_config,
    )  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"advantage_estimator": "gae"}, {"record_sample_logprobs": False}])
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_model_without_values_is_refused(tmp_path, tokenizer, make, changes):
    with pytest.raises(ConfigError, match=rf"tensors on the meta device, such as `.*{MODELS[make]}`.*to_empty"):
        start(tmp_path, make(tokenizer), tokenizer=tokenizer, **changes)


def test_a_model_without_values_is_refused_with_an_adapter(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="You passed as the model a Qwen3ForCausalLM with 27 of 27 tensors"):
        start(tmp_path, whole(tokenizer), tokenizer=tokenizer, peft_config=lora())


@pytest.mark.parametrize("place", ["meta", torch.device("meta"), {"": "meta"}, {"model": "cpu", "lm_head": "meta"}])
def test_a_model_that_would_be_loaded_without_values_is_refused(tmp_path, tokenizer, place):
    tiny_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"device_map.*with the meta device"):
        start(tmp_path, str(tmp_path / "base"), model_init_kwargs={"device_map": place})
    start(tmp_path, str(tmp_path / "base"), model_init_kwargs={"device_map": None})


def test_a_reward_model_without_values_is_refused(tmp_path, tokenizer):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, num_labels=1, **sizes)
    with torch.device("meta"):
        judge = AutoModelForSequenceClassification.from_config(settings)
    for reward, named in ((judge, 0), ([lambda completions, **kwargs: [0.0] * 4, judge], 1)):
        with pytest.raises(ConfigError, match=f"as reward function {named} a Qwen3ForSequenceClassification"):
            start(tmp_path, tiny_model(tokenizer), reward, tokenizer)


def test_a_model_that_was_given_values_trains(tmp_path, tokenizer):
    model = whole(tokenizer).to_empty(device="cpu")
    values = tiny_model(tokenizer)
    model.load_state_dict(values.state_dict())
    model.model.rotary_emb = values.model.rotary_emb
    trainer = start(tmp_path, model, tokenizer=tokenizer)
    trainer.train()
    assert trainer.state.global_step == 1
