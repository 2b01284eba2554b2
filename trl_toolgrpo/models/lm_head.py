"""The LM head in float32, while the rest of the policy computes in bfloat16 or float16 (`cast_lm_head_to_fp32`).

Rounded to bfloat16, a logit between 16 and 32 is off by up to 0.06, which is about half of the difference between
recorded and recomputed log-probs. TRL scores such a head outside autocast; the head that samples has to do the same.
"""

import functools
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from ..config.fields import ToolGRPOConfig
from ..errors import ConfigError
from .temporary_attribute import temporary_attribute


def without_trls_cast(args: ToolGRPOConfig, recording: bool) -> AbstractContextManager[None]:
    """
    Keep TRL's constructor from casting the LM head, which it can do for few models: it casts no head that is tied
    under an adapter, and its cast head returns bfloat16 under autocast. [`cast_heads`] takes its place.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration; unchanged afterwards.
        recording (`bool`):
            Whether rollouts are this package's own; otherwise TRL's cast is left to TRL.
    """
    return temporary_attribute(args, "cast_lm_head_to_fp32", args.cast_lm_head_to_fp32 and not recording)


def cast_heads(model: nn.Module, temperature: float, outputs: tuple[str, ...] = ("log_probs", "entropy")) -> None:
    """
    Have a model compute its logits in float32, outside autocast: a head that is tied or not, under an adapter or not.

    A head that is trained in low precision becomes float32 itself, as with TRL; a frozen one is cast as it is used,
    and one in float64 stays as it is.

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
    base = base_model(model)
    linears = _linears_of_head(base)
    if all(linear.weight.dtype == torch.float64 for linear in linears):
        return  # wider than float32
    trained = [linear for linear in linears if linear.weight.requires_grad]
    given = {linear.weight.dtype for linear in trained} - {torch.float32}
    for linear in trained:
        linear.float()
    for linear in linears:
        linear.forward = _Float32Product(linear)  # type: ignore[method-assign, assignment]
    embeddings = base.get_input_embeddings()
    if given and any(linear.weight is getattr(embeddings, "weight", None) for linear in trained):
        dtype = given.pop()  # what the layers above compute in
        embeddings.register_forward_hook(lambda module, args, output: output.to(dtype))
    add_fused_lm_head(base, temperature=temperature, cast_lm_head_to_fp32=True, outputs=outputs)


@contextmanager
def held_head(model: nn.Module) -> Iterator[None]:
    """
    Keep a float32 copy of a cast head's weight while this is open, in place of a cast at each token.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model, its head cast or not. Its weights must not change while this is open.
    """
    base = base_model(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    found = [module.__dict__.get("forward") for module in head.modules()] if isinstance(head, nn.Module) else []
    products = [product for product in found if isinstance(product, _Float32Product)]
    for product in products:
        product.holds = True
    try:
        yield
    finally:
        for product in products:
            product.holds, product.weight = False, None


@dataclass(frozen=True)
class _EffectiveHead:
    """What TRL's fused LM head reads of an output layer: weight (V, H) and bias (V,), an adapter's part added."""

    weight: Tensor
    bias: Tensor | None


@contextmanager
def adapted_head(model: str | nn.Module) -> Iterator[None]:
    """
    Have the output layer of a model show its effective weight, W + s·BA, while this is open.

    TRL multiplies hidden states by `lm_head.weight`, and refuses an adapter there since it would be left out. Shown
    the effective weight, it scores what the head computes, and the adapter gets its gradient through that weight.
    Adapters of other kinds than LoRA, and DoRA, stay as they are, so that TRL refuses them.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            The model, before or after it gets its adapter. Nothing is done for a model that TRL loads by its name.
    """
    if isinstance(model, str) or not hasattr(model, "get_output_embeddings"):
        yield
        return
    base = base_model(model)
    base.get_output_embeddings = lambda: _effective_head(type(base).get_output_embeddings(base))  # type: ignore[method-assign]
    try:
        yield
    finally:
        del base.get_output_embeddings


def check_adapted_head(model: str | nn.Module, peft_config: PeftConfig | None) -> None:
    """
    Check that an adapter on the LM head comes with a loaded model.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            The model as it was passed.
        peft_config (`PeftConfig`, *optional*):
            The adapter to train.

    Raises:
        ConfigError: for a model given by its name, whose head TRL looks at before anything can be done about it.
    """
    targets = getattr(peft_config, "target_modules", None)
    if isinstance(model, str) and not isinstance(targets, str) and "lm_head" in (targets or ()):
        raise ConfigError(
            f"You passed the model {model!r} by its name and an adapter on its `lm_head`.",
            remedy=f"Load the model and pass it itself, `model=AutoModelForCausalLM.from_pretrained({model!r})`, or "
            "take `lm_head` out of `target_modules`.",
        )


def score_adapted_head(model: nn.Module) -> None:
    """
    Have a model with a LoRA adapter on its LM head scored with it, see [`adapted_head`]; others are left as they are.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The policy, with TRL's fused LM head.
    """
    if not isinstance(model, PeftModel) or not isinstance(model.get_output_embeddings(), LoraLayer):
        return
    base = base_model(model)
    original = base.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: object, fused_lm_head: bool = False, **kwargs: object) -> object:
        if not fused_lm_head:
            return original(*args, **kwargs)
        with adapted_head(base):
            return original(*args, fused_lm_head=True, **kwargs)

    base.forward = types.MethodType(forward, base)


def _effective_head(head: nn.Module | None) -> nn.Module | _EffectiveHead | None:
    """Return the output layer as TRL's fused head reads it."""
    if not isinstance(head, LoraLayer) or not isinstance(head.get_base_layer(), nn.Linear):
        return head
    layer = head.get_base_layer()
    factors = {n: (head.lora_B[n], head.lora_A[n]) for n in head.lora_A}
    names = [] if head.disable_adapters or head.merged else [n for n in head.active_adapters if n in factors]
    if any(head.use_dora.get(name) for name in names) or not layer.weight.is_floating_point():
        return head
    weight, bias = layer.weight, layer.bias
    wide = torch.promote_types(weight.dtype, torch.float32)  # in which a small change of a weight is not rounded off
    with torch.autocast(weight.device.type, enabled=False):
        for name in names:
            (up, down), scaling = factors[name], head.scaling[name]
            weight = weight + scaling * (up.weight.to(wide) @ down.weight.to(wide))
            if up.bias is not None:
                bias = scaling * up.bias + (0.0 if bias is None else bias)
    return _EffectiveHead(weight, bias)


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return a model without the adapter around it."""
    return cast(PreTrainedModel, getattr(model, "get_base_model", lambda: model)())


def _linears_of_head(base: PreTrainedModel) -> list[nn.Linear]:
    """Return the linear layers of a model's LM head, those of its adapters included."""
    head = base.get_output_embeddings()
    linears = [] if head is None else [m for m in head.modules() if isinstance(m, nn.Linear)]
    if not linears or any(not linear.weight.is_floating_point() for linear in linears):
        kind = "none" if head is None else f"a {type(head).__name__}"
        raise ConfigError(
            f"You passed `cast_lm_head_to_fp32=True`, and the LM head of the model is {kind}, which cannot compute "
            "in float32.",
            remedy="Keep the head out of quantization (`llm_int8_skip_modules=['lm_head']`), or leave "
            "`cast_lm_head_to_fp32` at False.",
        )
    return linears


class _Float32Product:
    """The forward pass of a linear layer, in float32 and outside autocast."""

    def __init__(self, linear: nn.Linear):
        self.linear = linear
        self.holds = False
        self.weight: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.linear.bias is None else self.linear.bias.float()
            return nn.functional.linear(hidden.float(), self._float32_weight(), bias)

    def _float32_weight(self) -> Tensor:
        weight: Tensor = self.linear.weight
        if not self.holds or type(weight) is not nn.Parameter or weight.dtype == torch.float32:
            return weight.float()
        if self.weight is None:
            self.weight = weight.detach().float()
        return self.weight
