"""Two processes whose reference follows the policy, sharded and not; run by `test_distributed.py` with torchrun."""

import faulthandler
import json
import os
import sys

import torch
import torch.distributed as dist
from conftest import chat_tokenizer, config, prompts, tiny_model
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from trl_toolgrpo import ToolGRPOTrainer
from trl_toolgrpo.models.sharding import full
from trl_toolgrpo.reference.adapter import AdapterReference, Comparison


def gather(tensor):
    shares = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, tensor)
    return torch.cat(shares)


def sharded(tokenizer):
    """The reference is made before the parameters are sharded, as in the trainer."""
    model = get_peft_model(tiny_model(tokenizer), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    reference = AdapterReference(model, "default")
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    start = reference.state()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    report = reference.sync(1.0, Comparison(gather))
    for name, tensor in reference.state().items():
        assert torch.equal(tensor, full(model.get_parameter(name))), name
        assert not torch.equal(tensor, start[name]), name
    reference.load(start)
    assert all(torch.equal(tensor, start[name]) for name, tensor in reference.state().items())
    return {"tensors": report.tensors, "differ": report.differ}


faulthandler.dump_traceback_later(100, exit=True)
torch.set_num_threads(1)
tokenizer = chat_tokenizer()
trainer = ToolGRPOTrainer(
    tiny_model(tokenizer),
    lambda completions, **kwargs: [float(len(str(completion)) % 5) for completion in completions],
    config(
        sys.argv[1], max_steps=4, beta=0.1, learning_rate=0.02, sync_ref_model=True, ref_model_sync_steps=2,
        ref_model_mixup_alpha=1.0,
    ),
    prompts(16),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
)  # fmt: skip
trainer.train()
log = [log for log in trainer.state.log_history if "ref/syncs" in log]
found = {"syncs": trainer.reference._syncs, "differ": len(trainer.reference.report.differ)}
assert trainer.accelerator.process_index != 0 or (log[-1]["ref/syncs"], log[1]["ref/kl"] < 1e-7) == (2, True)
found = {"sharded": sharded(tokenizer), **found}
output = [None, None]
dist.all_gather_object(output, found)
if dist.get_rank() == 0:
    print("\n".join(map(json.dumps, output)), flush=True)
dist.barrier()
os._exit(0)  # past the interpreter's end, where threads of torch that are still about may abort the process
