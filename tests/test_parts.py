"""Parts of the trainer, each made without one, against slow versions of what they compute."""

import math
from collections import deque

import pytest
import torch
from conftest import chat_tokenizer, config, part_run, plain_scores, tiny_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from trl_toolgrpo import ConfigError, ReferenceSyncError, Trajectory, Turn, ValueHeadError
from trl_toolgrpo.critic.critic import Critic
from trl_toolgrpo.critic.value_head import HEAD_FILE
from trl_toolgrpo.reference.sync import REFERENCE_FILE, ReferencePolicy
from trl_toolgrpo.rollout.engine import RolloutBatch
from trl_toolgrpo.rollout.loop import Rollout, RolloutStats
from trl_toolgrpo.update.policy_update import MicroBatch
from trl_toolgrpo.update.sampler_correction import Correction, SamplerCorrection
from trl_toolgrpo.update.scoring import Packing, Scores, Scoring


TOKENIZER = chat_tokenizer()


def tokens_of(shared=False, lengths=(5, 2, 4, 1), width=5):
    """Return a padded batch of random tokens: prompts and completions differ in length, or prompts are shared."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 200, (len(lengths), 12 + width), generator=draw)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, 12 + length :] = 0
        if shared:
            ids[row, :12] = ids[0, :12]
        else:
            mask[row, : 2 * row] = 0
    return ids, mask, width


def run_of(path, model=None, **changes):
    attributes = {name: changes.pop(name) for name in ("recording", "top_entropy_quantile") if name in changes}
    return part_run(model or tiny_model(TOKENIZER), config(path, **changes), **attributes)


# Scoring


WANTED = [("logps",), ("logps", "entropies"), ("logps", "values"), ("logps", "entropies", "values", "value_inputs")]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("want", WANTED)
def test_scores_are_what_is_wanted(tmp_path, want, shared):
    run = run_of(tmp_path, temperature=0.7, advantage_estimator="gae")
    scoring = Scoring(run)
    critic = Critic(run, scoring)
    nn.init.normal_(critic.head.output.weight)
    tokens = tokens_of(shared)
    found = scoring.score(run.model, tokens, want)
    assert {name for name, value in vars(found).items() if value is not None} == set(want)
    assert found.hold(want) and not found.hold(["aux_loss"]) and scoring.packing.active is (True if shared else None)
    ids, mask, width = tokens
    scored = mask[:, -width:].bool()
    logps, entropies = plain_scores(run.model, ids, mask, width, 0.7)
    torch.testing.assert_close(found.logps.double() * scored, logps * scored, atol=1e-5, rtol=1e-5)
    if "entropies" in want:
        torch.testing.assert_close(found.entropies.double() * scored, entropies * scored, atol=1e-5, rtol=1e-5)
    if "value_inputs" in want:
        assert found.value_inputs.shape == (4, width, 32) and not found.value_inputs.requires_grad
        torch.testing.assert_close(critic.head(found.value_inputs)[scored], found.values[scored])


def test_recorded_scores_are_returned_without_a_pass(tmp_path):
    run = run_of(tmp_path)
    passes = []
    run.model.register_forward_pre_hook(lambda *args: passes.append(args))
    scoring, tokens = Scoring(run), tokens_of()
    recorded = Scores(torch.zeros(4, 5), torch.ones(4, 5))
    for want in WANTED[:2]:
        assert scoring.score(run.model, tokens, want, recorded) is recorded
    assert not passes
    alone = scoring.score(run.model, tokens, ("logps", "entropies"), Scores(torch.zeros(4, 5)))
    assert passes and alone.logps.any() and alone.entropies.any()


def of_other_attention(model):
    model.config._attn_implementation = "flash_attention_2"


def of_window(model):
    model.config.sliding_window = 8


OBSTACLES = {
    "recording": ({"recording": False}, None, "TRL's own"),
    "setting": ({"shared_prompt_updates": False}, None, "`shared_prompt_updates=False`"),
    "quantile": ({"top_entropy_quantile": 0.5}, None, "`top_entropy_quantile` is below 1"),
    "attention": ({}, of_other_attention, "`attn_implementation='flash_attention_2'` takes no mask"),
    "window": ({}, of_window, "limited to a window"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_obstacles_to_packing_are_told_in_words(tmp_path, name):
    changes, change, words = OBSTACLES[name]
    run = run_of(tmp_path, **changes)
    scoring = Scoring(run)
    if change is not None:
        change(run.model)
        with pytest.MonkeyPatch.context() as patch:  # which attention runs does not matter here
            patch.setattr(scoring, "_pass", lambda *args: pytest.fail("packed"))
            scoring._decide_packing(run.model, tokens_of(shared=True), ready=True)
    assert scoring.packing.active is False and words in scoring.packing.reason


def test_prompt_learning_is_an_obstacle_to_packing(tmp_path):
    model = get_peft_model(tiny_model(TOKENIZER), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    run = run_of(tmp_path, model)
    scoring = Scoring(run)
    scoring._decide_packing(run.model, tokens_of(shared=True), ready=True)
    assert scoring.packing.active is False and "before the prompt" in scoring.packing.reason


def test_a_decision_about_packing_is_restored(tmp_path):
    for decision in (Packing(), Packing(True), Packing(False, "layers read on")):
        other = Packing()
        other.load_state_dict(decision.state_dict())
        assert other == decision


# Critic


def critic_of(path, **changes):
    run = run_of(path, advantage_estimator="gae", **changes)
    critic = Critic(run, Scoring(run))
    nn.init.normal_(critic.head.output.weight)
    nn.init.normal_(critic.head.output.bias)
    return run, critic


def batch_of(tokens, values=None):
    """Return the rollouts of a padded batch; all tokens were sampled."""
    ids, mask, width = tokens
    rollouts = []
    for row in range(len(ids)):
        kept = ids[row][mask[row].bool()].tolist()
        count = int(mask[row, -width:].sum())
        given = None if values is None else values[row][:count]
        turns = [Turn(0, count)]
        completion = kept[-count:]
        rollouts.append(
            Rollout(
                Trajectory(kept[:-count], completion, [-0.5] * count, [1] * count, [0] * count, turns, "stop", given),
                [],
            )
        )
    return RolloutBatch(rollouts, RolloutStats(), [False] * len(ids))


@pytest.mark.parametrize("shared", [True, False])
def test_values_are_those_of_the_head(tmp_path, shared):
    run, critic = critic_of(tmp_path)
    tokens = tokens_of(shared)
    batch = batch_of(tokens)
    found = critic.values(tokens, batch)
    assert torch.equal(found, critic.computed_values(tokens)) and not found.requires_grad
    for row, trajectory in enumerate(batch.trajectories):
        alone = torch.tensor([[*trajectory.prompt_ids, *trajectory.completion_ids]])
        with torch.no_grad():
            hidden = run.model.eval()(alone, output_hidden_states=True).hidden_states[-1][0]
            expected = critic.head(hidden)[len(trajectory.prompt_ids) - 1 : -1]
        torch.testing.assert_close(found[row, : len(expected)].float(), expected, atol=1e-5, rtol=1e-4)


def test_recorded_values_are_taken_as_they_are(tmp_path):
    run, critic = critic_of(tmp_path)
    tokens = tokens_of()
    recorded = torch.rand(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    run.model.register_forward_pre_hook(lambda *args: pytest.fail("recomputed"))
    found = critic.values(tokens, batch_of(tokens, recorded.tolist()))
    assert torch.equal(found, recorded * tokens[1][:, -5:])
    recorded[2, 1] = math.inf
    with pytest.raises(ValueHeadError, match=r"not finite for the rollouts \[2\]"):
        critic.values(tokens, batch_of(tokens, recorded.tolist()))


@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("warmup", [0, 1])
def test_the_value_loss_by_a_loop(tmp_path, clip, warmup):
    run, critic = critic_of(tmp_path, value_clip=clip, value_loss_coef=0.3, value_warmup_steps=warmup, max_steps=2)
    draw = torch.Generator().manual_seed(5)
    values, old, targets = (torch.rand(4, 5, generator=draw, dtype=torch.float64) for _ in range(3))
    mask = (torch.rand(4, 5, generator=draw) < 0.6).long()
    values.requires_grad_()
    count = torch.tensor(12)
    given = {"old_values": old, "value_targets": targets, "value_mask": mask, "value_count": count}
    micro_batch = MicroBatch(given, given, is_recorded=False, scores=Scores(values.detach(), values=values))
    policy = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = critic.with_value_loss(policy, micro_batch)
    expected = 0.0
    for row in range(4):
        for place in range(5):
            if mask[row, place]:
                value, before, target = (x[row, place].item() for x in (values, old, targets))
                near = value if clip is None else min(max(value, before - clip), before + clip)
                expected += 0.5 * max((value - target) ** 2, (near - target) ** 2) / 12
    assert loss.item() == pytest.approx(0.3 * expected + (0.0 if warmup else 2.0))
    assert run.training_metrics["value/loss"] == [pytest.approx(expected)]
    loss.backward()
    assert policy.grad == (0 if warmup else 1)
    assert not values.grad[mask == 0].any() and values.grad[mask == 1].any()


def test_the_head_joins_an_optimizer_in_a_group_of_its_own(tmp_path):
    run, critic = critic_of(tmp_path, value_learning_rate=0.02)
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-5, weight_decay=0.1)
    for _ in range(2):  # the second time it has one already
        critic.join_optimizer(optimizer)
        policy, head = optimizer.param_groups
        assert head["params"] == list(critic.head.parameters())
        assert (head["lr"], head["weight_decay"], policy["lr"]) == (0.02, 0.0, 1e-5)
        assert len(policy["params"]) + 4 == len(list(run.model.parameters()))


def test_a_saved_head_is_loaded_to_the_bit(tmp_path):
    _, critic = critic_of(tmp_path)
    critic.save(tmp_path / "saved")
    _, other = critic_of(tmp_path)
    for parameter in other.head.parameters():
        nn.init.zeros_(parameter)
    other.load(tmp_path / "saved")
    for name, parameter in critic.head.named_parameters():
        assert torch.equal(parameter, other.head.get_parameter(name)), name
    assert not any("value_head" in name for name in critic.without_head(None)) and critic.without_head(None)
    (tmp_path / "saved" / HEAD_FILE).unlink()
    with pytest.raises(ValueHeadError, match="There is no"):
        other.load(tmp_path / "saved")


# Reference


def reference_of(path, **changes):
    options = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    run = run_of(path, get_peft_model(tiny_model(TOKENIZER), adapter), **{**options, **changes})
    return run, ReferencePolicy(run, given_adapter=False)


def move(model, seed=1):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw))


@pytest.mark.parametrize("changes", [{}, {"ref_model_mixup_alpha": 0.5}], ids=["adapter", "merged"])
def test_no_tensor_differs_after_a_sync(tmp_path, changes):
    run, reference = reference_of(tmp_path, **changes)
    start = {name: tensor.clone() for name, tensor in reference.synced.state().items()}
    move(run.model)
    report = reference.sync()
    assert report.differ == () and report.tensors == len(start) and reference.report is report
    assert all(not torch.equal(tensor, start[name]) for name, tensor in reference.synced.state().items())
    reference.on_log()
    logged = {name: values[-1] for name, values in run.training_metrics.items()}
    assert (logged["ref/syncs"], logged["ref/tensors"], logged["ref/tensors_differ"]) == (1, len(start), 0)


def test_a_sync_waits_for_the_end_of_a_batch(tmp_path):
    run, reference = reference_of(tmp_path, num_iterations=2)
    move(run.model)
    run.step, run.micro_batches = 1, [{}]
    before = {name: tensor.clone() for name, tensor in reference.synced.state().items()}
    assert reference.sync() is None and reference.report is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in reference.synced.state().items())
    reference.save(tmp_path / "saved")
    _, resumed = reference_of(tmp_path, num_iterations=2)
    resumed.load(tmp_path / "saved")
    run.step = 2
    for part in (reference, resumed):  # what is due is done before the next batch, in a resumed run too
        part.before_rollouts()
        assert part.report.differ == ()
        part.before_rollouts()
        part.on_log()
    assert run.training_metrics["ref/syncs"] == [1.0]


def test_a_callback_syncs_every_so_many_steps(tmp_path):
    run, reference = reference_of(tmp_path)
    (callback,) = run._trainer.callbacks
    syncs = []
    for step in range(1, 6):
        run.state.global_step = step
        callback.on_step_end(run.args, run.state, run.control)
        syncs.append(0 if reference.report is None else 1)
    assert syncs == [0, 1, 1, 1, 1]


def test_a_reference_is_restored(tmp_path):
    run, reference = reference_of(tmp_path)
    move(run.model)
    reference.sync()
    reference.save(tmp_path / "saved")
    other_run, other = reference_of(tmp_path)
    other.load(tmp_path / "saved")
    other.load_state_dict(reference.state_dict())
    assert other.report == reference.report and other.state_dict() == reference.state_dict()
    stored = reference.synced.state()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in other.synced.state().items())
    masks = {"completion_mask": torch.ones(4, 3, dtype=torch.long)}
    logps = torch.full((4, 3), -0.5)
    for part, its_run in ((reference, run), (other, other_run)):  # the policy has not moved since the sync
        part.on_rollouts({**masks, "ref_per_token_logps": logps - 0.1, "sampling_per_token_logps": logps})
        assert its_run.training_metrics["ref/kl"] == [pytest.approx(math.exp(-0.1) - 1 + 0.1)]
    (tmp_path / "saved" / REFERENCE_FILE).unlink()
    with pytest.raises(ReferenceSyncError, match="cannot be restored"):
        other.load(tmp_path / "saved")


def test_a_reference_that_is_not_synced_is_refused(tmp_path):
    _, reference = reference_of(tmp_path, sync_ref_model=False)
    assert reference.synced is None and reference.start is None
    with pytest.raises(ConfigError, match="no reference to sync"):
        reference.sync()


# Correction of the ratio


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("of_trl", [False, True])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_corrected_ratios_by_a_loop(tmp_path, mode, of_trl, moved):
    run = run_of(tmp_path)
    draw = torch.Generator().manual_seed(7)
    logps = -torch.rand(6, 5, generator=draw, dtype=torch.float64).requires_grad_()
    old = logps.detach() - 0.7 * torch.randn(6, 5, generator=draw, dtype=torch.float64)
    mask = (torch.rand(6, 5, generator=draw) < 0.8).long()
    advantages = torch.randn(6, generator=draw, dtype=torch.float64)
    low, high = 0.5, 2.0
    inputs = {"old_per_token_logps": old, "completion_mask": mask, "advantages": advantages}
    given = dict(inputs)
    SamplerCorrection(run, Correction(mode, low, high, of_trl)).correct(inputs, logps, moved)
    weighs = of_trl and not moved
    met = 0
    for row in range(6):
        places = [place for place in range(5) if mask[row, place]]
        spans = [places] if mode.startswith("sequence") else [[place] for place in places]
        for span in spans:
            total = sum((logps[row, place] - old[row, place]).item() for place in span)
            ratio = math.exp(total)
            bounded = min(max(ratio, low), high)
            outside = bounded != ratio
            met += outside * len(span)
            if weighs:  # TRL's loss multiplies by the weight, at a ratio of 1
                weight = inputs["importance_sampling_ratio"][row, span[0] if mode.startswith("token") else 0]
                assert weight.item() == pytest.approx(0.0 if outside and mode.endswith("mask") else bounded)
                assert torch.equal(inputs["old_per_token_logps"][row, span], logps[row, span])
                continue
            after = [(logps - inputs["old_per_token_logps"])[row, place].item() for place in span]
            if not outside:
                assert torch.equal(inputs["old_per_token_logps"][row, span], old[row, span])
            elif mode.endswith("truncate"):
                assert sum(after) == pytest.approx(math.log(bounded))
            else:  # no part in the ratio, in value and gradient, and no advantage
                assert after == [0.0] * len(span)
                assert not inputs["advantages"][row, span].any()
            if mode.endswith("mask") and not outside:
                assert (inputs["advantages"][row, span] == advantages[row]).all()
    assert 0 < met < mask.sum()
    assert run.training_metrics["sampling/corrected"] == [pytest.approx(met / mask.sum().item())]
    assert run.use_vllm is weighs
    assert all(torch.equal(given[name], value) for name, value in zip(given, (old, mask, advantages), strict=True))
    table = run._trainer._metrics["train"]
    assert ("sampling/importance_sampling_ratio/max" in table) is weighs and isinstance(run.completions_table, dict)
    assert isinstance(run.completions_table["advantages"], deque)
