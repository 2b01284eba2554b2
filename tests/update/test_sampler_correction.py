"""The correction of the ratio: its effect on each token, in every loss, and on nothing else."""

import math

import pytest
import torch
from conftest import chat_tokenizer, config, prompts, tiny_model

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.update.losses import bounded_ratio
from trl_toolgrpo.update.scoring import Scores


MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@pytest.mark.parametrize("bounds", [(None, 3.0), (0.5, 3.0), (0.5, None), (0.9, 1.1), (None, 2.0)])
@pytest.mark.parametrize("mode", MODES)
def test_bounds_by_loops(mode, bounds):
    """Compare with plain Python, token by token."""
    low, high = bounds[0] or 0.0, bounds[1] or math.inf
    generator = torch.Generator().manual_seed(3)
    log_ratio = 0.6 * torch.randn(12, 9, generator=generator, dtype=torch.float64)
    log_ratio[0] = 0.0  # a sampler that agrees
    log_ratio[1, :] = 500.0  # further off than a number can say
    log_ratio[2, :] = -500.0
    mask = (torch.rand(12, 9, generator=generator) < 0.7).long()
    mask[3] = 0  # nothing sampled
    mask[1:3, :5] = 1
    found = bounded_ratio(log_ratio.requires_grad_(), mask, mode, *bounds)
    assert not any(tensor.requires_grad for tensor in found)
    outside = 0
    for row in range(12):
        places = [place for place in range(9) if mask[row, place]]
        logs = {place: log_ratio[row, place].item() for place in places}
        groups = [places] if mode.startswith("sequence") else [[place] for place in places]
        for group in groups:
            total = sum(logs[place] for place in group)
            ratio = math.exp(total) if total < 700 else math.inf
            within = low <= ratio <= high
            outside += not within
            weight = ratio if within else min(max(ratio, low), high) if mode.endswith("truncate") else 0.0
            column = group[0] if group and mode.startswith("token") else 0
            assert found.weight[row, column].item() == pytest.approx(weight)
            for place in group:
                assert found.within[row, place].item() == within
                logs_after = found.log_ratio[row, place].item()
                if within:
                    assert logs_after == logs[place]
            if not within:
                after = sum(found.log_ratio[row, place].item() for place in group)
                assert after == pytest.approx(math.log(min(max(ratio, low), high)))
        assert not found.log_ratio[row][mask[row] == 0].any()
    assert outside > 3
    assert found.weight.shape == ((12, 1) if mode.startswith("sequence") else (12, 9))


def trainer_of(path, **changes):
    tokenizer = chat_tokenizer()
    rewards = lambda completions, **kwargs: [float(i % 3) for i in range(len(completions))]  # noqa: E731
    options = {"beta": 0.0, "logprob_check": "off", **changes}
    return ToolGRPOTrainer(
        tiny_model(tokenizer), rewards, config(path, **options), prompts(), processing_class=tokenizer
    )


def batch_of(trainer):
    """Make a batch whose recorded log-probs are off by known factors: the ratios are 1, 1.5, 3 and 0.2, in turn."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    inputs = trainer._generate_and_score_completions([{"prompt": [{"role": "user", "content": "hello"}]}] * 4)
    factors = torch.tensor([1.0, 1.5, 3.0, 0.2]).repeat(inputs["completion_ids"].size(1))
    factors = factors[: inputs["completion_ids"].size(1)].expand_as(inputs["completion_ids"])
    logps = inputs["old_per_token_logps"]
    inputs["old_per_token_logps"] = logps - factors.log()
    return inputs, logps, factors


@pytest.mark.parametrize("estimated", [False, True])
def test_the_loss_by_hand(tmp_path, estimated):
    """With a large `epsilon` the policy loss is -mean(ratio * advantage)."""
    wide = {"loss_type": "bnpo", "epsilon": 0.99, "epsilon_high": 1000.0}
    losses = {}
    for mode in (None, "truncate", "mask"):
        torch.manual_seed(0)
        trainer = trainer_of(tmp_path, sampler_correction=mode, **wide)
        inputs, _, factors = batch_of(trainer)
        advantages = inputs["advantages"] = torch.tensor([1.0, -1.0, 2.0, -0.5])
        advantages = advantages[:, None].expand_as(factors)
        if estimated:  # as "gae" leaves them, one for each token
            advantages = inputs["advantages"] = advantages * torch.linspace(0.5, 2.0, factors.size(1))
        mask = inputs["completion_mask"]
        expected = {
            None: factors,
            "truncate": factors.clamp(max=2.0),
            "mask": factors * (factors <= 2.0),
        }[mode]
        expected = -(torch.max(expected, torch.tensor(0.01)) * advantages * mask * (expected > 0)).sum() / mask.sum()
        loss = trainer._compute_loss(trainer.model, inputs)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        losses[mode] = loss.item()
        shares = trainer._metrics["train"].get("sampling/corrected")
        met = ((factors > 2.0) * mask).sum() / mask.sum()
        assert shares == (None if mode is None else [pytest.approx(met.item())]) and 0.1 < met < 0.4
    assert len({round(loss, 5) for loss in losses.values()}) == 3


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_every_loss_type_is_corrected(tmp_path, mode, loss_type):
    """A token above the cap counts as one at the cap, or, masked, has no gradient at all; the others stay."""
    options = {"loss_type": loss_type, "sampler_correction": mode, "delta": None}
    if loss_type == "luspo":
        options["importance_sampling_level"] = "sequence"
    trainer = trainer_of(tmp_path, **options)
    inputs, logps, factors = batch_of(trainer)
    inputs["advantages"] = torch.tensor([1.0, -1.0, 2.0, -0.5])

    def gradient(given, **changes):
        """Return the gradient of the loss by each token's log-prob; these replace the scoring pass."""
        leaf = logps.clone().requires_grad_()
        trainer.update.scoring._pass = lambda *args: Scores(leaf, torch.zeros_like(leaf))
        trainer.update.scoring.packing.active = True
        for name, value in changes.items():
            setattr(trainer.args, name, value)
        trainer._compute_loss(trainer.model, given).backward()
        return leaf.grad

    corrected = gradient(dict(inputs))
    if mode == "truncate":
        at_cap = {**inputs, "old_per_token_logps": logps - factors.clamp(max=2.0).log()}
        torch.testing.assert_close(corrected, gradient(at_cap, sampler_correction=None))
    else:
        above = factors > 2.0
        assert not corrected[above].any() and corrected[~above].any()
        if loss_type not in ("vespo", "luspo"):  # they weigh a token by the ratios of its whole sequence
            plain = gradient(dict(inputs), sampler_correction=None)
            torch.testing.assert_close(corrected[~above], plain[~above])


def test_on_policy_nothing_is_corrected(tmp_path):
    """If the sampler agrees, no ratio is above the cap, and the weights are the same to the last bit."""
    weights = []
    for mode in (None, "truncate", "mask"):
        torch.manual_seed(0)
        trainer = trainer_of(tmp_path, sampler_correction=mode, max_steps=2, learning_rate=1e-2)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        logged = [log["sampling/corrected"] for log in trainer.state.log_history if "sampling/corrected" in log]
        assert logged == ([] if mode is None else [0.0, 0.0])
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_recorded_log_probs_are_not_overwritten(tmp_path):
    """The metrics of the ratio, and a second pass over the batch, use the recorded log-probs."""
    trainer = trainer_of(tmp_path, sampler_correction="truncate")
    inputs, _, factors = batch_of(trainer)
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    trainer._compute_loss(trainer.model, inputs)
    assert all(torch.equal(inputs[name], value) for name, value in before.items())
    found = trainer.update.ratios.metrics(lambda x: x, lambda x: x)
    assert found["ratio/max"] == pytest.approx(3.0, rel=1e-3) and math.isclose(factors.max(), 3.0, rel_tol=1e-6)
