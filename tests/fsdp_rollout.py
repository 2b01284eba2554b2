"""Two processes with a sharded policy and rollouts of unequal length; run by `test_distributed.py` with torchrun."""

import faulthandler
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3Config, Qwen3ForCausalLM

from trl_toolgrpo.sampling.model_sampler import ModelSampler
from trl_toolgrpo.trl_hooks import gathered_parameters


def sample(model, tokens):
    """Return log-probs of a batch whose length differs between processes."""
    with gathered_parameters(model), ModelSampler(model, stop_ids=(), pad_id=0).open([[1, 2, 3]] * 2, 64) as session:
        for row in range(2):
            session.extend(row, [], tokens)
        turns = []
        while session.busy:
            turns += session.step()
    return turns


faulthandler.dump_traceback_later(60, exit=True)
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
options = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=64, num_hidden_layers=2, head_dim=16, **options))
whole = Qwen3ForCausalLM(model.config)
whole.load_state_dict(model.state_dict())
mesh = init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)

for _ in range(2):
    turns = sample(model, 8 if rank == 0 else 24)
    assert [len(turn.token_ids) for turn in turns] == [8 if rank == 0 else 24] * 2
    ids = torch.tensor([[1, 2, 3, *turns[0].token_ids]])
    with torch.no_grad():
        expected = torch.log_softmax(whole(ids).logits[0, 2:-1], dim=-1).gather(-1, ids[0, 3:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(turns[0].logprobs), expected, atol=1e-5, rtol=0)
loss = model(input_ids=torch.tensor([[1, 2, 3, 4]]), labels=torch.tensor([[1, 2, 3, 4]])).loss  # still trains, sharded
loss.backward()
assert all(parameter.grad is not None for parameter in model.parameters())
dist.barrier()
print(f"rank {rank} done", flush=True)
os._exit(0)  # past the interpreter's end, where threads of torch that are still about may abort the process
