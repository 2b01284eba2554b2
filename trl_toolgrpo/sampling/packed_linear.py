"""Linear layers with their weights packed, for as long as a CPU decodes with them.

With a handful of rows, as in decoding, a matrix product on a CPU spends much of its time rearranging the weight for
its kernel, and under autocast rounding a frozen weight anew in each step. While rollouts are sampled the weights do
not change, so oneDNN or MKL can rearrange each of them once, in the dtype of the product. Products in bfloat16 are
packed where the processor multiplies matrices of bfloat16 (AMX): there 16 rows of a Qwen3 of 12 layers and hidden size
512 take a third less time for them, and a fifth less in float32. (One product for queries, keys and values gained
nothing.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


LEAST_WEIGHTS = 2**16
"""Number of weights below which rearranging a layer costs too little to matter."""


def product_dtype(module: nn.Module) -> torch.dtype | None:
    """
    Return the dtype in which a layer multiplies, if it gains from packing: a plain linear layer on a CPU, large
    enough, outside autocast in its own dtype and under autocast in that of autocast.

    Args:
        module (`nn.Module`):
            The layer.
    """
    if type(module) is not nn.Linear or "forward" in module.__dict__:  # a subclass, or patched
        return None
    weight = module.weight
    if type(weight) not in (Tensor, nn.Parameter) or weight.device.type != "cpu" or weight.numel() < LEAST_WEIGHTS:
        return None
    low = torch.is_autocast_enabled("cpu") and weight.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if low else weight.dtype
    return dtype if dtype == torch.float32 or (dtype == torch.bfloat16 and _multiplies_bfloat16()) else None


def _multiplies_bfloat16() -> bool:
    """Return whether the processor has units for products of bfloat16 matrices."""
    return bool(torch.cpu._is_amx_tile_supported())


def _packs_for_rows() -> bool:
    """Return whether products in float32 are MKL's. It is a sixth faster than oneDNN where that was measured, which is
    on processors with AMX."""
    return bool(torch.backends.mkl.is_available() and torch.cpu._is_amx_tile_supported())


@contextmanager
def packed_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """
    Run the linear layers of a model on packed copies of their weights, which are freed at the end.

    This includes the base layers of LoRA adapters. Layers that are quantized, sharded, in another dtype or not on a
    CPU stay as they are. Needs memory for a copy of the packed weights.

    Args:
        model (`nn.Module`):
            The model; its weights must not change while this is open.
        rows (`int`):
            Most rows of a decoding step, for a kernel that is packed for a number of them.
    """
    usable = torch.backends.mkldnn.is_available()
    found = {m: product_dtype(m) for m in model.modules() if isinstance(m, nn.Linear)} if usable else {}
    packed = {module: dtype for module, dtype in found.items() if dtype is not None}
    try:
        for module, dtype in packed.items():
            exact = dtype == torch.float32 and _packs_for_rows()
            module.__dict__["forward"] = _product_of_rows(module, rows) if exact else _product(module, dtype)
        yield
    finally:
        for module in packed:
            module.__dict__.pop("forward", None)


def _product(linear: nn.Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return the forward pass of a linear layer with its weight packed, in a dtype."""
    kept = linear.weight.detach().to(dtype).contiguous()
    weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(kept, None)
    bias, run = None if linear.bias is None else linear.bias.detach().to(dtype), torch.ops.mkldnn._linear_pointwise
    casts = torch.is_autocast_enabled("cpu")

    def forward(input: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu") != casts:  # a part of the model that turns it off
            return F.linear(input, linear.weight, linear.bias)
        return run(input.to(dtype) if casts else input, weight, bias, "none", [], "")

    return forward


def _product_of_rows(linear: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    """Return the forward pass of a linear layer in float32 with its weight packed by MKL for a number of rows: more
    than half of them are filled up, fewer or more are multiplied without packing, which is as fast for them."""
    kept, bias = linear.weight.detach().contiguous(), linear.bias
    weight: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(kept, rows)

    def forward(input: Tensor) -> Tensor:
        count = input.shape[:-1].numel()
        if not rows < 2 * count <= 2 * rows or torch.is_autocast_enabled("cpu") or input.dtype != torch.float32:
            return F.linear(input, linear.weight, bias)
        given = input.reshape(count, -1)
        if count < rows:
            given = F.pad(given, (0, 0, 0, rows - count))
        found = torch.ops.mkl._mkl_linear(given, weight, kept, bias, rows)
        return found[:count].view(*input.shape[:-1], -1)

    return forward
