"""A loss that the value head has no part in, under DDP: as in the assisted warm-up."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from trl_toolgrpo.critic.critic import Critic


class Policy(torch.nn.Module):
    """A layer, and a head that its forward pass reads only if it is asked to."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)

    def forward(self, hidden, with_values=False):
        hidden = self.layer(hidden)
        return hidden.sum() + (self.head(hidden).sum() if with_values else 0.0)


@pytest.mark.parametrize("finds_unused", [True, False])
def test_ddp_takes_steps_with_and_without_the_head(finds_unused):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        policy = Policy()
        model = DistributedDataParallel(policy, find_unused_parameters=finds_unused)
        critic = SimpleNamespace(head=policy.head)
        for with_values in (False, False, True, False):
            model.zero_grad()
            loss = model(torch.ones(2, 3), with_values)
            (loss if with_values else Critic.with_idle_head(critic, loss, model)).backward()
            assert policy.layer.weight.grad.any()
            head = policy.head.weight.grad
            assert (head is not None and bool(head.any())) == with_values
    finally:
        torch.distributed.destroy_process_group()
