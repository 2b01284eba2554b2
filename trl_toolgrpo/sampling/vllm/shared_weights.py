"""Weights that another process of this machine reads in memory, without a file: on the GPU where they are, or from a
copy in shared memory.

What is sent are handles of a few kilobytes. They are pickled, so they are for a process that this one has started, and
never come from a network.
"""

import inspect
import os
import pickle
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor


Named: TypeAlias = list[tuple[str, Tensor]]
_ALIGNED = 64  # bytes; a multiple of the size of every dtype


class SharingError(Exception):
    """A process cannot share its tensors, or another one cannot open them; the message says why."""


@contextmanager
def shared_tensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    """
    Share tensors of one device while open. They must not change meanwhile, and whoever opens them has to be done with
    them before this is closed.

    On a GPU nothing is copied: the other process maps the memory that they are in. Elsewhere there is one copy in
    shared memory while open.

    Args:
        tensors (`Mapping[str, Tensor]`):
            The tensors by name.

    Yields:
        `bytes`: what [`opened_tensors`] opens.

    Raises:
        SharingError: if they cannot be shared.
    """
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) != 1:
        raise SharingError(f"the weights are on {len(devices)} devices")
    on_gpu = devices.pop().type == "cuda"
    with _shared_gpu_memory(tensors) if on_gpu else _shared_copy(tensors) as handles:
        yield pickle.dumps(handles)


def opened_tensors(handles: bytes) -> Named:
    """
    Return the tensors that another process of this machine shares, in its memory.

    Args:
        handles (`bytes`):
            From [`shared_tensors`].

    Raises:
        SharingError: if this process cannot read that memory.
    """
    found: _SharedCopy | _SharedGPUMemory = pickle.loads(handles)
    return found.opened()


# Shared memory


@dataclass(frozen=True)
class _SharedCopy:
    """
    A block of memory without a name on a disk, that lives as long as a process holds it.

    Args:
        path (`str`): where the other process finds it.
        key (`str`): identifies it; in another container the same path could be another block.
        size (`int`): its bytes.
        places (`list`): name, offset in bytes, dtype and shape of each tensor.
    """

    path: str
    key: str
    size: int
    places: list[tuple[str, int, torch.dtype, torch.Size]]

    def opened(self) -> Named:
        try:
            found = os.readlink(self.path)
            if found != f"/memfd:{self.key} (deleted)":
                raise SharingError(f"{self.path} is not the shared memory but {found}")
            block = torch.from_file(self.path, shared=False, size=self.size, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            raise SharingError(f"the shared memory cannot be opened ({error})") from error
        return [(name, _part(block, offset, dtype, shape)) for name, offset, dtype, shape in self.places]


@contextmanager
def _shared_copy(tensors: Mapping[str, Tensor]) -> Iterator[_SharedCopy]:
    """Copy tensors to shared memory while open."""
    places, size = [], 0
    for name, tensor in tensors.items():
        places.append((name, size, tensor.dtype, tensor.shape))
        size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    key = uuid.uuid4().hex
    try:
        file = os.memfd_create(key)
    except (AttributeError, OSError) as error:
        raise SharingError(f"this system gives no anonymous shared memory ({error})") from error
    path = f"/proc/{os.getpid()}/fd/{file}"
    try:
        try:
            os.ftruncate(file, size)
            block = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            raise SharingError(f"shared memory of {size} bytes cannot be had ({error})") from error
        for (_, offset, dtype, shape), tensor in zip(places, tensors.values(), strict=True):
            _part(block, offset, dtype, shape).copy_(tensor)
        yield _SharedCopy(path, key, size, places)
    finally:
        os.close(file)


def _part(block: Tensor, offset: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return block[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)


# The memory of a GPU


@dataclass(frozen=True)
class _SharedGPUMemory:
    """
    CUDA IPC handles.

    Args:
        uuid (`str`): the GPU.
        handles (`list`): name of each tensor, and what torch rebuilds it from.
    """

    uuid: str
    handles: list[tuple[str, tuple[Any, ...]]]

    def opened(self) -> Named:
        """Map the memory, on the device that is the same GPU for this process, whatever its index here."""
        here = torch.cuda.current_device()
        found = _gpu_uuid(torch.device("cuda", here))
        if found != self.uuid:
            raise SharingError(f"the engine is on another GPU ({found}) than the weights ({self.uuid})")
        tensors = []
        for name, arguments in self.handles:
            bound = inspect.signature(rebuild_cuda_tensor).bind(*arguments)
            bound.arguments["storage_device"] = here
            try:
                tensors.append((name, rebuild_cuda_tensor(*bound.args)))
            except RuntimeError as error:
                raise SharingError(f"the GPU's memory cannot be opened ({error})") from error
        return tensors


@contextmanager
def _shared_gpu_memory(tensors: Mapping[str, Tensor]) -> Iterator[_SharedGPUMemory]:
    """Let another process map the memory of tensors while open."""
    device = next(iter(tensors.values())).device
    torch.cuda.synchronize(device)  # with what is still being written to them
    handles = []
    for name, tensor in tensors.items():
        try:
            rebuild, arguments = reduce_tensor(tensor)
        except RuntimeError as error:
            raise SharingError(f"the GPU's memory cannot be shared ({error})") from error
        if rebuild is not rebuild_cuda_tensor:
            raise SharingError(f"torch shares {name} in a way of its own ({rebuild.__name__})")
        handles.append((name, arguments))
    try:
        yield _SharedGPUMemory(_gpu_uuid(device), handles)
    finally:
        with suppress(RuntimeError):
            torch.cuda.ipc_collect()


def _gpu_uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)
