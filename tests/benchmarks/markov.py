"""Shared parts of the benchmarks against TRL: a policy with known text at its true cost, and a process for each side.

The policy is a known Markov chain at the true cost of its shape. Every block's `o_proj` and `down_proj` are zero, so
that the residual stream carries only the current token, and the LM head is the transition table. Both trainers
therefore write the same text, and the log-prob of every token is known.

The LM head is not tied to the embedding, unlike in the small Qwen3 models: a tied one would make every token its own
likeliest successor. A decoding step and an update multiply by the same matrices either way. An untied head adds the
memory of one matrix, with its gradient and optimizer state where all weights are trained.
"""

import contextlib
import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cases import SHAPES, device, dtype_options, in_dtype
from machine import leave_room, peak_mib


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

CALL = ["<tool_call>", '\n{"name": "ping", "arguments": {}}\n', "</tool_call>", "<|im_end|>"]


def chain_text(tokens: int = 20, alternative: int = 0) -> list[str]:
    """
    Return the turn that the policy writes: words and a tool call, without a repeated token.

    Args:
        tokens (`int`, *optional*, defaults to 20):
            Number of tokens, at least 5.
        alternative (`int`, *optional*, defaults to 0):
            Other words in the same places, for a policy that has a choice.

    Returns:
        `list[str]`: the text of each token.
    """
    other = f"or{alternative}" if alternative else ""
    return [*(f" step{i}{other}" for i in range(tokens - len(CALL))), *CALL]


def build_tokenizer(turn_tokens: int = 20, alternatives: int = 1) -> Any:
    """Build a byte-level tokenizer with Qwen3's chat template, in which each piece of each turn is one token."""
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
    texts = [chain_text(turn_tokens, alternative) for alternative in range(alternatives)]
    tokenizer.add_tokens([*dict.fromkeys(itertools.chain(*texts)), "<|im_start|>", *(f" w{i}" for i in range(100))])
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3_instruct_2507.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def build_model(
    tokenizer: Any,
    shape: str = "small",
    turn_tokens: int = 20,
    dtype: str = "float32",
    alternatives: int = 1,
    leak: float = 0.0,
) -> Any:
    """
    Build a Qwen3 that writes `chain_text` after every newline that ends a prompt.

    Args:
        tokenizer (`PreTrainedTokenizerFast`):
            That of `build_tokenizer` for the same turns.
        shape (`str`, *optional*, defaults to `"small"`):
            Key of `SHAPES`.
        turn_tokens (`int`, *optional*, defaults to 20):
            Tokens of a turn.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Key of `DTYPES`, for the weights.
        alternatives (`int`, *optional*, defaults to 1):
            Words to choose from at each place; with more than one the text is drawn, and log-probs are not 0.
        leak (`float`, *optional*, defaults to 0):
            Scale of each block's `o_proj` and `down_proj`. Above 0, log-probs depend on the whole history and on every
            rounding on the way.

    Returns:
        `Qwen3ForCausalLM`: the model, on the device of training.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        **asdict(SHAPES[shape]),
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device(device()):  # an accelerator draws random numbers much faster
        model = Qwen3ForCausalLM(config)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    texts = [chain_text(turn_tokens, alternative) for alternative in range(alternatives)]
    places = [[newline], *(tokenizer.convert_tokens_to_ids(sorted(set(place))) for place in zip(*texts, strict=True))]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(leak)
            layer.mlp.down_proj.weight.mul_(leak)
        head = model.lm_head.weight.zero_()
        for current, following in itertools.pairwise(places):
            if len(following) > 1:  # the state decides which is likelier, with a standard deviation of 1
                head[following] = torch.randn(len(following), config.hidden_size).to(head) / config.hidden_size**0.5
            for token in current:
                state = model.model.norm(model.model.embed_tokens.weight[token])
                head[following] += 40 * state / state.square().sum()
    model.config._name_or_path = "markov-chain"
    return in_dtype(model, dtype)


def conversations(tokenizer: Any, prompts: int, tokens: int) -> list[list[dict[str, str]]]:
    """Return different prompts of about `tokens` tokens."""
    empty = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tools=[ping], tokenize=True)
    overhead = len(empty["input_ids"])
    words = max(tokens - overhead, 1)
    return [
        [{"role": "user", "content": "".join(f" w{(i * (p + 3)) % 100}" for i in range(words))}]
        for p in range(prompts)
    ]


def trainer_options(model: Any, tokenizer: Any, dtype: str, vllm: bool = False) -> dict[str, Any]:
    """
    Return options of either trainer for this machine.

    Args:
        model (`PreTrainedModel`), tokenizer (`PreTrainedTokenizerFast`):
            The policy, which is saved for vLLM to load.
        dtype (`str`):
            Key of `DTYPES`.
        vllm (`bool`, *optional*, defaults to `False`):
            Whether both sides sample with vLLM in the trainer's process, instead of transformers.

    Returns:
        `dict[str, Any]`: arguments of `GRPOConfig` and of `ToolGRPOConfig`.
    """
    options = dtype_options(dtype)
    if not vllm:
        return options
    folder = tempfile.mkdtemp()  # vLLM loads the model by its name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.config._name_or_path = folder
    return {**options, "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.4}


def ping() -> str:
    """Answers."""
    time.sleep(TOOL_SECONDS)
    return "pong"


TOOL_SECONDS = 0.0


class WorkerError(RuntimeError):
    """A side of a comparison that failed in its round."""


class Worker:
    """
    One side of a comparison: the benchmark script in a process of its own, which works on request.

    Sides take turns, so that other load on the machine affects all of them.

    Args:
        script (`str`):
            Path of the benchmark.
        name (`str`):
            Value of `--worker` for the script.
        flags (`list[str]`):
            Its other arguments.
    """

    def __init__(self, script: str, name: str, flags: list[str]):
        self.name = name
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, script, *flags, "--worker", name]
        pipe = subprocess.PIPE
        # Not a pipe, which would fill up unread
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, env=environment
        )
        self.found: list[dict[str, Any]] = []

    def work(self) -> dict[str, Any]:
        """
        Run one round.

        Returns:
            `dict[str, Any]`: the worker's result, which is also kept in `found`.

        Raises:
            WorkerError: if the round failed, with the worker's traceback, or if the process ended.
        """
        with contextlib.suppress(OSError):  # if it has ended, the reason is read below
            self._say("go")
        while not (line := self.process.stdout.readline()).startswith(MARK):
            if not line:
                self.errors.seek(0)
                raise WorkerError(f"{self.name} failed:\n{self.errors.read()}")
        told = json.loads(line.removeprefix(MARK))
        if "error" in told:
            raise WorkerError(f"{self.name} failed:\n{told['error']}")
        self.found.append(told)
        return told

    def move_on(self) -> None:
        """Move the worker to its next case, and drop the results of this one."""
        self.found = []
        with contextlib.suppress(OSError):
            self._say("next")

    def end(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.stdout.read()
        self.process.wait()

    def _say(self, word: str) -> None:
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()


class Warnings(logging.Handler):
    """Collects this package's warnings, such as a sampler that falls back, for the results; each line once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logging.getLogger("trl_toolgrpo").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning."""
        line = record.getMessage()
        if line not in self.lines:
            self.lines.append(line)

    def take(self) -> list[str]:
        """Return the warnings since the last call."""
        taken, self.lines = self.lines, []
        return taken


WARNINGS = Warnings()

MARK = "benchmark: "
_asked_for = [False]  # whether a requested round is not answered yet


def told() -> bool:
    """Wait in a worker for the request of a round; `False` if there will be none, or none of this case."""
    _asked_for[0] = sys.stdin.readline().strip() == "go"
    return _asked_for[0]


def tell(**found: Any) -> None:
    """Send the result of a round from a worker, with the peak memory so far and the warnings."""
    warned = {"warnings": WARNINGS.lines} if WARNINGS.lines else {}
    leave_room()  # the other side is next
    print(f"{MARK}{json.dumps({**found, 'peak_mib': peak_mib(), **warned})}", flush=True)
    _asked_for[0] = False


def tell_failure(error: str) -> None:
    """Answer the requested round of this case, and any other, with its failure, in a worker."""
    while _asked_for[0] or told():
        tell(error=error)


def serve(work: Callable[[], dict[str, Any]]) -> None:
    """Run rounds in a worker as long as they are requested."""
    while told():
        tell(**work())
