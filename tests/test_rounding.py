"""Rounding told from faults: by hand, on samples of known noise, and on a pretrained model's own arithmetic."""

import math

import pytest
import torch
import transformers
from conftest import chat_tokenizer, tiny_model

from trl_toolgrpo import LogprobMismatchError, Trajectory, Turn
from trl_toolgrpo.diagnostics import check_logprobs
from trl_toolgrpo.rounding import (
    QUANTILES,
    SLACK,
    Exact,
    Rounding,
    measure_rounding,
    score_at_once,
    score_in_pieces,
    ulp_of,
)


def noise(seed, count, scale=0.046):
    """Absolute differences of two correct passes: about normal."""
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale).abs()


def test_ulps_known_by_hand():
    assert ulp_of(torch.bfloat16, 20.0) == 0.125
    assert ulp_of(torch.bfloat16, 16.0) == 0.125 and ulp_of(torch.bfloat16, 15.9) == 0.0625
    assert ulp_of(torch.float16, 20.0) == 2**-6
    assert ulp_of(torch.float32, 1.0) == 2**-23
    assert ulp_of(torch.bfloat16, 0.0) == ulp_of(torch.bfloat16, math.inf) == 0.0


def test_an_exact_bound_names_the_largest_difference():
    assert Exact().excess(torch.tensor([0.0, 1e-3])) is None
    assert "2.00e-03 nats, accepted 0.001" in Exact().excess(torch.tensor([0.0, 2e-3]))
    assert Exact(0.5).excess(torch.tensor([0.4])) is None and Exact().excess(torch.tensor([])) is None
    assert Exact().excess(torch.tensor([math.nan])) is not None


def test_figures_of_rounding_known_by_hand():
    found = Rounding.of(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]), ulp=0.0)
    assert found.mean == 2.0 and found.quantiles == pytest.approx([4 * share for share in QUANTILES])
    few = Rounding.of(torch.zeros(4), ulp=0.125)  # rounded alike by chance
    assert few.mean == 0.0125 and few.quantiles == (0.15 * 0.125, 0.25 * 0.125, 0.5 * 0.125)
    assert Rounding.of(torch.tensor([]), 0.0).mean == 0.0


@pytest.mark.parametrize("scale", [0.002, 0.046, 0.1])
@pytest.mark.parametrize("count", [3, 20, 256, 4000, 60_000])
def test_healthy_batches_of_any_size_pass(scale, count):
    for seed in range(20):
        known = Rounding.of(noise(seed, 256, scale), ulp=0.0)
        assert known.excess(noise(1000 + seed, count, scale)) is None
        assert known.excess(noise(2000 + seed, count, 1.4 * scale)) is None  # another kernel's


@pytest.mark.parametrize("scale", [0.002, 0.02, 0.046])
def test_a_third_of_the_tokens_off_by_0_3_is_caught(scale):
    for seed in range(20):
        known = Rounding.of(noise(seed, 256, scale), ulp=0.125)
        found = noise(1000 + seed, 900, scale)
        found[::3] += 0.3
        assert known.excess(found) is not None


def test_a_mean_and_a_tail_have_a_limit_each():
    known = Rounding(0.03, (0.04, 0.08, 0.15))
    assert "mean difference" in known.excess(torch.full((1000,), 0.03 * SLACK * 1.3))
    assert known.excess(torch.full((1000,), 0.04)) is None
    tail = torch.zeros(1000)
    tail[:20] = 0.5
    assert "1% of the tokens differ by more than 5.00e-01 nats" in known.excess(tail)
    assert known.excess(tail[:50] * 0 + 0.03) is None
    assert known.excess(torch.tensor([math.nan])) is not None


def test_tokens_after_a_tool_result_are_compared_on_their_own():
    """Twenty in five thousand tokens hide in a mean and a quantile; as the first tokens of turns they are a class."""
    rollouts, rows = [], []
    for seed in range(20):
        turns = [Turn(0, 125, "stop"), Turn(130, 255)]
        mask = [1] * 125 + [0] * 5 + [1] * 125
        recorded = [-1.0 * m for m in mask]
        rollouts.append(Trajectory([1], [7] * 255, recorded, mask, [0] * 255, turns, "stop"))
        row = torch.tensor(recorded) + noise(seed, 255)
        row[130] += 0.4
        rows.append(row)
    known = Rounding.of(noise(99, 256), ulp=0.125)
    with pytest.raises(LogprobMismatchError, match=r"begin a turn after tool results.*turn 1, completion token 130"):
        check_logprobs(torch.stack(rows), rollouts, known, "transformers")
    rows = [row - torch.nn.functional.one_hot(torch.tensor(130), 255) * 0.4 for row in rows]
    check_logprobs(torch.stack(rows), rollouts, known, "transformers")


@pytest.mark.parametrize("width", [1, 2, 3, 8, 33])
def test_scoring_in_pieces_is_a_plain_pass(width):
    model = tiny_model(chat_tokenizer()).double().eval()
    draw = torch.Generator().manual_seed(width)
    prompt = torch.randint(1, 200, (9,), generator=draw).tolist()
    completions = torch.randint(1, 200, (3, width), generator=draw)
    with torch.no_grad():
        found, largest = score_in_pieces(model, prompt, completions, 0.7, torch.no_grad)
        ids = torch.cat([torch.tensor([prompt] * 3), completions], dim=1)
        logits = model(input_ids=ids).logits
    scores = torch.log_softmax(logits / 0.7, dim=-1)[:, 8:-1].gather(-1, completions[..., None])[..., 0]
    torch.testing.assert_close(found.double(), scores, atol=1e-6, rtol=1e-6)
    at_once, size = score_at_once(model, prompt, completions, 0.7, torch.no_grad)
    torch.testing.assert_close(at_once.double(), scores, atol=1e-6, rtol=1e-6)
    assert size == pytest.approx(largest, rel=1e-6)
    assert largest == pytest.approx(float(logits[:, 8:-1].abs().max()), rel=1e-6)


SHAPE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": None}
HEADS = {**SHAPE, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
STATES = {
    "Lfm2": {**HEADS, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "Jamba": {**HEADS, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "FalconH1": {**HEADS, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
                 "mamba_chunk_size": 8},
    "Mamba": {**SHAPE, "state_size": 8},
    "Mamba2": {**SHAPE, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_scoring_token_by_token_is_a_plain_pass_of_a_model_with_a_state(name):
    """Some of these say something else of several tokens after a cache; what they differ by would pass as rounding."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**STATES[name]))
    for parameter in model.eval().parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3.0)
    prompt, completions = [5, 6, 7, 8, 9], torch.randint(3, 97, (2, 24))
    with torch.no_grad():
        found, _ = score_in_pieces(model, prompt, completions, 1.0, torch.no_grad, growing=False)
        ids = torch.cat([torch.tensor([prompt] * 2), completions], dim=1)
        scores = torch.log_softmax(model(input_ids=ids, use_cache=False).logits, dim=-1)[:, 4:-1]
    torch.testing.assert_close(found, scores.gather(-1, completions[..., None])[..., 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_rounding_is_measured_in_the_dtype_of_training(cached, monkeypatch):
    model = tiny_model(chat_tokenizer()).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(std=1.0)
    draw = torch.Generator().manual_seed(0)
    prompt, completions = list(range(5, 20)), torch.randint(1, 200, (4, 60), generator=draw)
    if not cached:  # a model that keeps no cache
        forward = type(model).forward

        def without_cache(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            output.past_key_values = None
            return output

        monkeypatch.setattr(type(model), "forward", without_cache)
    means = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            found = measure_rounding(
                model, prompt, completions, torch.ones_like(completions).bool(), 1.0,
                lambda dtype=dtype: torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
            )  # fmt: skip
        means[dtype] = found.mean
    assert means[torch.float32] < 1e-5 < 1e-3 < means[torch.bfloat16] < 0.1
