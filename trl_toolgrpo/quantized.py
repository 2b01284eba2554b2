"""4-bit base weights that stay fit for training.

What sampling and loading a checkpoint would do to such a policy, and does not. Imports nothing of the package.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def keep_trainable(model: Any) -> None:
    """
    Keep the 4-bit layers of a policy in the layout that gradients pass through.

    On CPUs with AVX512-BF16, bitsandbytes packs a layer's weight anew at its first forward pass in evaluation mode,
    and never back: from then on its result has no gradient, also in training, and the layers below learn from their
    adapters' own paths alone. A policy is sampled before each update, so none of it is to happen.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The policy.
    """
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        state: Any = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):  # it was sampled from before
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
                module.weight.data, state
            )


@contextmanager
def same_parameters(model: Any) -> Iterator[None]:
    """
    Keep the trained parameters of a model the tensors they are while values are loaded into it.

    PEFT puts others in their place when it loads the adapter of a 4-bit model, in float32 where TRL trains it in
    bfloat16: a run that is resumed would go on with other arithmetic, and an optimizer would hold the old ones.

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
