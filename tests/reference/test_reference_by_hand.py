"""The reference for each variant of an adapter, as the trainer scores it, against a model kept by hand.

The model by hand is a copy of the policy as it was, or a plain model with weights that PEFT has merged and that are
averaged here; its log-probs come from a plain forward pass.
"""

import copy

import pytest
import torch
from conftest import chat_tokenizer, config, prompts, tiny_model
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_toolgrpo import ConfigError, ToolGRPOTrainer


TOKENIZER = chat_tokenizer()
LINEAR = ["q_proj", "v_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROWS = [{"prompt": [{"role": "user", "content": "hello"}]}] * 4


def lora(**changes):
    return LoraConfig(**{"r": 4, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **changes})


# Adapter, changes of the model, and whether its weights can be merged
VARIANTS = {
    "lora": (lora(), {}, True),
    "all_linear": (lora(target_modules="all-linear"), {}, True),
    "gaussian": (lora(init_lora_weights="gaussian"), {}, True),
    "pissa": (lora(init_lora_weights="pissa"), {}, True),
    "pissa_niter": (lora(init_lora_weights="pissa_niter_4"), {}, True),
    "olora": (lora(init_lora_weights="olora"), {}, True),
    "orthogonal": (lora(init_lora_weights="orthogonal"), {}, True),
    "dora": (lora(use_dora=True), {}, True),
    "pissa_dora": (lora(init_lora_weights="pissa", use_dora=True), {}, True),
    "rslora": (lora(use_rslora=True), {}, True),
    "patterns": (lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}), {}, True),
    "one_layer": (lora(layers_to_transform=[1]), {}, True),
    "bias_all": (lora(target_modules=["q_proj", "v_proj"], bias="all"), {"attention_bias": True}, True),
    "bias_lora_only": (lora(target_modules=["q_proj", "v_proj"], bias="lora_only"), {"attention_bias": True}, True),
    "bias_dora": (lora(target_modules=["q_proj"], bias="all", use_dora=True), {"attention_bias": True}, True),
    "lora_bias": (lora(target_modules=["q_proj", "v_proj"], lora_bias=True), {"attention_bias": True}, True),
    "lora_bias_alone": (lora(target_modules=["q_proj", "v_proj"], lora_bias=True), {}, True),
    "modules_to_save": (lora(modules_to_save=["lm_head", "norm"]), {}, True),
    "embedding": (lora(target_modules=["embed_tokens", "q_proj"]), {}, True),
    "tied_embedding": (lora(target_modules=["embed_tokens", "q_proj"]), {"tie_word_embeddings": True}, True),
    "dora_embedding": (lora(target_modules=["embed_tokens"], use_dora=True), {}, True),
    "saved_embedding": (lora(modules_to_save=["embed_tokens"]), {"tie_word_embeddings": True}, True),
    "saved_tied_embedding": (
        lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), {"tie_word_embeddings": True}, True,
    ),
    "tokens": (lora(trainable_token_indices=[5, 6, 7]), {}, False),
    "weight_parameter": (lora(target_modules=[], target_parameters=["q_proj.weight", "v_proj.weight"]), {}, True),
    "experts": (lora(target_modules=["q_proj"], target_parameters=EXPERTS), {"num_experts": 4}, True),
    "loha": (LoHaConfig(r=4, target_modules=LINEAR), {}, True),
    "lokr": (LoKrConfig(r=4, target_modules=LINEAR), {}, True),
    "ia3": (IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]), {}, False),
}  # fmt: skip
MERGED = sorted(name for name, (*_, merged) in VARIANTS.items() if merged)


def base(**changes):
    if "num_experts" not in changes:
        return tiny_model(TOKENIZER, **changes)
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts_per_tok=2,
            eos_token_id=TOKENIZER.eos_token_id, pad_token_id=TOKENIZER.pad_token_id, **changes,
        )
    )  # fmt: skip
    model.config._name_or_path = "tiny-moe"
    return model


def move(model, seed, size=0.1):
    """Change every trained parameter, and no other, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))


def started(path, variant, given, **changes):
    """Return a trainer, and a copy of the policy as it was before."""
    adapter, options, _ = VARIANTS[variant]
    model = base(**options)
    if given:
        model = get_peft_model(model, copy.deepcopy(adapter))
        move(model, 1)
    by_hand = copy.deepcopy(model).eval()
    trainer = ToolGRPOTrainer(
        model, lambda completions, **kwargs: [float(row % 3) for row in range(len(completions))],
        config(path, **{"beta": 0.1, "learning_rate": 0.02, "max_steps": 2, "max_completion_length": 12, **changes}),
        prompts(8), processing_class=TOKENIZER, peft_config=None if given else copy.deepcopy(adapter),
    )  # fmt: skip
    return trainer, by_hand


def scored(trainer):
    """Return a batch of rollouts, and the log-probs that the trainer's reference gives their tokens."""
    trainer.model.train()
    batch = trainer._generate_and_score_completions(copy.deepcopy(ROWS))
    return batch, batch["ref_per_token_logps"]


@torch.no_grad()
def score(model, batch):
    """Return the log-probs of a batch from a plain forward pass."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    width = batch["completion_ids"].size(1)
    logits = model.eval()(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -width - 1 : -1]
    return torch.log_softmax(logits, dim=-1).gather(-1, batch["completion_ids"][..., None])[..., 0]


def assert_scores(found, model, batch, atol=2e-5):
    sampled = batch["completion_mask"].bool()
    torch.testing.assert_close(found[sampled], score(model, batch)[sampled], atol=atol, rtol=1e-5)


def assert_moved(trainer, batch, reference):
    """Check that the policy has moved away, so that a reference that wrongly follows it would be seen."""
    sampled = batch["completion_mask"].bool()
    assert (batch["old_per_token_logps"] - reference)[sampled].abs().max() > 1e-3


def steps(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("given", [False, True], ids=["new", "given"])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_an_unsynced_reference_stays_the_initial_policy(tmp_path, variant, given):
    trainer, by_hand = started(tmp_path, variant, given)
    trainer.train()
    assert steps(trainer)[0]["kl"] < 1e-7 < steps(trainer)[1]["kl"]
    move(trainer.model, 2)
    batch, found = scored(trainer)
    assert_scores(found, by_hand, batch)
    assert_moved(trainer, batch, found)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_copied_adapter_scores_as_the_policy_at_the_last_sync(tmp_path, variant):
    trainer, by_hand = started(tmp_path, variant, True, sync_ref_model=True, ref_model_mixup_alpha=1.0)
    trainer.train()
    assert steps(trainer)[0]["kl"] < 1e-7
    batch, found = scored(trainer)
    assert_scores(found, by_hand, batch)
    assert trainer.sync_reference() is not None
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            parameter.copy_(trainer.model.get_parameter(name))
    batch, found = scored(trainer)
    assert_scores(found, by_hand, batch)
    sampled = batch["completion_mask"].bool()
    torch.testing.assert_close(found[sampled], batch["old_per_token_logps"][sampled], atol=2e-6, rtol=0)  # KL of 0
    move(trainer.model, 2)
    batch, found = scored(trainer)
    assert_scores(found, by_hand, batch)
    assert_moved(trainer, batch, found)


def dense(model):
    """Return the merged weights of a PEFT policy in float64; the head of the copy is untied first."""
    model = copy.deepcopy(model)
    plain = model.get_base_model()
    head, biases = plain.get_output_embeddings(), {}
    if "weight" in head._parameters:
        head.weight = nn.Parameter(head.weight.detach().clone())
    for name, layer in plain.named_modules():  # PEFT merges no bias into a layer without one
        if getattr(layer, "lora_bias", {}).get("default") and layer.get_base_layer().bias is None:
            biases[f"{name}.bias"] = layer.lora_B["default"].bias.detach() * layer.scaling["default"]
            layer.lora_bias["default"] = False
    weights = {name: p.detach() for name, p in model.merge_and_unload().named_parameters(remove_duplicate=False)}
    return {name: weight.double().clone() for name, weight in {**weights, **biases}.items()}


def plain_model(options, weights):
    model = base(**{**options, "tie_word_embeddings": False})
    for name, weight in weights.items():
        path, _, key = name.rpartition(".")
        assert key in model.get_submodule(path)._parameters, name
        setattr(model.get_submodule(path), key, nn.Parameter(weight.float()))
    return model


@pytest.mark.parametrize("variant", MERGED)
def test_merged_weights_are_the_dense_average(tmp_path, variant):
    given = variant in ("pissa", "bias_all", "tied_embedding", "lora_bias_alone", "experts")
    options = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_sync_mode": "merged"}
    trainer, by_hand = started(tmp_path, variant, given, **options)
    expected = dense(trainer.model)
    batch, found = scored(trainer)
    assert_scores(found, by_hand, batch)
    for seed, alpha in ((2, 0.5), (3, 0.5), (4, 1.0)):
        trainer.args.ref_model_mixup_alpha = alpha
        move(trainer.model, seed)
        report = trainer.sync_reference()
        assert report.differ == () and report.tensors > 0
        now = dense(trainer.model)
        expected = {name: alpha * now[name] + (1 - alpha) * weight for name, weight in expected.items()}
        batch, found = scored(trainer)
        assert_scores(found, plain_model(VARIANTS[variant][1], expected), batch, atol=5e-5)
        sampled = batch["completion_mask"].bool()
        gap = (batch["old_per_token_logps"] - found)[sampled].abs().max()
        assert gap < 1e-5 if alpha == 1 else gap > 1e-3
    move(trainer.model, 5)
    batch, found = scored(trainer)
    assert_scores(found, plain_model(VARIANTS[variant][1], expected), batch, atol=5e-5)


def test_other_adapters_of_a_model_have_no_effect(tmp_path):
    """An adapter loaded first, with other layers and modules, affects neither policy nor reference."""
    for mode, alpha in (("auto", 1.0), ("merged", 0.5), (None, None)):
        model = get_peft_model(base(), lora(target_modules=["o_proj"], modules_to_save=["norm"]), adapter_name="other")
        model.add_adapter("default", lora())
        model.set_adapter("default")
        move(model, 1)
        by_hand = copy.deepcopy(model)
        synced = {"sync_ref_model": True, "ref_sync_mode": mode, "ref_model_mixup_alpha": alpha} if mode else {}
        trainer = ToolGRPOTrainer(
            model, lambda completions, **kwargs: [1.0] * len(completions), config(tmp_path, beta=0.1, **synced),
            prompts(8), processing_class=TOKENIZER,
        )  # fmt: skip
        move(trainer.model, 2)
        batch, found = scored(trainer)
        assert_scores(found, by_hand, batch)
        assert_moved(trainer, batch, found)
        if alpha == 1:
            trainer.sync_reference()
            batch, found = scored(trainer)
            sampled = batch["completion_mask"].bool()
            torch.testing.assert_close(found[sampled], batch["old_per_token_logps"][sampled], atol=2e-6, rtol=0)


def test_a_second_trainer_starts_from_the_trained_policy(tmp_path):
    trainer, _ = started(tmp_path, "lora", True)
    trainer.train()
    model = trainer.model
    by_hand = get_peft_model(base(), lora())
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            parameter.copy_(model.get_parameter(name))
    again = ToolGRPOTrainer(
        model, lambda completions, **kwargs: [1.0] * len(completions), config(tmp_path, beta=0.1), prompts(8),
        processing_class=TOKENIZER,
    )  # fmt: skip
    move(again.model, 3)
    batch, found = scored(again)
    assert_scores(found, by_hand, batch)


@pytest.mark.parametrize("variant", ["pissa", "bias_all", "embedding", "loha"])
def test_a_resumed_run_keeps_its_initial_reference(tmp_path, variant):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    whole, _ = started(tmp_path / "whole", variant, True, **saving)
    whole.train()
    resumed, by_hand = started(tmp_path / "resumed", variant, True, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert steps(resumed)[-1]["kl"] == steps(whole)[-1]["kl"] > 0
    batch, found = scored(resumed)
    assert_scores(found, by_hand, batch)


def test_trained_tokens_of_a_tied_head_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"`trainable_token_indices` for a model whose LM head is tied"):
        ToolGRPOTrainer(
            base(tie_word_embeddings=True), lambda completions, **kwargs: [1.0] * len(completions), config(tmp_path),
            prompts(8), processing_class=TOKENIZER, peft_config=lora(trainable_token_indices=[5, 6]),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("names", "active", "words"),
    [
        (["tools"], "tools", r"adapters 'tools' and `beta=0\.1`, but none named 'default'"),
        (["default", "policy"], "policy", r"active adapters \['policy'\] and `beta=0\.1`"),
    ],
)
def test_an_adapter_that_would_not_be_copied_is_refused(tmp_path, names, active, words):
    for synced in ({}, {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0}):
        model = get_peft_model(base(), lora(), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, lora(target_modules=["v_proj"]))
        model.set_adapter(active)
        with pytest.raises(ConfigError, match=words):
            ToolGRPOTrainer(
                model, lambda completions, **kwargs: [1.0] * len(completions), config(tmp_path, beta=0.1, **synced),
                prompts(8), processing_class=TOKENIZER,
            )  # fmt: skip


def test_unmergeable_adapters_are_refused_by_name(tmp_path):
    options = {"sync_ref_model": True, "ref_sync_mode": "merged"}
    for variant, words in (("tokens", "TrainableTokensWrapper"), ("ia3", "type IA3")):
        with pytest.raises(ConfigError, match=words):
            started(tmp_path, variant, False, **options)
