"""Health rules: faults planted one at a time into a tiny run are named, each once, and healthy runs are not."""

import json
import logging
import math
import re
import time
from pathlib import Path

import pytest
import torch
from conftest import chat_tokenizer, config, prompts, scripted_model_sampler, tiny_model, tool_call
from peft import LoraConfig
from transformers import TrainerCallback

from trl_toolgrpo import ConfigError, HealthError, ToolGRPOTrainer
from trl_toolgrpo.monitoring.health import rules
from trl_toolgrpo.monitoring.health.monitor import RECOVERED, HealthMonitor, Rule, RunFacts, still_open
from trl_toolgrpo.monitoring.health.rollout_rules import _figures, correlation_within_groups
from trl_toolgrpo.run_folder.files import read_lines
from trl_toolgrpo.sampling import model_sampler


TOKENIZER = chat_tokenizer("qwen3_instruct_2507")
SAMPLE = model_sampler.sample_tokens
RULES = {rule.name: rule for rule in rules.RULES}
END = "<|im_end|>"


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: First.
        b: Second.
    """
    return BEHAVIOUR["add"](a + b)


BEHAVIOUR = {"add": lambda value: value}


def reward(completion_ids, **kwargs):
    """Differs within a group, and says nothing about length."""
    return [float(index * 5 % 4) for index, _ in enumerate(completion_ids)]


SCRIPT = [[tool_call("add", a=row, b=1) + END, f"the sum is {row}{END}"] for row in range(8)]


def start(path, monkeypatch=None, script=SCRIPT, rewards=reward, tools=(add,), **changes):
    """A run with everything a rule looks at: tools, a critic, an adapter and a reference that follows it."""
    options = {
        "max_steps": 5, "learning_rate": 1e-3, "per_device_train_batch_size": 8, "max_completion_length": 200,
        "advantage_estimator": "gae", "value_learning_rate": 1e-2, "beta": 0.05, "sync_ref_model": True,
        "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0, "seed": 3, **changes,
    }  # fmt: skip
    if options["advantage_estimator"] == "group":
        del options["value_learning_rate"]
    if script is not None:
        monkeypatch.setattr(model_sampler, "sample_tokens", SAMPLE)  # not what a trainer before was made to say
        scripted_model_sampler(monkeypatch, TOKENIZER, script)
    torch.manual_seed(0)
    return ToolGRPOTrainer(
        tiny_model(TOKENIZER), rewards, config(path, **options), prompts(9), processing_class=TOKENIZER,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]), tools=list(tools) or None,
    )  # fmt: skip


def named(folder):
    """Rules that have found something, with the step in which they did first."""
    lines = read_lines(Path(folder) / "health.jsonl")
    found = {line["rule"]: line["step"] for line in reversed(lines) if line["level"] != "ok"}
    assert all(len(line["message"]) > 80 for line in lines if line["level"] != "ok")
    return found


class At(TrainerCallback):
    """Does something at the beginning of steps."""

    def __init__(self, steps, do):
        self.steps, self.do = steps, do

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 in self.steps:
            self.do()


# Runs


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_healthy_run_raises_no_alarm(monkeypatch, tmp_path, iterations, caplog):
    trainer = start(tmp_path, monkeypatch, num_iterations=iterations, max_steps=8)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert named(tmp_path) == {} and "Health" not in caplog.text
    assert not (tmp_path / "health.jsonl").exists()


def zeroed_logprobs(trainer, monkeypatch):
    sample = trainer.rollouts.sample

    def zeroed(prompt_ids, force):
        batch = sample(prompt_ids, force)
        for trajectory in batch.trajectories:
            trajectory.logprobs = [0.0] * len(trajectory.logprobs)
        return batch

    monkeypatch.setattr(trainer.rollouts, "sample", zeroed)


def reference_that_never_moves(trainer, monkeypatch):
    handler = trainer.callback_handler
    handler.callbacks = [c for c in handler.callbacks if type(c).__name__ != "_SyncCallback"]


def frozen_critic(trainer, monkeypatch):
    trainer.critic.head.requires_grad_(False)


def nan_gradient(trainer, monkeypatch):
    weight = next(p for p in trainer.model.parameters() if p.requires_grad)
    trainer.add_callback(At([3], lambda: weight.register_hook(lambda gradient: gradient * math.nan)))


def failing_tool(trainer, monkeypatch):
    def fail(value):
        raise ConnectionError("the service is down")

    monkeypatch.setitem(BEHAVIOUR, "add", fail)


def tool_that_gets_slow(trainer, monkeypatch):
    def slow(value):
        time.sleep(1.05)
        return value

    trainer.add_callback(At([3], lambda: monkeypatch.setitem(BEHAVIOUR, "add", slow)))


def entropy_that_collapses(trainer, monkeypatch):
    head = trainer.model.get_base_model().lm_head.weight
    trainer.add_callback(At([3], lambda: head.data.mul_(200)))


def sharp_policy(trainer, monkeypatch):
    """A policy with sharp predictions, as a trained one has; those of a random one are near uniform."""
    trainer.model.get_base_model().lm_head.weight.data.mul_(30)


def weights_that_do_not_move(trainer, monkeypatch):
    kept = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

    class Restore(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            with torch.no_grad():
                for name, parameter in trainer.model.named_parameters():
                    if name in kept:
                        parameter.copy_(kept[name])

    trainer.add_callback(Restore())


def constant(completion_ids, **kwargs):
    return [0.5] * len(completion_ids)


def by_messages(completions, **kwargs):
    return [float(len(messages)) for messages in completions]


def by_length(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


ENDLESS = [["so it is and so it was and so it will be"]] * 8
LONGER = [[f"{'so it is ' * (row % 4 + 1)}{END}"] for row in range(8)]
REPEATS = [[*([tool_call("add", a=1, b=1) + END] * (row % 4 + 1)), f"2{END}"] for row in range(8)]
MALFORMED = [[f"<tool_call>\nadd one and {row}\n</tool_call>{END}", f"sorry{END}"] for row in range(8)]

FAULTS = {
    "zeroed log-probs": ("logprob_gap ratio_mean", zeroed_logprobs, {"logprob_check": "off"}),
    "no spread": ("ratio_spread", weights_that_do_not_move, {"num_iterations": 2, "sync_ref_model": False}),
    "forced rollouts": (
        "forced_in_update", None, {"script": None, "force_rate": 1.0, "disable_forcing_in_updates": False},
    ),
    "reference never moved": ("reference_still", reference_that_never_moves, {}),
    "frozen critic": ("critic_still", frozen_critic, {}),
    "critic without a rate": ("critic_still", None, {"value_learning_rate": 1e-30}),
    "gradient of NaN": ("not_finite", nan_gradient, {"max_steps": 3}),
    "constant reward": ("advantages_zero", None, {"rewards": constant, "advantage_estimator": "group"}),
    "failing tool": ("tool_failing", failing_tool, {}),
    "slow tool": ("tool_slow", tool_that_gets_slow, {}),
    "malformed calls": ("broken_calls", None, {"script": MALFORMED}),
    "completions too short": ("truncated", None, {"script": ENDLESS, "max_completion_length": 8}),
    "no gradient": (
        "gradient_zero", None,
        {"script": ENDLESS, "max_completion_length": 8, "mask_truncated_completions": True, "beta": 0.0,
         "sync_ref_model": False, "advantage_estimator": "group"},
    ),
    "entropy": ("entropy_collapse", entropy_that_collapses, {"script": None, "max_completion_length": 8}),
    "away from the reference": (
        "kl_runaway", sharp_policy, {"learning_rate": 0.5, "sync_ref_model": False, "advantage_estimator": "group"},
    ),
    "reward of length": ("shortcut", None, {"script": LONGER, "rewards": by_length}),
    "reward of repeated calls": (
        "shortcut", None,
        {"script": REPEATS, "max_completion_length": 400, "rewards": by_messages},
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_within_five_steps(monkeypatch, tmp_path, fault):
    rules, plant, changes = FAULTS[fault]
    trainer = start(tmp_path, monkeypatch, **changes)
    if plant is not None:
        plant(trainer, monkeypatch)
    trainer.train()
    found = named(tmp_path)
    assert all(found.get(rule, 99) <= 5 for rule in rules.split()), found


LACKING = [
    [f"so it is{END}"] if row % 8 == 0 else [tool_call("add", a=row, b=1) + END, f"the sum is {row}{END}"]
    for row in range(16)
]


def by_answer(completions, **kwargs):
    return [1.0 if len(messages) > 1 else 0.25 for messages in completions]


def test_a_rollout_that_lacks_a_step_is_no_shortcut(monkeypatch, tmp_path):
    """In each group one of eight is shorter and worth less: a correlation of 1 within groups, in every batch."""
    changes = {"per_device_train_batch_size": 16, "num_generations": 8, "advantage_estimator": "group", "max_steps": 7}
    start(tmp_path, monkeypatch, script=LACKING, rewards=by_answer, **changes).train()
    assert named(tmp_path) == {}


def test_two_batches_in_an_optimizer_step_and_their_replay_are_healthy(monkeypatch, tmp_path):
    changes = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 2,
        "learning_rate": 1e-2, "max_steps": 6,
    }  # fmt: skip
    start(tmp_path / "run", monkeypatch, **changes).train()
    replayed = start(tmp_path / "again", monkeypatch, replay=str(tmp_path / "run"), **changes)
    replayed.train()
    assert replayed.state.log_history[-2]["ratio/mean"] == pytest.approx(1, abs=1e-4)
    assert named(tmp_path / "run") == {} and named(tmp_path / "again") == {}


def test_a_fault_is_reported_once_also_after_a_resume(monkeypatch, tmp_path, caplog):
    changes = {"rewards": constant, "advantage_estimator": "group", "save_strategy": "steps", "save_steps": 1}
    with caplog.at_level(logging.WARNING):
        start(tmp_path, monkeypatch, **changes).train()
        assert caplog.text.count("Health, step 3, advantages_zero: In no group of the last 3") == 1
        caplog.clear()
        resumed = start(tmp_path, monkeypatch, **{**changes, "max_steps": 7})
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "advantages_zero" not in caplog.text
    lines = read_lines(tmp_path / "health.jsonl")
    assert [(line["step"], line["rule"]) for line in lines if line["rule"] == "advantages_zero"] == [
        (3, "advantages_zero")
    ]  # fmt: skip
    assert lines[0].keys() == {"step", "rule", "level", "value", "threshold", "message"}


def test_raise_saves_a_checkpoint_and_ends_the_run(monkeypatch, tmp_path):
    changes = {"rewards": constant, "advantage_estimator": "group", "max_steps": 6}
    trainer = start(tmp_path, monkeypatch, health_checks="raise", **changes)
    with pytest.raises(HealthError, match=r"in step 3 by the health rule `advantages_zero`.*checkpoint-3; resume"):
        trainer.train()
    resumed = start(tmp_path, monkeypatch, **changes)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6 and list(named(tmp_path)) == ["advantages_zero"]


def test_raise_on_a_full_disk_names_the_folder_of_the_model(monkeypatch, tmp_path):
    changes = {"rewards": constant, "advantage_estimator": "group", "max_steps": 6}
    trainer = start(tmp_path / "run", monkeypatch, health_checks="raise", **changes)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.run, "state_dict", full)
    words = r"the health rule `advantages_zero`.* could not be written: .*No space left"
    with pytest.raises(HealthError, match=words) as told:
        trainer.train()
    kept = re.search(r"written to (\S+) instead", str(told.value))[1]
    assert "checkpoint-3; resume from there" not in str(told.value) and list(Path(kept).glob("*.safetensors"))


def test_health_checks_off_runs_no_rule(monkeypatch, tmp_path):
    trainer = start(tmp_path, monkeypatch, rewards=constant, health_checks="off", advantage_estimator="group")
    trainer.train()
    assert not (tmp_path / "health.jsonl").exists()
    assert not any("correlation" in name for entry in trainer.state.log_history for name in entry)
    with pytest.raises(ConfigError, match="health_checks='loud'"):
        config(tmp_path, health_checks="loud")


def test_rules_run_on_trls_own_rollouts(monkeypatch, tmp_path):
    trainer = ToolGRPOTrainer(
        tiny_model(TOKENIZER), constant, config(tmp_path, record_sample_logprobs=False, max_steps=3), prompts(),
        processing_class=TOKENIZER,
    )  # fmt: skip
    trainer.train()
    assert named(tmp_path) == {"advantages_zero": 3, "truncated": 3}


# Rules on streams


def stream(count, **metrics):
    """Steps of a sound run; a metric may be a list, or a function of the step."""
    sound = {
        "loss": 0.1, "grad_norm": 0.4, "learning_rate": 1e-4, "entropy": 0.5, "kl": 0.01, "reward": 0.4,
        "reward_std": 0.3, "frac_reward_zero_std": 0.2, "ratio/mean": 1.0, "ratio/std": 1e-7,
        "sampling/logp_diff_mean": 1e-6, "sampling/logp_diff_max": 1e-5, "forced/fraction": 0.0,
        "value/loss": 0.1, "value/explained_variance": 0.3, "value/grad_norm": 0.2, "completions/clipped_ratio": 0.1,
        "completions/mean_length": 50.0, "tools/call_frequency": 1.5, "tools/malformed_calls": 0.0,
        "tools/unknown_calls": 0.0, "tools/add/calls": 12.0, "tools/add/errors": 1.0, "tools/add/timeouts": 0.0,
        "tools/add/latency_p95": 0.01, "rollout/tool_wait_fraction": 0.1,
    }  # fmt: skip
    made = []
    for step in range(1, count + 1):
        entry = {"step": step, **sound}
        for name, value in metrics.items():
            name = name.replace("__", "/")
            found = value[step - 1] if isinstance(value, list) else value(step) if callable(value) else value
            entry[name] = found
        made.append({name: value for name, value in entry.items() if value is not ...})
    return made


def found_by(rule, steps, **facts):
    return RULES[rule].check(steps, RunFacts(**facts)) is not None


REUSED = {"sampling__logp_diff_mean": lambda step: ... if step % 2 == 0 else 1e-6, "ratio__std": 0.0}

BOTH_WAYS = {
    "not_finite": ([("grad_norm", math.nan), ("loss", None), ("value__loss", math.inf)], [("reward", None)]),
    "ratio_mean": ([("ratio__mean", 1.02), ("ratio__mean", 0.5)], [("ratio__mean", 1.002)]),
    "logprob_gap": (
        [("sampling__logp_diff_mean", 0.01), ("sampling__logp_diff_max", 3.0)],
        [("sampling__logp_diff_max", 0.1)],
    ),
    "forced_in_update": ([("forced__fraction", 0.01)], [("forced__fraction", 0.0)]),
    "reference_differs": ([("ref__tensors_differ", 1.0), ("ref__kl", 0.01)], [("ref__kl", 1e-7)]),
    "critic_worse": (
        [("value__explained_variance", -0.3)], [("value__explained_variance", lambda step: 0.2 - 0.4 * (step % 2))],
    ),
    "value_loss": (
        [("value__loss", lambda step: 0.01 * step)],  # though the critic explains 0.3 of the variance: see below
        [("value__loss", lambda step: 1 / step)],
    ),
    "gradient_spike": (
        [("grad_norm", lambda step: 0.4 if step < 40 else 9.0)], [("grad_norm", lambda step: 0.4 + step % 3)],
    ),
    "entropy_collapse": (
        [("entropy", lambda step: 0.5 if step < 30 else 0.01)], [("entropy", lambda step: 0.5 - step / 100)],
    ),
    "kl_runaway": (
        [("kl", 0.8), ("kl", lambda step: 0.01 if step < 38 else 0.6)],
        [("kl", 0.3), ("kl", lambda step: 0.01 if step < 40 else 12.0)],
    ),
    "tool_use_fading": (
        [("tools__call_frequency", lambda step: 1.5 if step < 30 else 0.4)],
        [("tools__call_frequency", lambda step: 1.5 - step / 80)],
    ),
    "tool_failing": (
        [("tools__add__errors", 11.0)], [("tools__add__errors", lambda step: 11.0 if step % 3 else 2.0)],
    ),
    "tool_slow": (
        [("tools__add__latency_p50", lambda step: 0.01 if step < 39 else 2.0),
         ("tools__add__latency_p95", lambda step: 0.01 if step < 36 else 2.0), ("tools__add__timeouts", 4.0),
         ("rollout__tool_wait_fraction", 0.8)],
        [("tools__add__latency_p95", lambda step: 5.0), ("tools__add__latency_p95", lambda step: 9.0 * (step > 36)),
         ("tools__add__timeouts", 2.0)],
    ),
    "broken_calls": (
        [("tools__malformed_calls", 8.0), ("tools__unknown_calls", lambda step: 0.0 if step < 30 else 3.0)],
        [("tools__malformed_calls", 1.0), ("tools__unknown_calls", lambda step: 9.0 * (step == 40))],
    ),
    "truncated": (
        [("completions__clipped_ratio", 0.6)], [("completions__clipped_ratio", lambda step: step % 2 * 0.7)],
    ),
    "shortcut": (
        [("reward__length_correlation", 0.98), ("reward__repeats_correlation", 0.99)],
        [("reward__length_correlation", 0.95), ("reward__repeats_correlation", lambda step: 0.99 * (step % 3 > 0))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", BOTH_WAYS)
def test_rules_on_streams_with_the_fault_and_without(rule):
    assert not found_by(rule, stream(40))
    sick, sound = BOTH_WAYS[rule]
    explained = {"value__explained_variance": 0.0} if rule == "value_loss" else {}
    for name, value in sick:
        assert found_by(rule, stream(40, **{name: value}, **explained)), name
    for name, value in sound:
        assert not found_by(rule, stream(40, **{name: value}, **explained)), name


def test_ratio_spread_is_due_only_from_a_second_step_on_a_batch():
    assert found_by("ratio_spread", stream(8, **REUSED), steps_per_batch=2)
    assert not found_by("ratio_spread", stream(8, **{**REUSED, "ratio__std": 1e-3}), steps_per_batch=2)
    assert not found_by("ratio_spread", stream(8, ratio__std=0.0))  # each step has a batch of its own
    assert not found_by("ratio_spread", stream(8, learning_rate=0.0, **REUSED), steps_per_batch=2)
    assert not found_by("ratio_spread", stream(8, grad_norm=0.0, **REUSED), steps_per_batch=2)
    assert not found_by("ratio_spread", stream(8, **REUSED), steps_per_batch=2, policy_from=8)


def test_the_mean_of_a_reused_batch_may_drift_a_little():
    assert not found_by("ratio_mean", stream(4, ratio__mean=1.05), steps_per_batch=2)
    assert found_by("ratio_mean", stream(4, ratio__mean=1.2), steps_per_batch=2)
    assert not found_by("ratio_mean", stream(4, ratio__mean=1.03), dtype="bfloat16")


def test_groups_without_a_spread_are_no_fault_once_the_task_is_solved():
    flat = {"frac_reward_zero_std": lambda step: 0.3 if step < 20 else 1.0, "reward_std": lambda step: 0.3}
    assert not found_by("advantages_zero", stream(40, reward=lambda step: min(step / 20, 1.0), **flat))
    assert found_by("advantages_zero", stream(40, reward=lambda step: max(1 - step / 20, 0.0), **flat))
    assert found_by("advantages_zero", stream(3, frac_reward_zero_std=1.0))
    assert not found_by("advantages_zero", stream(2, frac_reward_zero_std=1.0))
    assert not found_by("advantages_zero", stream(4, frac_reward_zero_std=[0.5, 1.0, 1.0, 1.0]))


def test_low_entropy_with_a_risen_reward_is_no_collapse():
    falling = {"entropy": lambda step: 0.5 if step < 30 else 0.01}
    assert not found_by("entropy_collapse", stream(40, reward=lambda step: step / 40, **falling))
    assert found_by("entropy_collapse", stream(3, entropy=1e-5))


def test_gradient_zero_is_silent_where_no_group_has_a_spread():
    assert found_by("gradient_zero", stream(5, grad_norm=0.0))
    assert not found_by("gradient_zero", stream(5, grad_norm=0.0, frac_reward_zero_std=1.0))
    assert found_by("gradient_zero", stream(5, grad_norm=0.0, frac_reward_zero_std=1.0, forced__loss=0.0))
    assert not found_by("gradient_zero", stream(5, grad_norm=lambda step: float(step == 4)))


def test_reference_still_counts_the_syncs_that_were_due():
    synced = stream(12, ref__syncs=lambda step: float(step // 3))
    assert not any(found_by("reference_still", synced[:n], sync_steps=3) for n in range(1, 13))
    assert found_by("reference_still", stream(8), sync_steps=3) and not found_by("reference_still", stream(8))
    assert not found_by("reference_still", stream(5), sync_steps=3, steps_per_batch=2)
    assert not found_by("reference_differs", stream(4, ref__kl=0.01), copies_policy=False)


def test_critic_still_by_explained_variance_or_missing_gradient():
    assert found_by("critic_still", stream(4, value__explained_variance=0.0))
    assert not found_by("critic_still", stream(3, value__explained_variance=0.0))
    assert found_by("critic_still", stream(4, value__grad_norm=...))
    none = {"value__loss": ..., "value__grad_norm": ..., "value__explained_variance": ...}
    assert not found_by("critic_still", stream(4, **none))


def test_fewer_calls_with_more_reward_are_no_fading():
    calls = {"tools__call_frequency": lambda step: 3.0 if step < 30 else 1.0}
    assert not found_by("tool_use_fading", stream(40, reward=lambda step: step / 40, **calls))
    assert found_by("tool_use_fading", stream(40, reward=lambda step: 1 - step / 80, **calls))
    assert not found_by("tool_use_fading", stream(40, forced__loss=lambda step: 0.1 if step < 30 else ..., **calls))


def test_truncated_names_what_cut_the_rollouts_off():
    for reason, words in (("tool_limit", "max_tool_calling_iterations"), ("parse_errors", "parse_error_budget")):
        finding = RULES["truncated"].check(
            stream(4, completions__clipped_ratio=0.9, **{f"rollout__stop__{reason}": 0.9}), RunFacts()
        )
        assert words in finding.message and "90%" in finding.message


def test_every_message_names_the_fault_its_cause_and_the_remedy():
    seen = set()
    for rule, (sick, _) in BOTH_WAYS.items():
        name, value = sick[0]
        finding = RULES[rule].check(stream(40, **{"value__explained_variance": -0.3, name: value}), RunFacts())
        assert finding.message.count(". ") >= 1 and finding.message.endswith("."), finding.message
        seen.add(finding.message)
    assert len(seen) == len(BOTH_WAYS)


def test_a_monitor_reports_the_start_and_the_end_of_a_fault():
    monitor = HealthMonitor([Rule("kl_runaway", RULES["kl_runaway"].check)], RunFacts())
    kl = [0.1] * 3 + [0.9] * 4 + [0.1, 0.9, 0.9, 0.9] + [0.1] * 9 + [0.9] * 3
    said = [(line["step"], line["level"]) for step in stream(len(kl), kl=kl) for line in monitor.step(step)]
    over = 11 + RECOVERED
    assert said == [(6, "warning"), (over, "ok"), (23, "warning")]
    lines = [("a", "error"), ("b", "warning"), ("a", "ok")]
    assert still_open([{"rule": rule, "level": level} for rule, level in lines]) == ["b"]


def test_correlation_is_computed_within_groups():
    rewards, lengths = [1.0, 2, 3, 4, 11, 12, 13, 14], [8.0, 6, 4, 2, 8, 6, 4, 2]
    assert correlation_within_groups(rewards, lengths, 4) == pytest.approx(-1)
    together = correlation_within_groups(rewards, [1.0, 2, 3, 4, 4, 3, 2, 1], 4)
    assert together == pytest.approx(0)
    assert correlation_within_groups(rewards, [1.0] * 8, 4) is None
    assert correlation_within_groups(rewards[:4], lengths[:4], 4) is None  # too few to tell
    assert correlation_within_groups([math.nan, *rewards[1:]], lengths, 4) is None
    numpy = pytest.importorskip("numpy")
    generator = numpy.random.default_rng(0)
    rewards, values = generator.normal(size=(2, 32))
    centered = [x - x.reshape(8, 4).mean(axis=1).repeat(4) for x in (rewards, values)]
    expected = (centered[0] * centered[1]).sum() / math.sqrt((centered[0] ** 2).sum() * (centered[1] ** 2).sum())
    assert correlation_within_groups(rewards.tolist(), values.tolist(), 4) == pytest.approx(expected)


def test_health_lines_are_json(monkeypatch, tmp_path):
    trainer = start(tmp_path, monkeypatch, max_steps=3)
    nan_gradient(trainer, monkeypatch)
    trainer.train()
    for line in (tmp_path / "health.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_tool_may_be_called_mcp():
    entry = {"tools/mcp/calls": 3.0, "tools/mcp/db/restarts": 1.0, "tools/add/calls": 2.0}
    assert _figures(entry, "calls") == {"mcp": 3.0, "add": 2.0}
