"""Weights that another process reads in memory: what it finds there, and what a worker of vLLM does with it.

The GPU is a fake; everything around its handles is not.
"""

import inspect
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing import reductions
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, Qwen3MoeConfig

from trl_toolgrpo.critic.value_head import ValueHead, attach_value_head
from trl_toolgrpo.sampling.vllm import shared_weights
from trl_toolgrpo.sampling.vllm.policy_weights import is_converted, policy_tensors, write_policy
from trl_toolgrpo.sampling.vllm.shared_weights import SharingError, opened_tensors, shared_tensors
from trl_toolgrpo.sampling.vllm.worker import PolicyWorker


def weights():
    torch.manual_seed(0)
    return {
        "odd": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "turned": torch.randn(4, 6).T,
        "count": torch.tensor(2**40),
        "double": torch.randn(2, 1, 3, dtype=torch.float64),
        "empty": torch.empty(0, 4),
    }


def described(name, tensor):
    return name, str(tensor.dtype), tuple(tensor.shape), tensor.double().sum().item()


def _answer(handles, connection):
    """In another process: say what was found, and write to it."""
    found = opened_tensors(handles)
    connection.send([described(name, tensor) for name, tensor in found])
    for _, tensor in found:
        tensor.zero_()


def test_another_process_finds_every_tensor_and_cannot_change_it():
    sent = weights()
    processes = multiprocessing.get_context("fork")
    here, there = processes.Pipe()
    with shared_tensors(sent) as handles:
        assert len(handles) < 2000, "handles, and no tensors"
        process = processes.Process(target=_answer, args=(handles, there))
        process.start()
        assert here.poll(60)
        found = here.recv()
        process.join()
        again = dict(opened_tensors(handles))
    assert found == [described(name, tensor) for name, tensor in sent.items()]
    assert process.exitcode == 0 and again.keys() == sent.keys()
    assert all(again[name].dtype == sent[name].dtype and torch.equal(again[name], sent[name]) for name in sent)


def test_memory_is_freed_when_sharing_ends_and_when_it_fails():

    def blocks():
        paths = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        links = [os.readlink(path) for path in paths if path.is_symlink()]
        return [link for link in links if link.startswith("/memfd:")]

    before = blocks()
    with shared_tensors(weights()) as handles:
        assert len(blocks()) == len(before) + 1
    with pytest.raises(SharingError, match="the shared memory cannot be opened"):
        opened_tensors(handles)
    with pytest.raises(KeyError), shared_tensors(weights()):
        raise KeyError
    assert blocks() == before


def test_another_block_in_the_place_of_the_shared_one_is_refused():
    """As in a container with processes of its own, where the same path is another block."""
    with shared_tensors(weights()) as handles:
        pass
    with shared_tensors({"other": torch.zeros(500)}), pytest.raises(SharingError, match="is not the shared memory"):
        opened_tensors(handles)


def test_what_cannot_be_shared_says_why(monkeypatch):
    apart = {"a": torch.ones(1), "b": torch.ones(1, device="meta")}
    with pytest.raises(SharingError, match="on 2 devices"), shared_tensors(apart):
        pass
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(SharingError, match="gives no anonymous shared memory"), shared_tensors(weights()):
        pass


# The memory of a GPU


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs whose memory is this process's, with what torch is asked of them."""
    found = SimpleNamespace(current=0, uuids=["gpu-a", "gpu-b"], memory={}, devices=[], synchronized=[])

    def reduce(tensor):
        storage = bytes([len(found.memory)])
        found.memory[storage] = tensor.data
        value = tensor.data
        first = (torch.Tensor, value.shape, value.stride(), 0, torch.UntypedStorage, value.dtype)
        return rebuild, (*first, tensor.device.index, storage, value.nbytes, 0, False, b"", 0, b"", False)

    def rebuild(*arguments):
        named = inspect.signature(reductions.rebuild_cuda_tensor).bind(*arguments).arguments
        found.devices.append(named["storage_device"])
        return found.memory[named["storage_handle"]]

    rebuild.__signature__ = inspect.signature(reductions.rebuild_cuda_tensor)
    monkeypatch.setattr(shared_weights, "reduce_tensor", reduce)
    monkeypatch.setattr(shared_weights, "rebuild_cuda_tensor", rebuild)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: found.synchronized.append(device))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: found.current)
    of_device = lambda device: SimpleNamespace(uuid=found.uuids[device.index])  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", of_device)
    return found


def on_gpu(index):
    device = torch.device("cuda", index)
    return {name: SimpleNamespace(device=device, data=value) for name, value in weights().items()}


def test_a_gpus_memory_is_mapped_under_the_index_it_has_for_the_other_process(gpus):
    sent = on_gpu(1)
    with shared_tensors(sent) as handles:
        assert gpus.synchronized == [torch.device("cuda", 1)], "nothing is still being written"
        gpus.uuids = ["gpu-b"]  # the other process sees one GPU
        found = opened_tensors(handles)
    assert [name for name, _ in found] == list(sent) and gpus.devices == [0] * len(sent)
    assert all(tensor is sent[name].data for name, tensor in found), "nothing is copied"


def test_another_gpu_is_refused(gpus):
    with shared_tensors(on_gpu(1)) as handles:
        with pytest.raises(SharingError, match=r"on another GPU \(gpu-a\) than the weights \(gpu-b\)"):
            opened_tensors(handles)
        assert gpus.devices == []


def test_gpu_memory_that_cannot_be_shared_says_why(gpus, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("invalid resource handle")

    with shared_tensors(on_gpu(0)) as handles:
        fail.__signature__ = inspect.signature(reductions.rebuild_cuda_tensor)
        monkeypatch.setattr(shared_weights, "rebuild_cuda_tensor", fail)
        with pytest.raises(SharingError, match=r"cannot be opened \(invalid resource handle\)"):
            opened_tensors(handles)
    monkeypatch.setattr(shared_weights, "reduce_tensor", fail)
    with pytest.raises(SharingError, match=r"cannot be shared \(invalid resource handle\)"), shared_tensors(on_gpu(0)):
        pass
    monkeypatch.setattr(shared_weights, "reduce_tensor", lambda tensor: (reductions.rebuild_tensor, ()))
    with pytest.raises(SharingError, match="a way of its own"), shared_tensors(on_gpu(0)):
        pass


def test_torch_names_the_device_of_a_handle():
    assert "storage_device" in inspect.signature(reductions.rebuild_cuda_tensor).parameters


# The tensors of a policy

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1}
EXPERTS = {
    "qwen3 moe": Qwen3MoeConfig(**SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
}


def models(tokenizer):
    yield tiny_model(tokenizer), False
    yield tiny_model(tokenizer, tie_word_embeddings=True), False
    yield AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)), False
    for config in EXPERTS.values():
        yield AutoModelForCausalLM.from_config(config), True


def test_tensors_of_a_policy_are_those_of_its_checkpoint(tmp_path, tokenizer):
    for index, (policy, converted) in enumerate(models(tokenizer)):
        memory = {tensor.untyped_storage().data_ptr() for tensor in (*policy.parameters(), *policy.buffers())}
        attach_value_head(policy, ValueHead(32))
        tensors = policy_tensors(policy)
        folder = tmp_path / str(index)
        folder.mkdir()
        write_policy(policy, folder)
        written = load_file(folder / "model.safetensors")
        assert tensors.keys() == written.keys()
        assert all(torch.equal(tensors[n], written[n]) and tensors[n].dtype == written[n].dtype for n in written)
        copied = [name for name, tensor in tensors.items() if tensor.untyped_storage().data_ptr() not in memory]
        assert is_converted(policy, dict(policy.named_parameters())) == bool(copied) == converted


def test_a_checkpoint_of_another_form_is_not_made_on_a_gpu(monkeypatch):
    policy = AutoModelForCausalLM.from_config(EXPERTS["mixtral"])
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with pytest.raises(SharingError, match="the weights of MixtralForCausalLM have another form in a checkpoint"):
        policy_tensors(policy)


# The worker


class Model(nn.Module):
    """Loads what it is given by name, and returns the names, as models of vLLM do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2).bfloat16()

    def load_weights(self, weights):
        parameters, loaded = dict(self.named_parameters()), set()
        for name, value in weights:
            parameters[name].data.copy_(value)
            loaded.add(name)
        return loaded


def worker_with(model, quantization=None):
    worker = PolicyWorker()
    config = SimpleNamespace(quantization=quantization)
    worker.model_runner = SimpleNamespace(get_model=lambda: model, model_config=config)
    worker.reload_weights = lambda weights_iterator: model.load_weights(weights_iterator)
    return worker


def test_a_worker_loads_all_weights_from_memory():
    torch.manual_seed(0)
    sent, model = Model(), Model()
    with shared_tensors(sent.float().state_dict()) as handles:
        assert worker_with(model).reload_shared_policy(handles) is None
    for (name, value), loaded in zip(sent.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(value.to(loaded.dtype), loaded), name
    assert model.second.weight.dtype == torch.bfloat16 and "load_weights" not in vars(model)


def test_parameters_that_no_checkpoint_has_are_not_missed():
    """Those that vLLM makes of others, a head that is tied to the embedding until it is loaded, scales of a cache."""
    sent, model = Model().float().state_dict(), Model()
    for name in ("packed", "k_scale"):
        model.register_parameter(name, nn.Parameter(torch.ones(1)))
    model.second.tied = model.first.bias

    def reload(weights_iterator):
        del model.packed  # as vLLM does before it loads
        model.second.tied = nn.Parameter(torch.ones(1))
        model.load_weights(weights_iterator)

    worker = worker_with(model)
    worker.reload_weights = reload
    with shared_tensors(sent) as handles:
        assert worker.reload_shared_policy(handles) is None


@pytest.mark.parametrize("why", ["closed", "quantized"])
def test_a_worker_that_cannot_read_memory_changes_nothing_and_says_why(why):
    sent, model = Model(), Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with shared_tensors(sent.float().state_dict()) as handles:
        if why == "quantized":
            assert worker_with(model, "fp8").reload_shared_policy(handles) == "the engine is quantized"
    if why == "closed":
        assert "cannot be opened" in worker_with(model).reload_shared_policy(handles)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_are_left_out_are_an_error():
    """vLLM itself keeps such a weight as it was, with a warning."""
    sent, model = Model().float().state_dict(), Model()
    del sent["second.weight"]
    with shared_tensors(sent) as handles, pytest.raises(RuntimeError, match=r"no weights for second\.weight$"):
        worker_with(model).reload_shared_policy(handles)
    assert "load_weights" not in vars(model)


def test_a_worker_waits_for_its_gpu(gpus, monkeypatch):
    sent, model = Model().float().state_dict(), Model()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with shared_tensors(sent) as handles:
        assert worker_with(model).reload_shared_policy(handles) is None
    assert gpus.synchronized == [None]
