"""Keep a model with 4-bit base weights trainable, although sampling and loading a checkpoint would change it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def keep_trainable(model: nn.Module) -> None:
    """
    Keep the 4-bit layers of a policy in the layout that gradients pass through.

    On CPUs with AVX512-BF16, bitsandbytes repacks a layer's weight at its first forward pass in evaluation mode and
    never restores it: from then on the layer's result has no gradient, not even in training, and the layers below it
    learn from their adapters' own paths alone. A policy is sampled before each update, so this must never happen.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The policy.
    """
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        weight: nn.Parameter = module.weight  # type: ignore[assignment]
        state = getattr(weight, "quant_state", None)
        if state is not None and getattr(state, "packing_format_for_cpu", False):  # it was sampled from before
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(  # type: ignore[attr-defined]
                weight.data, state
            )


@contextmanager
def same_parameters(model: nn.Module) -> Iterator[None]:
    """
    Keep the trained parameters of a model the same tensors while values are loaded into it.

    PEFT replaces them when it loads the adapter of a 4-bit model, in float32 where TRL trains it in bfloat16: a
    resumed run would continue with different arithmetic, and an optimizer would still hold the old tensors.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The policy.
    """
    before = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    after = dict(model.named_parameters())
    for name, parameter in before.items():
        loaded = after.get(name)
        if loaded is not None and loaded is not parameter and loaded.shape == parameter.shape:
            with torch.no_grad():
                parameter.copy_(loaded)
            module, _, own = name.rpartition(".")
            setattr(model.get_submodule(module), own, parameter)
