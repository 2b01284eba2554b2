"""A policy that nothing would move is refused by name, and one that does not move is noticed."""

import logging
import math

import pytest
import torch
from conftest import chat_tokenizer, config, prompts, tiny_model
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import TrainerCallback

from trl_toolgrpo import ConfigError, ToolGRPOTrainer
from trl_toolgrpo.monitoring.health.monitor import RunFacts
from trl_toolgrpo.monitoring.health.update_rules import UPDATE_RULES
from trl_toolgrpo.reference.adapter import Comparison
from trl_toolgrpo.run_folder.files import read_lines


TOKENIZER = chat_tokenizer()
RULES = {rule.name: rule for rule in UPDATE_RULES}


def lora(**changes):
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes})


def differing(completions, **kwargs):
    return [float(row % 2) for row in range(len(completions))]


def nothing(completions, **kwargs):
    return [0.0] * len(completions)


def start(path, model=None, rewards=differing, optimizers=(None, None), peft_config=None, **changes):
    args = config(path, **{"learning_rate": 1e-2, "max_steps": 4, "max_completion_length": 8, **changes})
    model = tiny_model(TOKENIZER) if model is None else model
    return ToolGRPOTrainer(
        model, rewards, args, prompts(8), processing_class=TOKENIZER, peft_config=peft_config, optimizers=optimizers
    )


def entries(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def alarms(path):
    return {line["rule"] for line in read_lines(path / "health.jsonl") if line["level"] != "ok"}


def policy(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "value_head" not in n}


# What is frozen


def loaded_for_inference(path):
    get_peft_model(tiny_model(TOKENIZER), lora()).save_pretrained(path / "adapter")
    return PeftModel.from_pretrained(tiny_model(TOKENIZER), path / "adapter")


def frozen_model(path):
    return tiny_model(TOKENIZER).requires_grad_(False)


def frozen_adapter(path):
    return get_peft_model(tiny_model(TOKENIZER), lora()).requires_grad_(False)


def another_adapter_is_active(path):
    model = loaded_for_inference(path)
    model.add_adapter("second", lora())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".second." in name)
    return model


def merged_adapter(path):
    model = get_peft_model(tiny_model(TOKENIZER), lora())
    model.merge_adapter()
    return model


def disabled_adapter(path):
    model = get_peft_model(tiny_model(TOKENIZER), lora())
    model.base_model.disable_adapter_layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


FROZEN = {
    "inference": (loaded_for_inference, r"'default' was loaded for inference.*is_trainable=True"),
    "frozen model": (frozen_model, r"no parameter of the Qwen3ForCausalLM.*requires_grad_\(True\).*peft_config"),
    "frozen adapter": (frozen_adapter, r"no parameter of the adapter 'default'.*set_adapter\('default'\)"),
    "another is active": (another_adapter_is_active, r"'second' requires gradients, but \['default'\] is active.*"),
    "merged": (merged_adapter, r"'default' is switched off or merged.*unmerge_adapter"),
    "disabled": (disabled_adapter, r"'default' is switched off or merged.*enable_adapter_layers"),
}


@pytest.mark.parametrize(
    "changes",
    [{}, {"beta": 0.1}, {"beta": 0.1, "sync_ref_model": True, "ref_model_mixup_alpha": 1.0},
     {"advantage_estimator": "gae"}, {"learning_rate": 0.0}],
    ids=["plain", "beta", "synced", "gae", "no rate"],
)  # fmt: skip
@pytest.mark.parametrize("kind", FROZEN)
def test_a_policy_that_is_frozen_is_refused(tmp_path, kind, changes):
    make, words = FROZEN[kind]
    if kind == "frozen model" and "beta" in changes:
        pytest.skip("TRL loads the reference of a plain model by its name")
    with pytest.raises(ConfigError, match=f"Nothing of the policy would be trained: .*{words}"):
        start(tmp_path, make(tmp_path), **changes).train()


def test_a_frozen_policy_may_be_evaluated(tmp_path):
    trainer = start(tmp_path, loaded_for_inference(tmp_path))
    assert "eval_reward" in trainer.evaluate(prompts(4))


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_policy_that_is_frozen_later_is_refused_before_its_first_step(tmp_path, beta):
    trainer = start(tmp_path, peft_config=lora(), beta=beta)
    trainer.model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter of the adapter 'default' requires a gradient"):
        trainer.train()


def test_an_adapter_loaded_to_be_trained_is_trained(tmp_path):
    loaded_for_inference(tmp_path)
    model = PeftModel.from_pretrained(tiny_model(TOKENIZER), tmp_path / "adapter", is_trainable=True)
    trainer = start(tmp_path / "run", model, beta=0.1)
    before = policy(trainer)
    trainer.train()
    after = policy(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "lora_" in name and ".default." in name}


# What the optimizer holds


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


@pytest.mark.parametrize("changes", [{}, {"beta": 0.1}, {"advantage_estimator": "gae"}], ids=["plain", "beta", "gae"])
def test_an_optimizer_made_before_the_adapter_is_refused(tmp_path, changes):
    for bias in ("none", "all"):  # biases of the base are in such an optimizer
        model = tiny_model(TOKENIZER, attention_bias=True)
        with pytest.raises(ConfigError, match=r"leaves \d+ of the policy's \d+ trained tensors as they are: .*lora_A"):
            start(tmp_path, model, optimizers=(adam(model.parameters()), None), peft_config=lora(bias=bias), **changes)


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    other = adam(tiny_model(TOKENIZER).parameters())
    with pytest.raises(ConfigError, match="of another model"):
        start(tmp_path, optimizers=(other, None))
    model = tiny_model(TOKENIZER)
    optimizer = adam(model.parameters())
    model.resize_token_embeddings(len(TOKENIZER) + 8)  # which makes another head
    with pytest.raises(ConfigError, match=r"leaves 1 of the policy's 25 .*: lm_head\.weight\. It holds 1 others"):
        start(tmp_path, model, optimizers=(optimizer, None))


def test_an_optimizer_that_is_set_later_is_looked_at_before_the_first_step(tmp_path):
    trainer = start(tmp_path, peft_config=lora())
    trainer.optimizer = adam(tiny_model(TOKENIZER).parameters())
    with pytest.raises(ConfigError, match="of another model"):
        trainer.train()
    trainer = start(tmp_path, peft_config=lora())
    trainer.optimizer_cls_and_kwargs = torch.optim.AdamW, {"params": list(tiny_model(TOKENIZER).parameters())}
    with pytest.raises(ConfigError, match="of another model"):
        trainer.train()


def test_an_optimizer_of_a_part_of_the_policy_is_pointed_out(tmp_path, caplog):
    model = get_peft_model(tiny_model(TOKENIZER), lora())
    part = [p for n, p in model.named_parameters() if "layers.1." in n]  # frozen weights among them
    with caplog.at_level(logging.WARNING):
        trainer = start(tmp_path, model, optimizers=(adam(part), None))
    assert "holds 4 of the policy's 8 trained tensors" in caplog.text and "layers.0" in caplog.text
    trainer.train()
    assert [entry["policy/moved"] for entry in entries(trainer)][1:] == [0.5, 0.5, 0.5]
    assert "policy_still" not in alarms(tmp_path)


@pytest.mark.parametrize("estimator", ["group", "gae"])
def test_an_optimizer_made_after_the_adapter_trains_it(tmp_path, caplog, estimator):
    model = get_peft_model(tiny_model(TOKENIZER), lora())
    with caplog.at_level(logging.WARNING):
        trainer = start(tmp_path, model, optimizers=(adam(model.parameters()), None), advantage_estimator=estimator)
        before = policy(trainer)
        trainer.train()
    assert any(not torch.equal(before[name], weight) for name, weight in policy(trainer).items())
    assert "The optimizer you passed" not in caplog.text and entries(trainer)[-1]["policy/moved"] > 0


def test_a_schedule_of_another_optimizer_is_refused(tmp_path):
    model = tiny_model(TOKENIZER)
    mine, other = adam(model.parameters()), adam(model.parameters())
    for optimizer, driven in ((mine, other), (None, other)):
        schedule = torch.optim.lr_scheduler.ConstantLR(driven)
        with pytest.raises(ConfigError, match="scheduler made for another optimizer"):
            start(tmp_path, model, optimizers=(optimizer, schedule))
    start(tmp_path, model, optimizers=(mine, torch.optim.lr_scheduler.ConstantLR(mine)))


def test_a_schedule_that_knows_no_value_head_is_refused(tmp_path):
    model = tiny_model(TOKENIZER)
    optimizer = adam(model.parameters())
    given = optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for estimator in ("gae", "group_gae"):
        with pytest.raises(ConfigError, match=f"'{estimator}'.*made before the value head.*lr_scheduler_type"):
            start(tmp_path, model, optimizers=given, advantage_estimator=estimator)


def test_scoring_the_reference_leaves_frozen_factors_frozen(tmp_path):
    """Switching adapters makes PEFT require gradients of every factor, of those that were frozen on purpose, too."""
    for given in (False, True):
        model = get_peft_model(tiny_model(TOKENIZER), lora()) if given else tiny_model(TOKENIZER)
        trainer = start(tmp_path, model, peft_config=None if given else lora(), beta=0.1)
        for name, parameter in trainer.model.named_parameters():
            parameter.requires_grad_("lora_B.default" in name)
        trainer.train()
        trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
        assert trained and all("lora_B.default" in name for name in trained)


# A policy that does not move all the same


class Restore(TrainerCallback):
    """Undoes what each optimizer step does."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "value_head" not in name:
                    parameter.copy_(self.kept[name])


@pytest.mark.parametrize("estimator", ["group", "gae"])
@pytest.mark.parametrize("peft", [False, True])
def test_weights_that_do_not_move_raise_an_alarm(tmp_path, peft, estimator):
    peft_config = lora() if peft else None
    trainer = start(tmp_path, peft_config=peft_config, advantage_estimator=estimator)
    trainer.add_callback(Restore())
    trainer.train()
    assert [entry["policy/moved"] for entry in entries(trainer)] == [0.0] * 4
    assert "policy_still" in alarms(tmp_path)


def test_rules_run_on_trls_own_rollouts(tmp_path):
    trainer = start(tmp_path, record_sample_logprobs=False)
    trainer.add_callback(Restore())
    trainer.train()
    assert "policy_still" in alarms(tmp_path) and not any("policy/moved" in entry for entry in entries(trainer))


def test_a_rate_that_rounds_to_nothing_raises_an_alarm(tmp_path):
    start(tmp_path, learning_rate=1e-30).train()
    assert "policy_still" in alarms(tmp_path)


@pytest.mark.parametrize(
    ("rewards", "changes"),
    [
        (differing, {}),
        (differing, {"bf16": True}),
        (differing, {"learning_rate": 0.0}),
        (differing, {"learning_rate": 0.0, "advantage_estimator": "gae"}),
        (differing, {"warmup_steps": 3}),
        (nothing, {}),
        (nothing, {"advantage_estimator": "gae"}),
        (differing, {"advantage_estimator": "gae", "value_warmup_steps": 3}),
        (differing, {"assist_warmup_steps": 3}),
        (differing, {"num_iterations": 2}),
        (differing, {"logging_steps": 2, "max_steps": 6}),
        (differing, {"max_grad_norm": 0.0}),
    ],
)  # fmt: skip
def test_no_alarm_for_healthy_and_frozen_runs(tmp_path, rewards, changes):
    trainer = start(tmp_path, rewards=rewards, peft_config=lora(), logprob_check="off", **changes)
    trainer.train()
    assert not {"policy_still", "critic_still"} & alarms(tmp_path)
    moved = [entry["policy/moved"] for entry in entries(trainer) if "policy/moved" in entry]
    if rewards is differing and changes.get("learning_rate") != 0:
        assert moved and all(value > 0 for value in moved)
    if changes.get("learning_rate") == 0 or (rewards is nothing and not changes):
        assert moved == []


@pytest.mark.parametrize(
    ("rate", "warmup", "given", "estimator", "warned"),
    [
        (0.0, 0, False, "group", True),
        (0.0, 0, True, "group", True),
        (0.0, 0, False, "gae", True),
        (0.0, 0, True, "gae", True),
        (0.01, 0, False, "gae", False),
        (0.01, 2, False, "gae", False),
        (0.01, 2, True, "group", False),
    ],
)
def test_a_learning_rate_of_0_is_pointed_out(tmp_path, caplog, rate, warmup, given, estimator, warned):
    model = get_peft_model(tiny_model(TOKENIZER), lora())
    optimizers: tuple = (None, None)
    if given:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
        rising = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / max(warmup, 1)))
        optimizers = optimizer, rising if warmup else None
    changes = {"learning_rate": rate, "warmup_steps": warmup, "advantage_estimator": estimator, "max_steps": 1}
    with caplog.at_level(logging.WARNING):
        start(tmp_path, model, optimizers=optimizers, **changes).train()
    assert caplog.text.count("learning rate of the policy is 0") == warned


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_an_adapter_of_learned_tokens_is_refused_where_rollouts_are_recorded(tmp_path, kind):
    """What `model.generate` makes of one is not what a forward pass does."""
    adapter = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ConfigError, match=f"of type {adapter.peft_type.value}, .* before the prompt.*LoraConfig"):
        start(tmp_path, peft_config=adapter)
    if kind is PromptTuningConfig:  # which TRL's own rollouts take
        trainer = start(tmp_path, peft_config=adapter, record_sample_logprobs=False, max_steps=2)
        before = trainer.model.prompt_encoder.default.embedding.weight.detach().clone()
        trainer.train()
        assert not torch.equal(before, trainer.model.prompt_encoder.default.embedding.weight)


def test_steps_that_the_scaler_skips_are_no_fault(tmp_path, monkeypatch):
    trainer = start(tmp_path)
    trainer.add_callback(Restore())
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", property(lambda self: True))
    trainer.train()
    assert "policy_still" not in alarms(tmp_path) and not any("policy/moved" in entry for entry in entries(trainer))


def test_the_alarm_needs_two_steps():
    def found(*moved):
        window = [{"step": step, "grad_norm": 0.1, "policy/moved": m} for step, m in enumerate(moved, start=1)]
        return RULES["policy_still"].check(window, RunFacts()) is not None

    assert found(0.0, 0.0) and found(1.0, 0.0, 0.0)
    assert not found(0.0) and not found(0.0, 1.0) and not found(0.0, 0.1)
    quiet = [{"step": 1, "policy/moved": 0.0}, {"step": 2, "policy/moved": 0.0}, {"step": 3}]
    assert RULES["policy_still"].check(quiet, RunFacts()) is None


def test_a_value_head_that_has_nothing_to_learn_is_not_blamed(tmp_path):
    still = [{"step": step, "value/loss": 0.0, "value/grad_norm": 0.0} for step in (1, 2, 3)]
    assert RULES["critic_still"].check(still, RunFacts()) is None
    learning = [{**entry, "value/loss": 0.3} for entry in still]
    assert RULES["critic_still"].check(learning, RunFacts()) is not None
    assert RULES["critic_still"].check([still[0], learning[1]], RunFacts()) is None


# Figures over processes, and in float16


def test_the_largest_difference_is_that_of_all_processes():
    shares = [Comparison(), Comparison()]
    for share, off in zip(shares, (0.25, 4.0), strict=True):
        share.add("a", torch.tensor([1.0]), torch.tensor([1.0]))
        share.add("b", torch.tensor([1.0 + off]), torch.tensor([1.0]), tolerance=1.0)
    found = []
    together = [Comparison(lambda own: found.append(own) or own) for _ in shares]
    for one, share in zip(together, shares, strict=True):
        one._found = share._found
        one.report()
    every = torch.cat(found)
    for share in shares:
        share._gather = lambda own: every
        report = share.report()
        assert (report.tensors, report.differ, report.max_abs_diff) == (2, ("b",), 4.0)


def test_the_gradient_of_the_value_head_is_read_without_the_scale_of_float16(tmp_path):
    """Against the same run without a scale; 2 to the 10 is exact in float32."""

    def run(scale):
        torch.manual_seed(0)
        trainer = start(tmp_path, advantage_estimator="gae", max_steps=2, seed=5, max_grad_norm=0.0)
        if scale is not None:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.train()
        return [entry["value/grad_norm"] for entry in entries(trainer)]

    plain = run(None)
    assert all(math.isfinite(norm) and norm > 0 for norm in plain)
    assert run(1024.0) == pytest.approx(plain, rel=1e-5)
