"""What the benchmarks against TRL share: a policy of known text at its true cost, and a process for each side.

The policy is a known Markov chain at the true cost of its shape: every block's `o_proj` and `down_proj` are zero, so
that the residual stream carries the current token alone, and the LM head is the transition table. Both trainers
therefore write the same text, and the log-prob of every token is known.
"""

import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

TURN_TOKENS = 20


def chain_text() -> list[str]:
    """The turn the policy writes: 16 words and a tool call, 20 tokens, no two of them alike."""
    words = [f" step{i}" for i in range(TURN_TOKENS - 4)]
    return [*words, "<tool_call>", '\n{"name": "ping", "arguments": {}}\n', "</tool_call>", "<|im_end|>"]


def build_tokenizer() -> Any:
    """A byte-level tokenizer with Qwen3's chat template, where each piece of the turn is one token."""
    import trl
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    backend.train_from_iterator(["ping"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    tokenizer.add_tokens([*chain_text(), "<|im_start|>", *(f" w{i}" for i in range(100))])
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3_instruct_2507.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def build_model(tokenizer: Any, vocab_size: int = 8192) -> Any:
    """A 12-layer Qwen3 of width 512 that writes `chain_text` after every newline that ends a prompt."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    chain = [newline, *tokenizer.convert_tokens_to_ids(chain_text())]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for current, following in itertools.pairwise(chain):
            state = model.model.norm(model.model.embed_tokens.weight[current])
            model.lm_head.weight[following] = 40 * state / state.square().sum()
    model.config._name_or_path = "markov-chain"
    return model


def conversations(tokenizer: Any, prompts: int, tokens: int) -> list[list[dict[str, str]]]:
    """Prompts of about `tokens` tokens, no two alike."""
    empty = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tools=[ping], tokenize=True)
    overhead = len(empty["input_ids"])
    words = max(tokens - overhead, 1)
    return [
        [{"role": "user", "content": "".join(f" w{(i * (p + 3)) % 100}" for i in range(words))}]
        for p in range(prompts)
    ]


def device_options(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Options of either trainer for this machine: a CPU in float32, or an accelerator with vLLM in the process."""
    import torch

    if not torch.accelerator.is_available():
        return {"use_cpu": True, "bf16": False}
    folder = tempfile.mkdtemp()  # vLLM loads the model by its name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.config._name_or_path = folder
    return {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.4, "bf16": False}


def ping() -> str:
    """Answers."""
    time.sleep(TOOL_SECONDS)
    return "pong"


TOOL_SECONDS = 0.0


class Worker:
    """
    One side of a comparison: a benchmark script, run again in a process of its own, that works when it is told to.
    Sides take turns, so that whatever else the machine does meets all of them.

    Args:
        script (`str`):
            Path of the benchmark.
        name (`str`):
            What the script gets as `--worker`.
        flags (`list[str]`):
            Its other arguments.
    """

    def __init__(self, script: str, name: str, flags: list[str]):
        self.name = name
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, script, *flags, "--worker", name]
        pipe = subprocess.PIPE
        # Not a pipe: one that nobody reads would fill up
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, env=environment
        )
        self.found: list[dict[str, Any]] = []

    def work(self) -> dict[str, Any]:
        """Have one round done; returns and keeps what the worker tells of it."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith(MARK):
            if not line:
                self.errors.seek(0)
                sys.exit(f"{self.name} failed:\n{self.errors.read()}")
        self.found.append(json.loads(line.removeprefix(MARK)))
        return self.found[-1]

    def end(self) -> None:
        """Let the process go."""
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.wait()


MARK = "benchmark: "


def told() -> bool:
    """In a worker: wait to be told to do a round; `False` when there will be none."""
    return bool(sys.stdin.readline())


def tell(**found: Any) -> None:
    """In a worker: say what came of a round, with the peak memory of the process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{MARK}{json.dumps({**found, 'peak_mib': peak})}", flush=True)


def serve(work: Callable[[], dict[str, Any]]) -> None:
    """In a worker: do rounds for as long as they are asked for."""
    while told():
        tell(**work())
