"""Rollouts of this package against TRL's: the same model, prompts, tools and text, each in a process of its own.

    python tests/benchmarks/rollout.py --vs trl

The policy is a known Markov chain at the true cost of its shape: every block's `o_proj` and `down_proj` are zero, so
that the residual stream carries the current token alone, and the LM head is the transition table. Both trainers
therefore write the same text, and the log-prob of every token is known.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
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


def ping() -> str:
    """Answers."""
    time.sleep(TOOL_SECONDS)
    return "pong"


TOOL_SECONDS = 0.0


def build_trainer(backend: str, arguments: argparse.Namespace) -> tuple[Any, list]:
    """A trainer of TRL's or of this package's, and the prompts of one rollout batch."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    distinct = conversations(tokenizer, arguments.prompts, arguments.prompt_tokens)
    rows = [prompt for prompt in distinct for _ in range(arguments.samples)]

    options: dict[str, Any] = {
        "output_dir": "/tmp/toolgrpo_benchmark" if os.name == "posix" else "toolgrpo_benchmark",
        "per_device_train_batch_size": len(rows),
        "num_generations": arguments.samples,
        "max_completion_length": arguments.turns * 128,
        "max_tool_calling_iterations": arguments.turns - 1,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
    }
    dataset = Dataset.from_list([{"prompt": prompt} for prompt in distinct])
    if backend == "trl":
        trainer: Any = GRPOTrainer(
            model, _reward, GRPOConfig(**options), dataset, processing_class=tokenizer, tools=[ping]
        )
    else:
        from trl_toolgrpo import ToolGRPOConfig, ToolGRPOTrainer

        trainer = ToolGRPOTrainer(
            model, _reward, ToolGRPOConfig(**options), dataset, processing_class=tokenizer, tools=[ping]
        )
    return trainer, rows


def _reward(completions: list, **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


def measure(backend: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time rollout batches of one trainer; medians, tokens and peak memory."""
    import torch

    global TOOL_SECONDS
    TOOL_SECONDS = arguments.tool_ms / 1000
    torch.set_num_threads(arguments.threads)
    trainer, rows = build_trainer(backend, arguments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, sampled, digest = [], 0, 0
    for repeat in range(arguments.repeats + 1):
        if backend == "trl":
            functions = {"ping": trainer.tools[0]}
            trainer._sync_tool_dicts = [functions] * len(rows)
            trainer._async_tool_dicts = [{}] * len(rows)
        started = time.perf_counter()
        prompt_ids, completion_ids, tool_mask, *_ = trainer._generate(rows)
        if repeat:  # the first is a warm-up
            seconds.append(time.perf_counter() - started)
        sampled = sum(map(sum, tool_mask))
        digest = hash(json.dumps([prompt_ids, completion_ids, tool_mask])) if repeat == 0 else digest
    return {
        "seconds": statistics.median(seconds),
        "sampled": sampled,
        "prompt_tokens": len(prompt_ids[0]),
        "digest": digest,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "before_mib": before / 1024,
    }


def in_process(script: str, worker: str) -> dict[str, Any]:
    """What a benchmark script, run again as a worker in a process of its own, prints as its last line."""
    command = [sys.executable, script, *sys.argv[1:], "--worker", worker]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{worker} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run one trainer after the other and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vs", choices=["trl", "none"], default="trl")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--prompt_tokens", type=int, default=600)
    parser.add_argument("--tool_ms", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", choices=["trl", "trl_toolgrpo"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker, arguments)))
        return
    results = {}
    for backend in ["trl_toolgrpo", *([] if arguments.vs == "none" else ["trl"])]:
        results[backend] = found = in_process(__file__, backend)
        speed = found["sampled"] / found["seconds"]
        print(
            f"{backend:>12}: {found['seconds']:6.2f} s for {found['sampled']} tokens = {speed:7.1f} tokens/s, "
            f"prompt {found['prompt_tokens']} tokens, peak memory {found['peak_mib']:.0f} MiB",
            flush=True,
        )
    if len(results) == 2:
        ours, theirs = results["trl_toolgrpo"], results["trl"]
        if ours["digest"] != theirs["digest"]:
            sys.exit("The two trainers wrote different tokens: the ratio would mean nothing.")
        ratio = (ours["sampled"] / ours["seconds"]) / (theirs["sampled"] / theirs["seconds"])
        memory = ours["peak_mib"] / theirs["peak_mib"]
        print(f"rollout speed: {ratio:.1f}x TRL's, with {memory:.2f}x its peak memory (same tokens from both)")


if __name__ == "__main__":
    main()
