"""Shared parts of the tests: tokenizers for every chat template, tiny models, a sampler that follows a script."""

import itertools
import os
import re
from contextlib import contextmanager
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trl_toolgrpo import ToolGRPOConfig
from trl_toolgrpo.rollout.sampler import SampledTokens


torch.set_num_threads(1)

TEMPLATES = Path(trl.__file__).parent / "chat_templates"

# Control tokens as the model families write them
_CONTROL = re.compile(
    r"<\|[^|>\s]+\|>|<[a-z_]+\|>|<\|[a-z_]+>|</?(?:think|tool_call|tool_response|arg_key|arg_value|tools)>"
    r"|<\uff5c[^>\uff5c]+\uff5c>|<\|\"\|>|\[gMASK\]|<sop>"
)
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<turn|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|eot|>")
_FAMILY_STOPS = {
    "glm4moe": ["<|observation|>", "<|user|>"],
    "gptoss": ["<|return|>", "<|call|>"],
    "gemma4": ["<turn|>", "<|tool_response>"],
    "diffusion_gemma": ["<turn|>", "<|tool_response>"],
}


def chat_tokenizer(template: str = "qwen3") -> PreTrainedTokenizerFast:
    """
    A byte-level tokenizer with one of TRL's chat templates, byte for byte, and that template's control tokens.

    `tokenizer.stop_texts` lists the tokens that end a turn in the family.
    """
    text = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=320, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(["the name of the employee is in the answer of the tool; the sum is"], trainer)
    found = sorted({*_CONTROL.findall(text), "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>"})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(found, special_tokens=False)
    family = next((stops for name, stops in _FAMILY_STOPS.items() if template.startswith(name)), None)
    stops = family or [next(token for token in _END_OF_TURN if token in text)]
    tokenizer.eos_token = stops[0]
    tokenizer.stop_texts = stops
    tokenizer.chat_template = text
    return tokenizer


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **changes) -> Qwen3ForCausalLM:
    """A two-layer Qwen3 with random weights over the tokenizer's vocabulary."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**{**options, **changes}))
    model.config._name_or_path = "tiny-qwen3"
    return model


def prompts(count: int = 4, text: str = "hello") -> Dataset:
    """Conversational prompts."""
    return Dataset.from_list([{"prompt": [{"role": "user", "content": f"{text} {i}"}]} for i in range(count)])


def config(path, **changes) -> ToolGRPOConfig:
    """A configuration for a few quick steps in float32 on the CPU."""
    options = {
        "output_dir": str(path),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 16,
        "max_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return ToolGRPOConfig(**{**options, **changes})


class ScriptedSampler:
    """
    A sampler that writes a given text for each turn of each row, with log-prob -0.5 for every token.

    Args:
        tokenizer: encodes the texts.
        script (`list[list[str]]`): texts of the turns of each row. A text that does not end in a stop token ends on the
            token budget.
        stop_ids: tokens that end a turn.
    """

    def __init__(self, tokenizer, script, stop_ids):
        self.tokenizer, self.script, self.stop_ids = tokenizer, script, set(stop_ids)

    @contextmanager
    def open(self, prompts, max_length):
        self.histories = [list(prompt) for prompt in prompts]
        self.turns = [iter(turns) for turns in itertools.islice(itertools.cycle(self.script), len(prompts))]
        self.queue = []
        yield self

    @property
    def busy(self):
        return bool(self.queue)

    def extend(self, row, token_ids, max_new_tokens):
        self.histories[row] += token_ids
        self.queue.append((row, max_new_tokens))

    def step(self):
        done, self.queue = self.queue, []
        results = []
        for row, budget in done:
            ids = self.tokenizer(next(self.turns[row]), add_special_tokens=False)["input_ids"][:budget]
            self.histories[row] += ids
            results.append(SampledTokens(row, ids, [-0.5] * len(ids), ids[-1] in self.stop_ids))
        return results

    def finish(self, row):
        pass


@pytest.fixture
def tokenizer():
    return chat_tokenizer()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
