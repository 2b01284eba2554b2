"""Operations on parameters that may be sharded, by FSDP2 (DTensors) or by DeepSpeed ZeRO-3 (partitioned)."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensors: Iterable[Tensor], modify: bool = False) -> AbstractContextManager[object]:
    """
    Make parameters that ZeRO-3 has partitioned whole while the context is open; every process has to enter it.

    Args:
        tensors (`Iterable[Tensor]`):
            The parameters.
        modify (`bool`, *optional*, defaults to `False`):
            Whether what the first process writes is kept and given to all.
    """
    partitioned = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if modify else None)


def local(tensor: Tensor) -> Tensor:
    """Return this process's share of a tensor, as a view."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor; every process has to call it."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


@torch.no_grad()
def assign(tensor: Tensor, value: Tensor) -> None:
    """Write a whole value into a tensor, in place."""
    value = value.to(tensor.device, tensor.dtype)
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
    tensor.copy_(value)


def whole_copies(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return copies of named tensors, whole and on the CPU; every process has to call it."""
    copies = {}
    for name, tensor in tensors:
        with whole([tensor]):
            copies[name] = full(tensor).cpu().contiguous().clone()
    return copies


def assign_all(tensors: Iterable[tuple[str, Tensor]], values: dict[str, Tensor]) -> None:
    """Write whole values into named tensors, in place; every process has to call it."""
    for name, tensor in tensors:
        with whole([tensor], modify=True):
            assign(tensor, values[name])
