"""References with weights of their own: averages of the policy's merged weights, within the model or in a second one.

At each sync W_ref <- a W_policy + (1 - a) W_ref, as in TR-DPO (arXiv 2404.09656).
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError
from ..models.sharding import assign_all, local, whole, whole_copies
from ..sampling.protocol import at_least_float32, scoring_mode
from .adapter import Comparison, SyncReport, remove_twin


_Layer: TypeAlias = Any
"""A layer that PEFT has adapted; which attributes it has depends on the kind of adapter."""


def average(comparison: Comparison, name: str, reference: Tensor, policy: Tensor, alpha: float) -> None:
    """
    Move a tensor of the reference toward the policy's, and check the result.

    Args:
        comparison ([`Comparison`]):
            Gets the result.
        name (`str`):
            Name of the tensor.
        reference, policy (`Tensor`):
            Tensors of one shape; the first is changed.
        alpha (`float`):
            Weight of the policy's.
    """
    policy = policy.to(reference.dtype)
    if alpha == 1 or not reference.numel():  # a process may hold no share of a small tensor, and still takes part
        reference.copy_(policy)
        comparison.add(name, reference, policy)
    else:
        # An average is nearer to the policy by the same factor in every entry
        expected = (1 - alpha) * (reference - policy).abs().max()
        reference.mul_(1 - alpha).add_(policy, alpha=alpha)
        rounding = 4 * torch.finfo(reference.dtype).eps * float(policy.abs().max() + expected)
        comparison.add(name, (reference - policy).abs().max()[None], expected[None], rounding)


class MergedReference:
    """
    The weights that the policy's adapted modules act with, averaged over the syncs.

    They are kept in float32 in addition to the model, one dense tensor for each adapted module: 4 bytes for each of
    its weights, whatever the dtype of the base or the rank. While the reference is scored they replace the base
    weights, with the adapter switched off, so that scoring costs no more than the base model. Before the first sync
    the reference equals the policy.

    Args:
        model (`PeftModel`):
            The policy.
        adapter (`str`):
            Name of its adapter.

    Raises:
        ConfigError: for a kind of adapter without merged weights.
    """

    mode = "merged"

    def __init__(self, model: PeftModel, adapter: str) -> None:
        self._model, self._adapter = model, adapter
        remove_twin(model)
        self._randomness = random.Random(0)
        self._layers = _tuner_layers(model, adapter)
        with torch.no_grad():
            self._tensors = _in_blocks(lambda: effective_weights(model, adapter))

    @torch.no_grad()
    def sync(self, alpha: float, comparison: Comparison) -> SyncReport:
        """
        Average, then compare.

        Of each linear layer, one column, drawn anew at each sync, is compared with what the layer itself returns for a
        unit vector, and the rest is checked for being finite; everything else is compared entry by entry.
        """
        layers = {weight_name(name, layer): layer for name, layer in self._layers.items()}
        with scoring_mode(self._model):
            for name, policy in effective_weights(self._model, self._adapter):
                width = _input_width(layers[name]) if name in layers else None
                if width is None:
                    average(comparison, name, self._tensors[name], policy, alpha)
                else:
                    self._sync_linear(name, layers[name], policy, width, alpha, comparison)
        return comparison.report()

    def _sync_linear(
        self, name: str, layer: _Layer, policy: Tensor, width: int, alpha: float, comparison: Comparison
    ) -> None:
        reference, column = self._tensors[name], self._randomness.randrange(width)
        rows = reference.T if getattr(layer, "fan_in_fan_out", False) else reference
        acting, precision = _acting_column(layer, column, width)
        expected = alpha * acting + (1 - alpha) * rows[:, column]
        reference.lerp_(policy, alpha)
        found = rows[:, column] + 0 * reference.sum()  # NaN and infinity anywhere in the weight reach the column
        comparison.add(name, found, expected, 8 * precision * float(expected.abs().max()))

    def scoring(self) -> bool:
        """Return whether the model's forward pass is the reference's now: the base model's, without an adapter."""
        return any(layer.disable_adapters for layer in self._layers.values())

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Replace the base weights by the reference, while the context is open."""
        base, kept = self._model.get_base_model(), []
        try:
            for name, tensor in self._tensors.items():
                table, key, stand_in = _stand_in(base, name, tensor)
                kept.append((table, key, table[key]))
                table[key] = stand_in
            yield
        finally:
            for table, key, value in reversed(kept):
                table[key] = value

    def state(self) -> dict[str, Tensor]:
        """Return the whole reference, on the CPU."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a state whose names and shapes have been checked."""
        for name, tensor in self._tensors.items():
            tensor.copy_(state[name])


def _in_blocks(weights: Callable[[], Iterator[tuple[str, Tensor]]]) -> dict[str, Tensor]:
    """
    Return copies of tensors, in one block of memory for each device and dtype: scattered weights make scoring on a CPU
    a few percent slower. The tensors are asked for twice, so that they need not all exist at the same time.
    """
    sizes: Counter[tuple[torch.device, torch.dtype]] = Counter()
    for _, tensor in weights():
        sizes[tensor.device, tensor.dtype] += tensor.numel()
    free = {block: torch.empty(size, device=block[0], dtype=block[1]) for block, size in sizes.items()}
    copies = {}
    for name, tensor in weights():
        block = tensor.device, tensor.dtype
        own, free[block] = free[block].tensor_split([tensor.numel()])
        copies[name] = own.view(tensor.shape).copy_(tensor)
    return copies


def effective_weights(model: PeftModel, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """
    Yield the weights that a PEFT policy acts with, where they are not its base model's.

    Args:
        model (`PeftModel`):
            The policy.
        adapter (`str`):
            Name of its adapter.

    Yields:
        `tuple[str, Tensor]`: name in the base model, and tensor, float32 or float64: the weight of each adapted module
        (base plus difference, from the dequantized base if that is quantized; the DoRA form), trained copies of
        `modules_to_save`, and biases that are trained.

    Raises:
        ConfigError: for a module whose weight cannot be merged.
    """
    base = model.get_base_model()
    for name, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            if adapter in module.modules_to_save:
                for part, parameter in module.modules_to_save[adapter].named_parameters():
                    yield f"{name}.{part}", at_least_float32(parameter.detach())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise _unmergeable(name, type(module).__name__)
        elif isinstance(module, BaseTunerLayer) and _holds(module, adapter):
            yield weight_name(name, module), _effective_weight(name, module, adapter)
            yield from _adapter_bias(name, module, adapter)
    for name, parameter in base.named_parameters():
        outside = ".modules_to_save." not in f".{name}" and not name.startswith("value_head.")
        if parameter.requires_grad and outside and name.endswith("bias") and "lora_" not in name:
            yield name.replace(".base_layer.", "."), at_least_float32(parameter.detach())


def _adapter_bias(name: str, layer: _Layer, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the bias of an adapted layer if the adapter has one, whether or not the layer itself has one."""
    if getattr(layer, "lora_bias", {}).get(adapter):
        bias = layer.get_base_layer().bias
        difference = at_least_float32(layer.lora_B[adapter].bias.detach()) * layer.scaling[adapter]
        yield f"{name}.bias", difference if bias is None else at_least_float32(bias.detach()) + difference


def _effective_weight(name: str, layer: _Layer, adapter: str) -> Tensor:
    base, parameter = layer.get_base_layer(), _adapted_parameter(layer)
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    dora = variant is None or "dora" in str(getattr(variant, "__name__", type(variant).__name__)).lower()
    if not hasattr(layer, "get_delta_weight") or not hasattr(base, parameter) or not dora:
        raise _unmergeable(name, type(layer).__name__ if dora else str(variant))
    stored = dequantize_module_weight(base) if parameter == "weight" else getattr(base, parameter)
    weight = at_least_float32(stored.detach())
    if variant is None and hasattr(layer, "lora_B") and _input_width(layer) is not None:
        # LoRA and rsLoRA: multiplied at the precision of the sum, whatever the dtype of the factors
        up, down = (table[adapter].weight.detach().to(weight.dtype) for table in (layer.lora_B, layer.lora_A))
        factors = (down.T, up.T) if getattr(layer, "fan_in_fan_out", False) else (up, down)
        return torch.addmm(weight, *factors, alpha=layer.scaling[adapter])
    if variant is None:
        difference = at_least_float32(layer.get_delta_weight(adapter).detach())
        return difference.add_(weight)  # in place: the tensor is ours
    merged = at_least_float32(variant.merge_safe(layer, adapter, weight).detach())
    getattr(layer, "_caches", {}).clear()
    return merged


def _unmergeable(name: str, kind: str) -> ConfigError:
    return ConfigError(
        f"The reference of this run keeps merged weights, but `{name}` is adapted by {kind}, which has none.",
        remedy="Use `ref_sync_mode='adapter'` with `ref_model_mixup_alpha=1.0`, or LoRA on linear and embedding "
        "modules.",
    )


def _input_width(layer: _Layer) -> int | None:
    """Return the number of inputs of a linear layer; `None` for an embedding, a convolution and the like."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Linear):  # includes those of bitsandbytes
        return base.in_features
    return base.nx if isinstance(base, Conv1D) else None


def _acting_column(layer: _Layer, column: int, width: int) -> tuple[Tensor, float]:
    """Return a column of the weight a layer acts with, float32, by its own forward pass, and its precision."""
    some = next(p for p in layer.parameters() if p.is_floating_point())
    unit = some.new_zeros(1, width)
    unit[0, column] = 1.0
    output = layer(unit)
    precision = max(torch.finfo(output.dtype).eps, torch.finfo(some.dtype).eps)
    biased = [layer.get_base_layer(), *getattr(layer, "lora_B", {}).values()]
    if any(getattr(module, "bias", None) is not None for module in biased):
        output = output - layer(torch.zeros_like(unit))
    return at_least_float32(output[0]), precision


def _is_quantized(module: _Layer) -> bool:
    return not module.weight.is_floating_point() or type(module.weight).__name__ in ("Params4bit", "Int8Params")


def _tuner_layers(model: PeftModel, adapter: str) -> dict[str, _Layer]:
    """Return the layers that an adapter has factors in, by name; those of other adapters are left out."""
    modules = model.get_base_model().named_modules()
    return {name: module for name, module in modules if isinstance(module, BaseTunerLayer) and _holds(module, adapter)}


def _holds(layer: BaseTunerLayer, adapter: str) -> bool:
    return any(adapter in getattr(layer, table, ()) for table in layer.adapter_layer_names)


def weight_name(name: str, layer: _Layer) -> str:
    """Return the name in the base model of the weight an adapted layer acts with."""
    nested = name.replace(".base_layer", "")  # of a module of which several parameters are adapted
    return f"{nested}.{_adapted_parameter(layer)}"


def _adapted_parameter(layer: _Layer) -> str:
    return getattr(layer, "parameter_name", "weight")


class _Dense(nn.Linear):
    """A dense layer that takes the place of a quantized one."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight.to(input.dtype), bias)


def _stand_in(base: nn.Module, name: str, tensor: Tensor) -> tuple[dict[str, Any], str, nn.Module | nn.Parameter]:
    """
    Return the table of the base model that holds what a tensor replaces, the key there, and the replacement.

    The parameter is replaced and not overwritten, so that one it is tied to stays as it is.
    """
    path, _, key = name.rpartition(".")
    holder: _Layer = _original(base)
    for part in path.split(".") if path else ():
        holder = _original(getattr(holder, part))
    if isinstance(holder, BaseTunerLayer):
        table, holder = holder._modules, holder.get_base_layer()  # type: ignore[attr-defined]
        if key == "weight" and _is_quantized(holder):
            dense = _Dense(holder.in_features, holder.out_features, bias=False, device="meta")
            dense.weight, dense.bias = nn.Parameter(tensor, requires_grad=False), holder.bias
            return table, "base_layer", dense
    current = holder._parameters[key]  # `None` for the bias that an adapter brings to a layer without one
    dtype = next(p.dtype for p in (current, *holder.parameters()) if p is not None)
    return holder._parameters, key, nn.Parameter(tensor.to(dtype), requires_grad=False)


def _original(module: _Layer) -> _Layer:
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


class ModelReference:
    """
    A second model: TRL's own in full fine-tuning, or one that takes in the merged weights of a PEFT policy.

    Args:
        model (`PreTrainedModel`):
            The reference.
        policy (`PreTrainedModel` or `PeftModel`):
            The policy, of the same base.
        adapter (`str`, *optional*):
            Name of the policy's adapter, if it has one.
    """

    mode = "model"

    def __init__(
        self, model: PreTrainedModel, policy: PreTrainedModel | PeftModel, adapter: str | None = None
    ) -> None:
        self._model, self._policy, self._adapter = model, policy, adapter
        for name, _ in self._policy_weights() if adapter is not None else ():
            path, _, key = name.rpartition(".")
            holder: _Layer = model.get_submodule(path)
            parameter = holder._parameters[key]
            own = torch.zeros_like(holder.weight[:, 0]) if parameter is None else parameter.detach().clone()
            holder._parameters[key] = nn.Parameter(own, requires_grad=False)  # not tied

    def _policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        if self._adapter is not None:
            return effective_weights(self._policy, self._adapter)  # type: ignore[arg-type]
        named = self._policy.named_parameters()
        return ((name, parameter) for name, parameter in named if not name.startswith("value_head."))

    @torch.no_grad()
    def sync(self, alpha: float, comparison: Comparison) -> SyncReport:
        """Average tensor by tensor, and check each."""
        for name, policy in self._policy_weights():
            reference = self._model.get_parameter(name)
            with whole([reference, policy], modify=True):
                average(comparison, name, local(reference), local(policy), alpha)
        return comparison.report()

    def state(self) -> dict[str, Tensor]:
        """Return all parameters, whole and on the CPU; every process has to call it."""
        return whole_copies(self._model.named_parameters())

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a state whose names and shapes have been checked."""
        assign_all(self._model.named_parameters(), state)
