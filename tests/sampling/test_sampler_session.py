"""The default sampler's state machine and the sampling of single tokens, by known answers."""

import math

import pytest
import torch
from torch import nn

from trl_toolgrpo.errors import SamplerError
from trl_toolgrpo.sampling.model_sampler import ModelSampler, sample_tokens


# One token


def test_draws_follow_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -math.inf, 1.5, -3.0])
    count = 20_000
    noise = torch.rand(count, generator=torch.Generator().manual_seed(1))
    for temperature in (1.0, 0.5, 2.0):
        tokens, logprobs, entropies = sample_tokens(logits.expand(count, -1), temperature, noise)
        expected = torch.softmax(logits.double() / temperature, dim=-1)
        entropy = torch.distributions.Categorical(probs=expected).entropy()
        assert torch.allclose(entropies.double(), entropy, atol=1e-5)
        assert torch.allclose(logprobs.double(), expected.log()[tokens], atol=1e-6)
        seen = torch.bincount(tokens, minlength=8)
        assert seen[5] == 0
        keep = expected > 0
        chi_square = ((seen[keep] - count * expected[keep]) ** 2 / (count * expected[keep])).sum()
        assert chi_square < 24.3  # 0.999 quantile at 6 degrees of freedom


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_change_a_draw(dtype):
    """Also where a constraint leaves few tokens: the least float32 is no finite bfloat16."""
    logits = (4 * torch.randn(3, 300, generator=torch.Generator().manual_seed(2))).to(dtype)
    logits[1, 5:], logits[2, 1:] = -math.inf, -math.inf
    noise = torch.tensor([0.2, 0.7, 0.5])
    alone = sample_tokens(logits, 0.9, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sample_tokens(logits, 0.9, noise)
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    assert found[2].isfinite().all() and found[2][2] == pytest.approx(0.0, abs=1e-6)


def test_noise_is_inverted_through_the_cumulative_distribution():
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    for noise, token in ((0.0, 0), (0.0999, 0), (0.1001, 1), (0.2999, 1), (0.3001, 2), (0.6001, 3), (0.99999994, 3)):
        tokens, logprobs, _ = sample_tokens(logits, 1.0, torch.tensor([noise]))
        assert tokens.tolist() == [token]
        assert logprobs.item() == pytest.approx(math.log([0.1, 0.2, 0.3, 0.4][token]), abs=1e-6)


@pytest.mark.parametrize("noise", [0.0, 0.5, 0.99999994])
def test_tokens_without_mass_are_never_drawn(noise):
    inf = math.inf
    for logits in (
        [-inf, -inf, 0.0, 0.0, -inf],
        [-inf, 3.0, -inf, 3.0, -inf],
        [-inf, -inf, -inf, -inf, 0.0],
        [0.0] + [-inf] * 4,
    ):
        tokens, logprobs, _ = sample_tokens(torch.tensor([logits]), 1.0, torch.tensor([noise]))
        assert logits[tokens.item()] > -inf and math.isfinite(logprobs.item())


def test_draws_from_a_large_vocabulary_stay_in_range():
    """Rounding of a long cumulative sum must not lead past the end, nor to a token without mass."""
    logits = torch.randn(4, 150_000, generator=torch.Generator().manual_seed(0)) * 4
    logits[:, -5:] = -math.inf
    tokens, logprobs, _ = sample_tokens(logits, 0.7, torch.tensor([0.99999994, 0.0, 0.999, 0.5]))
    assert (tokens < 149_995).all() and logprobs.isfinite().all()
    expected = torch.log_softmax(logits.double() / 0.7, -1).gather(-1, tokens[:, None])[:, 0]
    assert torch.allclose(logprobs.double(), expected, atol=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.99999994])
def test_certain_token_has_logprob_zero_and_never_above(noise):
    logits = torch.full((1, 50), -100.0)  # their mass underflows to 0
    logits[0, 7] = 60.0
    tokens, logprobs, _ = sample_tokens(logits, 1.0, torch.tensor([noise]))
    assert tokens.item() == 7 and logprobs.item() == 0.0


def test_low_precision_logits_are_scored_in_float32():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens, logprobs, _ = sample_tokens(logits, 1.0, torch.tensor([0.1, 0.5, 0.9]))
    assert logprobs.dtype == torch.float32
    expected = torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, None])[:, 0]
    assert torch.allclose(logprobs, expected, atol=1e-6)


# The state machine


class Table(nn.Module):
    """A model with a fixed next token after each token, which records what it reads."""

    def __init__(self, following):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = type("Config", (), {"_attn_implementation": "eager"})()
        self.following = following
        self.dropout = nn.Dropout(0.5)
        self.read = []

    def forward(self, input_ids, position_ids, past_key_values, use_cache, logits_to_keep):
        batch, length = input_ids.shape
        keys = torch.zeros(batch, 1, length, 2)
        past_key_values.update(keys, keys, 0)
        self.read.append((input_ids.tolist(), position_ids.tolist()))
        logits = torch.full((batch, 1, 10), -50.0)
        for row, token in enumerate(input_ids[:, -1].tolist()):
            logits[row, 0, self.following[token]] = 50.0
        return type("Output", (), {"logits": logits})()


CYCLE = {0: 0, 1: 1, 2: 3, 3: 4, 4: 5, 5: 6, 6: 7, 7: 8, 8: 9, 9: 2}


def test_rows_end_on_their_stop_token_or_their_own_budget():
    model = Table(CYCLE)
    with ModelSampler(model, [5], 0).open([[2], [3], [8], [2]], 20) as session:
        for row, budget in enumerate((10, 1, 2, 3)):
            session.extend(row, [], budget)
        found = {}
        while session.busy:
            found.update({result.row: result for result in session.step()})
    assert [found[row].token_ids for row in range(4)] == [[3, 4, 5], [4], [9, 2], [3, 4, 5]]
    assert [found[row].stopped for row in range(4)] == [True, False, False, True]
    assert all(value == 0.0 for result in found.values() for value in result.logprobs)


def test_rows_leave_and_join_and_positions_go_on():
    model = Table(CYCLE)
    with ModelSampler(model, [5], 0).open([[9, 2], [9, 2], [6]], 30) as session:
        session.extend(0, [], 9)
        session.extend(1, [], 2)
        session.extend(2, [], 4)
        histories = [[9, 2], [9, 2], [6]]
        rounds = [0, 0, 0]
        while session.busy:
            for result in session.step():
                histories[result.row] += result.token_ids
                rounds[result.row] += 1
                if rounds[result.row] < 3:
                    histories[result.row] += [7, 7, 2]
                    session.extend(result.row, [7, 7, 2], 2)
    assert histories == [
        [9, 2, 3, 4, 5, 7, 7, 2, 3, 4, 7, 7, 2, 3, 4],
        [9, 2, 3, 4, 7, 7, 2, 3, 4, 7, 7, 2, 3, 4],
        [6, 7, 8, 9, 2, 7, 7, 2, 3, 4, 7, 7, 2, 3, 4],
    ]
    # Every token but the last of each row was read once, at its own position; the shared prompt once for both rows
    read = [
        (token, place)
        for tokens, places in model.read
        for token_row, place_row in zip(tokens, places, strict=True)
        for token, place in zip(token_row, place_row, strict=True)
    ]
    for row in (0, 1, 2):
        for place, token in enumerate(histories[row][:-1]):
            assert (token, place) in read
    assert read.count((9, 0)) == 1


def test_only_a_row_that_is_not_running_can_be_extended():
    with ModelSampler(Table(CYCLE), [], 0).open([[2], [3]], 20) as session:
        session.extend(0, [], 3)
        with pytest.raises(SamplerError, match="Row 0 was extended while"):
            session.extend(0, [], 3)
        session.step()
        with pytest.raises(SamplerError, match="Row 0 was extended while"):
            session.extend(0, [4], 3)
        while session.busy:
            session.step()
        session.extend(0, [4], 1)
        with pytest.raises(SamplerError, match=r"Row 1 .* budget of 0"):
            session.extend(1, [], 0)


def test_step_without_rows_runs_no_forward_pass():
    model = Table(CYCLE)
    with ModelSampler(model, [], 0).open([[2]], 5) as session:
        reads = len(model.read)
        assert not session.busy and session.step() == [] and len(model.read) == reads


def test_prompt_without_tokens_is_refused():
    with (
        pytest.raises(SamplerError, match="prompt of row 1 has no tokens"),
        ModelSampler(Table(CYCLE), [], 0).open([[1], []], 4),
    ):
        pass
