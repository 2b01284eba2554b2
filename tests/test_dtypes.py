"""Every dtype with every part: tools, forcing, value head, LoRA, synced reference, packing, resuming."""

import copy
import json

import pytest
import torch
from conftest import add, chat_tokenizer, config, prompts, tiny_model
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOTrainer

from trl_toolgrpo import LogprobMismatchError, ToolGRPOTrainer
from trl_toolgrpo.models.rounding import Rounding
from trl_toolgrpo.monitoring.health.monitor import RunFacts
from trl_toolgrpo.monitoring.health.update_rules import UPDATE_RULES
from trl_toolgrpo.sampling.model_sampler import ModelSession


DTYPES = {
    "float32": (torch.float32, False),
    "autocast": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}


def llama(tokenizer):
    torch.manual_seed(1)
    options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    options |= {"num_key_value_heads": 2, "eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **options))
    model.config._name_or_path = "tiny-llama"
    return model


FAMILIES = {"qwen3": tiny_model, "llama": llama}


def peaked(model):
    """Scale the weights so that logits reach about 20, as in a pretrained model, and keep some entropy."""
    std = 0.15 if model.config.tie_word_embeddings else 1.0  # a tied head favours the last token once more
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                parameter.normal_(std=std)
            elif parameter.ndim > 1:
                parameter.mul_(4)
    return model


def trainer_of(path, family, dtype, lora=True, **changes):
    tokenizer = chat_tokenizer()
    weights, autocast = DTYPES[dtype]
    options = {"bf16": autocast, "max_completion_length": 40, "max_steps": 4, "logprob_check": "always"}
    return ToolGRPOTrainer(
        peaked(FAMILIES[family](tokenizer)).to(weights),
        lambda completions, **kwargs: [float(i % 3) for i in range(len(completions))],
        config(path, **{**options, **changes}),
        prompts(16),
        processing_class=tokenizer,
        tools=[add],
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )


EVERYTHING = {
    "force_rate": 1.0, "force_level": "schema", "assist_warmup_steps": 1, "advantage_estimator": "gae", "beta": 0.05,
    "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0, "learning_rate": 1e-4,
}  # fmt: skip


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_option_at_once_trains_with_both_fast_paths(tmp_path, family, dtype, head):
    trainer = trainer_of(tmp_path, family, dtype, cast_lm_head_to_fp32=head, **EVERYTHING)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4
    assert trainer.rollouts.engine._supported is True and trainer.update.scoring.packing.active is True
    trained = [log for log in logs if "sampling/logp_diff_mean" in log]
    bound = 1e-4 if dtype == "float32" else 0.1
    assert len(trained) == 3 and all(log["sampling/logp_diff_mean"] < bound for log in trained)
    assert logs[-1]["ref/tensors_differ"] == 0 and logs[-1]["ref/syncs"] >= 1
    assert all(torch.isfinite(torch.tensor(log["value/loss"])) for log in trained)
    file = tmp_path / "health.jsonl"
    told = [json.loads(line)["rule"] for line in file.read_text().splitlines()] if file.is_file() else []
    assert not {"logprob_gap", "ratio_mean", "reference_differs", "reference_still", "policy_still"} & set(told)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_an_adapter_both_fast_paths_are_in_use(tmp_path, family, dtype):
    """accelerate puts autocast around the forward pass of the model itself, and the trial of the sampler meets it."""
    trainer = trainer_of(tmp_path, family, dtype, lora=False, max_steps=2)
    trainer.train()
    assert trainer.rollouts.engine._supported is True and trainer.update.scoring.packing.active is True


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, dtype, lora):
    """The weights are the same to the bit in every dtype."""
    changes = {"save_strategy": "steps", "save_steps": 2, "advantage_estimator": "gae", "seed": 3}
    whole = trainer_of(tmp_path / "whole", "qwen3", dtype, lora, **changes)
    whole.train()
    again = trainer_of(tmp_path / "whole", "qwen3", dtype, lora, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, one), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_agrees_with_trl(tmp_path, family, dtype):
    """Separate rows agree to the bit in log-probs, entropies and gradients, packed rows up to rounding."""
    found = {}
    for packs in (False, True):
        trainer = trainer_of(tmp_path, family, dtype, lora=False, shared_prompt_updates=packs)
        draw = torch.Generator().manual_seed(5)
        prompt, rows = torch.randint(1, 200, (1, 40), generator=draw), torch.randint(1, 200, (4, 12), generator=draw)
        ids = torch.cat([prompt.expand(4, -1), rows], dim=1)
        for kind in (GRPOTrainer, ToolGRPOTrainer):
            score = kind._get_per_token_logps_and_entropies
            trainer.model.zero_grad()
            batch = ids, torch.ones_like(ids), 12
            logps, entropies, _ = score(trainer, trainer.model, *batch, compute_entropy=True)
            (logps.sum() + entropies.sum()).backward()
            grads = torch.cat([p.grad.flatten().double() for p in trainer.model.parameters()])
            found[packs, kind] = logps.detach(), entropies.detach(), grads
        assert bool(trainer.update.scoring.packing.active) is packs
    trls, ours, packed = found[False, GRPOTrainer], found[False, ToolGRPOTrainer], found[True, ToolGRPOTrainer]
    assert all(torch.equal(one, other) for one, other in zip(trls, ours, strict=True))
    rounding = 1e-5 if dtype == "float32" else 0.05
    assert (packed[2] - trls[2]).norm() <= rounding * trls[2].norm()


def run_with(fault, trainer, monkeypatch):
    """Plant a fault between the sampler and the trainer."""
    run = trainer.rollouts.engine.run

    def planted(policy, *args, **kwargs):
        if fault == "adapter":
            with policy.disable_adapter():
                return run(policy, *args, **kwargs)
        if fault == "temperature":
            trainer.rollouts.engine.args = copy.copy(trainer.args)
            trainer.rollouts.engine.args.temperature = 0.8
        return run(policy, *args, **kwargs)

    if fault == "third":
        decode = ModelSession._decode

        def off(self):
            finished = decode(self)
            for result in finished:
                result.logprobs[::3] = [value - 0.3 for value in result.logprobs[::3]]
            return finished

        trainer.rollouts.engine._is_supported(trainer.model)
        monkeypatch.setattr(ModelSession, "_decode", off)
    monkeypatch.setattr(trainer.rollouts.engine, "run", planted)


@pytest.mark.parametrize("fault", ["temperature", "adapter", "third"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_planted_faults_are_caught_in_every_dtype(tmp_path, monkeypatch, family, dtype, fault):
    trainer = trainer_of(tmp_path, family, dtype, logprob_check="first")
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    run_with(fault, trainer, monkeypatch)
    with pytest.raises(LogprobMismatchError):
        trainer.train()


def test_grown_rounding_is_measured_again(tmp_path):
    trainer = trainer_of(tmp_path, "qwen3", "autocast", max_steps=2)
    small = Rounding(1e-9, (1e-9, 1e-9, 1e-9))
    trainer.update.scoring.rounding = small  # as if of a policy whose logits were small
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.update.scoring.rounding.mean > small.mean


RULES = {rule.name: rule for rule in UPDATE_RULES}


def test_health_rules_allow_for_rounding():
    healthy = {"step": 1, "loss": 0.1, "ratio/mean": 1.001, "ratio/std": 0.05,
               "sampling/logp_diff_mean": 0.034, "sampling/logp_diff_max": 0.28}  # fmt: skip
    facts = RunFacts(dtype="bfloat16", logprob_tolerance=0.036)
    for name in ("ratio_mean", "ratio_spread", "logprob_gap"):
        assert RULES[name].check([healthy], facts) is None
    assert RULES["logprob_gap"].check([healthy], RunFacts()) is not None  # in float32 it is a fault
    wrong = {**healthy, "ratio/mean": 1.2, "sampling/logp_diff_mean": 0.2}
    found = RULES["ratio_mean"].check([wrong], facts)
    assert "The ratio's spread is 0.050; rounding in bfloat16 explains about 0.054 of it" in found.message
    found = RULES["logprob_gap"].check([wrong], facts)
    assert "rounding in bfloat16 explains 0.036 on average" in found.message
