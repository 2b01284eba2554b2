"""Training with a value head: recorded values, learning, saving, and what is refused."""

import json
import math

import pytest
import torch
from conftest import MAKE_SAMPLER, ScriptedSampler, chat_tokenizer, config, prompts, tiny_model
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from trl_toolgrpo import ConfigError, RewardError, Tool, ToolGRPOTrainer, ToolResult, ValueHeadError
from trl_toolgrpo.critic.critic import Critic
from trl_toolgrpo.critic.value_head import HEAD_FILE
from trl_toolgrpo.sampling.generate_sampler import GenerateSampler


REWARDS = [0.0, 1.0, 0.25, 0.75]


def reward(completions, **kwargs):
    return [REWARDS[index % 4] for index in range(len(completions))]


def make(tmp_path, reward=reward, tools=None, dataset=None, model=None, peft=None, head_seed=None, **changes):
    tokenizer = chat_tokenizer("qwen3_instruct_2507")
    options = {"advantage_estimator": "gae", "beta": 0.0, "max_completion_length": 12, **changes}
    trainer = ToolGRPOTrainer(
        model if model is not None else tiny_model(tokenizer),
        reward,
        config(tmp_path, **options),
        dataset or prompts(16),
        processing_class=tokenizer,
        tools=tools,
        peft_config=peft,
    )
    if head_seed is not None:
        torch.manual_seed(head_seed)
        nn.init.normal_(trainer.critic.head.output.weight)
    kept = []
    score = trainer._generate_and_score_completions

    def keep(inputs):
        output = score(inputs)
        kept.append((dict(output), trainer.rollouts.batch.trajectories))
        return output

    trainer._generate_and_score_completions = keep
    return trainer, kept


def logs_of(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


def policy(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "value_head" not in n}


def look(place: str) -> ToolResult:
    """
    Look somewhere.

    Args:
        place: Where.
    """
    return ToolResult("nothing", reward=0.5)


CALL = '<tool_call>\n{"name": "look", "arguments": {"place": "x"}}\n</tool_call><|im_end|>'


def test_recorded_values_are_those_the_trainer_computes(tmp_path):
    """With shared prompts and unequal lengths, at the positions that predict each token."""
    trainer, kept = make(tmp_path, head_seed=1, per_device_train_batch_size=8)
    trainer.train()
    output, trajectories = kept[0]
    assert all(len(t.values) == len(t.completion_ids) for t in trajectories)
    trainer2, _ = make(tmp_path, head_seed=1)
    for row, trajectory in enumerate(trajectories):
        ids = torch.tensor([[*trajectory.prompt_ids, *trajectory.completion_ids]])
        with torch.no_grad():
            hidden = trainer2.model(ids, output_hidden_states=True).hidden_states[-1][0]
            values = trainer2.critic.head(hidden)[len(trajectory.prompt_ids) - 1 : -1]
        torch.testing.assert_close(torch.tensor(trajectory.values), values, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(output["old_values"][row, : len(values)], values, atol=1e-4, rtol=1e-4)


def test_unrecorded_values_are_computed_in_one_pass(tmp_path, monkeypatch):
    trainer, kept = make(tmp_path, head_seed=1)
    monkeypatch.setattr(MAKE_SAMPLER, lambda policy, supported, paths, **options: GenerateSampler(policy, **options))
    trainer.train()
    output, trajectories = kept[0]
    assert all(t.values is None for t in trajectories)
    again, _ = make(tmp_path, head_seed=1)
    for row, trajectory in enumerate(trajectories):
        ids = torch.tensor([[*trajectory.prompt_ids, *trajectory.completion_ids]])
        with torch.no_grad():
            values = again.model(ids, with_values=True)["token_values"][0, len(trajectory.prompt_ids) - 1 : -1]
        torch.testing.assert_close(output["old_values"][row, : len(values)], values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("estimator", ["gae", "group_gae"])
def test_advantages_by_hand(tmp_path, monkeypatch, estimator):
    """Zero values, gamma = lambda = 1: a token's advantage is the reward still to come, whitened for "gae"."""
    trainer, kept = make(tmp_path, tools=[look], advantage_estimator=estimator, gae_lambda=1.0, logprob_check="off",
                         max_completion_length=400)  # fmt: skip
    tokenizer = trainer.processing_class
    script = [[CALL, "done<|im_end|>"], ["done<|im_end|>"], ["no<|im_end|>"], [CALL, CALL, "so<|im_end|>"]]
    sampler = ScriptedSampler(tokenizer, script, [tokenizer.eos_token_id])
    monkeypatch.setattr(MAKE_SAMPLER, lambda *args, **kwargs: sampler)
    trainer.train()
    output, trajectories = kept[0]
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    terminal = rewards if estimator == "gae" else (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    expected = torch.zeros(output["advantages"].shape, dtype=torch.float64)
    for row, trajectory in enumerate(trajectories):
        ahead = 0.5 * (len(trajectory.turns) - 1)
        for number, turn in enumerate(trajectory.turns):
            expected[row, turn.start : turn.end] = terminal[row] + ahead - 0.5 * number
    mask = output["completion_mask"].bool() & output["tool_mask"].bool()
    if estimator == "gae":
        taken = expected[mask]
        expected = (expected - taken.mean()) / taken.std(correction=0)
    torch.testing.assert_close(output["advantages"].double(), expected * mask, atol=1e-5, rtol=1e-5)
    shown = list(trainer._logs["advantages"])[-4:] if trainer._logs["advantages"] else None
    means = (expected * mask).sum(1) / mask.sum(1)
    assert shown is None or shown == pytest.approx(means.tolist(), abs=1e-5)


@pytest.mark.parametrize("unit", ["token", "turn"])
@pytest.mark.parametrize("estimator", ["gae", "group_gae"])
def test_critic_metrics_are_logged(tmp_path, capsys, estimator, unit):
    trainer, _ = make(tmp_path, advantage_estimator=estimator, gae_unit=unit, max_steps=3)
    before = [p.detach().clone() for p in trainer.critic.head.parameters()]
    trainer.train()
    for step, log in enumerate(logs_of(trainer)):
        assert log["value/loss"] > 0
        if (estimator, unit) == ("group_gae", "turn"):
            # The rollouts of a group begin alike, and their advantages add up to 0: there is nothing to learn, until
            # Adam has made a step of its usual size of what rounding has left
            assert step > 0 or log["value/grad_norm"] == pytest.approx(0, abs=1e-5)
        else:
            assert log["value/grad_norm"] > 0
        assert log["value/explained_variance"] <= 1 and log["ratio/mean"] == pytest.approx(1, abs=1e-4)
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.critic.head.parameters(), strict=True)]
    assert all(moved) or (estimator, unit) == ("group_gae", "turn")
    assert "| value loss " in capsys.readouterr().out


@pytest.mark.parametrize("detach", [True, False])
def test_value_loss_reaches_the_trunk_only_without_detach(tmp_path, detach):
    trainer, kept = make(tmp_path, head_seed=1, value_detach=detach, logprob_check="off")
    trainer.train()
    inputs = kept[0][0]
    trainer.model.train()

    def gradients(coefficient):
        trainer.args.value_loss_coef = coefficient
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, inputs).backward()
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}

    without, with_value = gradients(0.0), gradients(0.5)
    for name in without:
        same = torch.allclose(without[name], with_value[name], atol=1e-7)
        assert same == (detach and "value_head" not in name) or name.startswith("lm_head"), name


def test_micro_batch_losses_add_up_to_the_batch_loss(tmp_path, monkeypatch):
    """The head's gradient does not depend on the size of the micro-batches."""
    norms = []
    for size, accumulate in ((8, 1), (4, 2), (2, 4)):
        torch.manual_seed(0)
        trainer, _ = make(
            tmp_path, head_seed=1, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate,
            logprob_check="off", max_grad_norm=1e9,
        )  # fmt: skip
        tokenizer = trainer.processing_class
        script = [["a b c<|im_end|>"], ["the answer<|im_end|>"], ["no<|im_end|>"], ["is it so<|im_end|>"]] * 2
        sampler = ScriptedSampler(tokenizer, script, [tokenizer.eos_token_id])
        monkeypatch.setattr(MAKE_SAMPLER, lambda *args, sampler=sampler, **kwargs: sampler)
        trainer.train()
        (log,) = logs_of(trainer)
        norms.append((log["value/grad_norm"], log["value/loss"]))
    assert norms[1] == pytest.approx(norms[0], rel=1e-3) and norms[2] == pytest.approx(norms[0], rel=1e-3)


@pytest.mark.parametrize("size", [8, 2])
def test_value_epochs_train_the_head_alone(tmp_path, size):
    """The head after one optimizer step is that of a plain loop over the whole batch, whatever the micro-batches."""
    options = {
        "per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "value_learning_rate": 1e-2, "value_clip": 0.05, "max_grad_norm": 0.05,
        "logprob_check": "off",
    }  # fmt: skip
    trainers = []
    for epochs in (1, 4):
        trainer, kept = make(tmp_path, head_seed=1, value_epochs=epochs, **options)
        start = [p.detach().clone() for p in trainer.critic.head.parameters()]
        trainer.train()
        trainers.append(trainer)
    one, four = trainers
    assert all(torch.equal(a, b) for a, b in zip(policy(one).values(), policy(four).values(), strict=True))
    output, trajectories = kept[0]
    fresh, _ = make(tmp_path, head_seed=1)
    head = fresh.critic.head
    assert all(torch.equal(a, b) for a, b in zip(start, head.parameters(), strict=True))
    read = torch.zeros(*output["completion_ids"].shape, head.layer.in_features)
    for row, trajectory in enumerate(trajectories):
        ids = torch.tensor([[*trajectory.prompt_ids, *trajectory.completion_ids]])
        with torch.no_grad():
            hidden = fresh.model(ids, output_hidden_states=True).hidden_states[-1][0]
        read[row, : len(trajectory.completion_ids)] = hidden[len(trajectory.prompt_ids) - 1 : -1]
    mask = output["value_mask"].bool()
    read, old, targets = read[mask], output["old_values"][mask], output["value_targets"][mask]
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2, weight_decay=0.0)
    for epoch in range(4):
        optimizer.zero_grad()
        values = head(read)
        near = old + (values - old).clamp(-0.05, 0.05)
        (0.5 * 0.5 * torch.maximum((values - targets) ** 2, (near - targets) ** 2).mean()).backward()
        if epoch:  # in the step itself the policy's gradient takes part in the norm
            nn.utils.clip_grad_norm_(head.parameters(), 0.05)
        else:
            shared = logs_of(four)[0]["grad_norm"]
            for parameter in head.parameters():
                parameter.grad *= min(1.0, 0.05 / (shared + 1e-6))
        optimizer.step()
    for mine, theirs in zip(head.parameters(), four.critic.head.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)
    assert any(not torch.allclose(a, b) for a, b in zip(one.critic.head.parameters(), head.parameters(), strict=True))


@pytest.mark.parametrize("sharding", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_value_epochs_of_a_sharded_head_are_refused(tmp_path, sharding):
    trainer, _ = make(tmp_path, value_epochs=2)
    setattr(trainer, sharding, True)
    with pytest.raises(ConfigError, match="`value_epochs=2` with FSDP or DeepSpeed"):
        Critic(trainer.run, trainer.update.scoring)


def test_value_warmup_under_deepspeed_is_refused(tmp_path):
    trainer, _ = make(tmp_path, value_warmup_steps=1)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ConfigError, match="`value_warmup_steps=1` with DeepSpeed"):
        Critic(trainer.run, trainer.update.scoring)


def test_the_head_has_its_own_learning_rate(tmp_path):
    for given, expected in ((None, 1e-3), (0.02, 0.02)):
        trainer, _ = make(tmp_path, value_learning_rate=given, learning_rate=1e-5, weight_decay=0.1)
        groups = trainer.create_optimizer().param_groups
        head = {id(p) for p in trainer.critic.head.parameters()}
        (own,) = [group for group in groups if head & {id(p) for p in group["params"]}]
        assert {id(p) for p in own["params"]} == head
        assert own["lr"] == expected and own["weight_decay"] == 0
        assert all(group["lr"] == 1e-5 for group in groups if group is not own)
        assert sum(len(group["params"]) for group in groups) == len(list(trainer.model.parameters()))


def test_value_warmup_trains_the_critic_alone(tmp_path):
    trainer, _ = make(tmp_path, value_warmup_steps=2, weight_decay=0.5, learning_rate=1e-2, max_steps=3)
    states = []
    step = trainer.training_step

    def watch(*args):
        states.append((policy(trainer), [p.detach().clone() for p in trainer.critic.head.parameters()]))
        return step(*args)

    trainer.training_step = watch
    trainer.train()
    states.append((policy(trainer), list(trainer.critic.head.parameters())))
    for before, after, trained in zip(states, states[1:], [False, False, True], strict=False):
        changed = [not torch.equal(before[0][name], after[0][name]) for name in before[0]]
        assert any(changed) == trained
        assert any(not torch.equal(one, other) for one, other in zip(before[1], after[1], strict=True))


def saving(lora, **changes):
    """Make a run that writes a checkpoint at every step, of a whole model or an adapter."""
    peft = LoraConfig(target_modules=["q_proj"], r=2) if lora else None
    return {"peft": peft, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, **changes}


@pytest.mark.parametrize("lora", [False, True])
def test_the_head_is_saved_in_its_own_file(tmp_path, lora):
    trainer, _ = make(tmp_path, **saving(lora, max_steps=2))
    trainer.train()
    trainer.save_model()
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    for folder in (tmp_path / "checkpoint-1", tmp_path / "checkpoint-2", tmp_path):
        assert not any("value_head" in name for name in load_file(folder / weights))
        assert len(load_file(folder / HEAD_FILE)) == 4
    last = load_file(tmp_path / HEAD_FILE)
    assert all(torch.equal(p, last[name]) for name, p in trainer.critic.head.named_parameters())
    first = load_file(tmp_path / "checkpoint-1" / HEAD_FILE)
    assert any(not torch.equal(first[name], last[name]) for name in last)


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path, lora):
    whole, _ = make(tmp_path, **saving(lora, max_steps=3))
    whole.train()
    resumed, _ = make(tmp_path, **saving(lora, max_steps=3))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5, msg=name)


def test_a_checkpoint_without_a_head_needs_a_value_warmup(tmp_path):
    plain, _ = make(tmp_path, **saving(False, advantage_estimator="group", max_steps=2))
    plain.train()
    checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueHeadError, match=rf"checkpoint-1/{HEAD_FILE}"):
        make(tmp_path, **saving(False, max_steps=2))[0].train(resume_from_checkpoint=checkpoint)
    options = saving(False, max_steps=4, value_warmup_steps=2, lr_scheduler_type="constant")
    resumed, _ = make(tmp_path, **options)
    states = []
    step = resumed.training_step

    def watch(*args):
        states.append(policy(resumed))
        return step(*args)

    resumed.training_step = watch
    resumed.train(resume_from_checkpoint=checkpoint)
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(p, saved[name]) for name, p in states[0].items() if name in saved)
    assert all(torch.equal(p, states[1][name]) for name, p in states[0].items())  # step 2 is the last of the warm-up
    assert any(not torch.equal(p, policy(resumed)[name]) for name, p in states[1].items())
    assert resumed.optimizer.param_groups[-1]["lr"] == 1e-3
    assert all(p.any() for p in resumed.critic.head.parameters())


def test_a_saved_policy_is_loaded_with_its_head(tmp_path):
    trainer, _ = make(tmp_path, max_steps=2, value_learning_rate=0.1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model = type(trainer.model).from_pretrained(tmp_path / "saved")
    again, _ = make(tmp_path, model=model)
    for one, other in zip(trainer.critic.head.parameters(), again.critic.head.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_critic_learns_the_value_of_a_prompt(tmp_path):
    """A reward that depends on the prompt alone is predictable from the first token on."""
    worth = {f"{name} " * 30: value for name, value in zip("abcdefgh", [0, 1, 0, 2, 1, 3, 0, 2], strict=True)}
    rows = [{"prompt": [{"role": "user", "content": text}], "worth": float(value)} for text, value in worth.items()]
    model = tiny_model(chat_tokenizer("qwen3_instruct_2507"), initializer_range=0.1)
    trainer, _ = make(
        tmp_path, model=model, dataset=Dataset.from_list(rows * 8), reward=lambda completions, worth, **kwargs: worth,
        per_device_train_batch_size=16, num_generations=2, max_steps=100, max_completion_length=4,
        value_learning_rate=1e-2, value_clip=None, learning_rate=1e-6, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    logs = logs_of(trainer)
    explained = [log["value/explained_variance"] for log in logs[-10:]]
    losses = [log["value/loss"] for log in logs]
    assert sum(explained) / 10 > 0.8
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 / 5


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"])
def test_every_loss_type_accepts_token_advantages(tmp_path, loss_type):
    trainer, _ = make(tmp_path, loss_type=loss_type, num_iterations=2, max_steps=2)
    before = policy(trainer)
    trainer.args.learning_rate = 1e-3
    trainer.train()
    assert all(math.isfinite(log["loss"]) and math.isfinite(log["grad_norm"]) for log in logs_of(trainer))
    assert any(not torch.equal(before[name], p) for name, p in policy(trainer).items())


def test_an_unscored_rollout_has_no_advantage_and_no_value_loss(tmp_path):
    trainer, kept = make(tmp_path, reward=lambda completions, **kwargs: [None, 1.0, 0.0, 0.5])
    trainer.train()
    output, _ = kept[0]
    assert not output["advantages"][0].any() and not output["value_mask"][0].any()
    assert output["value_mask"][1:].any(dim=1).all()
    assert math.isfinite(logs_of(trainer)[0]["loss"])


def test_an_infinite_reward_is_an_error_that_names_the_rollout(tmp_path):
    trainer, _ = make(tmp_path, reward=lambda completions, **kwargs: [0.0, 1.0, math.inf, 0.0])
    with pytest.raises(RewardError, match="gave inf for rollout 2"):
        trainer.train()


def test_values_that_are_not_finite_are_an_error(tmp_path, monkeypatch):
    trainer, _ = make(tmp_path, logprob_check="off")
    tokenizer = trainer.processing_class
    sampler = ScriptedSampler(tokenizer, [["a<|im_end|>"]], [tokenizer.eos_token_id])
    monkeypatch.setattr(MAKE_SAMPLER, lambda *args, **kwargs: sampler)
    nn.init.constant_(trainer.critic.head.output.bias, math.nan)
    with pytest.raises(ValueHeadError, match=r"not finite for the rollouts \[0, 1, 2, 3\]"):
        trainer.train()


def test_assisted_steps_leave_the_critic_alone(tmp_path):
    trainer, kept = make(
        tmp_path, tools=[Tool("look", "Look.", {"type": "object", "properties": {}}, lambda: "x")], force_rate=1.0,
        assist_warmup_steps=1, max_steps=2, max_completion_length=60,
    )  # fmt: skip
    trainer.train()
    logs = logs_of(trainer)
    assert "forced/loss" in logs[0] and "value/loss" not in logs[0] and "value/grad_norm" not in logs[0]
    assert "value/loss" in logs[1] and "forced/loss" not in logs[1]
    assert "value_targets" not in kept[0][0] and "value_targets" in kept[1][0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"advantage_estimator": "group", "gae_lambda": 0.9}, r"`gae_lambda=0.9` while .*'group'"),
        ({"advantage_estimator": "group", "value_detach": False}, "no value head"),
        ({"advantage_estimator": "ppo"}, "group, gae, group_gae"),
        ({"gae_gamma": 1.1}, "between 0 and 1"),
        ({"gae_lambda": -0.1}, "between 0 and 1"),
        ({"gae_unit": "word"}, "token, turn"),
        ({"value_loss_coef": -1.0}, "`value_loss_coef=-1.0`; it must be at least 0"),
        ({"value_epochs": 0}, "`value_epochs=0`; it must be at least 1"),
        ({"advantage_estimator": "group", "value_epochs": 4}, "no value head"),
        ({"value_clip": 0.0}, "positive"),
        ({"value_learning_rate": math.nan}, "positive"),
        ({"value_warmup_steps": 5, "max_steps": 4}, "never be trained"),
        ({"loss_type": "vespo"}, "vespo"),
        ({"record_sample_logprobs": False}, "record_sample_logprobs"),
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, **{"advantage_estimator": "gae", **changes})


def test_turn_rewards_without_effect_are_warned_of(tmp_path, monkeypatch, caplog):
    options = {"advantage_estimator": "group", "logprob_check": "off", "max_completion_length": 400, "max_steps": 2}
    trainer, _ = make(tmp_path, tools=[look], **options)
    tokenizer = trainer.processing_class
    sampler = ScriptedSampler(tokenizer, [[CALL, "done<|im_end|>"]], [tokenizer.eos_token_id])
    monkeypatch.setattr(MAKE_SAMPLER, lambda *args, **kwargs: sampler)
    trainer.train()
    assert caplog.text.count("Tools gave rewards to turns") == 1


def test_turn_rewards_of_an_environment_are_used(tmp_path, monkeypatch):
    """They pass through the environment's thread to the tokens of the turn."""

    class Place:
        turn_reward = None

        def reset(self, **row):
            self.turn_reward = None

        def look(self, place: str) -> str:
            """
            Look somewhere.

            Args:
                place: Where.
            """
            self.turn_reward = 0.25
            return "nothing"

    tokenizer = chat_tokenizer("qwen3_instruct_2507")
    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer),
        lambda completions, **kwargs: [0.0] * len(completions),
        config(tmp_path, advantage_estimator="group_gae", logprob_check="off", max_completion_length=400),
        prompts(16),
        processing_class=tokenizer,
        environment_factory=Place,
    )
    sampler = ScriptedSampler(tokenizer, [[CALL, "done<|im_end|>"]], [tokenizer.eos_token_id])
    monkeypatch.setattr(MAKE_SAMPLER, lambda *args, **kwargs: sampler)
    trainer.train()
    for trajectory in trainer.rollouts.batch.trajectories:
        assert [turn.reward for turn in trajectory.turns] == [0.25, None]


def test_the_group_estimator_has_no_value_head(tmp_path):
    trainer, kept = make(tmp_path, advantage_estimator="group")
    trainer.train()
    assert trainer.critic is None and kept[0][0]["advantages"].dim() == 1
    assert not any(name.startswith("value/") for name in logs_of(trainer)[0])
    assert json.dumps(sorted(name for name, _ in trainer.model.named_parameters())).count("value_head") == 0
