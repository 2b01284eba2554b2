"""TRL's correction of vLLM's log-probs: before the policy has moved it makes the update that TRL's own trainer makes,
later it bounds the one ratio; and a run says which correction acts."""

import math

import pytest
import torch
from conftest import chat_tokenizer, config, prompts, tiny_model
from datasets import Dataset
from trl import GRPOTrainer

import trl_toolgrpo.rollout.vllm_rollouts as vllm_rollouts
from trl_toolgrpo import ConfigError, ToolGRPOTrainer
from trl_toolgrpo.sampling.vllm.sampler import TokenReply
from trl_toolgrpo.update.scoring import Scores


MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
ROW = [{"prompt": [{"role": "user", "content": "hello"}]}] * 4
LENGTHS = [3, 6, 9, 5]
PRODUCTS = [1.3, 5.0, 0.3, 2.0]  # ratio of each rollout: only the second is above TRL's bound of 3


def ratios():
    """Return the ratio of the policy to the sampler for each token of each rollout, some far from 1."""
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


def by_token_gradient(trainer, batch, logps):
    """The loss, and its gradient by the log-prob of each token; the scoring pass is replaced by those log-probs."""
    leaf = logps.clone().requires_grad_()
    trainer.update.scoring.packing.active = True
    trainer.update.scoring._pass = lambda *args: Scores(leaf, torch.zeros_like(leaf))
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), leaf.grad


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_loss_by_loops(monkeypatch, tmp_path, mode, moved):
    """A token at a time, with a tool's tokens among them. TRL weighs every token of a sequence by its whole ratio;
    once the policy has moved its own steps are in the ratio, too, and it is the ratio of the loss that is bounded."""
    low, high = 0.6, 3.0
    trainer = vllm_trainer(
        monkeypatch, tmp_path, loss_type="bnpo", epsilon=0.999, epsilon_high=1000.0,
        vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=low,
    )  # fmt: skip
    trainer.model.train()
    batch = trainer._generate_and_score_completions(ROW)
    batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
    batch["tool_mask"][:, 1] = 0
    advantages = batch["advantages"] = torch.tensor([1.0, -1.0, 2.0, -0.5])
    width = batch["completion_ids"].size(1)
    factors = torch.ones(4, width)
    for row, found in enumerate(ratios()):
        factors[row, : len(found)] = found
    logps = batch["old_per_token_logps"] + factors.log()
    trainer.state.global_step += moved
    loss, gradient = by_token_gradient(trainer, batch, logps)

    expected, expected_gradient, count, met = 0.0, torch.zeros(4, width), 0, 0
    for row, length in enumerate(LENGTHS):
        places = [place for place in range(length) if place != 1]
        ratio = {place: factors[row, place].item() for place in places}
        product = math.prod(ratio.values())
        for place in places:
            count += 1
            judged = product if mode.startswith("sequence") else ratio[place]
            inside = low <= judged <= high
            met += not inside
            bounded = min(max(judged, low), high)
            if mode.endswith("mask") and not inside:
                weight = 0.0
            elif mode.startswith("sequence") and moved:  # its own ratio, with its share of the sequence's excess
                weight = ratio[place] * (bounded / product) ** (1 / len(places))
            else:
                weight = bounded
            expected -= weight * advantages[row].item()
            expected_gradient[row, place] = -weight * advantages[row]
    assert 0 < met < count
    assert loss == pytest.approx(expected / count, rel=1e-4)
    torch.testing.assert_close(gradient, expected_gradient / count, rtol=1e-4, atol=1e-6)
    assert trainer._metrics["train"]["sampling/corrected"] == [pytest.approx(met / count)]
    assert ("sampling/importance_sampling_ratio/mean" in trainer._metrics["train"]) is not moved


def test_a_changed_policy_is_clipped(monkeypatch, tmp_path):
    """TRL's `epsilon` clips the change of the policy, not the error of the sampler."""
    trainer = vllm_trainer(monkeypatch, tmp_path, loss_type="bnpo", vllm_importance_sampling_mode="token_truncate")
    trainer.model.train()
    batch = trainer._generate_and_score_completions(ROW)
    batch["advantages"] = torch.ones(4)
    logps = batch["old_per_token_logps"] + math.log(1.5) * batch["completion_mask"]
    sampled = batch["completion_mask"].bool()
    assert by_token_gradient(trainer, batch, logps)[1][sampled].all()
    trainer.state.global_step += 1
    assert not by_token_gradient(trainer, batch, logps)[1].any()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "TRL's vllm_importance_sampling_mode=sequence_mask, ratios of a sequence above 3 take no part in"),
        (
            {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_min": 0.5},
            "TRL's vllm_importance_sampling_mode=token_truncate, ratios of a token below 0.5 or above 3 are held",
        ),
        ({"vllm_importance_sampling_cap": 1.5}, "sequence_mask, ratios of a sequence above 1.5 take no part"),
        ({"vllm_importance_sampling_clip_max": None}, "sequence_mask, ratios of a sequence, without bounds"),
        ({"vllm_importance_sampling_correction": False}, "sampler correction: none"),
        (
            {"sampler_correction": "mask", "sampler_correction_cap": 4.0},
            "sampler_correction=mask, ratios of a token above 4 take no part in the policy loss (in place of TRL's",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The `vllm_importance_sampling_cap`:FutureWarning")
def test_a_run_says_which_correction_acts(monkeypatch, tmp_path, capsys, changes, said):
    trainer = vllm_trainer(monkeypatch, tmp_path, **changes)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sampler correction")]
    assert len(lines) == 1 and said in lines[0]
    trainer.train()
    logged = trainer.state.log_history[0]
    acts = "vllm_importance_sampling_correction" not in changes
    assert ("sampling/corrected" in logged) is acts
    assert ("sampling/importance_sampling_ratio/max" in logged) is (acts and "sampler_correction" not in changes)


def test_without_vllm_the_default_is_no_correction(tmp_path, capsys):
    tokenizer = chat_tokenizer()
    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer), lambda completions, **kwargs: [1.0, 2.0, 3.0, 4.0], config(tmp_path), prompts(),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert "sampler correction" not in capsys.readouterr().out
    assert not [name for name in trainer.state.log_history[0] if "corrected" in name or "importance" in name]


@pytest.mark.parametrize(
    "changes", [{"vllm_importance_sampling_correction": False}, {"sampler_correction": "truncate"}]
)
def test_corrections_switched_off_or_replaced_do_nothing(monkeypatch, tmp_path, changes):
    """TRL's mode and bounds no longer matter."""
    losses = []
    for more in ({}, {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_max": 1.1}):
        trainer = vllm_trainer(monkeypatch, tmp_path, epsilon_high=5.0, **changes, **more)
        trainer.model.train()
        losses.append(loss_and_gradient(trainer, trainer._generate_and_score_completions(ROW)))
    assert torch.equal(losses[0][1], losses[1][1]) and losses[0][0] == losses[1][0]


def test_an_evaluation_is_corrected_as_trl_corrects_it(monkeypatch, tmp_path):
    changes = {"per_device_eval_batch_size": 4, "num_generations_eval": 4}
    ours = vllm_trainer(monkeypatch, tmp_path, **changes)
    ours.model.eval()
    ours.state.global_step = 3
    batch = ours._generate_and_score_completions(ROW)
    trl = trls_trainer(tmp_path, batch, ours.processing_class, **changes)
    trl.model.eval()
    with torch.no_grad():
        expected = trl._compute_loss(trl.model, trl._generate_and_score_completions(ROW))
        torch.testing.assert_close(ours._compute_loss(ours.model, batch), expected, rtol=2e-5, atol=1e-6)
    assert ours._metrics["eval"]["sampling/importance_sampling_ratio/max"]


def test_a_run_is_replayed_with_its_correction(monkeypatch, tmp_path):
    """The same configuration, vLLM included, gives the same weights; nothing is sampled."""
    changes = {"max_steps": 3, "num_iterations": 2, "learning_rate": 1e-2}
    first = vllm_trainer(monkeypatch, tmp_path / "first", **changes)
    first.train()

    def never(*args, **kwargs):
        raise AssertionError("a replayed run samples nothing")

    again = vllm_trainer(monkeypatch, tmp_path / "again", never, replay=str(tmp_path / "first"), **changes)
    monkeypatch.setattr(vllm_rollouts.VLLMEngine, "start", never)
    again.train()
    assert first.state.log_history[0]["sampling/corrected"] > 0
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_corrections_that_cannot_act_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"vespo.*sequence_mask.*'token_truncate' or 'token_mask'"):
        config(tmp_path, use_vllm=True, loss_type="vespo")
    config(tmp_path, use_vllm=True, loss_type="vespo", vllm_importance_sampling_mode="token_mask")
    config(tmp_path, use_vllm=True, loss_type="vespo", vllm_importance_sampling_correction=False)
    config(tmp_path, use_vllm=True, loss_type="vespo", sampler_correction="mask")
    config(tmp_path, loss_type="vespo")
    with pytest.raises(ConfigError, match=r"vllm_importance_sampling_mode='tokens'.*token_truncate, token_mask"):
        config(tmp_path, use_vllm=True, vllm_importance_sampling_mode="tokens")
