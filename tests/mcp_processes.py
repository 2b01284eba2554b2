"""Two processes with MCP servers: one shared in each of them, one for each rollout. Run by `test_distributed.py`."""

import faulthandler
import json
import os
import sys
from pathlib import Path

from accelerate.utils import gather_object
from conftest import ScriptedSampler, chat_tokenizer, config, prompts, tiny_model, tool_call

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.rollout import engine


faulthandler.dump_traceback_later(100, exit=True)
rank = int(os.environ["RANK"])
tokenizer = chat_tokenizer()
plain = {"command": sys.executable, "args": [str(Path(__file__).parent / "mcp_plain_server.py")]}
servers = {
    "own": {**plain, "per_rollout": True, "tools": ["note", "notes"]},
    "shared": {**plain, "tools": ["pid", "crash"]},
}
end = "<|im_end|>"
quiet, busy = [f"no{end}"], [tool_call("pid") + end, tool_call("note", text="x") + tool_call("notes") + end, f"a{end}"]
crash = [tool_call("crash") + end, tool_call("pid") + end, f"b{end}"]
sampler = ScriptedSampler(tokenizer, [busy, crash] if rank == 0 else [quiet], [tokenizer.eos_token_id])
engine.make_sampler = lambda *args, **kwargs: sampler
told = []


def reward(completions, **kwargs):
    told.extend([m["content"] for m in completion if m["role"] == "tool"] for completion in completions)
    return [float(len(completion)) for completion in completions]


trainer = ToolGRPOTrainer(
    tiny_model(tokenizer),
    reward,
    config(sys.argv[1], max_steps=2, max_completion_length=600, logprob_check="off", max_concurrent_tools=1),
    prompts(16),
    processing_class=tokenizer,
    mcp_servers=servers,
)
trainer.train()
told = gather_object([told])
if rank == 0:
    names = ("tools/pid/calls", "tools/note/calls", "tools/crash/errors", "tools/mcp/shared/restarts")
    figures = {name: [entry[name] for entry in trainer.state.log_history if name in entry] for name in names}
    print(json.dumps({"told": told, **figures}), flush=True)
trainer.accelerator.wait_for_everyone()
trainer.rollouts.tools.mcp.close()
trainer.end()
os._exit(0)  # past the interpreter's end, where threads of torch that are still about may abort the process
