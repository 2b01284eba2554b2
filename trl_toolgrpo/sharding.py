"""Parameters that may be sharded: by FSDP2 (DTensors) or DeepSpeed ZeRO-3 (partitioned).

Owns the few operations the value head and the reference need on them. Imports nothing of the package.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensors: Iterable[Tensor], modify: bool = False) -> Any:
    """
    Context in which parameters that ZeRO-3 has partitioned are whole; every process has to enter it.

    Args:
        tensors (`Iterable[Tensor]`):
            The parameters.
        modify (`bool`, *optional*, defaults to `False`):
            Whether what the first process writes is kept, and given to all.
    """
    partitioned = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if modify else None)


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor; a view."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor; every process has to call it."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


@torch.no_grad()
def assign(tensor: Tensor, value: Tensor) -> None:
    """Write a whole value into a tensor, in place."""
    value = value.to(tensor.device, tensor.dtype)
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
    tensor.copy_(value)
