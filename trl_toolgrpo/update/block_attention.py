"""Packed attention on a GPU by one kernel: torch's flex attention, which skips the blocks that nobody sees.

What a token sees is two ranges of positions: the first tokens of the prompt, and its own piece as far as itself. A
block mask made from them serves all layers of a pass. `torch.nn.attention.varlen` does not fit: a range of queries
reads one range of keys there, so that the keys of the prompt would be copied for every segment in every layer.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..config.checks import gpu_paths_of
from ..config.fields import ToolGRPOConfig
from .packed_attention import Piece, PieceAttention


logger = logging.getLogger(__name__)

BLOCK = 128
"""Tokens in a block of the mask. Packed sequences are padded to a multiple of it, so that few shapes are compiled."""
HEAD_SIZES = (16, 256)
"""Least and largest size of a head that flex attention is used for."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What flex attention is used for."""
TOLERANCE = 0.03
"""Largest relative difference from the attention by pieces, of which rounding in bfloat16 explains a third."""

Kernel: TypeAlias = Callable[..., Tensor]
"""What has the parameters of torch's `flex_attention`."""
_QueryKeyValue: TypeAlias = tuple[Tensor, Tensor, Tensor]


class FlexAttention:
    """
    Flex attention for the packed passes of a run, as far as it works there.

    The first use for each kind of layer is compared, forward and backward, with the attention by pieces. Where it
    cannot be used, or fails, or differs, layers attend by pieces, and a warning says why, once.

    Args:
        kernel (`Callable`, *optional*):
            What has the parameters of torch's `flex_attention`, which is compiled by default.
    """

    def __init__(self, kernel: Kernel | None = None) -> None:
        self._kernel = kernel or _compiled_flex_attention()
        self._failures: dict[Hashable, str | None] = {}
        self.reason: str | None = None
        """Why some layers attend by pieces; `None` if none does."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
        """Return attention (R, H, L, D) of a query (R, H, L, D) to key and value (R, H_kv, L, D)."""
        grouped = query.shape[1] != key.shape[1]
        return self._kernel(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)

    def usable(self, kind: Hashable, obstacle: str | None, failure: Callable[[], str | None]) -> bool:
        """
        Return whether a layer can use it.

        Args:
            kind (`Hashable`):
                Which layers are alike.
            obstacle (`str`, *optional*):
                What is against it in this layer.
            failure (`Callable[[], str | None]`):
                Tries it, and returns what is wrong. Called once for each kind that nothing is against.
        """
        if obstacle is None and kind not in self._failures:
            self._failures[kind] = failure()
        reason = obstacle or self._failures[kind]
        if reason is not None and self.reason is None:
            self.reason = reason
            logger.warning("Packed updates attend by pieces, not by flex attention: %s.", reason)
        return reason is None


class BlockAttention:
    """
    Packed attention by flex attention; see [`packed_attention.PackedAttention`].

    Args:
        flex ([`FlexAttention`]):
            The kernel of the run.
        pieces (`Sequence[tuple[int, Sequence[int]]]`):
            For each sequence: number of tokens of the prompt, and of each segment.
        length (`int`):
            Number of tokens of a sequence, L, a multiple of `BLOCK`.
        device (`torch.device`):
            Where the model is.
    """

    def __init__(self, flex: FlexAttention, pieces: Sequence[Piece], length: int, device: torch.device) -> None:
        self._flex, self._mask = flex, block_mask(pieces, length, device)
        self._pieces, self._device = pieces, device

    @functools.cached_property
    def _by_pieces(self) -> PieceAttention:
        return PieceAttention(self._pieces, self._device)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, object]
    ) -> Tensor:
        """Return what each token attends to, shape (R, L, H, D); see [`packed_attention.PackedAttention`]."""
        kind = value.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
        given = query.to(dtype), key.to(dtype), value.to(dtype)  # as autocast does for torch's own attention

        layer = (dtype, *(tensor.shape[1::2] for tensor in given))
        failure = functools.partial(self._failure, module, given, options)
        if not self._flex.usable(layer, _obstacle(*given, options), failure):
            return self._by_pieces(module, query, key, value, options)
        return self._attend(*given, options)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        found = self._flex.attend(query, key, value, self._mask, options.get("scaling"))
        return found.transpose(1, 2).contiguous()

    def _failure(self, module: nn.Module, given: _QueryKeyValue, options: dict[str, Any]) -> str | None:
        """Return what is wrong with attention and its gradients in this layer; `None` if nothing is."""

        ends = torch.tensor([start + sum(counts) for start, counts in self._pieces], device=self._device)
        is_token = torch.arange(given[0].shape[2], device=self._device) < ends[:, None]

        def with_gradients(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
            query, key, value = leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
            found = attend(query, key, value) * is_token[..., None, None]
            return [found.detach(), *torch.autograd.grad(found, leaves, found.detach())]

        # Hooks of its own keep this graph out of the checkpoint that may surround the layer
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            expected = with_gradients(lambda q, k, v: self._by_pieces(module, q, k, v, options))
            try:
                found = with_gradients(lambda q, k, v: self._attend(q, k, v, options))
            except Exception as error:
                if should_reduce_batch_size(error):
                    raise
                lines = str(error).splitlines()
                return f"it fails here ({type(error).__name__}: {lines[0] if lines else ''})"
        for name, one, other in zip(("output", "gradients", "gradients", "gradients"), found, expected, strict=True):
            gap = float((one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-30))
            if not gap <= TOLERANCE:
                return f"its {name} differ by {gap:.1%} from those of torch's attention on this machine"
        return None


def flex_attention_of(args: ToolGRPOConfig, device: torch.device) -> FlexAttention | None:
    """
    Return the kernel for packed passes, if `gpu_paths` turns it on and the model is on a CUDA GPU.

    Args:
        args ([`ToolGRPOConfig`]):
            The configuration.
        device (`torch.device`):
            Where the model is.
    """
    if "updates" not in gpu_paths_of(args.gpu_paths) or device.type != "cuda":
        return None
    if args.torch_compile:
        logger.warning("Packed updates attend by pieces, not by flex attention: `torch_compile` compiles the model.")
        return None
    return FlexAttention()


def _compiled_flex_attention() -> Kernel:
    """Return flex attention compiled: for each kind of layer, with and without gradients, for some shapes."""
    compile_function: Any = torch.compile
    if "recompile_limit" not in inspect.signature(compile_function).parameters:
        return compile_function(flex_attention)
    return compile_function(flex_attention, recompile_limit=64, isolate_recompiles=True)


def block_mask(pieces: Sequence[Piece], length: int, device: torch.device) -> BlockMask:
    """
    Return which tokens attend to which, as a block mask; the same as [`packed_attention.dense_mask`].

    Args:
        pieces (`Sequence[tuple[int, Sequence[int]]]`):
            For each sequence: number of tokens of the prompt, and of each segment.
        length (`int`):
            Number of tokens of a sequence, L, a multiple of `BLOCK`.
        device (`torch.device`):
            Where the model is.
    """
    seen, first = (bound.to(device) for bound in _bounds(pieces, length))

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < seen[row, query]) | ((key >= first[row, query]) & (key <= query))

    # What each query sees of each block of keys: some of it, or all; shape (R, L, N)
    start = torch.arange(0, length, BLOCK, device=device)
    end, query = start + BLOCK, torch.arange(length, device=device)[:, None]
    prompt, own = seen[..., None], first[..., None]
    some = (start < prompt) | ((own < end) & (start <= query))
    whole = (end <= prompt) | ((own <= prompt.clamp(min=start)) & (end <= query + 1))
    some, whole = (x.unflatten(1, (-1, BLOCK)) for x in (some, whole))
    full = whole.all(dim=2)[:, None]
    partial = some.any(dim=2)[:, None] & ~full
    count, indices = _ordered(partial)
    return BlockMask.from_kv_blocks(count, indices, *_ordered(full), BLOCK_SIZE=BLOCK, mask_mod=visible)


def _bounds(pieces: Sequence[Piece], length: int) -> tuple[Tensor, Tensor]:
    """Return how many tokens of the prompt each token sees, and where its own piece begins, int32, shape (R, L)."""
    seen = torch.zeros(len(pieces), length, dtype=torch.int32)
    first = torch.arange(length, dtype=torch.int32).repeat(len(pieces), 1)  # padding sees itself
    for row, (start, counts) in enumerate(pieces):
        first[row, :start] = 0
        at = start
        for count in counts:
            seen[row, at : at + count], first[row, at : at + count] = start, at
            at += count
    return seen, first


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of blocks in each row, and their indices before those of the others, int32."""
    indices = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), indices.int()


def _obstacle(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> str | None:
    """Return why flex attention cannot be used for a layer; `None` if nothing is known against it."""
    sizes = sorted({query.shape[-1], value.shape[-1]})
    if query.dtype not in DTYPES:
        return f"the model computes in {str(query.dtype).removeprefix('torch.')}"
    if sizes[0] < HEAD_SIZES[0] or sizes[-1] > HEAD_SIZES[1]:
        return f"heads have a size of {' and '.join(map(str, sizes))}, and it takes {HEAD_SIZES[0]} to {HEAD_SIZES[1]}"
    if options.get("dropout"):
        return f"attention has a dropout of {options['dropout']}"
    for name, what in (("softcap", "caps its scores"), ("s_aux", "has sinks"), ("position_bias", "adds a bias")):
        if options.get(name) is not None:
            return f"attention {what} (`{name}`)"
    return None
