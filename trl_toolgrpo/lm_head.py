"""The LM head in float32, while the rest of the policy computes in bfloat16 or float16 (`cast_lm_head_to_fp32`).

Rounded to bfloat16, a logit between 16 and 32 is off by up to 0.06, which is about half of what recorded and
recomputed log-probs differ by. TRL scores such a head outside autocast; the head that samples has to do the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head

from .errors import ConfigError


@contextmanager
def without_trls_cast(args: Any, recording: bool) -> Iterator[None]:
    """
    Keep TRL's constructor from casting the LM head, which it can do for few models: it casts no head that is tied
    under an adapter, and its cast head returns bfloat16 under autocast. [`cast_heads`] takes its place.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration; unchanged afterwards.
        recording (`bool`):
            Whether rollouts are this package's own; otherwise TRL's cast is left to TRL.
    """
    wanted = args.cast_lm_head_to_fp32
    args.cast_lm_head_to_fp32 = wanted and not recording
    try:
        yield
    finally:
        args.cast_lm_head_to_fp32 = wanted


def cast_heads(model: Any, temperature: float, outputs: tuple[str, ...] = ("log_probs", "entropy")) -> None:
    """
    Have a model scored with its LM head in float32, tied or not, under an adapter or not.

    A head that is trained in low precision becomes float32 itself, as with TRL; a frozen one is cast as it is used.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The policy or the reference, with TRL's fused LM head.
        temperature (`float`):
            What logits are divided by.
        outputs (`tuple[str, ...]`, *optional*):
            What the fused head gives, as in TRL's `add_fused_lm_head`.

    Raises:
        ConfigError: if the head is quantized.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    linears = _linears_of_head(base)
    trained = [linear for linear in linears if linear.weight.requires_grad]
    given = {linear.weight.dtype for linear in trained} - {torch.float32, torch.float64}
    for linear in trained:
        linear.float()
    embeddings = base.get_input_embeddings()
    if given and any(linear.weight is getattr(embeddings, "weight", None) for linear in trained):
        dtype = given.pop()  # what the layers above compute in
        embeddings.register_forward_hook(lambda module, args, output: output.to(dtype))
    add_fused_lm_head(base, temperature=temperature, cast_lm_head_to_fp32=True, outputs=outputs)


@contextmanager
def head_in_float32(model: Any, wanted: bool = True) -> Iterator[None]:
    """
    Compute the logits of a model in float32, outside autocast, while this is open and gradients are off.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model. Its head's weights must not change while this is open: those in low precision are copied.
        wanted (`bool`, *optional*, defaults to `True`):
            `False` leaves the model as it is.

    Raises:
        ConfigError: if the head is quantized.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    linears = _linears_of_head(base) if wanted else []
    before = [linear.__dict__.get("forward") for linear in linears]
    for linear in linears:
        linear.forward = _float32_product(linear)
    try:
        yield
    finally:
        for linear, forward in zip(linears, before, strict=True):
            del linear.forward
            if forward is not None:
                linear.forward = forward


def _linears_of_head(base: Any) -> list[Any]:
    """Linear layers of a model's LM head, those of its adapters included."""
    head = base.get_output_embeddings()
    linears: list[Any] = [] if head is None else [m for m in head.modules() if isinstance(m, nn.Linear)]
    if not linears or any(not linear.weight.is_floating_point() for linear in linears):
        kind = "none" if head is None else f"a {type(head).__name__}"
        raise ConfigError(
            f"You passed `cast_lm_head_to_fp32=True`, and the LM head of the model is {kind}, which cannot compute in "
            f"float32. Keep the head out of quantization (`llm_int8_skip_modules=['lm_head']`), or leave "
            f"`cast_lm_head_to_fp32` at False."
        )
    return linears


def _float32_product(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    kept: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            weight = linear.weight
            if type(weight) is nn.Parameter and weight.dtype != torch.float32:
                if not kept:
                    kept.append(weight.detach().float())
                weight = kept[0]
            bias = None if linear.bias is None else linear.bias.float()
            return nn.functional.linear(hidden.float(), weight.float(), bias)

    return forward
