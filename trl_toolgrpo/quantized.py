"""4-bit base weights that stay fit for training.

Owns the one thing that sampling would do to them; fed by the trainer. Imports nothing of the package.
"""

from typing import Any


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
