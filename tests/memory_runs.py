"""Peak memory of tiny runs in a process of their own, compared with the estimate; run by `test_memory.py`."""

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch
from conftest import chat_tokenizer, config, prompts, tiny_model
from peft import LoraConfig

from trl_toolgrpo import ModelShape, ToolGRPOTrainer, estimate_memory


SHAPE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
SIZES = {"micro_batch": 8, "rollouts": 8, "num_generations": 8, "prompt_length": 16, "completion_length": 96}
RUNS = {
    "full": {"method": "full", "gradient_checkpointing": False},
    "lora": {"method": "lora", "lora_rank": 16, "gradient_checkpointing": False},
    "full, checkpointing": {"method": "full", "gradient_checkpointing": True},
}


def memory(line):
    """A line of this process's status, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(entry for entry in status.splitlines() if entry.startswith(line)).split()[1])


def run(folder, gradient_checkpointing, method, lora_rank=16, **shape):
    model = tiny_model(tokenizer, **shape)
    lora = LoraConfig(r=lora_rank, target_modules="all-linear", task_type="CAUSAL_LM") if method != "full" else None
    options = {"per_device_train_batch_size": 8, "num_generations": 8, "max_completion_length": 96, "max_steps": 2}
    ToolGRPOTrainer(
        model,
        lambda completion_ids, **kwargs: [float(sum(ids) % 11) for ids in completion_ids],
        config(folder, gradient_checkpointing=gradient_checkpointing, logprob_check="off", **options),
        prompts(4),
        processing_class=tokenizer,
        peft_config=lora,
    ).train()
    return ModelShape.from_config(model.config)


torch.set_num_threads(1)
tokenizer = chat_tokenizer()
run(sys.argv[1], True, "lora")  # what is loaded at the first use is no part of the figures
for name, options in RUNS.items():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    shape = run(sys.argv[1], **options, **SHAPE)
    estimate = estimate_memory(shape, weight_bytes=4, compute_bytes=4, on_cpu=True, **SIZES, **options)
    found = {"name": name, "measured": memory("VmHWM") - before, "estimated": estimate.peak}
    print(json.dumps({**found, "parts": vars(estimate)}), flush=True)
