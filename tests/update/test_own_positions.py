"""Models whose forward pass depends on more than a token's own prefix: rollouts are sampled and scored as if alone."""

import copy
import logging

import pytest
import torch
import transformers
from conftest import chat_tokenizer, config
from datasets import Dataset
from transformers import AutoModelForCausalLM

from trl_toolgrpo import LogprobMismatchError, ToolGRPOTrainer
from trl_toolgrpo.rollout.engine import RolloutBatch
from trl_toolgrpo.rollout.loop import RolloutStats


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ROTARY = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 512}
HEADS = {**ROTARY, "head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
BORDER = 60
FACTORS = {"short_factor": [1.0, 1.1, 1.0, 1.0], "long_factor": [3.0, 5.0, 8.0, 9.0], "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    **FACTORS,
    "original_max_position_embeddings": BORDER,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
BY_LAYER = {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0}, "full_attention": LONGROPE}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 20}
ABSOLUTE = {
    "GPT2": GPT,
    "GPTBigCode": GPT,
    "GPTNeo": {
        **{"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        **{"window_size": 16, "attention_dropout": 0, "embed_dropout": 0, "resid_dropout": 0},
    },
    "OPT": {**SMALL, "word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.0},
    "BioGpt": {**SMALL, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0, "activation_dropout": 0},
    "XGLM": {
        **{"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "dropout": 0},
        **{"attention_dropout": 0, "activation_dropout": 0},
    },
    "Ministral3": {
        **HEADS,
        "rope_parameters": {
            **{"rope_type": "default", "rope_theta": 100.0, "llama_4_scaling_beta": 2.0},
            "original_max_position_embeddings": 40,
        },
    },
}
RELATIVE = {
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "GPTJ": {**GPT, "rotary_dim": 4},
    "Mamba2": {
        **{"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8},
        **{"n_groups": 1, "expand": 2},
    },
    "Gemma4Text": {
        **{**HEADS, "num_hidden_layers": 4, "global_head_dim": 16, "sliding_window": 20, "num_kv_shared_layers": 2},
        **{"layer_types": LAYERS["layer_types"] * 2, "hidden_size_per_layer_input": 8},
    },
}
UNHIDDEN = {  # padding changes what `generate` gives
    "Rwkv": {**SMALL, "attention_hidden_size": 32, "context_length": 512},
    "MiniMax": {**HEADS, "num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"]},
}
MIXED = {"mamba_n_groups": 1, "mamba_d_state": 8, "mamba_n_heads": 4}
HYBRID = {  # attention in addition to layers with a state of their own
    "Qwen3Next": {
        **{**HEADS, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
        **{"shared_expert_intermediate_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        "layer_types": ["linear_attention", "full_attention"],
    },
    "Bamba": {**ROTARY, **MIXED, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "FalconH1": {**HEADS, **MIXED, "mamba_d_ssm": 32, "mamba_d_head": 8},
    "Lfm2": {**ROTARY, "conv_L_cache": 3, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "Jamba": {
        **{**ROTARY, "mamba_d_state": 8, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
        "use_mamba_kernels": False,
    },
}
BY_LENGTH = {
    "Phi3": {**ROTARY, "rope_parameters": LONGROPE, "original_max_position_embeddings": BORDER},
    "Llama longrope": {**HEADS, "rope_parameters": LONGROPE},
    "Llama dynamic": {**HEADS, "max_position_embeddings": BORDER, "rope_parameters": DYNAMIC},
    "Phimoe": {
        **ROTARY,
        "num_local_experts": 2,
        "router_aux_loss_coef": 0.0,
        "rope_parameters": {**LONGROPE, "long_mscale": 1.3, "short_mscale": 1.0},
    },
    "Gemma3Text": {**HEADS, **LAYERS, "rope_parameters": BY_LAYER},
    "Olmo3": {**ROTARY, **LAYERS, "rope_parameters": BY_LAYER},
}
FAMILIES = {**ABSOLUTE, **RELATIVE, **UNHIDDEN, **HYBRID, **BY_LENGTH}
EXPERTS = {"Qwen3Moe longrope": {**HEADS, "rope_parameters": LONGROPE}}


def build(name, tokenizer, **changes):
    """Make a tiny model whose attention matters."""
    torch.manual_seed(0)
    family = name.split()[0]
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    size = {"vocab_size": len(tokenizer)}
    if family == "Gemma4Text":
        size["vocab_size_per_layer_input"] = len(tokenizer)
    settings = getattr(transformers, f"{family}Config")(**{**{**FAMILIES, **EXPERTS}[name], **ids, **size, **changes})
    model = AutoModelForCausalLM.from_config(copy.deepcopy(settings))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3.0)
    model.config._name_or_path = "tiny"
    return model


def make(path, model, tokenizer, characters=(4, 30), **changes):
    """Make a trainer with a group of four rollouts for each prompt; `characters` gives their lengths."""
    rows = [{"prompt": [{"role": "user", "content": "x" * count}]} for count in characters]
    seen = []

    def reward(completions, trajectories, **kwargs):
        seen.append(copy.deepcopy(trajectories))
        return [float(row) for row in range(len(completions))]

    options = {
        "per_device_train_batch_size": 4 * len(rows),
        "num_generations": 4,
        "max_completion_length": 50,
        "logprob_check": "always",
        **changes,
    }
    trainer = ToolGRPOTrainer(
        model, reward, config(path, **options), Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.model.train()
    batch = trainer._generate_and_score_completions([dict(row) for row in rows for _ in range(4)])
    return trainer, batch, seen[0]


@torch.no_grad()
def alone(model, trajectory):
    """Return the log-probs of a rollout by one plain forward pass over it."""
    ids = torch.tensor([[*trajectory.prompt_ids, *trajectory.completion_ids]])
    scores = torch.log_softmax(model.eval()(input_ids=ids, use_cache=False).logits[0].double(), dim=-1)
    start = len(trajectory.prompt_ids)
    return scores[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]]


@torch.no_grad()
def scored(trainer, batch):
    """Return the trainer's log-probs of a padded batch."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    width = batch["completion_ids"].shape[1]
    return trainer._get_per_token_logps_and_entropies(trainer.model.eval(), ids, mask, width)[0]


def check(trainer, batch, trajectories, bound=2e-5):
    found = scored(trainer, batch)
    assert len({len(t.prompt_ids) for t in trajectories}) > 1  # so that rows are padded
    for row, trajectory in enumerate(trajectories):
        expected = alone(trainer.model, trajectory)
        count = len(trajectory.completion_ids)
        assert (torch.tensor(trajectory.logprobs, dtype=torch.float64) - expected).abs().max() < bound
        assert (found[row, :count].double() - expected).abs().max() < bound
        assert not found[row, count:].any()


@pytest.mark.parametrize("name", ["Rwkv", "MiniMax", "Mamba2", "GPT2"])
def test_rounding_is_measured_for_every_kind_of_model(tmp_path, name):
    """A healthy batch passes the check in bfloat16, and one with every third log-prob off by 0.3 does not."""
    tokenizer = chat_tokenizer()
    trainer, batch, _ = make(tmp_path, build(name, tokenizer), tokenizer, bf16=True)
    rollouts = trainer.rollouts.batch
    for trajectory in rollouts.trajectories:
        trajectory.logprobs[::3] = [value - 0.3 for value in trajectory.logprobs[::3]]
    with pytest.raises(LogprobMismatchError, match="rounding explains"):
        trainer.update.logprob_check.on_rollouts(trainer.update.tokens_of(batch, rollouts), rollouts)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_rollouts_are_sampled_and_scored_as_if_alone(tmp_path, name, packing):
    tokenizer = chat_tokenizer()
    trainer, batch, trajectories = make(
        tmp_path, build(name, tokenizer), tokenizer, shared_prompt_updates=packing
    )
    check(trainer, batch, trajectories)
    if name in BY_LENGTH:
        lengths = [len(t.prompt_ids) + len(t.completion_ids) for t in trajectories]
        ended = {t.stop_reason for t, length in zip(trajectories, lengths, strict=True) if length == BORDER}
        assert max(lengths) == BORDER and ended == {"length"}


# Whether the default sampler, and whether packing of a group, can be had
PATHS = {
    **dict.fromkeys(("GPT2", "OPT", "Phi3"), (True, True)),
    **dict.fromkeys(("Qwen3Next", "Bamba", "FalconH1", "Lfm2", "Jamba", "Mamba2", "Bloom"), (False, False)),
}


@pytest.mark.parametrize("name", PATHS)
def test_each_family_takes_its_fastest_correct_path(tmp_path, name, caplog):
    tokenizer = chat_tokenizer()
    with caplog.at_level(logging.WARNING):
        trainer, _, _ = make(tmp_path, build(name, tokenizer), tokenizer, max_steps=1, max_completion_length=12)
        trainer.train()
    sampled = PATHS[name][0]
    assert (trainer.rollouts.engine._supported, trainer.update.scoring.packing.active) == PATHS[name]
    assert ("falls back to `model.generate`" in caplog.text) != sampled
    logged = trainer.state.log_history[0]
    assert logged["ratio/mean"] == pytest.approx(1.0, abs=1e-5) and logged["sampling/logp_diff_max"] < 2e-5


def test_packing_is_used_where_positions_are_absolute(tmp_path, caplog):
    tokenizer = chat_tokenizer()
    with caplog.at_level(logging.WARNING):
        trainer, _, _ = make(tmp_path, build("GPT2", tokenizer), tokenizer)
        trainer.train()
    assert trainer.update.scoring.packing.active and "one by one" not in caplog.text


def test_load_balancing_loss_ignores_padding(tmp_path):
    """For a mixture of experts whose rollouts are moved to the first column."""
    tokenizer = chat_tokenizer()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.1}
    trainer, batch, trajectories = make(
        tmp_path, build("Qwen3Moe longrope", tokenizer, **experts), tokenizer, max_completion_length=10
    )
    assert trainer.aux_loss_enabled
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        arguments = trainer.model.eval(), ids, mask, batch["completion_ids"].shape[1]
        logps, _, loss = trainer._get_per_token_logps_and_entropies(*arguments, compute_aux_loss=True)
        _, _, again = trainer._get_per_token_logps_and_entropies(*arguments, batch_size=8, compute_aux_loss=True)
    assert loss == again > 0
    for row, trajectory in enumerate(trajectories):
        expected = alone(trainer.model, trajectory)
        assert (logps[row, : len(expected)].double() - expected).abs().max() < 2e-5
    trainer.train()
    assert trainer.state.log_history[0]["aux_loss"] > 0


@pytest.mark.parametrize("name", ["GPT2", "Phi3", "Rwkv", "Bloom"])
def test_values_do_not_depend_on_padding(tmp_path, name):
    """The values of a padded batch are those of each rollout by itself."""
    tokenizer = chat_tokenizer()
    trainer, batch, trajectories = make(
        tmp_path, build(name, tokenizer), tokenizer, advantage_estimator="group_gae", shared_prompt_updates=False
    )
    with torch.no_grad():
        for parameter in trainer.model.value_head.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    rollouts = trainer.rollouts.batch.rollouts
    together = trainer.critic.computed_values(trainer.update.tokens_of(batch, trainer.rollouts.batch))
    for row, trajectory in enumerate(trajectories):
        one = {
            "prompt_ids": torch.tensor([trajectory.prompt_ids]),
            "completion_ids": torch.tensor([trajectory.completion_ids]),
        }
        one |= {name.replace("ids", "mask"): torch.ones_like(ids) for name, ids in one.items()}
        tokens = trainer.update.tokens_of(one, RolloutBatch([rollouts[row]], RolloutStats()))
        expected = trainer.critic.computed_values(tokens)[0]
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(together[row, : len(expected)], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["Phi3", "Llama longrope", "Phimoe", "Gemma3Text"])
def test_long_rollouts_use_the_long_frequencies_of_longrope(tmp_path, caplog, name):
    """In one batch with shorter rollouts; the template adds 17 tokens to a prompt."""
    tokenizer = chat_tokenizer()
    sizes = [BORDER - 1, BORDER + 1, 2 * BORDER, 30]
    with caplog.at_level(logging.WARNING):
        trainer, batch, trajectories = make(
            tmp_path, build(name, tokenizer), tokenizer, characters=[size - 17 for size in sizes]
        )
    assert [len(t.prompt_ids) for t in trajectories[::4]] == sizes
    check(trainer, batch, trajectories)
    counts = [max(len(t.completion_ids) for t in trajectories[4 * g : 4 * g + 4]) for g in range(4)]
    assert counts[0] == 1 and counts[3] == BORDER - 30 and min(counts[1:3]) > 30
    warning = [r.getMessage() for r in caplog.records if "rotary frequencies" in r.getMessage()]
    assert len(warning) == 1 and f"(`longrope`) change after {BORDER} tokens" in warning[0]
    assert "as 8 of these 16 may" in warning[0]


def test_a_prompt_as_long_as_the_border_has_no_completion(tmp_path):
    tokenizer = chat_tokenizer()
    _, batch, trajectories = make(
        tmp_path, build("Phi3", tokenizer), tokenizer, characters=[BORDER - 17, 5]
    )
    assert len(trajectories[0].prompt_ids) == BORDER
    assert {t.stop_reason for t in trajectories[:4]} == {"length"} and not batch["completion_mask"][:4].any()
    assert batch["completion_mask"][4:].any()


@pytest.mark.parametrize("name", ["Phi3", "Llama dynamic"])
def test_a_models_own_frequencies_are_put_back(tmp_path, name):
    tokenizer = chat_tokenizer()
    model = build(name, tokenizer)
    ids = torch.arange(2 * BORDER)[None] + 5
    expected = model.eval()(input_ids=ids, use_cache=False).logits
    trainer, _, _ = make(tmp_path, model, tokenizer)
    trainer.train()
    again = build(name, tokenizer)
    again.load_state_dict(trainer.model.state_dict())
    found = [m.eval()(input_ids=ids, use_cache=False).logits for m in (trainer.model, again)]
    torch.testing.assert_close(*found)
    assert not torch.equal(found[0], expected)  # it was trained
    assert not any("forward" in m.__dict__ for m in model.modules() if hasattr(m, "rope_type"))
