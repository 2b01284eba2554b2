"""The vLLM backend without vLLM: the sampler over an engine of the test's own, the requests an engine gets, the
server and its client over real HTTP with a tiny model behind it, and the errors when something is missing."""

import asyncio
import json
import logging
import random
import re
import sys
import threading
import time
import types
import uuid
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import trl.trainer.grpo_trainer as trl_grpo
from conftest import chat_tokenizer, config, prompts, tiny_model, tool_call
from peft import LoraConfig, PeftModel, get_peft_model
from rollout_server import ServerProcess
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

import trl_toolgrpo.rollout.vllm_rollouts as vllm_rollouts
from trl_toolgrpo import ConfigError, RolloutServerError, SamplerError, ToolGRPOTrainer, Trajectory, TrajectoryError
from trl_toolgrpo.critic.value_head import ValueHead, attach_value_head
from trl_toolgrpo.errors import EngineLostError
from trl_toolgrpo.sampling.vllm import client as vllm_client
from trl_toolgrpo.sampling.vllm import engine as vllm_engine
from trl_toolgrpo.sampling.vllm import policy_weights
from trl_toolgrpo.sampling.vllm.client import ServedEngine, model_shape
from trl_toolgrpo.sampling.vllm.engine import VLLMEngine, check_version, engine_options, supported_versions
from trl_toolgrpo.sampling.vllm.policy_weights import (
    PolicyFile,
    SharedPolicy,
    adapter_problem,
    claim_folder,
    is_shared_folder,
    policy_folder,
    write_checkpoint,
    write_policy,
)
from trl_toolgrpo.sampling.vllm.sampler import TokenReply, TokenRequest, VLLMSampler
from trl_toolgrpo.sampling.vllm.shared_weights import opened_tensors, shared_tensors
from trl_toolgrpo.sampling.vllm.worker import PolicyWorker


class Engine:
    """An engine that writes the texts of a script, one after the other for each prompt, and takes its time."""

    max_length = 2000

    def __init__(self, write, delay=lambda request: 0.0):
        self.write, self.delay = write, delay
        self.asked, self.loaded, self.log, self.cancelled = [], [], [], 0

    async def load(self, policy):
        self.log.append("load")
        self.loaded.append(policy)

    async def generate(self, request):
        self.asked.append(request)
        try:
            await asyncio.sleep(self.delay(request))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        ids = self.write(request)
        return TokenReply(ids, [-0.5] * len(ids), self.loaded[-1].version if self.loaded else 0)

    async def wake(self):
        self.log.append("wake")

    async def rest(self):
        self.log.append("rest")

    async def close(self):
        self.log.append("close")


def sampler_over(engine, stop_ids=(9,)):
    async def start():
        return engine

    return VLLMSampler(start, stop_ids, 0.7)


@pytest.fixture
def over():
    """Make samplers, and close them at the end."""
    made = []

    def make(engine, **options):
        made.append(sampler_over(engine, **options))
        return made[-1]

    yield make
    for sampler in made:
        sampler.close()


def drain(session):
    found = []
    while session.busy:
        found += session.step()
    return found


# The sampler


def test_every_turn_is_a_request_with_its_whole_history(over):
    engine = Engine(lambda request: [len(request.prompt_ids), 9])
    with over(engine).open([[1, 2], [1, 2, 3]], 50) as session:
        session.extend(0, [], 5)
        session.extend(1, [4], 1)
        first = {sampled.row: sampled for sampled in drain(session)}
        assert (first[0].token_ids, first[0].logprobs, first[0].stopped) == ([2, 9], [-0.5, -0.5], True)
        assert first[1].token_ids == [4, 9]
        session.extend(0, [7, 8], 3)
        drain(session)
    asked = sorted((r.prompt_ids, r.max_new_tokens) for r in engine.asked)
    assert asked == [([1, 2], 5), ([1, 2, 2, 9, 7, 8], 3), ([1, 2, 3, 4], 1)]
    assert all(r.stop_ids == [9] and r.temperature == 0.7 for r in engine.asked)


def test_no_row_waits_for_another(over):
    """While row 0 takes a second, row 1 has ten turns."""
    engine = Engine(lambda request: [5], delay=lambda request: 1.0 if request.prompt_ids == [1] else 0.0)
    with over(engine).open([[1], [2]], 50) as session:
        session.extend(0, [], 1)
        for _ in range(10):
            session.extend(1, [3], 1)
            while not (found := session.step()):
                pass
            assert [sampled.row for sampled in found] == [1] and session.busy
        assert [sampled.row for sampled in drain(session)] == [0]


def test_leaving_a_batch_cancels_it_and_rests_the_engine(over):
    engine = Engine(lambda request: [5], delay=lambda request: 60.0)
    started = time.monotonic()
    with pytest.raises(KeyError), over(engine).open([[1], [2]], 50) as session:
        session.extend(0, [], 1)
        session.extend(1, [], 1)
        assert session.step() == []
        raise KeyError
    assert engine.cancelled == 2 and time.monotonic() - started < 20
    assert engine.log == ["wake", "rest"]


def test_failures_of_the_engine_are_raised_by_step(over):
    def fail(request):
        raise SamplerError("out of cache")

    with pytest.raises(SamplerError, match="out of cache"), over(Engine(fail)).open([[1]], 5) as session:
        session.extend(0, [], 1)
        drain(session)
    for write, said in ((lambda r: [], "0 tokens and 0 log-probs"),):
        with pytest.raises(SamplerError, match=said), over(Engine(write)).open([[1]], 5) as session:
            session.extend(0, [], 1)
            drain(session)


def test_requests_that_cannot_be_sampled_are_refused(over):
    engine = Engine(lambda request: [5])
    with over(engine).open([[1] * 2000, [1] * 1990], 50) as session:
        with pytest.raises(SamplerError, match=r"Rollout 0 has 2000 tokens .* for 2000 in total"):
            session.extend(0, [], 5)
        with pytest.raises(SamplerError, match="without constraints"):
            session.extend(1, [], 5, constraint=object())
        session.extend(1, [], 50)
        with pytest.raises(SamplerError, match="Row 1 was extended"):
            session.extend(1, [], 5)
        drain(session)
    assert [request.max_new_tokens for request in engine.asked] == [10], "no more than fits"


def test_an_engine_that_does_not_start_leaves_no_thread():
    async def start():
        raise SamplerError("no memory")

    before = threading.active_count()
    with pytest.raises(SamplerError, match="no memory"):
        VLLMSampler(start, [9])
    assert threading.active_count() == before


def test_closing_twice_closes_once():
    engine = Engine(lambda request: [5])
    sampler = sampler_over(engine)
    sampler.close()
    sampler.close()
    assert engine.log == ["close"]


# Policies on disk


def test_an_adapter_alone_is_written_and_can_be_read(tmp_path, tokenizer):
    policy = get_peft_model(tiny_model(tokenizer), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    write_policy(policy, tmp_path)
    file = PolicyFile("key", 3, tmp_path, adapter=True)
    assert file.adapter_config()["r"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    ids = torch.arange(8)[None]
    again = PeftModel.from_pretrained(tiny_model(tokenizer), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, policy(input_ids=ids).logits)
        assert not torch.allclose(policy(input_ids=ids).logits, tiny_model(tokenizer)(input_ids=ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_all_weights_are_written_without_the_value_head(tmp_path, tokenizer, tied):
    policy = tiny_model(tokenizer, seed=5, tie_word_embeddings=tied)
    expected = policy(input_ids=torch.arange(8)[None]).logits
    attach_value_head(policy, ValueHead(32))
    write_policy(policy, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=torch.arange(8)[None]).logits, expected)
    assert PolicyFile("key", 0, tmp_path, adapter=False).weights.is_file()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"use_rslora": True}, None),
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"bias": "all"}, "bias='all'"),
        ({"target_modules": ["q_proj", "lm_head"]}, "on the LM head"),
    ],
)
def test_reason_why_vllm_cannot_use_an_adapter(changes, said):
    problem = adapter_problem(LoraConfig(**changes))
    assert problem is None if said is None else said in problem


# Requests to vLLM


class Struct:
    def __init__(self, *args, **values):
        self.args = args
        self.__dict__.update(values)


class LLM:
    """The part of vLLM's engine that is used here; records its calls."""

    def __init__(self, fail=()):
        self.calls, self.fail, self.errored = [], fail, False
        self.model_config = Struct(max_model_len=128)

    def __getattr__(self, name):
        async def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if name in self.fail:
                raise ValueError("target module lm_head is unknown")

        return call

    async def generate(self, prompt, params, name, lora_request):
        self.calls.append(("generate", (prompt, params, lora_request), {}))
        entries = [{4: Struct(logprob=-0.25)}, {9: Struct(logprob=-1.5)}]
        yield Struct(outputs=[Struct(token_ids=(4, 9), logprobs=entries)])

    def shutdown(self):
        self.calls.append(("shutdown", (), {}))


@pytest.fixture
def stand_in(monkeypatch):
    """Modules of vLLM's names, with the few records that are made of them."""

    class LoRARequest(Struct):
        lora_name = property(lambda self: self.args[0])
        lora_int_id = property(lambda self: self.args[1])

    modules = {
        "vllm": {"SamplingParams": Struct, "__version__": "0.31.0", "__spec__": object()},
        "vllm.sampling_params": {"RequestOutputKind": Struct(FINAL_ONLY="final")},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)


def test_an_adapter_is_swapped_under_a_new_id_and_the_old_one_removed(stand_in, tmp_path):
    llm = LLM()
    engine = VLLMEngine(llm)

    async def run():
        with pytest.raises(SamplerError, match="before it was given a policy"):
            await engine.generate(TokenRequest([1], 1, [9], 1.0))
        for version in (0, 7):
            await engine.load(PolicyFile(f"run-{version}", version, tmp_path, adapter=True))
        return await engine.generate(TokenRequest([1, 2], 20, [9], 0.7))

    reply = asyncio.run(run())
    assert (reply.token_ids, reply.logprobs, reply.version) == ([4, 9], [-0.25, -1.5], 7)
    names = [name for name, _, _ in llm.calls]
    seeds = [call[2]["args"] for call in llm.calls if call[1] == ("reseed",)]
    assert len(seeds) == names.count("collective_rpc") == 2 and seeds[0] != seeds[1]
    llm.calls = [call for call in llm.calls if call[1] != ("reseed",)]
    names = [name for name, _, _ in llm.calls]
    assert names == ["add_lora", "remove_lora", "add_lora", "generate"], "nothing is merged, no other weights sent"
    assert llm.calls[0][1][0].args == ("run-0", 1, str(tmp_path))
    assert llm.calls[1][1] == (1,) and llm.calls[2][1][0].args == ("run-7", 2, str(tmp_path))
    prompt, params, adapter = llm.calls[3][1]
    assert prompt == {"prompt_token_ids": [1, 2]} and adapter.lora_int_id == 2
    asked = {name: value for name, value in vars(params).items() if name != "args"}
    assert asked == {
        "temperature": 0.7,
        "max_tokens": 20,
        "stop_token_ids": [9],
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
        "output_kind": "final",
    }


def test_all_weights_are_reloaded_and_the_cache_of_the_old_ones_dropped(stand_in, tmp_path):
    llm = LLM()
    engine = VLLMEngine(llm)
    asyncio.run(engine.load(PolicyFile("run-1", 1, tmp_path, adapter=False)))
    assert llm.calls[:2] == [
        ("collective_rpc", ("reload_policy",), {"args": (str(tmp_path),)}),
        ("reset_prefix_cache", (), {}),
    ]
    assert [call[1] for call in llm.calls[2:]] == [("reseed",)]


def test_a_restarted_engine_draws_with_other_noise(tmp_path):
    """Its noise depends only on the process and the version of the policy."""

    def seed(process, version):
        llm = LLM()
        asyncio.run(VLLMEngine(llm, seed=process).load(PolicyFile("key", version, tmp_path, adapter=False)))
        return llm.calls[-1][2]["args"][0]

    seeds = {seed(process, version) for process in range(4) for version in range(20)}
    assert len(seeds) == 80 and all(0 <= value < 2**32 for value in seeds) and seed(1, 7) == seed(1, 7)
    drawn = []
    for value in (seed(0, 3), seed(0, 4), seed(0, 3)):
        PolicyWorker().reseed(value)
        drawn.append((float(torch.rand(())), float(np.random.rand()), random.random()))
    assert drawn[0] == drawn[2] and all(one != other for one, other in zip(drawn[0], drawn[1], strict=True))


@pytest.mark.parametrize(("mode", "main", "order"), [
    ("server", True, ["wait", "load", "wait", "wait"]),
    ("server", False, ["wait", "wait", "load", "wait"]),
    ("colocate", False, ["wait", "load", "wait", "wait"]),
])  # fmt: skip
def test_a_server_is_sent_the_policy_by_one_process(tmp_path, mode, main, order):
    did = []
    accelerator = Struct(
        is_main_process=main, is_local_main_process=False, wait_for_everyone=lambda: did.append("wait")
    )
    run = Struct(args=Struct(vllm_mode=mode), accelerator=accelerator, state=Struct(global_step=3))
    rollouts = object.__new__(vllm_rollouts.VLLMRollouts)
    sampler = Struct(load=lambda file: did.append("load"), engine=None)
    values = {"shares": True, "folder": tmp_path, "sent_at": 2, "_sent": 1, "_key": "key", "policy_file": None}
    vars(rollouts).update(values, _run=run, sampler=sampler)
    rollouts.send(None)
    assert did == order and rollouts.sent_at == 3


def test_weights_of_processes_that_were_killed_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    living, remove = claim_folder("living")
    (living / "weights").write_text("x")
    left = policy_folder("killed")
    left.mkdir()
    (left / "weights").write_text("x")
    left.with_name(f"{left.name}.lock").touch()  # what a killed process leaves: a lock that nobody holds
    other, remove_other = claim_folder("other")
    assert (living / "weights").is_file() and other.is_dir() and not left.exists()
    remove()
    remove_other()
    assert list(tmp_path.iterdir()) == []


def test_a_worker_packs_again_what_vllm_has_packed_once():
    done = []
    packs = Struct(process_weights_after_loading=lambda module: done.append(module))
    head, emptied, other = (torch.nn.Linear(2, 2) for _ in range(3))
    for module in (head, emptied):
        module.cpu_linear, module.quant_method = None, packs
    emptied.weight = torch.nn.Parameter(torch.empty(0))
    worker = PolicyWorker()
    worker.reload_weights = lambda weights_path: done.append(weights_path)
    model = torch.nn.Sequential(head, emptied, other)
    model.load_weights = None
    worker.model_runner = Struct(get_model=lambda: model, model_config=Struct(quantization=None))
    worker.reload_policy("folder")
    assert done == ["folder", head]


@pytest.fixture
def shared_memory(tmp_path, monkeypatch):
    """Shared memory and temporary files of the test's own, and how much room the memory has."""
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    monkeypatch.setattr(policy_weights, "SHARED_MEMORY", memory)
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    found = Struct(memory=memory, disk=disk, room=2**30)
    monkeypatch.setattr(policy_weights.shutil, "disk_usage", lambda path: Struct(free=found.room))
    return found


def test_a_checkpoint_is_in_shared_memory_and_linked_from_where_it_was_asked_for(shared_memory, tokenizer):
    folder, remove = claim_folder("run")
    file = PolicyFile("key", 0, folder / "1", adapter=False)
    assert write_checkpoint(tiny_model(tokenizer), file.folder) is None
    assert file.weights.is_file() and file.folder.is_symlink()
    assert file.shared_folder() == shared_memory.memory / folder.name / "1"
    file.remove()
    assert list(folder.iterdir()) == list((shared_memory.memory / folder.name).iterdir()) == []
    write_checkpoint(tiny_model(tokenizer), folder / "2")
    remove()
    assert list(shared_memory.disk.iterdir()) == list(shared_memory.memory.iterdir()) == []


@pytest.mark.parametrize("problem", ["small", "full", "missing"])
def test_a_checkpoint_without_room_in_memory_is_on_disk_and_says_why(shared_memory, tokenizer, monkeypatch, problem):
    folder, remove = claim_folder("run")
    if problem == "small":
        shared_memory.room, said = 1000, "has room for 0.0 GiB, and two versions of the weights take 0.0 GiB"
    elif problem == "missing":
        monkeypatch.setattr(policy_weights, "SHARED_MEMORY", shared_memory.memory / "none")
        said = "there is no shared memory at "
    else:
        write, said = write_policy, r"cannot hold them \(No space left on device\)"

        def write_some(policy, folder):
            write(policy, folder)
            if folder.is_relative_to(shared_memory.memory):
                raise SafetensorError("No space left on device")

        monkeypatch.setattr(policy_weights, "write_policy", write_some)
    file = PolicyFile("key", 0, folder / "1", adapter=False)
    assert re.search(said, write_checkpoint(tiny_model(tokenizer), file.folder))
    assert file.weights.is_file() and not file.folder.is_symlink() and file.shared_folder() is None
    assert list(shared_memory.memory.rglob("*.safetensors")) == []
    remove()
    assert list(shared_memory.disk.iterdir()) == []


def test_an_adapter_is_on_disk(shared_memory, tokenizer):
    folder, remove = claim_folder("run")
    policy = get_peft_model(tiny_model(tokenizer), LoraConfig(r=4, target_modules=["q_proj"]))
    assert write_checkpoint(policy, folder / "1") is None
    assert (folder / "1" / "adapter_model.safetensors").is_file() and list(shared_memory.memory.iterdir()) == []
    remove()


def test_shared_memory_of_a_process_that_was_killed_is_freed(shared_memory):
    left = policy_folder("killed")
    left.with_name(f"{left.name}.lock").touch()
    weights = shared_memory.memory / left.name / "1" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    claim_folder("other")[1]()
    assert list(shared_memory.memory.iterdir()) == []


# All weights from the memory of the process


class Workers(LLM):
    """An engine whose workers load the weights into models of the test's own; `problems` are what they say."""

    def __init__(self, count=1, problems=()):
        super().__init__()
        self.loaded, self.problems, self.count = [], problems, count
        self.fails = False

    async def collective_rpc(self, method, args):
        self.calls.append(("collective_rpc", (method,), {"args": args}))
        if method == "reload_shared_policy":
            if self.fails:
                raise ValueError("half-way")
            self.loaded.append({name: value.clone() for name, value in opened_tensors(args[0])})
            return [*self.problems, *[None] * (self.count - len(self.problems))]
        return [None] * self.count

    @property
    def methods(self):
        return [call[1][0] for call in self.calls if call[0] == "collective_rpc"]


def test_shared_weights_are_loaded_before_the_call_returns(stand_in):
    llm = Workers()
    engine = VLLMEngine(llm)
    sent = {"a": torch.ones(3)}

    async def run():
        with shared_tensors(sent) as handles:
            assert await engine.load_shared(SharedPolicy("run-1", 5, handles)) is None
        sent["a"] += 1  # as an optimizer does
        return await engine.generate(TokenRequest([1, 2], 20, [9], 0.7))

    assert asyncio.run(run()).version == 5
    assert torch.equal(llm.loaded[0]["a"], torch.ones(3))
    assert [call[0] for call in llm.calls[:3]] == ["collective_rpc", "reset_prefix_cache", "collective_rpc"]
    assert llm.methods == ["reload_shared_policy", "reseed"]


@pytest.mark.parametrize("failure", ["refused by one worker", "failed", "checkpoint failed"])
def test_an_engine_with_some_of_the_new_weights_does_not_sample(stand_in, tmp_path, failure):
    llm = Workers(count=2)
    engine = VLLMEngine(llm)

    async def run():
        with shared_tensors({"a": torch.ones(3)}) as handles:
            await engine.load_shared(SharedPolicy("run-1", 1, handles))
            if failure == "refused by one worker":
                llm.problems = [None, "it is on another GPU"]
                assert await engine.load_shared(SharedPolicy("run-2", 2, handles)) == "it is on another GPU"
            elif failure == "failed":
                llm.fails = True
                with pytest.raises(SamplerError, match="the weights of version 2: ValueError: half-way"):
                    await engine.load_shared(SharedPolicy("run-2", 2, handles))
            else:
                llm.collective_rpc = None
                with pytest.raises(SamplerError, match="the weights of version 2: TypeError"):
                    await engine.load(PolicyFile("run-2", 2, tmp_path, adapter=False))
        with pytest.raises(SamplerError, match="before it was given a policy"):
            await engine.generate(TokenRequest([1], 1, [9], 1.0))

    asyncio.run(run())


def test_a_full_run_hands_its_weights_over_without_a_file(tmp_path, tokenizer, in_process, shared_memory):
    llm = Workers()
    in_process(VLLMEngine(llm))
    trainer = train(tmp_path, tokenizer, lora=False, use_vllm=True)
    rollouts, policy = trainer.rollouts.vllm, trainer.model
    for step in (0, 1):
        trainer.state.global_step = step
        for _ in range(2):
            rollouts.send(policy)
        with torch.no_grad():
            policy.lm_head.weight += 1
    first, second = (loaded["lm_head.weight"] for loaded in llm.loaded)
    assert torch.equal(second, first + 1) and llm.methods == ["reload_shared_policy", "reseed"] * 2
    assert llm.loaded[0].keys() == dict(policy.named_parameters()).keys()
    assert list(shared_memory.memory.iterdir()) == list(rollouts.folder.iterdir()) == []
    rollouts.sampler.close()


def test_weights_that_cannot_be_shared_are_sent_as_a_file_and_it_says_so_once(
    tmp_path, tokenizer, in_process, shared_memory, caplog
):
    llm = Workers(problems=["the shared memory cannot be opened"])
    in_process(VLLMEngine(llm))
    trainer = train(tmp_path, tokenizer, lora=False, use_vllm=True)
    shared_memory.room = 0
    for step in (0, 1):
        trainer.state.global_step = step
        trainer.rollouts.vllm.send(trainer.model)
    assert llm.methods == ["reload_shared_policy", "reseed", "reload_policy", "reseed", "reload_policy", "reseed"]
    said = [record.message for record in caplog.records if record.name == vllm_rollouts.__name__]
    assert said[0].endswith("from a checkpoint, and not in its memory: the shared memory cannot be opened.")
    assert said[1].startswith("The weights of the policy for vLLM are written to files on disk: ") and len(said) == 2
    assert list(trainer.rollouts.vllm.folder.iterdir()) == [], "the engine has it"
    trainer.rollouts.vllm.sampler.close()


def test_processes_use_a_file_if_the_engine_of_one_cannot_read_memory(
    tmp_path, tokenizer, in_process, shared_memory, monkeypatch
):
    llm = Workers()
    in_process(VLLMEngine(llm))
    trainer = train(tmp_path, tokenizer, lora=False, use_vllm=True)
    monkeypatch.setattr(vllm_rollouts, "gather_object", lambda found: [*found, "it is on another GPU"])
    trainer.rollouts.vllm.send(trainer.model)
    assert llm.methods == ["reload_shared_policy", "reseed", "reload_policy", "reseed"]
    assert not trainer.rollouts.vllm.shares
    trainer.rollouts.vllm.sampler.close()


@pytest.mark.parametrize(("device", "paths", "lora", "shares"), [
    ("cpu", "none", False, True),
    ("cpu", "none", True, False),
    ("cuda", "none", False, False),
    ("cuda", "attention,weights", False, True),
    ("cuda", "all", True, False),
    ("mps", "all", False, False),
])  # fmt: skip
def test_devices_whose_memory_is_read(tmp_path, tokenizer, in_process, monkeypatch, device, paths, lora, shares):
    in_process(Engine(lambda request: [1]))
    monkeypatch.setattr(vllm_rollouts, "_visible_devices", lambda device: {})
    policy = tiny_model(tokenizer)
    policy = get_peft_model(policy, LoraConfig(r=4)) if lora else policy
    run = Struct(
        bare_model=policy, model=policy, args=config(tmp_path, use_vllm=True, gpu_paths=paths), eos_token_ids=[1],
        accelerator=Struct(device=torch.device(device), is_local_main_process=False, process_index=0),
    )  # fmt: skip
    rollouts = vllm_rollouts.VLLMRollouts(run)
    assert rollouts.shares == shares
    rollouts.sampler.close()


@pytest.mark.parametrize("sleeps", [False, True])
def test_sleep_mode_releases_memory_between_batches(sleeps):
    llm = LLM()

    async def run():
        engine = VLLMEngine(llm, sleeps)
        for _ in range(2):
            await engine.wake()
            await engine.rest()
        await engine.close()

    asyncio.run(run())
    between = [("sleep", (), {"level": 1}), ("wake_up", (), {}), ("sleep", (), {"level": 1})]
    assert llm.calls == [*(between if sleeps else []), ("shutdown", (), {})]


def test_an_adapter_refused_by_vllm_is_an_error_with_its_message(stand_in, tmp_path):
    engine = VLLMEngine(LLM(fail={"add_lora"}))
    with pytest.raises(SamplerError, match=r"the adapter of version 4: ValueError: target module lm_head"):
        asyncio.run(engine.load(PolicyFile("k", 4, tmp_path, adapter=True)))


@pytest.mark.parametrize("ended", [False, True])
def test_a_lost_engine_is_distinguished_from_a_failed_turn(stand_in, tmp_path, ended):
    llm = LLM()
    llm.errored = ended

    async def run():
        engine = VLLMEngine(llm)
        await engine.load(PolicyFile("k", 4, tmp_path, adapter=True))
        llm.generate = lambda *args, **kwargs: failing()
        await engine.generate(TokenRequest([1, 2], 1, [9], 1.0))

    async def failing():
        raise ValueError("too long")
        yield

    said = "vLLM's engine ended: ValueError: too long" if ended else "failed on a turn after 2 tokens: ValueError"
    with pytest.raises(SamplerError, match=said) as caught:
        asyncio.run(run())
    assert isinstance(caught.value, EngineLostError) == ended


def test_options_of_the_engine():
    options = engine_options("m", 5, max_model_len=None, seed=3)
    assert options == {
        "model": "m",
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "disable_log_stats": True,
        "worker_extension_cls": "trl_toolgrpo.sampling.vllm.worker.PolicyWorker",
        "seed": 3,
        "enable_lora": True,
        "max_lora_rank": 8,
        "max_loras": 1,
    }
    assert "enable_lora" not in engine_options("m", None)
    assert engine_options("m", 9)["max_lora_rank"] == 16
    with pytest.raises(ConfigError, match="rank 513, and vLLM supports at most 512"):
        engine_options("m", 513)


@pytest.mark.parametrize("version", ["0.22.0", "0.28.1", "0.31.0", "0.31.0+cpu"])
def test_versions_supported_by_trl_are_accepted(version):
    check_version(version, "It")


@pytest.mark.parametrize("version", ["0.21.9", "0.32.0", "1.0"])
def test_other_versions_are_refused_with_the_supported_ones(version):
    with pytest.raises(ConfigError) as caught:
        check_version(version, "This environment")
    assert str(caught.value).startswith(f"This environment has vLLM {version}, which TRL ")
    assert f"`pip install 'vllm{supported_versions()}'`" in str(caught.value) and "0.31.0" in str(supported_versions())


def test_missing_vllm_names_the_remedies(monkeypatch, tmp_path, tokenizer):
    found = vllm_engine.importlib.util.find_spec
    spec = lambda name, *more: None if name == "vllm" else found(name, *more)  # noqa: E731
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", spec)
    with pytest.raises(ConfigError) as caught:
        train(tmp_path, tokenizer, use_vllm=True)
    for remedy in ("pip install 'trl_toolgrpo[vllm]'", "`vllm_mode='server'`", "`rollout_backend='transformers'`"):
        assert remedy in str(caught.value)


# Options


def test_use_vllm_is_the_backend_unless_the_rollouts_are_trls(tmp_path):
    assert config(tmp_path, use_vllm=True).rollout_backend == "vllm"
    assert config(tmp_path, rollout_backend="vllm").rollout_backend == "vllm"
    assert config(tmp_path, use_vllm=True, record_sample_logprobs=False).rollout_backend == "transformers"
    assert config(tmp_path).rollout_backend == "transformers"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"record_sample_logprobs": False}, "TRL's vLLM is `use_vllm=True`"),
        ({"vllm_mode": "ray"}, "Choose one of colocate, server"),
        ({"vllm_structured_outputs_regex": "a+"}, "vllm_structured_outputs_regex"),
        ({"force_rate": 0.5, "force_level": "schema"}, "`force_level='call'` or 'name'"),
        ({"deterministic_rollouts": True}, "deterministic_rollouts=True"),
        ({"top_p": 0.9}, "top_p=0.9"),
    ],
)
def test_what_vllm_cannot_do_is_refused(tmp_path, changes, said):
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, rollout_backend="vllm", **changes)
    assert said in str(caught.value)


def test_versions_are_part_of_a_turn():
    record = {
        "prompt_ids": [1],
        "completion_ids": [2, 3],
        "logprobs": [-1.0, -0.5],
        "tool_mask": [1, 1],
        "forced_mask": [0, 0],
        "turns": [{"start": 0, "end": 2, "policy_version": 4}],
        "stop_reason": "stop",
    }
    trajectory = Trajectory.from_dict(record)
    assert trajectory.turns[0].policy_version == 4
    assert Trajectory.from_dict(trajectory.to_dict()) == trajectory
    for wrong in (-1, 1.5, True, "4"):
        record["turns"][0]["policy_version"] = wrong
        with pytest.raises(TrajectoryError, match=r"turns\[0\].policy_version` expected optimizer steps"):
            Trajectory.from_dict(record)


# Training


def train(path, tokenizer, *, lora=True, reward=None, tools=None, model=None, **changes):
    """Return a trainer on vLLM; LoRA does not start at zero, so that rollouts without the adapter would be noticed."""
    options = {"max_steps": 3, "learning_rate": 0.05, "logprob_check": "always", "vllm_server_timeout": 30.0}
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None
    return ToolGRPOTrainer(
        model or tiny_model(tokenizer),
        reward or (lambda completions, **kwargs: [float(index) for index in range(len(completions))]),
        config(path, **{**options, **changes}),
        prompts(),
        processing_class=tokenizer,
        peft_config=adapter,
        tools=tools,
    )


def watching(seen):
    def reward(completions, trajectories, **kwargs):
        seen.append([turn.policy_version for t in trajectories for turn in t.turns])
        return [float(index) for index in range(len(completions))]

    return reward


@pytest.fixture
def in_process(monkeypatch):
    """Replace vLLM's engine by one of the test's own; return the options it was started with."""
    started = {}

    def put(engine):
        async def start(options):
            started.update(options)
            return engine

        monkeypatch.setattr(vllm_rollouts, "check_installed", lambda: None)
        monkeypatch.setattr(vllm_rollouts.VLLMEngine, "start", staticmethod(start))
        return started

    return put


def test_tools_run_while_the_rest_is_sampled(tmp_path, tokenizer, in_process):
    """One rollout calls a tool of half a second, three take a second each to sample: all in little more than that."""

    def write(request):
        text = tokenizer.decode(request.prompt_ids)
        called = "<tool_response>" in text
        done = called or request is not engine.asked[0]
        return tokenizer("fine<|im_end|>" if done else tool_call("wait", seconds=0.5) + "<|im_end|>")["input_ids"]

    def wait(seconds: float) -> str:
        """
        Waits.

        Args:
            seconds: how long.
        """
        running.append(sum(1 for _ in engine.asked))
        time.sleep(seconds)
        return "waited"

    running, seen = [], []
    engine = Engine(write, delay=lambda request: 0.0 if request is engine.asked[0] else 1.0)
    in_process(engine)
    changes = {"max_steps": 1, "logprob_check": "off", "max_completion_length": 400, "learning_rate": 0.0}
    trainer = train(tmp_path, tokenizer, use_vllm=True, tools=[wait], reward=watching(seen), **changes)
    trainer.train()
    batch = trainer.rollouts.batch
    assert sorted(len(t.turns) for t in batch.trajectories) == [1, 1, 1, 2]
    assert batch.stats.tool_wait_seconds < 0.3, "the tool ran while turns were being sampled"
    assert seen == [[0] * 5]


def test_trls_options_set_the_engine_up(tmp_path, tokenizer, in_process):
    engine = Engine(lambda request: [tokenizer.eos_token_id])
    started = in_process(engine)
    options = {"vllm_max_model_length": 256, "vllm_gpu_memory_utilization": 0.4, "vllm_enable_sleep_mode": True}
    trainer = train(tmp_path, tokenizer, use_vllm=True, seed=11, **options)
    expected = {
        "model": "tiny-qwen3",
        "dtype": "float32",
        "max_lora_rank": 8,
        "max_model_len": 256,
        "max_num_seqs": 4,
        "gpu_memory_utilization": 0.4,
        "enable_sleep_mode": True,
        "model_impl": "vllm",
        "seed": 11,
    }
    assert {name: started[name] for name in expected} == expected
    assert trainer.args.use_vllm and not trainer.use_vllm, "TRL makes no engine of its own"
    trainer.rollouts.engine.sampler.close()


def test_unsupported_models_and_layouts_are_refused(tmp_path, tokenizer, in_process):
    in_process(Engine(lambda request: [1]))
    with pytest.raises(ConfigError, match=r"vllm_tensor_parallel_size=2.*trl_toolgrpo.serve --tensor-parallel-size 2"):
        train(tmp_path, tokenizer, use_vllm=True, vllm_tensor_parallel_size=2)
    model = tiny_model(tokenizer)
    model.config._name_or_path = ""
    with pytest.raises(ConfigError, match=r"not loaded from anywhere. Save it with `save_pretrained`"):
        train(tmp_path, tokenizer, use_vllm=True, model=model)
    dora = LoraConfig(r=4, use_dora=True, target_modules="all-linear")
    with pytest.raises(ConfigError, match=r"use_dora=True.*rollout_backend='transformers'"):
        train(tmp_path, tokenizer, use_vllm=True, lora=False, model=get_peft_model(tiny_model(tokenizer), dora))


def test_trls_own_vllm_is_left_to_trl(tmp_path, tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(trl_grpo, "VLLMGeneration", lambda **options: asked.append(options))
    trainer = train(tmp_path, tokenizer, use_vllm=True, record_sample_logprobs=False)
    assert len(asked) == 1 and trainer.use_vllm and trainer.rollouts.vllm is None


@pytest.mark.parametrize(("lora", "estimator"), [(True, "group"), (False, "group"), (False, "gae")])
def test_a_served_run_samples_from_what_it_was_sent(tmp_path, tokenizer, lora, estimator):
    """Every token of three steps is checked against the trainer; each step is written by its own version."""
    seen = []
    with ServerProcess() as server:
        server.about()
        options = {"rollout_backend": "vllm", "vllm_mode": "server", "vllm_server_base_url": server.url}
        options["advantage_estimator"] = estimator
        trainer = train(tmp_path, tokenizer, lora=lora, reward=watching(seen), **options)
        sizes = []
        load = trainer.rollouts.engine.sampler.load
        trainer.rollouts.engine.sampler.load = lambda file: (sizes.append(file.weights.stat().st_size), load(file))
        trainer.train()
        assert seen == [[0] * 4, [1] * 4, [2] * 4]
        trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad and "value_head" not in n}
        count = sum(parameter.numel() for parameter in trained.values())
        assert len(sizes) == 3 and all(0 < size - 4 * count < 20_000 for size in sizes), "what is trained, and no more"
        for row in trainer.state.log_history[:3]:
            assert ("value/loss" in row) == (estimator == "gae"), "from one pass without gradient"
            assert row["ratio/mean"] == pytest.approx(1.0, abs=1e-4) and row["sampling/logp_diff_max"] < 1e-3
        assert len(list(trainer.rollouts.vllm.folder.iterdir())) == 1, "older versions are deleted"


@pytest.mark.parametrize("fate", ["hangs", "ends"])
def test_a_server_lost_during_a_rollout_batch_loses_and_repeats_nothing(tmp_path, tokenizer, caplog, fate):
    seen, killed = [], []

    def kill():
        if fate == "hangs":
            server.wait_for(lambda about: about["version"] == 1 and about["running"] == 4)
            server.kill()
        server.process.join()
        killed.append(server.process.exitcode)
        server.start()

    with ServerProcess(fate) as server, caplog.at_level(logging.WARNING):
        server.about()
        options = {"rollout_backend": "vllm", "vllm_mode": "server", "vllm_server_base_url": server.url}
        trainer = train(tmp_path, tokenizer, reward=watching(seen), **options)
        killer = threading.Thread(target=kill)
        killer.start()
        trainer.train()
        killer.join()
    assert killed == [-9 if fate == "hangs" else 1]
    retried = trainer.rollouts.engine.sampler.engine.retried
    assert retried == 4 if fate == "hangs" else retried >= 4, "every lost turn is requested again"
    assert seen == [[0] * 4, [1] * 4, [2] * 4]
    assert [row["ratio/mean"] for row in trainer.state.log_history[:3]] == pytest.approx([1.0] * 3, abs=1e-4)
    assert f"The rollout server at {server.url} was lost" in caplog.text


def connect(server_url, timeout=5.0, shape=None):
    shape = shape or model_shape(tiny_model(chat_tokenizer()).config)

    async def run():
        engine = await ServedEngine.start(server_url, timeout, "tiny-qwen3", shape)
        await engine.close()
        return engine.max_length

    return asyncio.run(run())


def test_unsuitable_servers_are_errors_with_a_remedy(monkeypatch):
    with pytest.raises(RolloutServerError) as caught:
        connect("http://127.0.0.1:9", timeout=0.1)
    said = str(caught.value)
    assert "http://127.0.0.1:9 was unreachable for 0.1 s" in said and "`vllm_server_timeout`" in said
    assert "python -m trl_toolgrpo.serve --model tiny-qwen3" in said and "`vllm_server_base_url`" in said
    assert isinstance(caught.value, ConnectionError)
    with ServerProcess() as server:
        server.about()
        assert connect(server.url) == 4096
        other = model_shape(tiny_model(chat_tokenizer(), hidden_size=64).config)
        with pytest.raises(RolloutServerError, match=r"'tiny' \(hidden_size=32\).*trains .* \(hidden_size=64\)"):
            connect(server.url, shape=other)
    with ServerProcess(vllm="0.21.0") as server:
        server.about()
        with pytest.raises(ConfigError, match=r"The rollout server at .* has vLLM 0.21.0"):
            connect(server.url)


def test_other_kinds_of_servers_are_refused_at_once():
    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(RolloutServerError, match=r"is not a rollout server \(status 404\).*vllm serve"):
            connect(f"http://127.0.0.1:{server.server_port}", timeout=60.0)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("readable", [True, False])
def test_a_server_on_the_machine_reads_shared_memory(tokenizer, caplog, readable):
    """Elsewhere it is sent the tensors."""
    folder, remove = claim_folder(uuid.uuid4().hex)
    file = PolicyFile("one", 3, folder / "1", adapter=False)
    again = PolicyFile("two", 4, folder / "1", adapter=False)
    assert write_checkpoint(tiny_model(tokenizer), file.folder) is None
    bodies = []

    async def run(server):
        engine = await ServedEngine.start(server.url, 20.0, "tiny", model_shape(tiny_model(tokenizer).config))
        put = engine._http.put
        engine._http.put = lambda url, data: put(url, data=counted(data))
        try:
            await engine.load(file)
            server.kill()
            server.start()
            await asyncio.to_thread(server.about)
            assert (await engine.generate(TokenRequest([1, 2], 2, [0], 1.0))).version == 3
            await engine.load(again)
            return (await engine.generate(TokenRequest([1, 2], 2, [0], 1.0))).version
        finally:
            await engine.close()

    async def counted(data):
        bodies.append(0)
        async for chunk in data:
            bodies[-1] += len(chunk)
            yield chunk

    with ServerProcess(memory=None if readable else "/elsewhere") as server, caplog.at_level(logging.INFO):
        server.about()
        assert asyncio.run(run(server)) == 4
    size = file.weights.stat().st_size
    if readable:
        assert len(bodies) == 3 and max(bodies) < 500, "where it is, and no tensors"
    else:
        assert len(bodies) == 4 and bodies[0] < 500 and min(bodies[1:]) > size
    assert ("cannot read the shared memory of this process" in caplog.text) != readable
    assert file.weights.is_file(), "it is the run's"
    remove()


@pytest.mark.parametrize("folder", ["/etc", "/dev/shm", "/dev/shm/other/1", "/dev/shm/trl_toolgrpo-policy-x/.."])
def test_other_folders_are_not_read(folder):
    assert not is_shared_folder(Path(folder)) and is_shared_folder(Path("/dev/shm/trl_toolgrpo-policy-x/1"))


def test_two_runs_on_one_server_are_an_error(tmp_path):
    """The other run sends its weights whenever this one has sent its own."""
    folder = tmp_path / "weights"
    folder.mkdir()
    write_policy(tiny_model(chat_tokenizer()), folder)

    async def run(url):
        shape = model_shape(tiny_model(chat_tokenizer()).config)
        one, other = [await ServedEngine.start(url, 5.0, "tiny", shape) for _ in range(2)]
        try:
            await one.load(PolicyFile("one", 0, folder, adapter=False))
            for _ in range(vllm_client.LOST_POLICIES + 1):
                await other.load(PolicyFile("other", 9, folder, adapter=False))
                reply = await one.generate(TokenRequest([1, 2], 2, [0], 1.0))
                assert reply.version == 0, "never an answer from the other run's weights"
        finally:
            await one.close()
            await other.close()

    with ServerProcess() as server:
        server.about()
        with pytest.raises(RolloutServerError, match=r"another run uses it\. Start a server for each run"):
            asyncio.run(run(server.url))


def test_a_server_that_stops_answering_is_an_error(monkeypatch):
    """A lost machine closes no connection: the turn is given up when the server answers no other request."""
    monkeypatch.setattr(vllm_client, "WATCH_SECONDS", 0.05)

    async def run():
        engine = ServedEngine("http://127.0.0.1:9", 0.1, "tiny", {})
        engine._policy = PolicyFile("k", 0, None, adapter=False)
        engine._post = lambda body: asyncio.sleep(3600)
        try:
            await engine.generate(TokenRequest([1], 1, [0], 1.0))
        finally:
            await engine.close()

    with pytest.raises(RolloutServerError, match=r"unreachable for 0\.1 s"):
        asyncio.run(asyncio.wait_for(run(), 20))


def test_a_sent_policy_is_described_by_its_header(tmp_path, tokenizer):
    write_policy(get_peft_model(tiny_model(tokenizer), LoraConfig(r=4, target_modules=["q_proj"])), tmp_path)

    async def body():
        return b"".join([chunk async for chunk in vllm_client._packed(PolicyFile("k", 2, tmp_path, adapter=True))])

    sent = asyncio.run(body())
    size = int.from_bytes(sent[:8], "little")
    about = json.loads(sent[8 : 8 + size])
    assert about["key"] == "k" and about["version"] == 2 and about["adapter_config"]["target_modules"] == ["q_proj"]
    assert sent[8 + size :] == (tmp_path / "adapter_model.safetensors").read_bytes()
