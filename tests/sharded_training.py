"""
A run that is sharded by FSDP2 or DeepSpeed over processes on the CPU, saved and resumed; or the same run in one
process. With the argument `lora` it has an adapter, and a reference that follows it. Run by `test_distributed.py` with
torchrun, or alone. Prints losses.
"""

import faulthandler
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import add, chat_tokenizer, config, full_disk, prompts, tiny_model
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.checkpoints.folder import checkpoints, fault_of
from trl_toolgrpo.models.sharding import full
from trl_toolgrpo.models.sharding import whole as whole_parameters
from trl_toolgrpo.trl_hooks import is_checkpointed


def shard_on_cpu():
    """Let accelerate, which shards over accelerators only, shard over processes on a CPU."""
    if deepspeed:
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
        return
    initialize = AcceleratorState.__init__

    def sharded(self, *args, fsdp_plugin=None, **kwargs):
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = sharded


def start(path, **changes):
    if lora:
        synced = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}
        changes = {**synced, **changes}
    return ToolGRPOTrainer(
        tiny_model(tokenizer),
        lambda completion_ids, **kwargs: [float((7 * len(ids) + sum(ids)) % 11) for ids in completion_ids],
        config(
            path, **{"max_steps": 4, "save_steps": 2, **changes}, save_strategy="steps", learning_rate=1e-3,
            per_device_train_batch_size=8 // processes, num_iterations=2, deterministic_rollouts=True, seed=5,
            max_completion_length=48, advantage_estimator="gae", use_cpu=not deepspeed,
        ),
        prompts(9),
        processing_class=tokenizer,
        tools=[add],
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None,
    )  # fmt: skip


def parameters(trainer):
    """Return the parameters, gathered."""
    with whole_parameters(trainer.model.parameters()):
        return [full(parameter).clone() for parameter in trainer.model.parameters()]


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


faulthandler.dump_traceback_later(140, exit=True)
torch.set_num_threads(1)
processes = int(os.environ.get("WORLD_SIZE", "1"))
deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
folder, lora = Path(sys.argv[1]), sys.argv[2:] == ["lora"]
if processes > 1:
    shard_on_cpu()
tokenizer = chat_tokenizer("qwen3_instruct_2507")
whole = start(folder / "whole")
whole.train()
found = {"losses": logged(whole, "loss"), "norms": logged(whole, "value/grad_norm")}
if processes > 1:
    found["type"] = whole.accelerator.distributed_type.value
    found["sharded"] = sum(
        isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in whole.model.parameters()
    )
    found["checkpointed"], found["packed"] = is_checkpointed(whole.model), whole.update.scoring.packing.active
    checkpoint = folder / "whole" / "checkpoint-2"
    found["fault"] = fault_of(checkpoint)
    resumed = start(folder / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    found["resumed"] = logged(resumed, "loss")
    pairs = zip(parameters(whole), parameters(resumed), strict=True)
    found["differ"] = max(float((one - other).abs().max()) for one, other in pairs)
    if lora:
        states = [trainer.reference.synced.state() for trainer in (whole, resumed)]
        found["reference"] = max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0])
        found["moved"] = max(float(states[1][name].abs().max()) for name in states[1] if "lora_B" in name)
        found["syncs"] = [whole.reference._syncs, resumed.reference._syncs]
    unsaved = start(folder / "unsaved", save_steps=1)
    with full_disk(unsaved, {2: 2**10, 3: 0}) if unsaved.accelerator.is_main_process else nullcontext():
        unsaved.train()
    found["unsaved"] = [path.name for path in checkpoints(folder / "unsaved")]
if whole.accelerator.is_main_process:
    print(json.dumps(found), flush=True)
whole.accelerator.wait_for_everyone()
os._exit(0)  # past the interpreter's end, where threads of torch that are still about may abort the process
