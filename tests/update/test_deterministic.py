"""`deterministic_rollouts`: keyed noise by known answers, and the same rollouts whatever the timing."""

import random
import threading
import time

import pytest
import torch
from conftest import ScriptedSampler, chat_tokenizer, config, prompts, tiny_model, tool_call
from trl.chat_template_utils import add_response_schema, get_training_chat_template

from trl_toolgrpo import ConfigError, Tool, ToolGRPOTrainer
from trl_toolgrpo.chat.tool_chat import ToolChat
from trl_toolgrpo.rollout.loop import TOOL_STEPS, RolloutLimits, RolloutLoop, RolloutRequest
from trl_toolgrpo.sampling.generate_sampler import GenerateSampler
from trl_toolgrpo.sampling.model_sampler import ModelSampler, sample_tokens
from trl_toolgrpo.sampling.noise import RolloutNoise, race, uniforms
from trl_toolgrpo.tools.runtime.executor import ToolExecutor
from trl_toolgrpo.update.micro_batches import interleaved


# Noise


def test_uniforms_are_those_of_splitmix64():
    """Compare with the generator in Python's integers; the first output for seed 0 is the published one."""

    def splitmix64(seed, count):
        for step in range(1, count + 1):
            z = (seed + step * 0x9E3779B97F4A7C15) % 2**64
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            yield z ^ (z >> 31)

    assert next(splitmix64(0, 1)) == 0xE220A8397B1DCDAF
    keys = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    found = uniforms(torch.tensor(keys), 50)
    assert found.dtype == torch.float64 and found.shape == (6, 50)
    for key, row in zip(keys, found.tolist(), strict=True):
        assert row == [((z >> 12) + 0.5) / 2**52 for z in splitmix64(key % 2**64, 50)]
    assert found.min() > 0 and found.max() < 1


def test_keys_depend_on_what_is_drawn_and_nothing_else():
    one, other = RolloutNoise(7, 3), RolloutNoise(7, 3, first=4)
    first = one([4, 5]).tolist()
    assert first == [one._key("token", 4, 0), one._key("token", 5, 0)]
    assert [*other([1]).tolist(), *other([0]).tolist()] == first[::-1]  # rollouts 5 and 4, of another process
    again = RolloutNoise(7, 3)
    again([0, 1, 2])
    assert again([5, 4]).tolist() == first[::-1]
    keys = {
        noise._key(kind, row, number)
        for noise in (RolloutNoise(7, 3), RolloutNoise(8, 3), RolloutNoise(7, 4), RolloutNoise(7, 3, purpose="eval"))
        for kind in ("token", "turn")
        for row in range(5)
        for number in range(5)
    }
    assert len(keys) == 4 * 2 * 5 * 5
    assert one.other("turn", 2, 1).random() == RolloutNoise(7, 3, first=2).other("turn", 0, 1).random()


def test_keyed_draws_follow_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -torch.inf, 1.5, -3.0])
    count = 20_000
    keys = RolloutNoise(0, 0)(range(count))
    for temperature in (1.0, 0.5):
        tokens, logprobs, _ = sample_tokens(logits.expand(count, -1), temperature, keys)
        expected = torch.softmax(logits.double() / temperature, dim=-1)
        assert torch.allclose(logprobs.double(), expected.log()[tokens], atol=1e-6)
        seen = torch.bincount(tokens, minlength=8)
        keep = expected > 0
        assert seen[5] == 0
        chi_square = ((seen[keep] - count * expected[keep]) ** 2 / (count * expected[keep])).sum()
        assert chi_square < 24.3  # 0.999 quantile at 6 degrees of freedom


def test_rounding_hardly_ever_changes_a_token():
    """At most twice the total variation of the tokens change; noise of 1e-3 on the logits stands for rounding."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8_000, 200, generator=generator, dtype=torch.float64)
    moved = logits + 1e-3 * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    one, other = torch.softmax(logits, -1), torch.softmax(moved, -1)
    keys = RolloutNoise(1, 0)(range(len(logits)))
    share = (race(one, keys) != race(other, keys)).double().mean().item()
    bound = (one - other).abs().sum(-1).mean().item()
    assert 0 < share < 1.3 * bound < 2e-3
    assert torch.equal(race(one, keys), race(one.clone(), keys))


# Samplers


def turns(sampler, order, noise_rows=6):
    """Sample rollouts of two turns, extended in a given order; some rows join while others are under way."""
    histories, done = {}, []
    with sampler.open([[5, 6, 7]] * 3 + [[8, 9]] * 3, 60) as session:
        for row in order:
            session.extend(row, [], 5 + row)
            histories[row] = []
            if row % 2:
                results = session.step()
                done += results
                for result in results:
                    histories[result.row] += result.token_ids
        rounds = dict.fromkeys(range(noise_rows), 0)
        for result in done:
            rounds[result.row] += 1
            session.extend(result.row, [11, 12], 4)
        while session.busy:
            for result in session.step():
                histories[result.row] += result.token_ids
                rounds[result.row] += 1
                if rounds[result.row] < 2:
                    session.extend(result.row, [11, 12], 4)
    assert set(rounds.values()) == {2}
    return histories


@pytest.mark.parametrize("kind", [ModelSampler, GenerateSampler])
def test_a_row_does_not_depend_on_the_other_rows(kind, tokenizer):
    model = tiny_model(tokenizer, vocab_size=40, pad_token_id=0, eos_token_id=1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    found = []
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [2, 0, 4, 5, 3, 1]):
        torch.manual_seed(len(found))
        state = torch.get_rng_state()
        found.append(turns(kind(model, [1, 2], 0, noise=RolloutNoise(3, 1)), order))
        if kind is ModelSampler:
            assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1] == found[2]
    assert found[0] != turns(kind(model, [1, 2], 0, noise=RolloutNoise(3, 2)), [0, 1, 2, 3, 4, 5])


# The loop


class Steps(ScriptedSampler):
    """A scripted sampler that records which rows each step was for; a turn takes as many steps as `lengths` says."""

    lengths = (1, 3, 2, 5)

    def extend(self, row, token_ids, max_new_tokens, constraint=None):
        super().extend(row, token_ids, max_new_tokens, constraint)
        self.left = {**getattr(self, "left", {}), row: self.lengths[row % 4]}

    def step(self):
        self.seen = [*getattr(self, "seen", []), tuple(row for row, _ in self.queue)]
        self.left = {row: count - 1 for row, count in self.left.items()}
        waiting = [entry for entry in self.queue if self.left[entry[0]] > 0]
        self.queue = [entry for entry in self.queue if self.left[entry[0]] <= 0]
        results = super().step()
        self.queue = waiting
        return results


def test_steps_do_not_depend_on_how_long_tools_take():
    tokenizer = chat_tokenizer("qwen3")
    add_response_schema(tokenizer)
    chat = ToolChat(tokenizer, [tokenizer.eos_token_id], get_training_chat_template(tokenizer))
    executor = ToolExecutor(timeout=20.0)
    delays = random.Random()
    slow = Tool("look", "A tool.", {"type": "object", "properties": {}}, lambda: time.sleep(delays.random() * 0.05))
    prompt = tokenizer("hello", add_special_tokens=False)["input_ids"]
    call = tool_call("look") + "<|im_end|>"
    script = [[call, call, "done<|im_end|>"], ["no<|im_end|>"], [call, "done<|im_end|>"], [call, "no<|im_end|>"]]

    def run(in_order):
        sampler = Steps(tokenizer, script, [tokenizer.eos_token_id])
        requests = [RolloutRequest(prompt, {"look": slow}) for _ in script]
        with sampler.open([prompt] * 4, 900) as session:
            loop = RolloutLoop(session, requests, RolloutLimits(900, 8, 200, 1), chat, executor, None, in_order)
            rollouts = loop.run()
        return sampler.seen, [rollout.trajectory.completion_ids for rollout in rollouts]

    try:
        found = [run(True) for _ in range(4)]
        assert all(one == found[0] for one in found)
        assert found[0][1] == run(False)[1]
    finally:
        executor.shutdown()
    assert found[0][0][0] == (0, 1, 2, 3)


def test_decoding_waits_for_a_tool_after_some_steps():
    tokenizer = chat_tokenizer("qwen3")
    add_response_schema(tokenizer)
    chat = ToolChat(tokenizer, [tokenizer.eos_token_id], get_training_chat_template(tokenizer))
    executor, answered = ToolExecutor(timeout=20.0), threading.Event()
    tool = Tool("look", "A tool.", {"type": "object", "properties": {}}, lambda: answered.wait(10))
    prompt = tokenizer("hello", add_special_tokens=False)["input_ids"]

    class Long(Steps):
        lengths = (1, 20)

        def step(self):
            if len(getattr(self, "seen", ())) == TOOL_STEPS:
                answered.set()  # too early for a loop that would wait at once, which then had waited for ever
            return super().step()

    sampler = Long(tokenizer, [[tool_call("look") + "<|im_end|>", "done<|im_end|>"], ["no<|im_end|>"]], [1])
    sampler.stop_ids = {tokenizer.eos_token_id}
    requests = [RolloutRequest(prompt, {"look": tool}) for _ in range(2)]
    try:
        with sampler.open([prompt] * 2, 900) as session:
            RolloutLoop(session, requests, RolloutLimits(900, 8, 200, 1), chat, executor, None, True).run()
    finally:
        executor.shutdown()
    # Row 0 calls in the first step, and is with the others again TOOL_STEPS later
    assert sampler.seen[: TOOL_STEPS + 2] == [(0, 1), *[(1,)] * TOOL_STEPS, (1, 0)]


# The trainer


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_batch_is_split_alike_by_any_number_of_processes(parts):
    whole = interleaved(16, parts, RolloutNoise(1, 2))
    assert sorted(row for part in whole for row in part) == list(range(16))
    for processes in (2, 4):
        share = 16 // processes
        pieces = [interleaved(share, parts, RolloutNoise(1, 2, first=p * share)) for p in range(processes)]
        for part in range(parts):
            joined = [p * share + row for p, piece in enumerate(pieces) for row in piece[part]]
            assert joined == whole[part]
    if parts > 1:
        assert interleaved(16, parts, RolloutNoise(1, 3)) != whole


def test_a_trainers_split_does_not_depend_on_the_order_of_rows(tmp_path, tokenizer):
    trainer, _ = start(tmp_path, tokenizer, deterministic_rollouts=True)
    rows = torch.randperm(16)
    order = trainer.update.split.rows_of_parts([{"rollout": chunk} for chunk in rows.chunk(4)])
    expected = interleaved(16, 4, RolloutNoise(trainer.args.seed, 0))
    assert [rows[part].tolist() for part in order] == expected


def start(path, tokenizer, **changes):
    options = {"max_steps": 2, "steps_per_generation": 2, "num_iterations": 1, "learning_rate": 1e-2, **changes}
    data = prompts(6)
    kept = []

    def reward(completion_ids, **kwargs):
        kept.append([list(ids) for ids in completion_ids])
        return [float(sum(ids) % 7) for ids in completion_ids]

    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer), reward, config(path, **options), data, data, processing_class=tokenizer
    )
    return trainer, kept


@pytest.mark.parametrize("deterministic", [True, False])
def test_rollouts_do_not_depend_on_the_random_state(tmp_path, tokenizer, deterministic):
    found = []
    for disturbance in (0, 3):
        trainer, kept = start(tmp_path, tokenizer, deterministic_rollouts=deterministic)
        torch.rand(disturbance)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.evaluate()
        trainer.evaluate()
        found.append((kept, losses))
    assert (found[0] == found[1]) == deterministic
    evaluations = found[0][0][1:]  # one rollout batch of training, then two evaluations of equal length
    half = len(evaluations) // 2
    assert (evaluations[:half] == evaluations[half:]) == deterministic
    flat = [tuple(ids) for batch in found[0][0][: 1 + half] for ids in batch]
    assert len(set(flat)) > 0.9 * len(flat)  # no two of them from the same noise


@pytest.mark.parametrize("changes", [{"record_sample_logprobs": False}, {"use_vllm": True}])
def test_deterministic_rollouts_of_trl_are_refused(tmp_path, changes):
    with pytest.raises(ConfigError, match=r"deterministic_rollouts=True.*noise is not this package's"):
        config(tmp_path, deterministic_rollouts=True, **changes)


def test_deterministic_rollouts_of_a_rollout_func_are_refused(tmp_path, tokenizer):
    options = config(tmp_path, deterministic_rollouts=True)
    with pytest.raises(ConfigError, match=r"rollouts of TRL's own \(a `rollout_func`\), whose noise"):
        ToolGRPOTrainer(
            tiny_model(tokenizer), lambda **kwargs: [], options, prompts(4), processing_class=tokenizer,
            rollout_func=lambda prompts, trainer: {},
        )  # fmt: skip
