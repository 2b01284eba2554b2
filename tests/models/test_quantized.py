"""QLoRA on a CPU: the recipe's flags, rollouts of a 4-bit policy, and optimizers that keep their state in 8 bits."""

from dataclasses import replace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import chat_tokenizer, config, prompts, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import get_peft_config, get_quantization_config

from trl_toolgrpo import ConfigError, ToolGRPOTrainer, ValueHead
from trl_toolgrpo.models.quantized import keep_trainable
from trl_toolgrpo.recipes.arguments import parse_arguments
from trl_toolgrpo.recipes.evaluate import load_policy
from trl_toolgrpo.recipes.evaluation.results import RunSettings
from trl_toolgrpo.recipes.qwen3_tools import build_task, build_trainer


def quantized(folder, path, *flags):
    """Make the recipe's trainer for a model in 4 bits, as its command line does."""
    arguments = [
        "--model_name_or_path", str(folder), "--load_in_4bit", "true", "--use_peft", "true", "--lora_r", "4",
        "--lora_target_modules", "all-linear", "--dtype", "float32", "--output_dir", str(path), "--train_size", "16",
        "--held_out_size", "2", "--max_steps", "3", "--per_device_train_batch_size", "8", "--bf16", "false",
        "--max_completion_length", "24", "--per_device_eval_batch_size", "2", "--learning_rate", "1e-3", *flags,
    ]  # fmt: skip
    recipe, training, model = parse_arguments(arguments, {})
    assert get_quantization_config(model).load_in_4bit and get_peft_config(model) is not None
    return build_trainer(build_task(recipe, training), recipe, training, model)[0]


def test_an_adapter_is_evaluated_on_the_base_it_was_trained_on(folder, tmp_path):
    arguments = ["--model_name_or_path", str(folder), "--load_in_4bit", "true", "--output_dir", str(tmp_path)]
    recipe, training, model = parse_arguments(arguments, {})
    RunSettings.of(recipe, training, model).save(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(base, LoraConfig(r=2, target_modules=["gate_proj"])).save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    run = RunSettings.load(tmp_path)
    for settings, in_four_bits in ((run, True), (replace(run, load_in_4bit=False), False), (None, False)):
        policy, _ = load_policy(str(tmp_path), "float32", settings)
        layer = policy.get_base_model().model.layers[0].mlp.gate_proj.base_layer
        assert isinstance(layer, Linear4bit) == in_four_bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, tokenizer = tmp_path_factory.mktemp("base"), chat_tokenizer()
    tiny_model(tokenizer, hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"]])
def test_a_head_in_float32_over_four_bits(folder, tmp_path, targets):
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    trainer = ToolGRPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bits, dtype="bfloat16"),
        lambda completions, **kwargs: [float(i % 3) for i in range(len(completions))],
        config(tmp_path, bf16=True, cast_lm_head_to_fp32=True, advantage_estimator="gae", logprob_check="always",
               max_steps=3, max_completion_length=24),
        prompts(8),
        processing_class=chat_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    gaps = [log["sampling/logp_diff_mean"] for log in trainer.state.log_history if "sampling/logp_diff_mean" in log]
    assert len(gaps) == 3 and max(gaps) < 5e-3 and trainer.rollouts.engine._supported


def test_a_policy_in_four_bits_is_sampled_and_trained(folder, tmp_path, monkeypatch):
    trainer = quantized(folder, tmp_path, "--beta", "0.1", "--sync_ref_model", "true", "--ref_model_sync_steps", "1")
    base = trainer.model.get_base_model()
    assert isinstance(base.model.layers[0].mlp.gate_proj.base_layer, Linear4bit)
    assert all(p.requires_grad == ("lora_" in n and ".ref." not in n) for n, p in trainer.model.named_parameters())
    rewards = iter(range(1000))  # differ within a group
    trainer.reward_funcs = [lambda completions, **kwargs: [float(next(rewards) % 7) for _ in completions]]
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(log) == 3
    for entry in log:  # the self-check has passed, and the sampler is the policy that is trained
        assert entry["ratio/mean"] == pytest.approx(1.0, abs=1e-3) and entry["sampling/logp_diff_max"] < 1e-3
        assert entry["grad_norm"] > 0
    assert trainer.rollouts.engine._supported, "rollouts fell back to `model.generate`"
    assert trainer.reference.report.differ == ()
    factors = [p for n, p in trainer.model.named_parameters() if "lora_B.default" in n]
    assert factors and all(bool(p.any()) for p in factors)


FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
CRITICS = {
    "gae": {"advantage_estimator": "gae"},
    "gae by turn": {"advantage_estimator": "gae", "gae_unit": "turn"},
    "group_gae": {"advantage_estimator": "group_gae", "value_epochs": 2},
    "warm-up": {"advantage_estimator": "gae", "value_warmup_steps": 1},
    "into the trunk": {"advantage_estimator": "gae", "value_detach": False},
    "bfloat16": {"advantage_estimator": "gae", "bf16": True, "bound": 2e-2},
    "with a reference": {
        "advantage_estimator": "gae", "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 1.0,
    },
}  # fmt: skip


def critic(folder, path, kind="nf4", **changes):
    bits = {"load_in_8bit": True} if kind == "int8" else {**FOUR_BITS, "bnb_4bit_quant_type": kind}
    options = {
        "max_steps": 3, "learning_rate": 1e-2, "logprob_check": "always", "model_init_kwargs": {"dtype": "float32"},
        **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    return ToolGRPOTrainer(
        str(folder), lambda completion_ids, **kwargs: [float(sum(ids) % 11) for ids in completion_ids],
        config(path, **options), prompts(4), quantization_config=BitsAndBytesConfig(**bits),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"), [*(("nf4", name) for name in CRITICS), ("fp4", "gae"), ("int8", "gae")]
)
def test_a_value_head_over_a_quantized_base(folder, tmp_path, kind, name):
    """The head is not quantized, learns, is saved with the adapter, and can be loaded again."""
    changes = dict(CRITICS[name])
    bound = changes.pop("bound", 2e-2 if kind == "int8" else 1e-4)
    trainer = critic(folder, tmp_path, kind, **changes)
    head = trainer.critic.head
    assert type(head.layer) is torch.nn.Linear and {p.dtype for p in head.parameters()} == {torch.float32}
    before = [parameter.detach().clone() for parameter in head.parameters()]
    trainer.train()
    trainer.save_model()
    assert all(not torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))
    logged = [entry for entry in trainer.state.log_history if "value/loss" in entry]
    assert len(logged) == 3 and all(entry["value/grad_norm"] > 0 for entry in logged)
    assert all(entry["sampling/logp_diff_max"] < bound for entry in logged)
    loaded = ValueHead.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), head.parameters(), strict=True))


@pytest.mark.parametrize("estimator", ["group", "gae"])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_four_bit_run_is_resumed_exactly(folder, tmp_path, estimator, fresh):
    """Also by the same trainer: the adapter stays in the dtype it is trained in."""
    options = {"save_strategy": "steps", "save_steps": 1, "advantage_estimator": estimator}
    trainer = critic(folder, tmp_path, **options)
    trainer.train()
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    again = critic(folder, tmp_path, **options) if fresh else trainer
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = {name: p for name, p in again.model.named_parameters() if p.requires_grad}
    assert set(found) == set(trained)
    for name, tensor in trained.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("sampled_before", [False, True])
def test_sampling_does_not_cut_the_gradient(folder, sampled_before):
    """Gradients of the adapter are those over the dequantized weights, after passes in evaluation mode too."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=nf4)
    ids = torch.arange(12)[None] + 5
    if sampled_before:
        with torch.no_grad():
            model.eval()(ids)
        keep_trainable(model)  # packing has rounded the scales
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight)
    gradients = []
    for base in (model, plain):
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        policy = get_peft_model(base, lora)
        keep_trainable(policy)
        with torch.no_grad():
            policy.eval()(ids)
        policy.train()(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.requires_grad})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-5, rtol=1e-3, msg=name)
    assert len(gradients[1]) == 2 * 7 * 2


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "paged_lion_8bit"])
def test_optimizers_in_eight_bits(tmp_path, optim):
    """Optimizers with paged state need a GPU; the others also work on a CPU."""

    def start():
        tokenizer = chat_tokenizer()
        return ToolGRPOTrainer(
            tiny_model(tokenizer, hidden_size=128, head_dim=32),
            lambda completion_ids, **kwargs: [float(sum(ids) % 7) for ids in completion_ids],
            config(tmp_path, optim=optim),
            prompts(),
            processing_class=tokenizer,
        )

    if optim.startswith("paged"):
        with pytest.raises(ConfigError, match=rf"`optim='{optim}'` on a CPU.*Use `optim='[a-z]\w+'`, or train on a"):
            start()
        return
    trainer = start()
    trainer.train()
    states = trainer.optimizer.state.values()
    assert any(state["state1"].dtype == torch.uint8 for state in states)


def test_paged_optimizers_are_refused_on_a_cpu(tmp_path, monkeypatch):
    from trl_toolgrpo.validation.trainable_parameters import check_optimizer

    args = config(tmp_path, optim="paged_adamw_8bit")
    monkeypatch.setattr(type(args), "device", torch.device("cuda"))
    check_optimizer(args)
