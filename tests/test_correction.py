"""The correction of the ratio: what it does to each token, in every loss, and that nothing else changes."""

import math

import pytest
import torch
from conftest import chat_tokenizer, config, prompts, tiny_model

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.losses import capped_old_logps, within_cap


OLD = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -4.0, 0.0]])
RATIOS = torch.tensor([[1.0, 1.9, 2.5], [0.01, 40.0, 2.1]])


def test_a_cap_by_hand():
    logps = (OLD + RATIOS.log()).requires_grad_()
    assert within_cap(logps, OLD, 2.0).tolist() == [[True, True, False], [True, False, False]]
    capped = capped_old_logps(logps, OLD, 2.0)
    assert not capped.requires_grad
    ratio = (logps - capped).exp()
    torch.testing.assert_close(ratio, torch.tensor([[1.0, 1.9, 2.0], [0.01, 2.0, 2.0]]))
    ratio.sum().backward()  # the gradient of a ratio is the ratio itself, times that of the log-prob
    torch.testing.assert_close(logps.grad, ratio.detach())


def trainer_of(path, **changes):
    tokenizer = chat_tokenizer()
    rewards = lambda completions, **kwargs: [float(i % 3) for i in range(len(completions))]  # noqa: E731
    options = {"beta": 0.0, "logprob_check": "off", **changes}
    return ToolGRPOTrainer(
        tiny_model(tokenizer), rewards, config(path, **options), prompts(), processing_class=tokenizer
    )


def batch_of(trainer):
    """A batch whose recorded log-probs are off by known factors: ratio 1, 1.5, 3 and 0.2, in turn."""
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
    """With `epsilon` out of the way the policy loss is -mean(ratio * advantage)."""
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
def test_every_loss_takes_a_correction(tmp_path, mode, loss_type):
    """A token above the cap counts as one at the cap, or, masked, has no gradient at all; the others stay."""
    options = {"loss_type": loss_type, "sampler_correction": mode, "delta": None}
    if loss_type == "luspo":
        options["importance_sampling_level"] = "sequence"
    trainer = trainer_of(tmp_path, **options)
    inputs, logps, factors = batch_of(trainer)
    inputs["advantages"] = torch.tensor([1.0, -1.0, 2.0, -0.5])

    def gradient(given, **changes):
        """Of the loss, by the log-prob of each token; the scoring pass is replaced by those log-probs."""
        leaf = logps.clone().requires_grad_()
        trainer._score_packed = lambda *args: (leaf, torch.zeros_like(leaf), None)
        trainer._packs = True
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


def test_on_policy_it_changes_nothing_at_all(tmp_path):
    """With a sampler that agrees no ratio is above the cap: the same weights to the last bit."""
    weights = []
    for mode in (None, "truncate", "mask"):
        torch.manual_seed(0)
        trainer = trainer_of(tmp_path, sampler_correction=mode, max_steps=2, learning_rate=1e-2)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        logged = [log["sampling/corrected"] for log in trainer.state.log_history if "sampling/corrected" in log]
        assert logged == ([] if mode is None else [0.0, 0.0])
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_what_was_recorded_is_not_overwritten(tmp_path):
    """The metrics of the ratio, and a second pass over the batch, go by the recorded log-probs."""
    trainer = trainer_of(tmp_path, sampler_correction="truncate")
    inputs, _, factors = batch_of(trainer)
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    trainer._compute_loss(trainer.model, inputs)
    assert all(torch.equal(inputs[name], value) for name, value in before.items())
    found = trainer._ratio.metrics(lambda x: x, lambda x: x)
    assert found["ratio/max"] == pytest.approx(3.0, rel=1e-3) and math.isclose(factors.max(), 3.0, rel_tol=1e-6)
