"""A sampler of the user's, passed to the trainer: it trains, is checked as strictly as ours, and is refused by name
where it cannot work."""

import copy
import itertools
import logging
import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import MAKE_SAMPLER, add, chat_tokenizer, config, prompts, tiny_model, tool_call
from peft import LoraConfig
from transformers import CLIPImageProcessor, LlavaProcessor

from trl_toolgrpo import ConfigError, LogprobMismatchError, SampledTokens, ToolGRPOTrainer, TrajectoryError


TOKENIZER = chat_tokenizer("qwen3_instruct_2507")
END = "<|im_end|>"
STOPS = {TOKENIZER.eos_token_id}
CALLS = [
    [f"{tool_call('add', a=1, b=2)}{END}", f"three{END}"],
    [f"done{END}"],
    [f"{tool_call('add', a=1, b=2)}{END}", f"{tool_call('add', a=3)}{END}", f"so be it{END}"],
    [f"{tool_call('add', a=5, b=6)}{END}", "eleven"],
]


class PlainSampler:
    """
    Samples with a forward pass over the whole row for each token, from a copy of the policy.

    Args:
        script (`list[list[str]]`, *optional*):
            Texts of the turns of each row, written instead of drawn tokens, with their true log-probs.
        temperature (`float`, *optional*, defaults to `1.0`):
            That of the configuration.
        change (`Callable`, *optional*):
            Gets each record and returns the one that is handed over.
    """

    def __init__(self, script=None, temperature=1.0, change=lambda sampled: sampled):
        self.script, self.temperature, self.change = script, temperature, change
        self.loaded, self.policies, self.opened = [], [], 0

    def load_policy(self, policy, version):
        self.model, self.version = copy.deepcopy(policy).eval(), version
        self.loaded.append(version)
        self.policies.append(type(policy).__name__)

    @contextmanager
    def open(self, prompts, max_length):
        self.opened += 1
        yield PlainSession(self, prompts)


class PlainSession:
    """One whole turn of each row in a step."""

    def __init__(self, sampler, prompts):
        self.sampler, self.rows, self.queue = sampler, [list(prompt) for prompt in prompts], []
        self.turns = itertools.cycle(sampler.script or [None])
        self.turns = [iter(turns or ()) for turns in itertools.islice(self.turns, len(prompts))]

    @property
    def busy(self):
        return bool(self.queue)

    def extend(self, row, token_ids, max_new_tokens, constraint=None):
        assert constraint is None
        self.rows[row] += token_ids
        self.queue.append((row, max_new_tokens))

    def finish(self, row):
        pass

    def step(self):
        queue, self.queue = self.queue, []
        return [self.sampler.change(self.turn(row, budget)) for row, budget in queue]

    def turn(self, row, budget):
        sampler, history = self.sampler, self.rows[row]
        text = next(self.turns[row], None)
        given = None if text is None else TOKENIZER(text, add_special_tokens=False)["input_ids"][:budget]
        ids, logprobs = [], []
        while len(ids) < (budget if given is None else len(given)) and not STOPS.intersection(ids[-1:]):
            with torch.no_grad():
                logits = sampler.model(torch.tensor([history])).logits[0, -1].float() / sampler.temperature
            token = int(torch.multinomial(logits.softmax(-1), 1)) if given is None else given[len(ids)]
            ids.append(token)
            history.append(token)
            logprobs.append(float(logits.log_softmax(-1)[token]))
        return SampledTokens(row, ids, logprobs, ids[-1] in STOPS, policy_version=sampler.version)


def reward(completion_ids, **kwargs):
    return [float((7 * len(ids) + sum(ids)) % 11) for ids in completion_ids]


def make(path, sampler, model=None, **changes):
    options = {
        "max_completion_length": 300, "max_steps": 3, "learning_rate": 1e-2, "logprob_check": "always", **changes
    }  # fmt: skip
    names = ("tools", "eval_dataset", "peft_config", "rollout_func", "processing_class")
    extra = {name: options.pop(name) for name in names if name in options}
    return ToolGRPOTrainer(
        model or tiny_model(TOKENIZER), reward, config(path, **options), prompts(4),
        **{"processing_class": TOKENIZER, **extra}, sampler=sampler,
    )  # fmt: skip


def steps_of(trainer):
    return [row for row in trainer.state.log_history if "ratio/mean" in row]


def check_on_policy(trainer, steps=3):
    logged = steps_of(trainer)
    assert len(logged) == steps
    for row in logged:
        assert row["ratio/mean"] == pytest.approx(1.0, abs=1e-4) and row["sampling/logp_diff_max"] < 1e-4
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0
    return logged


# It trains


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=4, target_modules="all-linear")], ids=["full", "lora"])
def test_it_trains_with_tools_at_a_ratio_of_one(tmp_path, monkeypatch, adapter):
    monkeypatch.setattr(MAKE_SAMPLER, lambda *args, **kwargs: pytest.fail("the policy itself was asked"))
    sampler = PlainSampler(CALLS)
    trainer = make(tmp_path, sampler, tools=[add], peft_config=adapter)
    trainer.train()
    logged = check_on_policy(trainer)
    assert all(row["tools/call_frequency"] == 1.0 for row in logged), "a call in each of four rollouts on average"
    assert sampler.loaded == [0, 1, 2] and sampler.opened == 3
    assert sampler.policies == ["Qwen3ForCausalLM" if adapter is None else "PeftModelForCausalLM"] * 3
    trajectories = trainer.rollouts.batch.trajectories
    assert [len(t.turns) for t in trajectories] == [2, 1, 3, 2]
    assert {turn.policy_version for t in trajectories for turn in t.turns} == {2}
    assert trajectories[0].turns[0].tool_results[0].content == "3" and trajectories[2].turns[1].tool_results[0].is_error


def test_it_draws_at_the_temperature_of_the_configuration(tmp_path):
    """Over micro-batches of several optimizer steps, for which the policy of the first one has sampled."""
    sampler = PlainSampler(temperature=0.6)
    trainer = make(
        tmp_path, sampler, temperature=0.6, max_completion_length=12, max_steps=4, steps_per_generation=2
    )  # fmt: skip
    trainer.train()
    first, _, third, _ = steps_of(trainer)
    assert first["ratio/mean"] == pytest.approx(1.0, abs=1e-4) and third["ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    assert sampler.loaded == [0, 2]
    with pytest.raises(LogprobMismatchError):
        make(tmp_path / "wrong", PlainSampler(temperature=1.0), temperature=0.6, max_completion_length=12).train()


@pytest.mark.parametrize("level", ["call", "name"])
def test_forced_calls_and_the_assisted_warm_up(tmp_path, level):
    trainer = make(
        tmp_path, PlainSampler(), tools=[add], force_rate=0.7, force_level=level, max_completion_length=120,
        assist_warmup_steps=1, max_steps=3,
    )  # fmt: skip
    trainer.train()
    check_on_policy(trainer, steps=2)
    assert any(any(t.forced_mask) for t in trainer.rollouts.batch.trajectories)


@pytest.mark.parametrize("estimator", ["gae", "group_gae"])
def test_values_it_does_not_record_are_computed(tmp_path, estimator):
    changes = {"advantage_estimator": estimator, "tools": [add]}
    trainer = make(tmp_path, PlainSampler(CALLS), **changes)
    expected, estimate = [], trainer.advantages.estimate

    def look(output, batch, rewards, values):
        expected.append((values, trainer.critic.computed_values(trainer.update.tokens_of(output, batch))))
        assert all(t.values is None for t in batch.trajectories)
        return estimate(output, batch, rewards, values)

    trainer.advantages.estimate = look
    trainer.train()
    assert all("value/loss" in row for row in check_on_policy(trainer))
    assert len(expected) == 3 and all(torch.equal(*pair) and pair[0].any() for pair in expected)


def test_values_it_records_are_used(tmp_path):
    sampler = PlainSampler(change=lambda sampled: replace(sampled, values=[0.25] * len(sampled.token_ids)))
    trainer = make(tmp_path, sampler, advantage_estimator="gae", max_completion_length=8, max_steps=1)
    found, estimate = [], trainer.advantages.estimate
    trainer.advantages.estimate = lambda *args: found.append(args[-1]) or estimate(*args)
    trainer.train()
    assert set(found[0].flatten().tolist()) <= {0.25, 0.0} and found[0].any()


@pytest.mark.parametrize("tools", [[], [add]], ids=["plain", "tools"])
def test_an_evaluation_needs_no_recorded_entropies(tmp_path, tools):
    ours = make(tmp_path / "ours", None, tools=tools, eval_dataset=prompts(2), max_completion_length=30)
    sampler = PlainSampler()
    theirs = make(tmp_path / "theirs", sampler, tools=tools, eval_dataset=prompts(2), max_completion_length=30)
    figures = theirs.evaluate()
    assert figures.keys() == ours.evaluate().keys()
    assert figures["eval_entropy"] == pytest.approx(math.log(len(TOKENIZER)), rel=0.1)
    expected = theirs.rollouts.batch.trajectories
    assert all(t.logprobs for t in expected) and sampler.loaded == [0]


def test_a_policy_is_loaded_once_until_it_changes(tmp_path):
    """An evaluation after a step samples from what that step's successor samples from; other weights are loaded."""
    sampler = PlainSampler()
    changes = {
        "eval_dataset": prompts(8), "eval_strategy": "steps", "eval_steps": 1, "max_completion_length": 4,
        "per_device_eval_batch_size": 4, "num_generations_eval": 1, "save_strategy": "steps", "save_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "reward", "greater_is_better": True,
    }  # fmt: skip
    trainer = make(tmp_path, sampler, **changes)
    trainer.evaluate()
    assert sampler.loaded == [0]
    trainer.train()
    assert sampler.loaded == [0, 0, 1, 2, 3]
    trainer.evaluate()  # the best weights, at an unchanged number of steps
    assert sampler.loaded == [0, 0, 1, 2, 3, 3]
    trainer.evaluate()
    assert sampler.loaded == [0, 0, 1, 2, 3, 3]
    current = dict(trainer.model.named_parameters())
    assert all(torch.equal(value, current[name]) for name, value in sampler.model.named_parameters())


def test_a_resumed_run_is_the_undisturbed_one(tmp_path):
    changes = {"max_completion_length": 8, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make(tmp_path, PlainSampler(), **changes)
    whole.train()
    sampler = PlainSampler()
    resumed = make(tmp_path, sampler, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert sampler.loaded == [2, 3]
    for found, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_copy_is_a_model_of_its_own(tmp_path):
    """Also of a policy with a value head, an adapter and a head in float32, which all change its forward pass."""
    sampler = PlainSampler()
    trainer = make(
        tmp_path, sampler, advantage_estimator="gae", cast_lm_head_to_fp32=True, max_completion_length=4, max_steps=1,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = sampler.model(ids).logits
        for parameter in trainer.model.parameters():
            parameter.zero_()
        assert torch.equal(sampler.model(ids).logits, before) and not trainer.model(ids).logits.any()


def test_a_replayed_run_does_not_ask_it(tmp_path):
    changes = {"tools": [add], "max_steps": 2}
    first = make(tmp_path / "first", PlainSampler(CALLS), **changes)
    first.train()
    unasked = SimpleNamespace(open=lambda *args: pytest.fail("it was asked"))
    again = make(tmp_path / "again", unasked, replay=str(tmp_path / "first"), **changes)
    again.train()
    for found, expected in zip(again.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_correction_acts_on_its_ratio(tmp_path):
    """Each token is recorded as half as likely as it was: a ratio of 2, cut to 1.5."""

    def halve(sampled):
        return replace(sampled, logprobs=[value - math.log(2) for value in sampled.logprobs])

    changes = {"logprob_check": "off", "max_completion_length": 8, "max_steps": 1}
    trainer = make(
        tmp_path, PlainSampler(change=halve), sampler_correction="truncate", sampler_correction_cap=1.5, **changes
    )
    trainer.train()
    row = steps_of(trainer)[0]
    assert row["sampling/corrected"] == 1.0 and row["ratio/mean"] == pytest.approx(2.0, abs=1e-3)


def test_a_longest_row_of_its_own_ends_rollouts(tmp_path):
    """A `max_length` that a sampler keeps for itself is not read."""
    sampler = PlainSampler(["x" * 50])
    sampler.max_length = 3
    trainer = make(tmp_path, sampler, max_completion_length=20, max_steps=1)
    trainer.train()
    trajectories = trainer.rollouts.batch.trajectories
    assert all(len(t.completion_ids) == 20 or t.stop_reason == "stop" for t in trajectories)
    sampler.max_sequence_length = len(trajectories[0].prompt_ids) + 2
    trainer.train()
    assert all(1 <= len(t.completion_ids) <= 2 for t in trainer.rollouts.batch.trajectories)


# It is checked


def shifted(sampled):
    """Return equal text, with one log-prob that is off in each turn of two tokens."""
    return replace(sampled, logprobs=[value - 0.5 * (place == 1) for place, value in enumerate(sampled.logprobs)])


def test_a_wrong_logprob_of_equal_text_is_an_error(tmp_path):
    make(tmp_path / "right", PlainSampler(CALLS), tools=[add], max_steps=1).train()
    with pytest.raises(LogprobMismatchError, match="recorded by the PlainSampler sampler"):
        make(tmp_path / "wrong", PlainSampler(CALLS, change=shifted), tools=[add]).train()


def test_an_old_policy_is_an_error(tmp_path):
    sampler = PlainSampler(CALLS)
    trainer = make(tmp_path, sampler, tools=[add])
    trainer.train()
    sampler.load_policy = lambda policy, version: None
    with pytest.raises(LogprobMismatchError, match="recorded by the PlainSampler sampler"):
        trainer.train()


def without(name):
    def change(sampled):
        return SimpleNamespace(**{key: value for key, value in vars(sampled).items() if key != name})

    return change


def misnamed(sampled):
    fields = dict(vars(sampled))
    return SimpleNamespace(**fields | {"old_logprobs": fields.pop("logprobs")})


FAULTS = {
    "short": (lambda s: replace(s, logprobs=s.logprobs[:-1]), r"field `logprobs` of a turn has \d+ values"),
    "missing": (without("logprobs"), "field `logprobs` of a turn is missing; the sampler returned a SimpleNamespace"),
    "no stop": (without("stopped"), "field `stopped` of a turn is missing"),
    "NaN": (lambda s: replace(s, logprobs=[math.nan] * len(s.logprobs)), "expected finite values .*, got nan"),
    "above 0": (lambda s: replace(s, logprobs=[0.5] * len(s.logprobs)), "expected finite values of at most 0, got"),
    "misnamed": (misnamed, "`old_logprobs` is not read: name it `logprobs`"),
    "a tensor": (lambda s: replace(s, token_ids=torch.tensor(s.token_ids)), "expected a list, got Tensor"),
    "no token ids": (lambda s: replace(s, token_ids=[1.5] * len(s.token_ids)), "expected token ids, got 1.5"),
    "too few values": (lambda s: replace(s, values=[0.5]), r"field `values` of a turn has 1 values"),
    "infinite entropies": (
        lambda s: replace(s, entropies=[math.inf] * len(s.token_ids)), "field `entropies` of a turn expected finite",
    ),
    "too many tokens": (
        lambda s: replace(s, token_ids=s.token_ids * 400, logprobs=s.logprobs * 400),
        r"field `token_ids` of a turn has \d+ values, expected at most 300",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_record_is_an_error_that_names_the_field(tmp_path, name):
    change, said = FAULTS[name]
    with pytest.raises(TrajectoryError, match=said):
        make(tmp_path, PlainSampler(CALLS, change=change), tools=[add]).train()


@pytest.mark.parametrize("name", FAULTS)
def test_without_strictness_its_rollout_is_masked_out(tmp_path, caplog, name):
    change, said = FAULTS[name]
    sampler = PlainSampler(CALLS, change=lambda sampled: change(sampled) if sampled.row == 1 else sampled)
    trainer = make(tmp_path, sampler, tools=[add], strict_trajectories=False, max_steps=1)
    seen, score = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: seen.append(score(inputs)) or seen[-1]
    with caplog.at_level(logging.WARNING):
        trainer.train()
    mask = seen[0]["completion_mask"] * seen[0]["tool_mask"]
    assert mask.any(dim=1).tolist() == [True, False, True, True]
    assert check_on_policy(trainer, steps=1)[0]["rollout/invalid"] == 1.0 and "Masked out of the update" in caplog.text


def test_a_turn_of_another_row_is_an_error_even_without_strictness(tmp_path):
    sampler = PlainSampler(CALLS, change=lambda sampled: replace(sampled, row=7))
    with pytest.raises(TrajectoryError, match="returned a turn of row 7, expected one of the rows it was asked"):
        make(tmp_path, sampler, tools=[add], strict_trajectories=False).train()


# It is refused


def given(prompts, trainer):
    return {"prompt_ids": [], "completion_ids": [], "logprobs": []}


REFUSED = {
    "a function": ({"rollout_func": given}, "with a `rollout_func`, whose rollouts are TRL's own"),
    "unrecorded": ({"record_sample_logprobs": False}, "with `record_sample_logprobs=False`, whose rollouts"),
    "vllm": ({"rollout_backend": "vllm"}, "with `rollout_backend='vllm'`, which is a sampler itself"),
    "noise": ({"deterministic_rollouts": True}, "with `deterministic_rollouts=True`, whose noise"),
    "schema": (
        {"tools": [add], "force_rate": 0.5, "force_level": "schema"}, "with `force_level='schema'`, whose constraints",
    ),
    "cache": ({"rollout_cache_gib": 1e-9}, "with `rollout_cache_gib`, which bounds the cache of the default sampler"),
    "multimodal": (
        {"processing_class": LlavaProcessor(CLIPImageProcessor(), chat_tokenizer("qwen3_instruct_2507"))},
        "with a multimodal model, whose rollouts are TRL's own",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_ask_it_refuses_it(tmp_path, name):
    changes, said = REFUSED[name]
    with pytest.raises(ConfigError, match=f"You passed `sampler=PlainSampler` {said}"):
        make(tmp_path, PlainSampler(), **{"logprob_check": "first", **changes})


def test_what_is_no_sampler_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"`sampler=object`, which has no method `open\(prompts, max_length\)`"):
        make(tmp_path, object())
    with pytest.raises(ConfigError, match="You passed the class `PlainSampler` as `sampler`. Pass an object of it"):
        make(tmp_path, PlainSampler)
