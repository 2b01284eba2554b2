"""Rollouts within a bound on memory: how a batch is divided, that the bound holds, and that nothing else changes."""

import pytest
import torch
from conftest import chat_tokenizer, config, prompts, tiny_model

from trl_toolgrpo import ConfigError, ToolGRPOTrainer
from trl_toolgrpo.rollout import engine
from trl_toolgrpo.rollout.cache_budget import bytes_per_token, parts_that_fit
from trl_toolgrpo.sampling import model_sampler
from trl_toolgrpo.sampling.generate_sampler import GenerateSampler
from trl_toolgrpo.sampling.shared_prefix import KeyValueStore


TOKEN = 2 * 2 * 2 * 8 * 4  # keys and values, 2 layers, 2 heads of width 8, float32


def gib(tokens):
    return (tokens * TOKEN + 1) / 2**30


def parts(path, limit, lengths, own=15, **options):
    rows = [[index] * size for index, size in enumerate(lengths) for _ in range(4)]
    args = config(path, max_completion_length=own, rollout_cache_gib=None if limit is None else gib(limit))
    return parts_that_fit(args, tiny_model(chat_tokenizer()), rows, **options)


def test_bytes_per_token(tmp_path):
    model = tiny_model(chat_tokenizer())
    assert bytes_per_token(config(tmp_path), model) == TOKEN
    assert bytes_per_token(config(tmp_path, bf16=True), model) == TOKEN // 2  # stored as autocast makes them
    assert bytes_per_token(config(tmp_path), model.bfloat16()) == TOKEN // 2


def test_a_batch_is_divided_no_more_than_needed(tmp_path):
    assert parts(tmp_path, None, [10, 10]) == [(0, 8)] and parts(tmp_path, 99, []) == [(0, 0)]
    assert parts(tmp_path, 2 * 10 + 8 * 16, [10, 10]) == [(0, 8)]
    assert parts(tmp_path, 2 * 10 + 8 * 16 - 1, [10, 10]) == [(0, 4), (4, 8)]  # not seven and one
    assert parts(tmp_path, 10 + 16, [10, 10]) == [(row, row + 1) for row in range(8)]
    assert parts(tmp_path, 50 + 4 * 16, [10, 50]) == [(0, 4), (4, 8)]


def test_prompts_that_are_not_shared_count_for_each_rollout(tmp_path):
    assert parts(tmp_path, 8 * (10 + 16), [10, 10], shares=False) == [(0, 8)]
    assert parts(tmp_path, 8 * (10 + 16) - 1, [10, 10], shares=False) == [(0, 4), (4, 8)]
    assert parts(tmp_path, 10 + 16, [10, 10], shares=False) == [(row, row + 1) for row in range(8)]


def test_the_plain_sampler_keeps_to_the_bound(tmp_path, monkeypatch):
    tokenizer, opened = chat_tokenizer(), []

    class Kept(GenerateSampler):
        def open(self, prompts, max_length):
            opened.append(len(prompts) * (max(map(len, prompts)) + max_length + 1))
            return super().open(prompts, max_length)

    monkeypatch.setattr(engine, "unsupported_reason", lambda *args: "a reason")
    monkeypatch.setattr(engine, "make_sampler", lambda policy, supported, paths, **options: Kept(policy, **options))
    trainer = make(tmp_path, tokenizer, rollout_cache_gib=gib(250))
    rollouts(trainer)
    assert len(opened) > 1 and max(opened) <= 250


def test_a_bound_too_small_for_one_rollout_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"of 50 tokens and `max_completion_length=15` can need 66, which is \S+ G"):
        parts(tmp_path, 65, [10, 50])
    tokenizer = chat_tokenizer()
    with pytest.raises(ConfigError, match=r"You passed `rollout_cache_gib=.* holds the keys and values of 17 tokens"):
        make(tmp_path, tokenizer, rollout_cache_gib=gib(17))
    make(tmp_path, tokenizer, rollout_cache_gib=gib(18))


def make(path, tokenizer, **changes):
    rewards = lambda completions, **kwargs: [float(i % 3) for i in range(len(completions))]  # noqa: E731
    options = {"per_device_train_batch_size": 8, "deterministic_rollouts": True, **changes}
    model = tiny_model(tokenizer, max_position_embeddings=256)
    return ToolGRPOTrainer(model, rewards, config(path, **options), prompts(), processing_class=tokenizer)


def rollouts(trainer):
    rows = [{"prompt": [{"role": "user", "content": "hello " * (1 + row // 4)}]} for row in range(8)]
    return trainer._generate_and_score_completions(rows)["completion_ids"]


def test_parts_give_the_same_rollouts_within_the_bound(tmp_path, monkeypatch):
    tokenizer = chat_tokenizer()
    stores = []

    class Kept(KeyValueStore):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            stores.append(self)

    whole = rollouts(make(tmp_path, tokenizer))
    monkeypatch.setattr(model_sampler, "KeyValueStore", Kept)
    trainer = make(tmp_path, tokenizer)
    size = len(trainer._tokenize_prompts([[{"role": "user", "content": "hello hello "}]])[0][0])
    limit = 3 * 17 + 2 * size
    trainer.args.rollout_cache_gib = gib(limit)
    assert torch.equal(rollouts(trainer), whole)
    stores = [store for store in stores if store.rows > 1 and store.max_length == 17 and store.own]
    assert len(stores) >= 3
    for store in stores:
        held = [tensor for pair in (*store.prompts, *store.own) for tensor in pair]
        assert sum(tensor.numel() * tensor.element_size() for tensor in held) <= limit * TOKEN
