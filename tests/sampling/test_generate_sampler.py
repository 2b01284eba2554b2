"""The plain sampler records what the default one does; which models the default one cannot handle."""

import logging
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import chat_tokenizer, config, prompts, tiny_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.errors import ConfigError, SamplerError
from trl_toolgrpo.rollout.engine import check_gathering
from trl_toolgrpo.sampling.choice import make_sampler, unsupported_reason
from trl_toolgrpo.sampling.generate_sampler import GenerateSampler
from trl_toolgrpo.sampling.model_sampler import ModelSampler
from trl_toolgrpo.trl_hooks import gathered_parameters


VOCAB = 61
TOKENS = [(index * 7 + 3) % VOCAB for index in range(8)]
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
BLOOM = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}
MODELS = {
    "Qwen3": {**SIZES, "head_dim": 8},
    "Llama": SIZES,
    "Bloom": BLOOM,
    "Mamba": {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
    "Lfm2": {**SIZES, "layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},
    "Bamba": {
        **{**SIZES, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8},
        "attn_layer_indices": [1],
    },
    "FalconH1": {
        **{**SIZES, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1},
        "mamba_d_state": 8,
    },
    "Qwen3Next": {
        **SIZES,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 1,
    },
}


def build(name, seed=0, **changes):
    torch.manual_seed(seed)
    made = getattr(transformers, f"{name}Config")(**{**MODELS[name], **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(made)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(3)
    return model


@torch.no_grad()
def recompute(model, history, temperature):
    """Return log-probs of every token by one full forward pass for each, softmax in float64."""
    values = [math.nan]
    for stop in range(1, len(history)):
        logits = model(input_ids=torch.tensor([history[:stop]]), use_cache=False).logits[0, -1]
        values.append(torch.log_softmax(logits.double() / temperature, dim=-1)[history[stop]].item())
    return values


@pytest.mark.parametrize("name", ["Qwen3", "Bloom", "LoRA"])
def test_recorded_logprobs_are_those_of_plain_forward_passes(name):
    model = build("Qwen3" if name == "LoRA" else name)
    if name == "LoRA":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=0.3)
    histories = [[5, 6, 7, 8, 9], [5, 6, 7, 8, 9], [20]]
    recorded, rounds = [[] for _ in histories], [0] * 3
    with GenerateSampler(model, [1, 2], 0, temperature=0.7).open([list(h) for h in histories], 60) as session:
        for row in range(3):
            session.extend(row, [], 4 + row)
        while session.busy:
            for result in session.step():
                recorded[result.row] += zip(range(len(histories[result.row]), 999), result.logprobs, strict=False)
                histories[result.row] += result.token_ids
                rounds[result.row] += 1
                if rounds[result.row] < 3:
                    read = [30 + result.row, 31, 32][: 1 + rounds[result.row]]
                    histories[result.row] += read
                    session.extend(result.row, read, 3 + result.row)
    model.eval()
    gaps = []
    for history, pairs in zip(histories, recorded, strict=True):
        expected = recompute(model, history, 0.7)
        gaps += [abs(expected[place] - value) for place, value in pairs]
    assert len(gaps) > 20 and max(gaps) < 2e-5


def test_other_processes_are_not_waited_for(monkeypatch):
    """Not even if transformers believes that parameters are sharded, which are gathered by then."""
    monkeypatch.setattr(transformers.generation.utils, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(transformers.generation.utils, "_get_torch_distributed_world_size", lambda: 2)
    with GenerateSampler(build("Qwen3"), [1, 2], 0).open([[5, 6]], 8) as session:
        session.extend(0, [], 3)
        assert session.step()[0].token_ids


@pytest.mark.parametrize(
    ("plugins", "gathers", "refused"),
    [
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, False, "`ds3_gather_for_generation=False` with"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, True, None),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=2)}, False, None),
        ({"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, True, "FSDP version 1"),
        ({"fsdp_plugin": SimpleNamespace(fsdp_version=2)}, True, None),
        ({}, False, None),
    ],
)
def test_sharding_that_gathers_for_each_token_is_refused(tmp_path, plugins, gathers, refused):
    tokenizer = chat_tokenizer()
    options = config(tmp_path, ds3_gather_for_generation=gathers)
    reward = lambda completions, **kwargs: [0.0] * len(completions)  # noqa: E731
    trainer = ToolGRPOTrainer(tiny_model(tokenizer), reward, options, prompts(), processing_class=tokenizer)
    trainer.accelerator.state = SimpleNamespace(**plugins)
    with pytest.raises(ConfigError, match=refused) if refused else nullcontext():
        check_gathering(trainer.run)


def test_fsdp_reshards_after_rollouts_as_before():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))

        def build_sharded(asked_for):
            model = build("Qwen3")
            for layer, reshards in zip(model.model.layers, asked_for, strict=True):
                fully_shard(layer, mesh=mesh, reshard_after_forward=reshards)
            return fully_shard(model, mesh=mesh)

        def settings(model):
            states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
            return [state._fsdp_param_group.post_forward_mesh_info is not None for state in states]

        for forward_first in (False, True):
            model, untouched = (build_sharded([False, True]) for _ in range(2))
            untouched(torch.tensor([TOKENS]))
            if forward_first:
                model(torch.tensor([TOKENS]))
            with gathered_parameters(model):
                model(torch.tensor([TOKENS]))
                assert settings(model) == [False] * 3
            assert settings(model) == settings(untouched) == [False, False, True]
    finally:
        torch.distributed.destroy_process_group()


def test_rows_end_on_their_own_budget_or_stop_token():
    model = build("Qwen3")
    stops = list(range(20))  # a third of the vocabulary, so that both ends are seen
    seen = set()
    for seed in range(4):
        torch.manual_seed(seed)
        with GenerateSampler(model, stops, 0).open([[5, 6]] * 6, 40) as session:
            for row in range(6):
                session.extend(row, [], 1 + 2 * row)
            results = session.step()
            assert not session.busy
        assert [result.row for result in results] == list(range(6))
        for result in results:
            seen.add(result.stopped)
            assert 1 <= len(result.token_ids) == len(result.logprobs) <= 1 + 2 * result.row
            assert not set(result.token_ids[:-1]) & set(stops) and all(value <= 0 for value in result.logprobs)
            assert result.stopped == (result.token_ids[-1] in stops)
            assert result.stopped or len(result.token_ids) == 1 + 2 * result.row
    assert seen == {True, False}


def test_without_stop_tokens_every_budget_is_used():
    with GenerateSampler(build("Qwen3"), [], 0).open([[5], [6, 7]], 9) as session:
        session.extend(0, [], 3)
        session.extend(1, [8], 5)
        assert [(len(r.token_ids), r.stopped) for r in session.step()] == [(3, False), (5, False)]


@pytest.mark.parametrize("lora", [False, True])
def test_models_own_generation_settings_do_not_reshape_the_distribution(lora):
    model = build("Qwen3")
    settings = model.generation_config
    settings.update(
        top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=5.0, no_repeat_ngram_size=1, max_new_tokens=1
    )
    base, model = model, get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if lora else model
    with GenerateSampler(model, [], 0).open([[5, 6]] * 8, 20) as session:
        for row in range(8):
            session.extend(row, [], 10)
        results = session.step()
    assert base.generation_config is settings and settings.repetition_penalty == 5.0
    assert len({tuple(result.token_ids) for result in results}) > 1
    for result in results:
        expected = recompute(model.eval(), [5, 6, *result.token_ids], 1.0)[2:]
        assert result.logprobs == pytest.approx(expected, abs=2e-5)


def test_row_that_is_queued_cannot_be_extended():
    with GenerateSampler(build("Qwen3"), [], 0).open([[5]], 9) as session:
        session.extend(0, [], 3)
        with pytest.raises(SamplerError, match="Row 0 was extended while"):
            session.extend(0, [], 3)


@pytest.mark.parametrize("fail", [False, True])
def test_training_flags_and_gradients_are_restored(fail):
    model = build("Qwen3")
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    try:
        with GenerateSampler(model, [], 0).open([[5]], 9) as session:
            assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
            session.extend(0, [], 2)
            session.step()
            if fail:
                raise KeyError("stop")
    except KeyError:
        assert fail
    assert [module.training for module in model.modules()] == before and torch.is_grad_enabled()


# Which sampler a model gets


@pytest.mark.parametrize("name", ["Qwen3", "Llama"])
def test_ordinary_models_get_the_default_sampler(name):
    model = build(name)
    assert unsupported_reason(model, TOKENS) is None
    assert unsupported_reason(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), TOKENS) is None
    assert isinstance(make_sampler(model, True, stop_ids=[1], pad_id=0), ModelSampler)
    assert isinstance(make_sampler(model, False, stop_ids=[1], pad_id=0), GenerateSampler)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Bloom", "does not go through transformers' attention interface"),
        ("Mamba", ""),
        ("Lfm2", "conv layers"),
        ("Qwen3Next", ""),
        ("Bamba", ""),
        ("FalconH1", ""),
    ],
)
def test_reason_why_the_default_sampler_cannot_handle_a_model(name, reason):
    found = unsupported_reason(build(name), TOKENS)
    assert found and reason in found


def test_encoder_decoder_is_unsupported():
    made = transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    assert unsupported_reason(transformers.T5ForConditionalGeneration(made), TOKENS) == "it is an encoder-decoder"


def test_learned_prompt_is_unsupported():
    model = get_peft_model(build("Qwen3"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert unsupported_reason(model, TOKENS) == "PROMPT_TUNING puts learned tokens before the prompt"


def test_model_with_other_logprobs_in_the_trial_is_unsupported():
    """The model declares everything needed, and computes something else when it reads from a cache."""
    model = build("Qwen3")
    forward = model.forward

    def skewed(*args, past_key_values=None, **kwargs):
        output = forward(*args, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None:
            output.logits = output.logits * 1.1
        return output

    model.forward = skewed
    assert "its log-probs in the trial are not those of a plain pass" in unsupported_reason(model, TOKENS)


def test_trial_leaves_random_state_and_model_unchanged():
    model = build("Qwen3")
    model.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for broken in (False, True):
        if broken:
            model.model.layers[0].self_attn.forward = None
        unsupported_reason(model, TOKENS)
        assert all(module.training for module in model.modules()) and torch.is_grad_enabled()
        assert model.config._attn_implementation != "toolgrpo_shared_prefix"
    assert torch.equal(torch.rand(3), expected)


def test_trial_accepts_a_model_in_half_precision():
    assert unsupported_reason(build("Qwen3").bfloat16(), TOKENS) is None


def get_salary(person: str) -> int:
    """
    Salary of a person.

    Args:
        person: Name.
    """
    return 10


@pytest.mark.parametrize("with_tools", [False, True])
def test_training_works_with_the_plain_sampler(tmp_path, caplog, with_tools):
    tokenizer = chat_tokenizer()
    made = transformers.BloomConfig(**{**BLOOM, "vocab_size": len(tokenizer)})
    model = transformers.BloomForCausalLM(made)
    model.config._name_or_path = "tiny-bloom"
    with caplog.at_level(logging.WARNING):
        trainer = ToolGRPOTrainer(
            model,
            reward_funcs=lambda completion_ids, **kwargs: [float(sum(ids) % 7) for ids in completion_ids],
            args=config(tmp_path, logprob_check="always", max_steps=2, num_iterations=2, learning_rate=1e-3),
            train_dataset=prompts(4),
            processing_class=tokenizer,
            tools=[get_salary] if with_tools else None,
        )
        before = [parameter.detach().clone() for parameter in model.parameters()]
        trainer.train()
    assert "falls back to `model.generate` for this model: its attention does not go through" in caplog.text
    history = [entry for entry in trainer.state.log_history if "ratio/mean" in entry]
    assert [entry["step"] for entry in history] == [1, 2]
    assert history[0]["ratio/mean"] == pytest.approx(1.0, abs=1e-4) and history[0]["sampling/logp_diff_max"] < 1e-4
    assert history[1]["ratio/std"] > 1e-6  # the second step on the same rollouts
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_both_samplers_draw_from_one_distribution():
    """Over many rows, the share of each first token is that of the softmax with either sampler."""
    tokenizer = chat_tokenizer()
    model = tiny_model(tokenizer)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1] * 30
        top = torch.zeros_like(logits)
        top[logits.topk(4).indices] = torch.tensor([3.0, 2.0, 2.0, 1.0]) + 20
        model.lm_head.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(top)
    expected = torch.softmax(top, dim=-1)
    for kind in (ModelSampler, GenerateSampler):
        torch.manual_seed(0)
        with kind(model, [], 0).open([[5, 6, 7]] * 2000, 1) as session:
            for row in range(2000):
                session.extend(row, [], 1)
            drawn = torch.tensor([result.token_ids[0] for result in session.step()])
        seen = torch.bincount(drawn, minlength=len(top)).float()
        keep = expected > 1e-6
        assert ((seen[keep] - 2000 * expected[keep]) ** 2 / (2000 * expected[keep])).sum() < 16.3  # 0.999, 3 degrees
        assert seen[~keep].sum() == 0
