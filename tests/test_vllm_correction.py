"""TRL's correction of vLLM's log-probs: before the policy has moved it makes the update that TRL's own trainer makes,
later it bounds the one ratio; and a run says which correction acts."""

import math

import pytest
import torch
from conftest import chat_tokenizer, config, prompts, tiny_model
from datasets import Dataset
from trl import GRPOTrainer

import trl_toolgrpo.vllm_rollouts as vllm_rollouts
from trl_toolgrpo import ConfigError, ToolGRPOTrainer
from trl_toolgrpo.rollout.vllm_sampler import TokenReply


MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
ROW = [{"prompt": [{"role": "user", "content": "hello"}]}] * 4
LENGTHS = [3, 6, 9, 5]
PRODUCTS = [1.3, 5.0, 0.3, 2.0]  # ratio of each rollout: only the second is above TRL's bound of 3


def ratios():
    """Ratio of the policy to the sampler for each token of each rollout, some far off."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for length, product in zip(LENGTHS, PRODUCTS, strict=True):
        logs = 0.8 * torch.randn(length, generator=generator, dtype=torch.float64)
        found.append((logs - logs.mean() + math.log(product) / length).exp())
    return found


class OffEngine:
    """An engine that writes given tokens, and is off about each of them by a given ratio."""

    max_length = 2000

    def __init__(self, model, tokenizer):
        self.model, self.calls = model, 0
        end = tokenizer.eos_token_id
        self.rows = [[*range(20 + row, 19 + row + length), end] for row, length in enumerate(LENGTHS)]

    async def generate(self, request):
        ids, ratio = self.rows[self.calls % 4], ratios()[self.calls % 4]
        self.calls += 1
        with torch.no_grad():
            logits = self.model(torch.tensor([[*request.prompt_ids, *ids]])).logits[0, -len(ids) - 1 : -1]
        logps = torch.log_softmax(logits.double(), dim=-1)[range(len(ids)), ids]
        return TokenReply(ids, (logps - ratio.log()).tolist(), 0)

    async def load(self, policy):
        pass

    async def wake(self):
        pass

    async def rest(self):
        pass

    async def close(self):
        pass


def options_of(**changes):
    return {"logprob_check": "off", "learning_rate": 1e-3, "vllm_server_timeout": 240.0, **changes}


def vllm_trainer(monkeypatch, path, reward=None, **changes):
    """Our trainer, sampling with `OffEngine`."""
    tokenizer = chat_tokenizer()
    model = tiny_model(tokenizer)

    async def start(options):
        return OffEngine(model, tokenizer)

    monkeypatch.setattr(vllm_rollouts, "check_installed", lambda: None)
    monkeypatch.setattr(vllm_rollouts.VLLMEngine, "start", staticmethod(start))
    reward = reward or (lambda completions, **kwargs: [1.0, 3.0, -2.0, 0.5])
    return ToolGRPOTrainer(
        model, reward, config(path, **options_of(use_vllm=True, **changes)), prompts(), processing_class=tokenizer
    )


def trls_trainer(path, batch, tokenizer, model=None, **changes):
    """TRL's own trainer as if its vLLM had written `batch`."""
    trainer = GRPOTrainer(
        model or tiny_model(tokenizer),
        lambda completions, **kwargs: [1.0, 3.0, -2.0, 0.5],
        config(path, **options_of(**changes)),
        Dataset.from_list(ROW),
        processing_class=tokenizer,
    )
    trainer.use_vllm = True
    mask = batch["completion_mask"].bool()
    ids = [row[kept].tolist() for row, kept in zip(batch["completion_ids"], mask, strict=True)]
    logps = [row[kept].tolist() for row, kept in zip(batch["sampling_per_token_logps"], mask, strict=True)]
    trainer._generate_single_turn = lambda *args, **kwargs: (ids, logps)
    return trainer


def loss_and_gradient(trainer, batch):
    trainer.current_gradient_accumulation_steps = 1
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_fresh_batch_makes_trls_own_update(monkeypatch, tmp_path, loss_type, level):
    """TRL recomputes old log-probs, which are those of the present policy, and multiplies its loss by the weight."""
    changes = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.0, "epsilon_high": 5.0}
    modes = [mode for mode in MODES if loss_type != "vespo" or mode.startswith("token")]
    ours = vllm_trainer(monkeypatch, tmp_path, vllm_importance_sampling_mode=modes[0], **changes)
    ours.model.train()
    batch = ours._generate_and_score_completions(ROW)
    trl = trls_trainer(tmp_path, batch, ours.processing_class, vllm_importance_sampling_mode=modes[0], **changes)
    trl.model.train()
    seen = []
    for mode in modes:
        for low in (None, 0.6):
            ours.args.vllm_importance_sampling_mode = trl.vllm_importance_sampling_mode = mode
            ours.args.vllm_importance_sampling_clip_min = trl.vllm_importance_sampling_clip_min = low
            their_batch = trl._generate_and_score_completions(ROW)
            expected, expected_gradient = loss_and_gradient(trl, their_batch)
            loss, gradient = loss_and_gradient(ours, batch)
            torch.testing.assert_close(loss, expected, rtol=2e-5, atol=1e-6)
            assert (gradient - expected_gradient).norm() <= 2e-5 * expected_gradient.norm()
            assert expected_gradient.norm() > 0
            for name in ("importance_sampling_ratio/min", "importance_sampling_ratio/mean",
                         "importance_sampling_ratio/max", "sampling_logp_difference/mean",
                         "sampling_logp_difference/max"):  # fmt: skip
                found, theirs = (trainer._metrics["train"][f"sampling/{name}"][-1] for trainer in (ours, trl))
                assert found == pytest.approx(theirs, rel=1e-4, abs=1e-6), name
            seen.append(gradient)
    assert not ours.use_vllm  # in TRL's loss alone
    pairs = [(a, b) for place, a in enumerate(seen) for b in seen[:place]]
    assert all((a - b).norm() > 1e-4 * a.norm() for a, b in pairs), "each mode and bound makes an update of its own"


@pytest.mark.parametrize("bias_correction", [True, False])
def test_the_kl_term_is_trls(monkeypatch, tmp_path, bias_correction):
    """The weight is not part of the KL term, masked rollouts included."""
    found = []
    ours = vllm_trainer(monkeypatch, tmp_path)
    batch = ours._generate_and_score_completions(ROW)
    reference = batch["old_per_token_logps"] + 0.4 * torch.sin(torch.arange(batch["completion_ids"].numel())).view_as(
        batch["old_per_token_logps"]
    )
    trl = trls_trainer(tmp_path, batch, ours.processing_class)
    their_batch = trl._generate_and_score_completions(ROW)
    for trainer, inputs in ((ours, batch), (trl, their_batch)):
        trainer.beta = 0.3
        trainer.args.use_bias_correction_kl = bias_correction
        found.append(loss_and_gradient(trainer, {**inputs, "ref_per_token_logps": reference}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-5, atol=1e-6)
    assert (found[0][1] - found[1][1]).norm() <= 2e-5 * found[1][1].norm()
