"""Health rules over stored runs and simulated ones: no alarm where nothing is wrong, every planted fault by name."""

import math
import random
import re
import time
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_runs import FAULTS, ONSET, RULES, SOUND, Kind, alarms, caught, facts_of, rewards_of, simulate
from stored_runs import keep, load, stored

from trl_toolgrpo.monitoring.health.monitor import HealthMonitor, RunFacts, binomial_tail, deviations
from trl_toolgrpo.monitoring.health.rollout_rules import DISTINCT, correlation_within_groups


WEAKEST = {
    "a loss that is NaN": None,
    "log-probs of another policy, by the ratio": 1.02,
    "the same, in bfloat16": 1.06,
    "a policy that moves too far in a batch": 1.2,
    "old log-probs recomputed": 5e-7,
    "log-probs that differ": 1.1e-3,
    "log-probs that differ, in bfloat16": 0.13,
    "forced tokens in updates": 1e-4,
    "a reference that is not synced": 2.0,
    "a reference that is not the policy": 2e-4,
    "a tensor that a sync left out": 1,
    "weights that do not move": 0.0,
    "a critic without a gradient": 0.0,
    "a critic that never changes": 1e-7,
    "a critic worse than none": 0.3,
    "a value loss that grows": 3.0,
    "no gradient": 0.0,
    "a spike of the gradient": 50,
    "rewards that lose their spread": 0.0,
    "rewards that never have a spread": 0.0,
    "entropy that collapses": 0.04,
    "a policy far from its reference": 0.6,
    "tools that are called less": 0.3,
    "a tool that fails": 0.65,
    "a tool that gets slow": 1.1,
    "a tool whose slowest calls get slow": 1.1,
    "a tool that runs into its limit": 0.25,
    "waiting for tools": 0.75,
    "calls that break": 0.35,
    "calls that are broken from the start": 0.35,
    "rollouts that are cut off": 0.6,
    "a reward for length": 0.98,
    "a reward for length, two groups of four": 0.98,
    "a reward for repeated calls": 0.98,
}
"""Strength from which each planted fault is named, whatever the noise."""



def strengths(name):
    """The strengths of a fault that are to be caught."""
    if WEAKEST[name] is None:
        return FAULTS[name].strengths
    return FAULTS[name].strengths[FAULTS[name].strengths.index(WEAKEST[name]) :]


def test_stored_runs_are_sixty_of_many_kinds():
    runs = list(load())
    facts = [facts for _, _, facts in runs]
    assert len(runs) >= 60 and sum(len(entries) for _, entries, _ in runs) >= 1800
    assert {"float32", "float64", "bfloat16"} <= {fact.dtype for fact in facts}
    assert {1, 2, 3, 4} <= {fact.steps_per_batch for fact in facts}
    assert any(fact.sync_steps for fact in facts) and not all(fact.group_advantages for fact in facts)
    assert sum(name.startswith("quick start") for name, _, _ in runs) == 10
    logged = {metric for _, entries, _ in runs for entry in entries for metric in entry}
    assert {"kl", "ref/kl", "forced/loss", "value/loss", "value/explained_variance", "policy/moved"} <= logged


@pytest.mark.parametrize(("name", "entries", "facts"), list(load()), ids=[name for name, _, _ in load()])
def test_a_stored_run_raises_no_alarm(name, entries, facts):
    assert alarms(entries, facts) == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOUND, ids=str)
def test_a_simulated_sound_run_raises_no_alarm(kind):
    assert alarms(simulate(kind, 0, 400), facts_of(kind)) == {}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_and_no_other(name):
    fault = FAULTS[name]
    for strength in strengths(name):
        assert all(caught(fault, strength, seed) is not None for seed in range(3)), strength
    begin = 1 if fault.from_start or fault.score else ONSET

    def change(step, entry, generator):
        if fault.change is not None and step >= begin and ("reward" in entry or fault.kind.reused > 1):
            fault.change(fault.strengths[-1], entry, generator)

    score = fault.score(fault.strengths[-1]) if fault.score else rewards_of
    entries = simulate(fault.kind, 0, begin + fault.within - 1, score, change)
    assert set(alarms(entries, facts_of(fault.kind))) == {fault.rule}


def test_every_rule_has_a_planted_fault():
    assert {fault.rule for fault in FAULTS.values()} == set(RULES) and WEAKEST.keys() == FAULTS.keys()


# Long runs


def test_a_long_run_costs_a_rule_no_more_and_hides_nothing():
    kind = Kind(8, 4)
    monitor = HealthMonitor(list(RULES.values()), facts_of(kind))
    steps = list(simulate(kind, 0, 1000))
    monitor.recall({**entry, "step": 1000 * turn + entry["step"]} for turn in range(10) for entry in steps)
    assert len(monitor.window) <= 320 and monitor.count == 10_000
    kept = [entry["step"] for entry in monitor.window]
    assert kept[:64] == list(range(1, 65)) and kept[-128:] == list(range(9873, 10_001))
    between = [later - earlier for earlier, later in pairwise(kept[63:-127])]
    assert len(between) > 64 and max(between) <= 128

    def seconds(monitor):
        begun = time.process_time()
        for entry in steps[-200:]:
            assert monitor.step({**entry, "step": monitor.count + 1, "ref/syncs": 1e9}) == []
        return time.process_time() - begun

    short = HealthMonitor(list(RULES.values()), facts_of(kind))
    short.recall(steps[:300])
    assert seconds(monitor) < 3 * seconds(short)
    for step in range(3):
        said = monitor.step({**steps[-1], "step": 10_201 + step, "kl": 5.0, "ref/syncs": 1e9})
    assert [line["rule"] for line in said] == ["kl_runaway"]


@pytest.mark.parametrize("reused", [1, 2, 3])
def test_a_slow_fade_is_seen_in_a_thinned_window(reused):
    """Tool use that halves over 2,000 steps, far more than the window holds, from a peak in the middle of the run."""

    def change(step, entry, generator):
        if "reward" in entry:
            rate = 0.5 + min(step, 1000) / 1000 - 1.3 * max(step - 1000, 0) / 2000
            entry["tools/call_frequency"] = float(generator.poisson(64 * rate)) / 64

    kind = Kind(reused=reused)
    found = alarms(simulate(kind, 0, 3000, change=change), facts_of(kind))
    assert set(found) == {"tool_use_fading"} and 2000 < found["tool_use_fading"] < 2800


def test_a_resumed_monitor_has_the_window_of_an_uninterrupted_one():
    steps = list(simulate(Kind(8, 4), 1, 900))
    whole, resumed = (HealthMonitor(list(RULES.values()), facts_of(Kind(8, 4))) for _ in range(2))
    for entry in steps:
        whole.step(entry)
    resumed.recall(steps[:500])
    for entry in steps[500:]:
        resumed.step(entry)
    assert whole.window == resumed.window and whole.count == resumed.count


# Evidence


@pytest.mark.parametrize(
    ("rewards", "lengths"),
    [
        ([0.25, *[1.0] * 7], [19.0, *[35.0] * 7]),  # one group, one rollout that lacks a call
        ([0.25, *[1.0] * 7] * 2, [19.0, *[35.0] * 7, 20.0, *[33.0] * 7]),
        ([0.5, *[1.0] * 7] * 8, [34.0, *[35.0] * 7] * 8),  # a difference of one token, in every group
        ([0.25, 0.5, *[1.0] * 6] * 4, [19.0, 27.0, *[35.0] * 6] * 4),
    ],
)
def test_a_rollout_that_stands_alone_in_its_group_shows_no_correlation(rewards, lengths):
    assert correlation_within_groups(rewards, lengths, 8) is None


@pytest.mark.parametrize("group", [2, 4, 8])
def test_a_reward_for_length_is_a_correlation(group):
    generator = random.Random(0)
    lengths = [float(generator.randint(10, 400)) for _ in range(64)]
    assert correlation_within_groups([0.01 * n for n in lengths], lengths, group) == pytest.approx(1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), group=st.sampled_from([2, 4, 8]), count=st.sampled_from([8, 16, 64]),
    values=st.integers(2, 6), lengths=st.integers(2, 60), kind=st.sampled_from(sorted(DISTINCT)),
)  # fmt: skip
def test_rewards_that_know_nothing_of_length_are_no_shortcut(seed, group, count, values, lengths, kind):
    generator, facts = random.Random(seed), RunFacts(rollouts=count, generations=group)
    entries = []
    for step in range(1, 301):
        rewards = [generator.randrange(values) / values for _ in range(count)]
        spent = [float(generator.randrange(lengths)) for _ in range(count)]
        found = correlation_within_groups(rewards, spent, group, DISTINCT[kind])
        entries.append({"step": step, "reward": 0.5, "completions/mean_length": 30.0, "tools/call_frequency": 2.0})
        entries[-1] |= {} if found is None else {"reward/length_correlation": found}
        assert RULES["shortcut"].check(entries[-8:], facts) is None


def stream(count, **metrics):
    return [{"step": step, "reward": 0.5, "grad_norm": 0.4, **metrics} for step in range(1, count + 1)]


def test_a_correlation_counts_in_rollout_batches_in_a_row_and_while_lengths_do_not_fall():
    rule, facts = RULES["shortcut"].check, RunFacts()
    high = stream(4, **{"reward/length_correlation": 0.99, "completions/mean_length": 40.0})
    assert rule(high, facts) is not None and rule(high[:3], facts) is None
    without = [*high[:2], *stream(1, **{"completions/mean_length": 40.0}), *high[2:]]
    assert rule(without, facts) is None
    reused = [*high[:2], {"step": 9, "grad_norm": 0.1}, *high[2:]]  # a second step on a rollout batch
    assert rule(reused, facts) is not None
    shorter = [*stream(4, **{"completions/mean_length": 80.0}), *high]
    assert rule(shorter, facts) is None


def test_a_scaled_loss_may_overflow_and_others_may_not():
    overflow = stream(4, grad_norm=float("inf"), **{"value/loss": 0.1, "value/grad_norm": None})
    rule = RULES["not_finite"].check
    assert rule(overflow, RunFacts()) is not None and rule(overflow, RunFacts(loss_scaling=True)) is None
    assert RULES["critic_still"].check(overflow, RunFacts(loss_scaling=True)) is None
    assert rule(stream(17, grad_norm=float("inf")), RunFacts(loss_scaling=True)) is not None
    assert rule(stream(1, loss=None), RunFacts(loss_scaling=True)) is not None


def test_messages_name_the_cause_that_the_metrics_show():
    def message(rule, entry, **facts):
        return RULES[rule].check([{"step": 1, "reward": 0.5, **entry}], RunFacts(**facts)).message

    gap = {"sampling/logp_diff_mean": 1e-6, "sampling/logp_diff_max": 1e-5}
    wrong = {"sampling/logp_diff_mean": 0.3, "sampling/logp_diff_max": 4.0}
    far = {"ratio/mean": 1.4, "ratio/std": 0.3}
    assert "recorded log-probs are right" in message("ratio_mean", {**far, **gap}, steps_per_batch=2)
    assert "not those of the policy that sampled" in message("ratio_mean", {**far, **wrong}, steps_per_batch=2)
    assert "longest sequence" in message("logprob_gap", wrong, rope="longrope")
    assert "longest sequence" not in message("logprob_gap", wrong)
    # The KL after a sync is measured against recorded log-probs, which are to blame where they are wrong
    assert RULES["reference_differs"].check([{"step": 1, "ref/kl": 0.2, **wrong}], RunFacts()) is None
    assert RULES["reference_differs"].check([{"step": 1, "ref/kl": 0.2, **gap}], RunFacts()) is not None


def test_entropy_of_exactly_zero_is_no_collapse():
    rule = RULES["entropy_collapse"].check
    assert rule(stream(4, entropy=0.0), RunFacts()) is None and rule(stream(4, entropy=1e-5), RunFacts()) is not None


def test_without_groups_only_rewards_that_are_all_the_same_leave_nothing_to_learn():
    flat = stream(4, reward_std=0.3, frac_reward_zero_std=1.0)
    rule = RULES["advantages_zero"].check
    assert rule(flat, RunFacts()) is not None and rule(flat, RunFacts(group_advantages=False)) is None
    same = stream(4, reward_std=0.0, frac_reward_zero_std=1.0)
    assert "critic" in rule(same, RunFacts(group_advantages=False)).message


def test_few_groups_without_a_spread_are_an_accident():
    def stands(number, facts, **changes):
        entry = {"reward": 0.0, "reward_std": 0.0, "frac_reward_zero_std": 1.0, **changes}
        return RULES["advantages_zero"].check([{"step": n + 1, **entry} for n in range(number)], facts) is not None

    one, two = RunFacts(rollouts=4, generations=4), RunFacts(rollouts=8, generations=4)
    assert not stands(5, one) and stands(6, one) and not stands(2, two) and stands(3, two)
    assert stands(3, one, reward=0.5) and not stands(2, two, reward=0.5)
    differ = {"reward": 0.5, "reward_std": 0.5}  # some groups all right, others all wrong
    assert not stands(23, one, **differ) and stands(24, one, **differ) and stands(12, two, **differ)
    assert stands(3, RunFacts(), **differ)


def test_binomial_tail_against_known_values():
    for total in (1, 7, 60, 500):
        for share in (Fraction(1, 20), Fraction(1, 3), Fraction(9, 10)):
            terms = [math.comb(total, n) * share**n * (1 - share) ** (total - n) for n in range(total + 1)]
            for count in range(0, total + 1, max(total // 7, 1)):
                found = binomial_tail(count, total, float(share))
                assert found == (1.0 if count <= total * share else pytest.approx(float(sum(terms[count:])), rel=1e-6))
    assert deviations([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 0 and deviations([2.0] * 3, [1.0] * 3) == float("inf")


def test_a_run_is_stored_as_it_was(tmp_path):
    entries = [{"step": 1, "loss": 0.5, "kl": None}, {"step": 2, "loss": 0.25, "reward": 1.0, "other": 3}, {"step": 3}]
    facts = RunFacts(dtype="bfloat16", rollouts=8)
    keep([stored("a", entries, facts)], tmp_path / "runs")
    keep([stored("b", entries, facts), stored("a", entries[:1], facts)], tmp_path / "runs")
    assert list(load(tmp_path / "runs")) == [
        ("a", [{"step": 1, "loss": 0.5, "kl": None}], facts),
        ("b", [{"step": 1, "loss": 0.5, "kl": None}, {"step": 2, "loss": 0.25, "reward": 1.0}], facts),
    ]


# The command


@pytest.mark.slow
def test_the_command_says_what_it_finds(monkeypatch, capsys):
    """On a few of the faults, one of them too weak for the rule that should name it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import health_runs

    few = ["a tool that fails", "a reward for length"]
    monkeypatch.setattr(health_runs, "FAULTS", {name: FAULTS[name] for name in few})
    monkeypatch.setattr("sys.argv", ["health_runs.py"])
    with pytest.raises(SystemExit) as ended:
        health_runs.main()
    said = capsys.readouterr().out
    assert ended.value.code == 0 and all(name in said for name in few)
    weak = replace(FAULTS["a tool that fails"], strengths=(0.0,))
    monkeypatch.setattr(health_runs, "FAULTS", {"a tool that fails": weak})
    with pytest.raises(SystemExit) as ended:
        health_runs.main()
    assert ended.value.code == 1 and re.search(r"a tool that fails\s+tool_failing\s+none", capsys.readouterr().out)
