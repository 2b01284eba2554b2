"""Rounding and faults are told apart: by hand, on known noise, and on a pretrained model's arithmetic."""

import math
from contextlib import nullcontext

import pytest
import torch
import transformers
from conftest import chat_tokenizer, tiny_model

from trl_toolgrpo import LogprobMismatchError, Trajectory, Turn
from trl_toolgrpo.models.rounding import QUANTILES, SLACK, Exact, Rounding, measure_rounding, score
from trl_toolgrpo.sampling.generate_sampler import GenerateSampler
from trl_toolgrpo.sampling.model_sampler import ModelSampler
from trl_toolgrpo.update.logprob_check import check_logprobs


def noise(seed, count, scale=0.046):
    """Return absolute differences of two correct passes, which are about normal."""
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale).abs()


def test_an_exact_bound_names_the_largest_difference():
    assert Exact().excess(torch.tensor([0.0, 1e-3])) is None
    assert "2.00e-03 nats, accepted 0.001" in Exact().excess(torch.tensor([0.0, 2e-3]))
    assert Exact(0.5).excess(torch.tensor([0.4])) is None and Exact().excess(torch.tensor([])) is None
    assert Exact().excess(torch.tensor([math.nan])) is not None


def test_figures_of_rounding_known_by_hand():
    found = Rounding.of(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]))
    assert found.mean == 2.0 and found.quantiles == pytest.approx([4 * share for share in QUANTILES])
    assert Rounding.of(torch.zeros(4)) == Rounding.of(torch.tensor([])) == Rounding(5e-4, (5e-4, 5e-4, 5e-4))
    assert Rounding.of(torch.tensor([0.0, math.nan, math.inf])).mean == 5e-4


@pytest.mark.parametrize("scale", [0.002, 0.046, 0.1])
@pytest.mark.parametrize("count", [3, 20, 256, 4000, 60_000])
def test_healthy_batches_of_any_size_pass(scale, count):
    for seed in range(20):
        known = Rounding.of(noise(seed, 256, scale))
        assert known.excess(noise(1000 + seed, count, scale)) is None
        assert known.excess(noise(2000 + seed, count, 1.4 * scale)) is None  # another kernel's


@pytest.mark.parametrize("scale", [0.002, 0.02, 0.046])
def test_a_third_of_the_tokens_off_by_0_3_is_caught(scale):
    for seed in range(20):
        known = Rounding.of(noise(seed, 256, scale))
        found = noise(1000 + seed, 900, scale)
        found[::3] += 0.3
        assert known.excess(found) is not None


def test_mean_and_tail_each_have_a_limit():
    known = Rounding(0.03, (0.04, 0.08, 0.15))
    assert "mean difference" in known.excess(torch.full((1000,), 0.03 * SLACK * 1.3))
    assert known.excess(torch.full((1000,), 0.04)) is None
    tail = torch.zeros(1000)
    tail[:20] = 0.5
    assert "1% of the tokens differ by more than 5.00e-01 nats" in known.excess(tail)
    assert known.excess(tail[:50] * 0 + 0.03) is None
    assert known.excess(torch.tensor([math.nan])) is not None


def test_tokens_after_a_tool_result_are_compared_separately():
    """Twenty in five thousand tokens do not show in mean and quantiles; they are compared as a class of their own."""
    rollouts, rows = [], []
    for seed in range(20):
        turns = [Turn(0, 125, "stop"), Turn(130, 255)]
        mask = [1] * 125 + [0] * 5 + [1] * 125
        recorded = [-1.0 * m for m in mask]
        rollouts.append(Trajectory([1], [7] * 255, recorded, mask, [0] * 255, turns, "stop"))
        row = torch.tensor(recorded) + noise(seed, 255)
        row[130] += 0.4
        rows.append(row)
    known = Rounding.of(noise(99, 256))
    with pytest.raises(LogprobMismatchError, match=r"begin a turn after tool results.*turn 1, completion token 130"):
        check_logprobs(torch.stack(rows), rollouts, known, "transformers")
    rows = [row - torch.nn.functional.one_hot(torch.tensor(130), 255) * 0.4 for row in rows]
    check_logprobs(torch.stack(rows), rollouts, known, "transformers")


@pytest.mark.parametrize("width", [1, 2, 33])
def test_scoring_is_a_plain_pass(width):
    model = tiny_model(chat_tokenizer()).double().eval()
    draw = torch.Generator().manual_seed(width)
    prompt = torch.randint(1, 200, (9,), generator=draw).tolist()
    completions = torch.randint(1, 200, (3, width), generator=draw)
    with torch.no_grad():
        found = score(model, prompt, completions, 0.7, torch.no_grad)
        ids = torch.cat([torch.tensor([prompt] * 3), completions], dim=1)
        scores = torch.log_softmax(model(input_ids=ids).logits / 0.7, dim=-1)[:, 8:-1]
    torch.testing.assert_close(found.double(), scores.gather(-1, completions[..., None])[..., 0], atol=1e-6, rtol=1e-6)


SHAPE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": None}
HEADS = {**SHAPE, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "Qwen3": {**HEADS, "head_dim": 8},
    "Gemma2": {**HEADS, "head_dim": 8, "sliding_window": 16, "attn_logit_softcapping": 20.0},
    "GptOss": {**HEADS, "head_dim": 8, "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {**HEADS, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Mamba2": {**SHAPE, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
}


def family(name, scale):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**FAMILIES[name]))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(scale)
    return model.eval()


@torch.no_grad()
def gaps_of(sampler, model, prompt, autocast):
    """Return how far a sampler's log-probs are from a plain pass, and the rounding measured on the same model."""
    with sampler(model, [], 0, autocast=autocast).open([prompt] * 4, 64) as session:
        for row in range(4):
            session.extend(row, [], 64)
        found = {}
        while session.busy:
            found.update({result.row: result for result in session.step()})
    completions = torch.tensor([found[row].token_ids for row in range(4)])
    recorded = torch.tensor([found[row].logprobs for row in range(4)])
    known = measure_rounding(model, prompt, completions, torch.ones_like(completions).bool(), 1.0, autocast)
    return recorded, score(model, prompt, completions, 1.0, autocast), known


@pytest.mark.parametrize("low", ["autocast", "weights"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_healthy_sampler_passes_and_a_faulty_one_does_not(name, scale, low):
    """Also if two passes of one kernel hardly differ: in some families a cached pass equals a plain one to the bit."""
    model = family(name, scale)
    autocast = nullcontext
    if low == "autocast":
        autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    else:
        model = model.bfloat16()
    sampler = GenerateSampler if name == "Mamba2" else ModelSampler
    torch.manual_seed(1)
    recorded, plain, known = gaps_of(sampler, model, list(range(5, 45)), autocast)
    assert known.excess((recorded - plain).abs().flatten()) is None
    recorded.flatten()[::3] -= 0.3
    assert known.excess((recorded - plain).abs().flatten()) is not None


def test_rounding_is_that_of_the_dtype_of_training():
    model, prompt = family("Qwen3", 4.0), list(range(5, 20))
    completions = torch.randint(1, 90, (4, 60), generator=torch.Generator().manual_seed(0))
    means = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            found = measure_rounding(
                model, prompt, completions, torch.ones_like(completions).bool(), 1.0,
                lambda dtype=dtype: torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
            )  # fmt: skip
        means[dtype] = found.mean
    assert means[torch.float32] == 5e-4 < 1e-3 < means[torch.bfloat16] < 0.1
    assert not model.get_input_embeddings()._forward_hooks


def doubted(seed, count, scale, sure):
    """Return the rounding of logits where some tokens are almost certain, and the probability of all other tokens."""
    generator = torch.Generator().manual_seed(seed)
    certain = torch.rand(count, generator=generator) < sure
    doubt = torch.where(certain, 1e-4, 0.2 + 0.8 * torch.rand(count, generator=generator))
    return (scale * torch.randn(count, generator=generator)).abs() * doubt, doubt


@pytest.mark.parametrize("count", [10, 100, 1000])
@pytest.mark.parametrize("sure", [0.0, 0.5])
def test_unexpected_tokens_may_differ_by_more(count, sure):
    for seed in range(20):
        known = Rounding.of(*doubted(seed, 300, 0.02, sure=0.95))
        gaps, doubt = doubted(1000 + seed, count, 0.02, sure)
        assert known.excess(gaps, doubt) is None
        assert known.excess(gaps) is not None or count == 10
        assert known.excess(16 * gaps, doubt) is not None  # and by more than rounding where something is wrong


def test_expected_tokens_may_not_differ_by_more():
    known = Rounding.of(*doubted(0, 300, 0.02, sure=0.95))
    sure = torch.full((200,), 1e-4)
    for gap in (0.003, 0.01):
        assert known.excess(torch.full((200,), gap), sure) is not None
    assert Exact().doubtful == Exact().mean and Exact().excess(torch.tensor([2e-3]), torch.ones(1)) is not None
