"""Models that TRL's scoring pass cannot score are refused at construction, by name and with a remedy."""

import pytest
import torch
import transformers
from conftest import add, chat_tokenizer, config, prompts
from transformers import AutoModelForCausalLM

from trl_toolgrpo import ConfigError, ToolGRPOTrainer


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
}
HYBRID = {
    **{**SMALL, "layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1},
    **{"shared_intermediate_size": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8},
    **{"mamba_n_groups": 1, "mamba_expand": 2},
}
MODELS = {
    "Llama4Text": {**SMALL, "head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 48},
    "Doge": {**SMALL, "head_dim": 16},
    "GraniteMoe": {**SMALL, "num_local_experts": 2, "num_experts_per_tok": 1},
    "GraniteMoeHybrid": HYBRID,
    "Llama": {**SMALL, "attn_implementation": "flex_attention"},
    "RecurrentGemma": {
        **{**SMALL, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 64, "head_dim": 16},
        "attention_window_size": 32,
    },
}
REFUSED = {
    "Llama4Text": "scoring pass does not run for Llama4ForCausalLM.*another family",
    "Doge": "load-balancing loss does not run for DogeForCausalLM.*`router_aux_loss_coef=0.0`",
    "GraniteMoe": "load-balancing loss does not run for GraniteMoeForCausalLM.*`router_aux_loss_coef=0.0`",
    "GraniteMoeHybrid": "load-balancing loss does not run for GraniteMoeHybridForCausalLM.*`router_aux_loss_coef=0.0`",
    "Llama": "`attn_implementation='flex_attention'` on a CPU.*'sdpa'",
    "RecurrentGemma": "are not those of RecurrentGemmaForCausalLM's own logits.*capping",
}


def make(path, name, **changes):
    tokenizer = chat_tokenizer()
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    settings = getattr(transformers, f"{name}Config")(**MODELS[name], **ids, vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(settings)
    if name == "RecurrentGemma":
        model.get_output_embeddings().weight.data.mul_(20)  # logits as large as those of a trained model
    model.config._name_or_path = "tiny"
    options = {"max_completion_length": 8, "logprob_check": "always", **changes}
    return ToolGRPOTrainer(
        model,
        lambda completions, **kwargs: [float(row) for row in range(len(completions))],
        config(path, **options),
        prompts(4),
        processing_class=tokenizer,
        tools=[add],
    )


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_trl_cannot_score_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=REFUSED[name]):
        make(tmp_path, name)


@pytest.mark.parametrize("name", ["Doge", "GraniteMoe", "GraniteMoeHybrid"])
def test_the_suggested_remedy_works(tmp_path, name):
    trainer = make(tmp_path, name, router_aux_loss_coef=0.0)
    before = trainer.model.get_input_embeddings().weight.detach().clone()
    trainer.train()
    assert trainer.state.log_history[0]["ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    assert not torch.equal(trainer.model.get_input_embeddings().weight, before)
