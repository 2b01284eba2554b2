"""Linear layers with their weights packed, for as long as a CPU decodes with them.

Owns a faster way to the same product. With a handful of rows, as in decoding, a matrix product on a CPU spends half of
its time on rearranging the weight for its kernel; while rollouts are sampled the weights stand still, so that oneDNN
can rearrange each of them once. Fed by `model_sampler.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


LEAST_WEIGHTS = 2**16
"""Weights below which a layer's rearranging costs too little to matter."""


def can_pack(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer in float32 on a CPU, large enough to gain from packing."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:  # a subclass, or patched: it has its own way
        return False
    weight = module.weight
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and weight.numel() >= LEAST_WEIGHTS


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """
    Run the linear layers of a model on packed copies of their weights, which are freed at the end.

    The base layers of LoRA adapters are among them. Layers that are quantized, sharded, in another dtype or not on a
    CPU stay as they are, and under autocast all of them do. Memory: a copy of the weights that are packed.

    Args:
        model (`nn.Module`):
            The model; its weights must not change while this is open.
    """
    usable = torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")
    packed: list[Any] = [module for module in model.modules() if can_pack(module)] if usable else []
    try:
        for module in packed:
            module.forward = _product(module)
        yield
    finally:
        for module in packed:
            module.__dict__.pop("forward", None)


def _product(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), None)
    bias, run = linear.bias, torch.ops.mkldnn._linear_pointwise

    def forward(input: Tensor) -> Tensor:
        return run(input, weight, bias, "none", [], "")

    return forward
