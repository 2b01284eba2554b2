"""A run in a process of its own, for `test_run_lock.py`: trains in a folder, and prints when it has begun."""

import sys
import time
from pathlib import Path

from conftest import chat_tokenizer, config, prompts, tiny_model
from transformers import TrainerCallback

from trl_toolgrpo import ToolGRPOTrainer


class Wait(TrainerCallback):
    """Holds the run in its second step while there is a file `wait` next to its folder."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            print("under way", flush=True)
            while (Path(args.output_dir).parent / "wait").exists():
                time.sleep(0.05)


tokenizer = chat_tokenizer("qwen3_instruct_2507")
options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "max_completion_length": 8}
trainer = ToolGRPOTrainer(
    tiny_model(tokenizer),
    lambda completion_ids, **kwargs: [float(sum(ids) % 11) for ids in completion_ids],
    config(sys.argv[1], **options),
    prompts(5),
    processing_class=tokenizer,
    callbacks=[Wait()],
)
trainer.train(resume_from_checkpoint=True if sys.argv[2:] == ["resume"] else None)
print("ended", trainer.state.global_step, flush=True)
