"""The LM head in float32: the same logits for sampling and scoring, in every kind of head and dtype."""

import copy

import pytest
import torch
import transformers
from conftest import add, chat_tokenizer, config, prompts, tiny_model
from peft import IA3Config, LoraConfig
from trl import GRPOConfig, GRPOTrainer

from trl_toolgrpo import ConfigError, ToolGRPOTrainer
from trl_toolgrpo.models.lm_head import adapted_head, cast_heads, held_head
from trl_toolgrpo.sampling.generate_sampler import GenerateSampler
from trl_toolgrpo.sampling.model_sampler import ModelSampler


DTYPES = {"autocast": (torch.float32, True), "bfloat16": (torch.bfloat16, False), "float16": (torch.float16, False)}
HEADS = ["untied", "tied", "gpt2", "softcapped", "biased", "lora", "tied_lora", "saved", "adapted", "tied_adapted"]


def build(head, tokenizer, dtype=torch.float32):
    """A tiny policy with logits of up to about 30, and the adapter it is trained with."""
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if head == "gpt2":
        made = transformers.GPT2Config(**size, n_embd=32, n_layer=2, n_head=4, bos_token_id=1)
        model = transformers.GPT2LMHeadModel(made)
    elif head == "softcapped":
        made = transformers.Gemma2Config(
            **size, **shape, num_key_value_heads=2, head_dim=8, final_logit_softcapping=20.0
        )
        model = transformers.Gemma2ForCausalLM(made)
    elif head == "biased":
        made = transformers.PhiConfig(**size, **shape, num_key_value_heads=2)
        model = transformers.PhiForCausalLM(made)
    else:
        model = tiny_model(tokenizer, tie_word_embeddings=head.startswith("tied"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight")):
                parameter.normal_(std=1.0)
            elif name.endswith("lm_head.bias"):
                parameter.normal_(std=2.0)
    model.config._name_or_path = f"tiny-{head}"
    adapter = None
    if head.endswith("adapted"):
        adapter = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    if head in ("lora", "tied_lora", "saved"):
        saved = {"modules_to_save": ["lm_head"]} if head == "saved" else {}
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **saved)
    return model.to(dtype), adapter


def trainer_of(path, head, dtype, **changes):
    tokenizer = chat_tokenizer()
    weights, autocast = DTYPES[dtype]
    model, adapter = build(head, tokenizer, weights)
    options = {"bf16": autocast, "cast_lm_head_to_fp32": True, "logprob_check": "always", "max_steps": 2, **changes}
    rewards = lambda completions, **kwargs: [float(i % 3) for i in range(len(completions))]  # noqa: E731
    return ToolGRPOTrainer(
        model, rewards, config(path, **options), prompts(8), processing_class=tokenizer, peft_config=adapter
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
def test_logits_are_those_of_a_float32_product_for_sampling_and_scoring(tmp_path, head, dtype):
    trainer = trainer_of(tmp_path, head, dtype)
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(1))
    mask, autocast = torch.ones_like(ids), trainer.accelerator.autocast
    bare = trainer.accelerator.unwrap_model(trainer.model)
    base = bare.get_base_model() if hasattr(bare, "get_base_model") else bare
    hidden, seen = [], base.base_model.register_forward_hook(lambda module, args, output: hidden.append(output[0]))
    bare.eval()
    if head.endswith("adapted"):  # an adapter that has been trained
        torch.nn.init.normal_(base.lm_head.lora_B["default"].weight, std=0.3)
    with torch.no_grad(), autocast(), held_head(bare):
        logits = bare(input_ids=ids).logits
    seen.remove()
    with adapted_head(base):
        weight, bias = base.get_output_embeddings().weight, base.get_output_embeddings().bias
    expected = torch.nn.functional.linear(hidden[0].float(), weight.float(), None if bias is None else bias.float())
    if head == "softcapped":
        expected = 20 * torch.tanh(expected / 20)
    assert logits.dtype == torch.float32 and logits.abs().max() > 8
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        scored, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 6)
    known = torch.log_softmax(expected, -1)[:, 5:-1].gather(-1, ids[:, 6:, None])[..., 0]
    torch.testing.assert_close(scored, known, atol=1e-4, rtol=1e-5)
    if head.endswith("adapted"):
        scored, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 6)
        scored.sum().backward()
        assert base.lm_head.lora_A["default"].weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", [ModelSampler, GenerateSampler])
@pytest.mark.parametrize("head", ["untied", "lora"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_samplers_record_what_a_float32_head_says(tmp_path, dtype, head, kind):
    """The weight is cast once for all tokens of a session, and not kept after it."""
    trainer = trainer_of(tmp_path, head, dtype)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    product = (policy.get_base_model() if head == "lora" else policy).lm_head.forward
    with kind(policy, [], 0, autocast=trainer.accelerator.autocast).open([[5, 6, 7]], 8) as session:
        session.extend(0, [], 8)
        while session.busy:
            found = session.step()
        assert (product.weight is not None) is (head == "lora" and dtype != "autocast")
        assert product(torch.ones(1, 32, dtype=DTYPES[dtype][0])).dtype == torch.float32
    assert product.weight is None and len(found[0].logprobs) == 8


@pytest.mark.parametrize("dtype", ["autocast", "bfloat16"])
@pytest.mark.parametrize("head", HEADS)
def test_training_agrees_with_its_sampler(tmp_path, head, dtype):
    adapted = "lora" in head or "adapted" in head
    trainer = trainer_of(tmp_path, head, dtype, beta=0.05 if adapted else 0.0)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "sampling/logp_diff_mean" in log]
    assert len(logs) == 2 and all(log["sampling/logp_diff_mean"] < 0.05 for log in logs)
    assert logs[0].get("kl", 0.0) == pytest.approx(0.0, abs=1e-3)


def test_a_reference_that_is_loaded_has_such_a_head_too(tmp_path):
    tokenizer = chat_tokenizer()
    model, _ = build("untied", tokenizer)
    model.save_pretrained(tmp_path / "model")
    trainer = ToolGRPOTrainer(
        str(tmp_path / "model"), lambda completions, **kwargs: [float(i % 3) for i in range(len(completions))],
        config(tmp_path, bf16=True, cast_lm_head_to_fp32=True, beta=0.05), prompts(8), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_on_the_head_is_scored_and_trained_as_it_is_sampled(tmp_path, tied, lora_bias):
    """Log-probs and gradients of TRL's pass against autograd through the model's own logits, in float64."""
    tokenizer = chat_tokenizer()
    model, _ = build("tied" if tied else "untied", tokenizer, torch.float64)
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], lora_bias=lora_bias)
    trainer = ToolGRPOTrainer(
        model, lambda completions, **kwargs: [float(i % 3) for i in range(len(completions))],
        config(tmp_path, beta=0.05, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5,
               max_steps=2, learning_rate=1e-2, logprob_check="always"),
        prompts(8), processing_class=tokenizer, peft_config=adapter,
    )  # fmt: skip
    trainer.train()
    head = trainer.model.get_base_model().lm_head
    assert head.lora_B["default"].weight.abs().max() > 0  # it has moved
    assert all(log["sampling/logp_diff_mean"] < 1e-6 for log in trainer.state.log_history if "ratio/mean" in log)
    ids = torch.randint(3, 200, (3, 12), generator=torch.Generator().manual_seed(1))
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    found = []
    for fused in (True, False):
        if fused:
            scored, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 6)
        else:
            scores = torch.log_softmax(trainer.model(input_ids=ids).logits, -1)
            scored = scores[:, 5:-1].gather(-1, ids[:, 6:, None])[..., 0]
        found.append((scored.detach(), torch.autograd.grad(scored.sum(), trained, allow_unused=True)))
    torch.testing.assert_close(found[0][0].double(), found[1][0].double(), atol=1e-6, rtol=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    with trainer.model.disable_adapter(), torch.no_grad():  # TRL's own pass: ours would be the reference's
        scored, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, ids, ids // ids, 6)
        scores = torch.log_softmax(trainer.model(input_ids=ids).logits, -1)[:, 5:-1].gather(-1, ids[:, 6:, None])
    torch.testing.assert_close(scored.double(), scores[..., 0].double(), atol=1e-6, rtol=1e-6)


def test_an_adapter_on_the_head_needs_a_loaded_model(tmp_path):
    build("untied", chat_tokenizer())[0].save_pretrained(tmp_path / "model")
    adapter = LoraConfig(target_modules=["q_proj", "lm_head"])
    arguments = {"args": config(tmp_path), "train_dataset": prompts(4), "processing_class": chat_tokenizer()}
    with pytest.raises(ConfigError, match=r"by its name and an adapter on its `lm_head`.*from_pretrained"):
        ToolGRPOTrainer(str(tmp_path / "model"), lambda completions, **_: [0.0], peft_config=adapter, **arguments)


def test_other_adapters_on_the_head_are_refused_by_name(tmp_path):
    model, _ = build("untied", chat_tokenizer())
    for adapter in (LoraConfig(target_modules=["lm_head"], use_dora=True), IA3Config(
        target_modules=["lm_head"], feedforward_modules=[], task_type="CAUSAL_LM"
    )):  # fmt: skip
        with pytest.raises(ValueError, match="lm_head"):
            ToolGRPOTrainer(
                copy.deepcopy(model), lambda completions, **kwargs: [0.0] * len(completions), config(tmp_path),
                prompts(4), processing_class=chat_tokenizer(), peft_config=adapter,
            )  # fmt: skip


def test_a_step_is_trls_with_the_same_option(tmp_path):
    """Full training of bfloat16 weights, where TRL's cast works: the head becomes float32, and the loss is equal."""
    losses = {}
    tokenizer = chat_tokenizer()
    ids = torch.randint(3, 200, (4, 12), generator=torch.Generator().manual_seed(1))
    for kind in (ToolGRPOTrainer, GRPOTrainer):
        model, _ = build("untied", tokenizer, torch.bfloat16)
        args = config(tmp_path, cast_lm_head_to_fp32=True, beta=0.0)
        if kind is GRPOTrainer:
            names = {field for field in GRPOConfig.__dataclass_fields__ if GRPOConfig.__dataclass_fields__[field].init}
            given = {name: getattr(args, name) for name in names} | {"steps_per_generation": None}
            given["generation_batch_size"] = None
            args = GRPOConfig(**given)
        trainer = kind(model, lambda completions, **kwargs: [0.0] * 4, args, prompts(8), processing_class=tokenizer)
        scored, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 6)
        scored.sum().backward()
        weight = trainer.model.lm_head.weight
        losses[kind] = scored.detach(), weight.grad.clone(), weight.dtype
    ours, trls = losses[ToolGRPOTrainer], losses[GRPOTrainer]
    assert ours[2] == trls[2] == torch.float32
    assert torch.equal(ours[0], trls[0]) and torch.equal(ours[1], trls[1])


def test_a_quantized_head_is_refused_by_name():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, _ = build("untied", chat_tokenizer())
    model.lm_head = bitsandbytes.nn.Linear4bit(32, model.config.vocab_size, bias=False)
    model.lm_head.weight.data = torch.zeros(16, 1, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=r"cast_lm_head_to_fp32.*llm_int8_skip_modules"):
        cast_heads(model, 1.0)


def test_a_head_in_float64_stays_as_it_is():
    model, _ = build("tied", chat_tokenizer(), torch.float64)
    ids = torch.arange(3, 12)[None]
    before = model(input_ids=ids).logits
    cast_heads(model, 1.0)
    assert torch.equal(model(input_ids=ids).logits, before) and model.lm_head.weight.dtype == torch.float64


def test_vllm_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="cast_lm_head_to_fp32=True` with vLLM"):
        config(tmp_path, cast_lm_head_to_fp32=True, use_vllm=True)


def test_tools_and_forcing_run_with_it(tmp_path):
    tokenizer = chat_tokenizer()
    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer), lambda completions, **kwargs: [float(i % 3) for i in range(len(completions))],
        config(tmp_path, bf16=True, cast_lm_head_to_fp32=True, max_completion_length=48, max_steps=2, force_rate=1.0,
               force_level="schema", assist_warmup_steps=1, advantage_estimator="gae"),
        prompts(8), processing_class=tokenizer, tools=[add],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2
