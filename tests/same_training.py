"""The same run in one process or several; run by `test_distributed.py` with torchrun, or alone. Prints its losses."""

import faulthandler
import json
import os
import random
import sys
import time

from accelerate.utils import gather_object
from conftest import chat_tokenizer, config, prompts, tiny_model
from peft import LoraConfig

from trl_toolgrpo import ToolGRPOTrainer


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: First.
        b: Second.
    """
    time.sleep(random.SystemRandom().random() * 0.02)
    return a + b


def reward(completion_ids, **kwargs):
    """Differs within a group."""
    return [float((7 * len(ids) + sum(ids)) % 11) for ids in completion_ids]


faulthandler.dump_traceback_later(140, exit=True)
processes = int(os.environ.get("WORLD_SIZE", "1"))
tokenizer = chat_tokenizer("qwen3_instruct_2507")
trainer = ToolGRPOTrainer(
    tiny_model(tokenizer),
    reward,
    config(
        sys.argv[1], max_steps=20, per_device_train_batch_size=8 // processes, learning_rate=1e-3, num_iterations=2,
        max_completion_length=120, force_rate=0.4, force_level="schema", disable_forcing_in_updates=False,
        deterministic_rollouts=True, seed=5, **json.loads(sys.argv[2]),
    ),
    prompts(9),
    processing_class=tokenizer,
    tools=[add],
    peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
)  # fmt: skip
calls, roll_out = [], trainer.rollouts.sample


def counted(prompt_ids, force):
    batch = roll_out(prompt_ids, force)
    calls.append(sum(len(turn.tool_results) for t in batch.trajectories for turn in t.turns))
    return batch


trainer.rollouts.sample = counted
trainer.train()
calls = gather_object([calls])
if trainer.accelerator.is_main_process:
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    rewards = [entry["reward"] for entry in log if "reward" in entry]
    print(json.dumps({"losses": [entry["loss"] for entry in log], "rewards": rewards, "calls": calls}), flush=True)
trainer.accelerator.wait_for_everyone()
trainer.end()
os._exit(0)  # past the interpreter's end, where threads of torch that are still about may abort the process
