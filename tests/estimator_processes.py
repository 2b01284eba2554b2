"""
A run with an estimator of its own in two processes that share a group, or in one; run by `test_distributed.py` with
torchrun, or alone. Prints what became of each rollout batch.
"""

import faulthandler
import json
import os
import sys

import torch
from accelerate.utils import gather_object
from conftest import chat_tokenizer, config, prompts, tiny_model

from trl_toolgrpo import AdvantageEstimator, ToolGRPOTrainer


class Ranked(AdvantageEstimator):
    """Looks at all rollouts of a group, and gives later tokens less; some groups are left out."""

    def score(self, group):
        ranks = (group.rewards[:, None] > group.rewards).sum(dim=1) - (len(group) - 1) / 2
        longest = max(len(trajectory.completion_ids) for trajectory in group.trajectories)
        return (ranks[:, None] + longest / 40) * torch.linspace(1.0, 0.5, group.mask.size(1)) * group.mask

    def admit(self, group):
        return bool(group.rewards.sum() % 2)


faulthandler.dump_traceback_later(140, exit=True)
processes = int(os.environ.get("WORLD_SIZE", "1"))
tokenizer = chat_tokenizer("qwen3_instruct_2507")
model = tiny_model(tokenizer)
model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(30)]  # so that rollouts differ in length
trainer = ToolGRPOTrainer(
    model,
    lambda completion_ids, **kwargs: [float((7 * len(ids) + sum(ids)) % 11) for ids in completion_ids],
    config(
        sys.argv[1], advantage_estimator=Ranked(), per_device_train_batch_size=12 // processes, num_generations=4,
        max_steps=5, learning_rate=1e-3, max_completion_length=40, deterministic_rollouts=True, seed=5,
    ),
    prompts(9),
    processing_class=tokenizer,
)  # fmt: skip
part, estimate, batches = trainer.advantages, trainer.advantages.estimate, []


def watched(output, batch, rewards, values):
    estimate(output, batch, rewards, values)
    lengths = [len(trajectory.completion_ids) for trajectory in batch.trajectories]
    rows = zip(output["advantages"].tolist(), output["completion_mask"].tolist(), lengths, strict=True)
    # One number for a rollout, where all groups of a process were left out
    own = [(a[:length] if isinstance(a, list) else [a] * length, sum(mask)) for a, mask, length in rows]
    batches.append(gather_object(own))


part.estimate = watched
trainer.train()
if trainer.accelerator.is_main_process:
    admitted = [entry["groups/admitted"] for entry in trainer.state.log_history if "groups/admitted" in entry]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps({"losses": losses, "batches": batches, "admitted": admitted}), flush=True)
trainer.accelerator.wait_for_everyone()
trainer.end()
os._exit(0)  # past the interpreter's end, where threads of torch that are still about may abort the process
