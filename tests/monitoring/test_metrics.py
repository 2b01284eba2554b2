"""Metrics against numpy and by hand, the self-check both ways, and the console line word for word."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_toolgrpo import LogprobMismatchError, ToolCall, ToolResult, Trajectory, Turn
from trl_toolgrpo.models.rounding import Exact, compute_dtype
from trl_toolgrpo.monitoring.metrics import console_line, rollout_counts, rollout_metrics
from trl_toolgrpo.update.logprob_check import check_logprobs
from trl_toolgrpo.update.ratio_statistics import RatioStatistics


# Dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_compute_dtype_is_that_of_the_weights(dtype):
    args = SimpleNamespace(bf16=False, fp16=False)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).to(dtype)
    assert compute_dtype(args, model) == dtype
    if dtype != torch.float64:  # such as the factors of an adapter
        model[1].to(torch.float64)
        assert compute_dtype(args, model) == dtype
    assert compute_dtype(SimpleNamespace(bf16=True, fp16=False), model) == torch.bfloat16
    assert compute_dtype(SimpleNamespace(bf16=False, fp16=True), model) == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compute_dtype_is_that_of_quantized_layers(dtype):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].compute_dtype = dtype  # as layers of bitsandbytes have it
    assert compute_dtype(SimpleNamespace(bf16=False, fp16=False), model) == dtype


# Ratio


def batches(seed, count, share=0.7):
    """Make micro-batches of different widths: present log-probs, recorded log-probs, mask."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        shape = (3, 4 + 3 * index)
        recorded = -torch.rand(shape, generator=generator) * 5
        logps = recorded + torch.randn(shape, generator=generator) * 0.3
        made.append((logps, recorded, (torch.rand(shape, generator=generator) < share).long()))
    return made


def by_numpy(made):
    difference = np.concatenate([(n.double() - r.double()).numpy()[m.numpy() == 1] for n, r, m in made])
    return difference, np.exp(difference)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_statistics_over_micro_batches_are_those_of_all_tokens(count):
    made = batches(count, count)
    statistics = RatioStatistics()
    for logps, recorded, mask in made:
        statistics.add(logps, recorded, mask, fresh=True)
    difference, ratio = by_numpy(made)
    expected = {
        "ratio/mean": ratio.mean(),
        "ratio/std": ratio.std(),
        "ratio/min": ratio.min(),
        "ratio/max": ratio.max(),
        "sampling/logp_diff_mean": np.abs(difference).mean(),
        "sampling/logp_diff_max": np.abs(difference).max(),
        "sampling/kl_k3": (ratio - 1 - difference).mean(),
    }
    assert statistics.metrics() == pytest.approx(expected, abs=1e-6)


def test_ratio_known_by_hand():
    logps = torch.tensor([[math.log(0.5), math.log(0.2), -99.0]])
    recorded = torch.tensor([[math.log(0.25), math.log(0.4), -1.0]])
    statistics = RatioStatistics()
    statistics.add(logps, recorded, torch.tensor([[1, 1, 0]]), fresh=True)
    assert statistics.metrics() == pytest.approx(
        {
            "ratio/mean": 1.25,  # 2 and 1/2
            "ratio/std": 0.75,
            "ratio/min": 0.5,
            "ratio/max": 2.0,
            "sampling/logp_diff_mean": math.log(2),
            "sampling/logp_diff_max": math.log(2),
            "sampling/kl_k3": ((2 - 1 - math.log(2)) + (0.5 - 1 + math.log(2))) / 2,
        }
    )


def test_only_fresh_micro_batches_count_for_the_sampler():
    first, second, third = batches(1, 3)
    statistics = RatioStatistics()
    statistics.add(*first, fresh=False)
    assert set(statistics.metrics()) == {"ratio/mean", "ratio/std", "ratio/min", "ratio/max"}
    statistics.add(*second, fresh=True)
    statistics.add(*third, fresh=False)
    found = statistics.metrics()
    _, everything = by_numpy([first, second, third])
    fresh, ratio = by_numpy([second])
    assert found["ratio/mean"] == pytest.approx(everything.mean(), abs=1e-6)
    assert found["ratio/max"] == pytest.approx(everything.max(), abs=1e-6)
    assert found["sampling/logp_diff_mean"] == pytest.approx(np.abs(fresh).mean(), abs=1e-6)
    assert found["sampling/logp_diff_max"] == pytest.approx(np.abs(fresh).max(), abs=1e-6)
    assert found["sampling/kl_k3"] == pytest.approx((ratio - 1 - fresh).mean(), abs=1e-6)


def test_equal_logprobs_give_a_ratio_of_exactly_one():
    logps = -torch.rand(4, 9)
    statistics = RatioStatistics()
    statistics.add(logps, logps, torch.ones(4, 9), fresh=True)
    found = statistics.metrics()
    assert (found["ratio/mean"], found["ratio/std"], found["ratio/min"], found["ratio/max"]) == (1, 0, 1, 1)
    assert found["sampling/logp_diff_max"] == found["sampling/kl_k3"] == 0.0


def test_spread_of_ratios_near_one_is_not_lost_to_rounding():
    difference = torch.tensor([[1e-4, -1e-4] * 50])
    statistics = RatioStatistics()
    statistics.add(difference, torch.zeros_like(difference), torch.ones(1, 100), fresh=False)
    assert statistics.metrics()["ratio/std"] == pytest.approx(1e-4, rel=1e-4)


def test_empty_masks_and_resets_give_no_metrics():
    statistics = RatioStatistics()
    assert not statistics.state_dict() and statistics.metrics() == {}
    values = torch.full((2, 3), math.nan)
    statistics.add(values, values, torch.zeros(2, 3), fresh=True)
    assert statistics.state_dict() and statistics.metrics() == {}
    first = batches(3, 1)[0]
    statistics.add(*first, fresh=True)
    _, ratio = by_numpy([first])
    found = statistics.metrics()
    assert found["ratio/min"] == pytest.approx(ratio.min()) and found["ratio/mean"] == pytest.approx(ratio.mean())
    statistics.reset()
    assert not statistics.state_dict() and statistics.metrics() == {}


def test_statistics_are_combined_over_processes():
    made = batches(5, 2)
    parts = []
    for batch in made:
        parts.append(RatioStatistics())
        parts[-1].add(*batch, fresh=True)
    together = parts[0].metrics(
        reduce_sum=lambda sums: sums + parts[1].state_dict()["sums"],
        gather=lambda extremes: torch.cat([extremes, parts[1].state_dict()["extremes"][None]]),
    )
    alone = RatioStatistics()
    for batch in made:
        alone.add(*batch, fresh=True)
    assert together == pytest.approx(alone.metrics())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.floats(0.05, 1.0))
def test_order_of_micro_batches_does_not_matter(seed, count, share):
    made = batches(seed, count, share)
    found = []
    for order in (made, made[::-1]):
        statistics = RatioStatistics()
        for batch in order:
            statistics.add(*batch, fresh=True)
        found.append(statistics.metrics())
    assert found[0] == pytest.approx(found[1])
    if found[0]:
        assert found[0]["ratio/min"] <= found[0]["ratio/mean"] <= found[0]["ratio/max"]
        assert found[0]["sampling/kl_k3"] >= 0


# The self-check


def rollouts():
    """Two rollouts, the first of two turns with a tool result of two tokens between them."""
    call, result = ToolCall("call_0_0", "add"), ToolResult(3)
    return [
        Trajectory([1], [10, 11, 12, 13, 14], [-0.1, -0.2, 0.0, 0.0, -0.5], [1, 1, 0, 0, 1], [0] * 5,
                   [Turn(0, 2, "stop", [call], [result]), Turn(4, 5)], "stop"),
        Trajectory([1], [20, 21, 22], [0.0, -2.0, -1.0], [1, 1, 1], [1, 0, 0], [Turn(0, 3)], "length"),
    ]  # fmt: skip


def recomputed():
    nan = math.nan  # what the trainer computes where nothing was sampled is of no interest
    return torch.tensor([[-0.1, -0.2, nan, -9.0, -0.5], [nan, -2.0, -1.0, nan, nan]])


def test_equal_logprobs_pass_with_any_tolerance():
    check_logprobs(recomputed(), rollouts(), Exact(1e-7), "transformers")


def test_a_mismatch_in_one_process_is_raised_in_all():
    told = []

    def gather(mine):
        told.extend(mine)
        return [*mine, "found by the other"]

    with pytest.raises(LogprobMismatchError, match="found by the other"):
        check_logprobs(recomputed(), rollouts(), Exact(1e-7), "transformers", gather)
    with pytest.raises(LogprobMismatchError, match="rollout 0, turn 0"):
        check_logprobs(recomputed() - 1, rollouts(), Exact(1e-7), "transformers", gather)
    assert told[0] is None and "rollout 0, turn 0" in told[1]


def test_one_wrong_token_is_named_with_both_values():
    scored = recomputed()
    scored[0, 4] = -0.75
    with pytest.raises(LogprobMismatchError) as caught:
        check_logprobs(scored, rollouts(), Exact(1e-3), "transformers")
    assert str(caught.value) == (
        "The log-probs recorded by the transformers sampler are not those the trainer computes: over 5 tokens, the "
        "largest difference is 2.50e-01 nats, accepted 0.001. The largest is in rollout 0, turn 1, completion token 4 "
        "(id 14): recorded -0.500000, recomputed -0.750000. Every ratio would be wrong by as much. Check that "
        "sampling and training use the same weights, adapter, dtype and temperature; raise `logprob_check_tolerance` "
        "only if the difference is known rounding."
    )
    check_logprobs(scored, rollouts(), Exact(0.26), "transformers")
    assert isinstance(caught.value, ArithmeticError)


def test_worst_token_of_the_batch_is_named():
    scored = recomputed()
    scored[0, 0] -= 0.1
    scored[1, 1] -= 0.2
    with pytest.raises(LogprobMismatchError, match=r"rollout 1, turn 0, completion token 1 \(id 21\): recorded -2.0"):
        check_logprobs(scored, rollouts(), Exact(0.15), "transformers")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nan_is_a_mismatch(value):
    scored = recomputed()
    scored[1, 2] = value
    with pytest.raises(LogprobMismatchError, match=r"difference is inf nats.* rollout 1, turn 0, completion token 2"):
        check_logprobs(scored, rollouts(), Exact(0.15), "x")


def test_logprobs_shifted_by_one_token_do_not_pass():
    scored = recomputed().roll(1, dims=1)
    with pytest.raises(LogprobMismatchError):
        check_logprobs(scored, rollouts(), Exact(0.15), "x")


def test_rollouts_without_sampled_tokens_pass():
    empty = Trajectory([1], [5, 6], [0.0, 0.0], [0, 0], [0, 0], [], "stop")
    check_logprobs(torch.full((1, 2), math.nan), [empty], Exact(1e-9), "x")
    check_logprobs(torch.zeros(1, 0), [Trajectory([1], [], [], [], [], [], "stop")], Exact(1e-9), "x")


# Rollouts


def tool_batch():
    add, ask = ToolCall("0", "add"), ToolCall("1", "ask")
    bad, nope = ToolCall("2", "", error="not JSON"), ToolCall("3", "nope")
    unread = ToolResult({"error": "x"}, is_error=True, error_type="malformed")
    unknown = ToolResult({"error": "x"}, is_error=True, error_type="unknown_tool")
    late = ToolResult({"error": "x"}, is_error=True, error_type="timeout", seconds=3.0)
    failed = ToolResult({"error": "x"}, is_error=True, error_type="error", seconds=0.5)
    first = Turn(0, 3, "stop", [add, bad, ask], [ToolResult(1, truncated=True, seconds=1.0), unread, late])
    second = Turn(5, 6, "stop", [add, nope], [failed, unknown])
    return [
        Trajectory([1], [2] * 8, [0.0] * 8, [1, 1, 1, 0, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0],
                   [first, second, Turn(7, 8)], "stop"),
        # An unanswered call, and one cut off by the token budget
        Trajectory([1], [2, 2], [0.0] * 2, [1, 1], [0, 0], [Turn(0, 2, "stop", [add])], "tool_limit"),
        Trajectory([1], [2] * 4, [0.0] * 4, [1] * 4, [0] * 4, [Turn(0, 4, "length", [bad])], "length"),
        Trajectory([1], [2] * 4, [0.0] * 4, [1] * 4, [0] * 4, [Turn(0, 4, "stop", [bad])], "parse_errors"),
    ]  # fmt: skip


def test_rollout_metrics_known_by_hand():
    counts = rollout_counts(tool_batch(), seconds=2.0, tool_wait=0.5, invalid=0, abandoned=3)
    assert rollout_metrics([counts], with_tools=True) == pytest.approx(
        {
            "forced/fraction": 1 / 15,
            "rollout/turns_mean": 6 / 4,
            "rollout/tokens_per_second": 15 / 2.0,
            "rollout/tool_wait_fraction": 0.25,
            "rollout/stop/stop": 0.25,
            "rollout/stop/length": 0.25,
            "rollout/stop/tool_limit": 0.25,
            "rollout/stop/parse_errors": 0.25,
            "rollout/stop/tool_overflow": 0.0,
            "rollout/stop/environment": 0.0,
            "tools/unknown_calls": 1,
            "tools/malformed_calls": 2,
            "tools/abandoned": 3,
            "tools/add/calls": 2,
            "tools/add/errors": 1,
            "tools/add/timeouts": 0,
            "tools/add/truncated": 1,
            "tools/add/latency_p50": 0.75,
            "tools/add/latency_p95": 0.975,
            "tools/ask/calls": 1,
            "tools/ask/errors": 1,
            "tools/ask/timeouts": 1,
            "tools/ask/truncated": 0,
            "tools/ask/latency_p50": 3.0,
            "tools/ask/latency_p95": 3.0,
        }
    )


def test_rollout_counts_add_up_over_processes():
    first = rollout_counts(tool_batch()[:1], seconds=2.0, tool_wait=0.5, invalid=0, abandoned=1)
    second = rollout_counts(tool_batch()[1:], seconds=4.0, tool_wait=1.0, invalid=2, abandoned=2)
    found = rollout_metrics([first, second], with_tools=True)
    whole = rollout_metrics([rollout_counts(tool_batch(), 4.0, 1.0, 2, abandoned=3)], with_tools=True)
    assert found == pytest.approx(whole)
    assert found["rollout/invalid"] == 2 and found["rollout/tokens_per_second"] == 15 / 4.0


def test_the_least_bound_on_keys_and_values_of_all_processes_is_logged():
    counts = [rollout_counts(tool_batch(), 1.0, 0.0, 0, cache_gib=chosen) for chosen in (3.5, 2.5, None)]
    assert rollout_metrics(counts, with_tools=True)["rollout/cache_gib"] == 2.5
    assert "rollout/cache_gib" not in rollout_metrics(counts[2:], with_tools=True)


def test_a_tool_called_in_one_process_is_counted():
    first = rollout_counts(tool_batch()[:1], 1.0, 0.0, 0)
    second = rollout_counts([Trajectory([1], [2], [0.0], [1], [0], [Turn(0, 1)], "stop")], 1.0, 0.0, 0)
    assert rollout_metrics([second, first], with_tools=True)["tools/ask/calls"] == 1


def test_metrics_without_tools_and_without_rollouts():
    plain = [Trajectory([1], [2, 3], [0.0] * 2, [1, 1], [0, 0], [Turn(0, 2)], "stop")]
    found = rollout_metrics([rollout_counts(plain, 1.0, 0.0, 0)], with_tools=False)
    assert not any(name.startswith("tools/") for name in found) and "rollout/invalid" not in found
    assert (found["forced/fraction"], found["rollout/turns_mean"], found["rollout/stop/stop"]) == (0.0, 1.0, 1.0)
    nothing = rollout_metrics([rollout_counts([], 0.0, 0.0, 0)], with_tools=True)
    assert set(nothing.values()) == {0}


# The console line


LOGS = {
    "ratio/mean": 1.0024,
    "ratio/std": 0.1131,
    "forced/fraction": 0.0,
    "kl": 0.0128,
    "tools/call_frequency": 1.92,
    "tools/failure_frequency": 0.018,
}


def without(*names):
    return {name: value for name, value in LOGS.items() if name not in names}


def test_console_line_word_for_word():
    assert console_line(LOGS) == "ratio 1.002±0.113 | forced 0.0% | kl 0.013 | tools 1.9 calls, 2% failed"
    assert console_line(without("kl")) == "ratio 1.002±0.113 | forced 0.0% | tools 1.9 calls, 2% failed"
    more = {"value/loss": 0.212, "value/explained_variance": 0.43, "ref/syncs": 2.0, "ref/tensors_differ": 0.0}
    assert console_line({**LOGS, **more}) == (
        "ratio 1.002±0.113 | forced 0.0% | kl 0.013 | value loss 0.21 ev 0.43 | ref synced 2× (0 tensors differ) | "
        "tools 1.9 calls, 2% failed"
    )
    plain = without("kl", "tools/call_frequency", "tools/failure_frequency")
    assert console_line(plain) == "ratio 1.002±0.113 | forced 0.0%"
    assert console_line({**plain, "forced/fraction": 0.1234}) == "ratio 1.002±0.113 | forced 12.3%"
    assert console_line(without("tools/failure_frequency")).endswith("tools 1.9 calls, 0% failed")


def test_step_without_a_ratio_has_no_line():
    assert console_line(without("ratio/mean")) is None and console_line({}) is None
    assert console_line({**LOGS, "ratio/mean": None}) is None
