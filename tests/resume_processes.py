"""Two processes that resume in the middle of a rollout batch; run by `test_distributed.py` with torchrun."""

import faulthandler
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import chat_tokenizer, config, full_disk, prompts, tiny_model
from peft import LoraConfig

from trl_toolgrpo import CheckpointError, CheckpointSaveError, OutputFolderInUseError, ToolGRPOTrainer
from trl_toolgrpo.checkpoints.folder import checkpoints, fault_of
from trl_toolgrpo.run_folder.lock import take_lock


faulthandler.dump_traceback_later(100, exit=True)
torch.set_num_threads(1)
tokenizer = chat_tokenizer()


def start(path, **changes):
    """Random numbers of each process's own: dropout, sampling and the division of a batch."""
    options = {
        "max_steps": 5, "save_strategy": "steps", "save_steps": 1, "logging_steps": 2, "learning_rate": 1e-2,
        "steps_per_generation": 2, "num_iterations": 2, "per_device_train_batch_size": 2, "num_generations": 2,
        **changes,
    }  # fmt: skip
    return ToolGRPOTrainer(
        tiny_model(tokenizer),
        lambda completion_ids, **kwargs: [float(sum(ids) % 11) for ids in completion_ids],
        config(path, **options),
        prompts(16),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.2),
    )


def figures(trainer):
    times = ("time", "seconds", "wait", "latency", "per_second", "runtime", "train_loss")
    return [{k: v for k, v in e.items() if not any(w in k for w in times)} for e in trainer.state.log_history]


folder = Path(sys.argv[1])
whole = start(folder / "whole")
whole.train()
torch.manual_seed(99)
resumed = start(folder / "resumed")
resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-3"))
pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
found = {"differ": sum(not torch.equal(one, other) for one, other in pairs)}
found["figures"] = figures(whole) == figures(resumed)
found["fault"] = fault_of(folder / "whole" / "checkpoint-3")
try:
    start(folder / "other", num_generations=4).train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-4"))
except CheckpointError as error:
    found["refused"] = "num_generations (value): 2 in the checkpoint, 4 here" in str(error)
unsaved = start(folder / "unsaved", max_steps=3)
with full_disk(unsaved, {2: 2**10}) if dist.get_rank() == 0 else nullcontext():
    unsaved.train()
found["unsaved"] = [path.name for path in checkpoints(folder / "unsaved")]
blocked = folder / "blocked"
if dist.get_rank() == 0:
    blocked.mkdir()
    (blocked / "_unfinished").touch()  # where a folder has to be
dist.barrier()
try:
    start(blocked).train()
except CheckpointSaveError as error:
    found["blocked"] = "Nothing can be written to" in str(error)
lock = take_lock(folder / "in use") if dist.get_rank() == 0 else None
dist.barrier()
try:
    start(folder / "in use").train()
except OutputFolderInUseError as error:
    found["in_use"] = "which a run that is under way writes to: process" in str(error)
output = [None, None]
dist.all_gather_object(output, found)
if dist.get_rank() == 0:
    print("\n".join(map(json.dumps, output)), flush=True)
dist.barrier()
os._exit(0)  # without the interpreter's shutdown, in which remaining threads of torch may abort the process
