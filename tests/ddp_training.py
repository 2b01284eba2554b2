"""Two processes whose rollouts differ in turns and calls; run by `test_distributed.py` with torchrun."""

import faulthandler
import json
import os
import sys

import torch
from conftest import ScriptedSampler, add, chat_tokenizer, config, prompts, tiny_model

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.rollout import engine


faulthandler.dump_traceback_later(100, exit=True)
rank = int(os.environ["RANK"])
tokenizer = chat_tokenizer()
call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'
script = [[call, call, call, "done<|im_end|>"], ["no<|im_end|>"]] if rank == 0 else [["no<|im_end|>"]]
sampler = ScriptedSampler(tokenizer, script, [tokenizer.eos_token_id])
engine.make_sampler = lambda *args, **kwargs: sampler
trainer = ToolGRPOTrainer(
    tiny_model(tokenizer),
    lambda completions, **kwargs: [float(len(completion)) for completion in completions],
    config(
        sys.argv[1], max_steps=2, max_completion_length=256, logprob_check="off", mask_truncated_completions=True,
        num_iterations=2, advantage_estimator="gae", value_epochs=3,
    ),
    prompts(16),
    processing_class=tokenizer,
    tools=[add],
)  # fmt: skip
trainer.train()
head = torch.cat([p.detach().flatten() for p in trainer.critic.head.parameters()])
heads = trainer.accelerator.gather(head[None])
assert torch.equal(heads[0], heads[1]) and head[-1] != 0, "each process has a value head of its own"
if rank == 0:
    names = ("tools/call_frequency", "tools/add/calls", "rollout/turns_mean", "forced/fraction")
    print(json.dumps({name: trainer.state.log_history[0][name] for name in names}), flush=True)
trainer.accelerator.wait_for_everyone()
trainer.end()
os._exit(0)  # past the interpreter's end, where threads of torch that are still about may abort the process
