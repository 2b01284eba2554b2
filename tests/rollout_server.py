"""A rollout server in a process of its own whose engine is a tiny model of transformers: real HTTP, real weights that
are sent to it, no vLLM."""

import asyncio
import json
import multiprocessing
import os
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import chat_tokenizer, tiny_model
from peft import PeftModel
from safetensors.torch import load_file

from trl_toolgrpo.errors import EngineLostError
from trl_toolgrpo.sampling.vllm import policy_weights
from trl_toolgrpo.sampling.vllm.client import model_shape
from trl_toolgrpo.sampling.vllm.sampler import TokenReply
from trl_toolgrpo.sampling.vllm.server import serve


class TinyEngine:
    """
    Samples with the model the tests train, from the weights it was sent.

    Args:
        fate (`str`, *optional*): what becomes of the second version's turns: it `"hangs"` or `"ends"` over them.
    """

    max_length = 4096

    def __init__(self, fate):
        self.fate = fate
        self.model = self.version = None

    async def load(self, policy):
        self.model = tiny_model(chat_tokenizer()).eval()
        if policy.adapter:
            self.model = PeftModel.from_pretrained(self.model, policy.folder).eval()
        else:
            assert not self.model.load_state_dict(load_file(policy.weights), strict=False).unexpected_keys
        self.version = policy.version

    async def generate(self, request):
        ids, logprobs = list(request.prompt_ids), []
        for _ in range(request.max_new_tokens):
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1]
            scores = torch.log_softmax(logits / request.temperature, dim=-1)
            ids.append(int(torch.multinomial(scores.exp(), 1)))
            logprobs.append(float(scores[ids[-1]]))
            if ids[-1] in request.stop_ids:
                break
        if self.fate == "ends" and self.version == 1:
            raise EngineLostError("The engine ended.")
        await asyncio.sleep(3600 if self.fate == "hangs" and self.version == 1 else 0)
        return TokenReply(ids[len(request.prompt_ids) :], logprobs, self.version)

    async def wake(self):
        pass

    async def rest(self):
        pass

    async def close(self):
        pass


def _run(port, fate, token, memory, changes):
    torch.set_num_threads(1)
    policy_weights.SHARED_MEMORY = Path(memory or policy_weights.SHARED_MEMORY)

    async def start():
        return TinyEngine(fate)

    about = {"model": "tiny", "shape": model_shape(tiny_model(chat_tokenizer()).config), "vllm": "0.31.0"}
    serve(start, {**about, **changes}, "127.0.0.1", port, token)


class ServerProcess:
    """
    A server that can be killed and started again on its port.

    Args:
        fate (`str`, *optional*): see [`TinyEngine`]; one that was started again has none.
        token (`str`, *optional*): what its clients have to show.
        memory (`str`, *optional*): where it looks for shared memory.
        changes: what it says about itself that is not so.
    """

    # Forks of a process that has imported everything, and has no threads
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["rollout_server"])

    def __init__(self, fate=None, token=None, memory=None, **changes):
        self.fate, self.token, self.memory, self.changes = fate, token, memory, changes
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.kill()

    def start(self):
        options = (self.port, self.fate if self.process is None else None, self.token, self.memory, self.changes)
        self.process = self.processes.Process(target=_run, args=options, daemon=True)
        here = Path(__file__).parent
        with pytest.MonkeyPatch.context() as patch:  # what is imported beforehand is looked for there
            patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (here, here.parent))))
            self.process.start()

    def kill(self):
        self.process.kill()
        self.process.join()

    def about(self, wait=120.0):
        """Return what the server says about itself, once it answers."""
        deadline = time.monotonic() + wait
        while True:
            shown = {"Authorization": f"Bearer {self.token}"} if self.token else {}
            request = urllib.request.Request(f"{self.url}/rollouts", headers=shown)
            try:
                with urllib.request.urlopen(request, timeout=5) as response:
                    return json.load(response)
            except (OSError, urllib.error.URLError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def wait_for(self, condition, wait=120.0):
        """Wait until what the server says meets a condition."""
        deadline = time.monotonic() + wait
        while not condition(self.about()):
            assert time.monotonic() < deadline, "The server never got there."
            time.sleep(0.02)
