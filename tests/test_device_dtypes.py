"""Devices without float64, such as Apple's GPUs: no float64 tensor is made there, and the results are the same. On one
that this package does not know, `model.generate` samples."""

import importlib
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import add, chat_tokenizer, config, prompts, tiny_model
from peft import LoraConfig
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.algorithms import batch_advantages
from trl_toolgrpo.algorithms.advantages import (
    explained_variance,
    generalized_advantages,
    moments,
    rewards_to_go,
    whiten,
)
from trl_toolgrpo.algorithms.base import TokenAdvantages
from trl_toolgrpo.algorithms.batch_advantages import BatchAdvantages
from trl_toolgrpo.models.rounding import Rounding, widest
from trl_toolgrpo.reference.adapter import Comparison
from trl_toolgrpo.rollout.engine import RolloutEngine
from trl_toolgrpo.rollout.loop import RolloutRequest
from trl_toolgrpo.sampling.choice import differs
from trl_toolgrpo.sampling.generate_sampler import GenerateSampler
from trl_toolgrpo.sampling.model_sampler import ModelSampler, sample_tokens
from trl_toolgrpo.sampling.noise import RolloutNoise
from trl_toolgrpo.update.ratio_statistics import RatioStatistics


MPS, XPU = torch.device("mps"), torch.device("xpu")


class Abroad(torch.Tensor):
    """A tensor of the pretended device."""


class Pretend(TorchFunctionMode):
    """Pretends that [`Abroad`] tensors, and those made from them, are on a device that refuses float64."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = tree_flatten((args, kwargs or {}))[0]
        there = any(isinstance(value, Abroad) or value == self.device for value in given if not _plain(value))
        if not there:
            return function(*args, **(kwargs or {}))
        if function == torch.Tensor.device.__get__:
            return self.device
        args, kwargs = tree_map(self._at_home, (args, kwargs or {}))
        with torch._C.DisableTorchFunction():
            result = function(*args, **kwargs)
        leaves = function in (torch.Tensor.cpu,) or (function is torch.Tensor.to and "cpu" in map(str, given[1:]))
        return result if leaves else tree_map(_abroad, result)

    def _at_home(self, value):
        if isinstance(value, Abroad):
            return value.as_subclass(torch.Tensor)
        return torch.device("cpu") if isinstance(value, torch.device) and value == self.device else value


def _plain(value):
    return isinstance(value, torch.Tensor) and not isinstance(value, Abroad)


def _abroad(value):
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
    return value.as_subclass(Abroad)


def ratio(move):
    statistics, generator = RatioStatistics(), torch.Generator().manual_seed(0)
    for fresh in (True, False):
        logps, recorded = -torch.rand(2, 3, 5, generator=generator)
        mask = torch.rand(3, 5, generator=generator) > 0.3
        statistics.add(move(logps), move(recorded), move(mask), fresh)
    return statistics.metrics()


def comparison(move):
    found = Comparison()
    for dtype in (torch.float32, torch.bfloat16):
        one = torch.arange(6, dtype=dtype)
        found.add(f"same {dtype}", move(one), move(one))
        found.add(f"other {dtype}", move(one), move(one + 0.25))
    report = found.report()
    return {"differ": report.differ, "max": report.max_abs_diff}


def gae(move):
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.rand(2, 3, 6, generator=generator)
    steps = torch.tensor([[0, 0, -1, 1, 2, 2], [0, 1, 2, 3, -1, -1], [-1] * 6])
    rewards, values, steps = move(rewards), move(values), move(steps)
    advantages, returns = generalized_advantages(rewards, values, steps, 0.9, 0.8)
    taken = steps >= 0
    sums = moments(returns, taken), moments(returns - values, taken)
    found = {"whitened": whiten(advantages, taken, moments(advantages, taken)), "returns": returns}
    found["to go"] = rewards_to_go(rewards, steps, 0.9)
    found["none"] = generalized_advantages(rewards, values, steps[2:].expand(3, 6), 0.9, 0.8)[0]
    return {**{name: value.tolist() for name, value in found.items()}, "explained": explained_variance(*sums)}


def keyed_tokens(move):
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    keys = torch.arange(5) * 7919
    tokens, logprobs, entropies = sample_tokens(move(logits), 0.7, move(keys))
    return {"tokens": tokens.tolist(), "logprobs": logprobs.tolist(), "entropies": entropies.tolist()}


def drawn_tokens(move):
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    return {"tokens": sample_tokens(move(logits), 1.0, torch.linspace(0.1, 0.9, 5))[0].tolist()}


def trials(move):
    one = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))
    known = Rounding.of(move(one.abs() / 100))
    return {
        "differs": [differs(move(one), move(one + gap), move(one), exact) for gap in (0.0, 0.5) for exact in (0, 1)],
        "known": known.quantiles,
        "excess": [known.excess(move(one.abs() / size).flatten()) is None for size in (100, 1)],
    }


@pytest.mark.parametrize("device", [MPS, XPU], ids=str)
@pytest.mark.parametrize("figures", [ratio, comparison, gae, keyed_tokens, drawn_tokens, trials])
def test_results_without_float64_are_the_same(figures, device):
    with Pretend(device):
        found = figures(lambda tensor: tensor.to(device))
    expected = figures(lambda tensor: tensor)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, (float, list)) and name != "tokens":
            value, own = torch.tensor(value, dtype=torch.float32), torch.tensor(found[name], dtype=torch.float32)
            torch.testing.assert_close(own, value, rtol=1e-4, atol=1e-6)
        else:
            assert found[name] == value, name


def test_the_pretended_device_refuses_float64():
    with Pretend(MPS):
        for make in (
            lambda: torch.zeros(2, dtype=torch.float64, device=MPS),
            lambda: torch.zeros(2, dtype=torch.float64).to(MPS),
            lambda: torch.zeros(2, device=MPS).double(),
        ):
            with pytest.raises(TypeError, match="doesn't support float64"):
                make()
        assert torch.zeros(2, device=MPS).device == MPS and torch.zeros(2, device=MPS).cpu().double().device != MPS
    assert widest(MPS) == widest(XPU) == torch.float32
    assert widest(torch.device("cpu")) == widest(torch.device("cuda")) == torch.float64


# Which sampler a device gets


def settle(model):
    """Move a model to the pretended device."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    there = tensor.data.as_subclass(Abroad)
                    tensors[name] = torch.nn.Parameter(there) if tensors is module._parameters else there
    return model


def keyed_rollouts(tmp_path, device=None):
    tokenizer = chat_tokenizer()
    model = tiny_model(tokenizer)
    engine = RolloutEngine(config(tmp_path, max_completion_length=12), [tokenizer.eos_token_id], 0)
    requests = [RolloutRequest([3 + row, 7, 9, 5][: 4 - row % 2]) for row in range(4)]
    noise = RolloutNoise(seed=1, step=0)
    if device is None:
        return engine.run(model, requests, nullcontext, noise=noise)
    with torch.no_grad(), Pretend(device):
        assert next(settle(model).parameters()).device == device
        return engine.run(model, requests, nullcontext, noise=noise)


@pytest.mark.parametrize("device", [MPS, XPU], ids=str)
def test_generate_samples_on_a_device_that_is_not_known(tmp_path, caplog, monkeypatch, device):
    made = []
    for sampler in (GenerateSampler, ModelSampler):
        opened = lambda self, *args, usual=sampler.open: made.append(type(self)) or usual(self, *args)  # noqa: E731
        monkeypatch.setattr(sampler, "open", opened)
    expected = keyed_rollouts(tmp_path).trajectories
    assert made[-1] is ModelSampler and not caplog.messages
    found = keyed_rollouts(tmp_path, device).trajectories
    assert made[-1] is (GenerateSampler if device == XPU else ModelSampler)
    said = (
        "Sampling falls back to `model.generate` for this model: it is on a device of type `xpu`, and the default "
        "sampler is written for cpu, cuda, mps."
    )
    assert [message for message in caplog.messages if "falls back" in message] == [said] * (device == XPU)
    assert len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert one.completion_ids == other.completion_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


# A whole run

HOST = {
    *("place_rewards", "values", "check_logprobs", "_mismatch", "of", "excess", "uniforms", "race"),
    *("check_scoring", "rewards_to_go"),
}
"""What makes float64 tensors on the CPU, whatever the device of the policy is."""


class Spy(TorchFunctionMode):
    """Records which functions of the package make float64 tensors."""

    def __init__(self):
        super().__init__()
        self.makers = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(isinstance(value, torch.Tensor) and value.dtype == torch.float64 for value in tree_flatten(result)[0]):
            frame = sys._getframe(1)
            while frame is not None and "/trl_toolgrpo/" not in frame.f_code.co_filename:
                frame = frame.f_back
            if frame is not None:
                self.makers.add(frame.f_code.co_name)
        return result


def test_advantages_of_an_estimator_reach_the_device_without_float64(monkeypatch):
    monkeypatch.setattr(batch_advantages, "widest", lambda device: torch.float32)
    estimator = SimpleNamespace(whitens=False)
    output = {"completion_ids": torch.ones(2, 3), "completion_mask": torch.ones(2, 3), "advantages": torch.zeros(2)}
    wide, steps = torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.long)
    accelerator = SimpleNamespace(gather=lambda values: values)
    run = SimpleNamespace(accelerator=accelerator, completions_table={"advantages": [0, 0]})
    with Spy() as spy:
        part = BatchAdvantages(run, estimator)
        part._put_tokens(output, [TokenAdvantages(wide, wide, wide, steps)], None)
    assert not spy.makers and output["advantages"].tolist() == [[1.0] * 3] * 2


def reward(completion_ids, **kwargs):
    return [float(sum(ids) % 11) for ids in completion_ids]


@pytest.mark.parametrize("keyed", [False, True])
def test_a_run_makes_float64_only_on_the_host(tmp_path, monkeypatch, keyed):
    users = ("algorithms.advantages", "algorithms.batch_advantages", "critic.critic", "update.ratio_statistics")
    users += ("sampling.choice", "sampling.decoding", "sampling.noise", "reference.adapter", "reference.sync")
    for name in users:
        monkeypatch.setattr(importlib.import_module(f"trl_toolgrpo.{name}"), "widest", lambda device: torch.float32)
    tokenizer = chat_tokenizer("qwen3_instruct_2507")
    trainer = ToolGRPOTrainer(
        tiny_model(tokenizer),
        reward,
        config(
            tmp_path, max_steps=3, num_iterations=2, advantage_estimator="gae", value_epochs=2, beta=0.1,
            sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0, deterministic_rollouts=keyed,
            logprob_check="always",
        ),
        prompts(4),
        processing_class=tokenizer,
        tools=[add],
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    with Spy() as spy:
        trainer.train()
    assert spy.makers and spy.makers <= HOST, spy.makers - HOST
    assert trainer.state.global_step == 3 and "value/explained_variance" in trainer.state.log_history[0]
