"""The reference as weights of its own: averages of the policy's merged weights, beside the model or in a second one.

Owns what a PEFT policy acts with, and the references that average it: W_ref <- a W_policy + (1 - a) W_ref, as in
TR-DPO (arXiv 2404.09656). Fed by the policy's parameters; `sync.py` says when, and lets the trainer score with them.
"""

import random
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .errors import ConfigError, ReferenceSyncError
from .reference import Comparison, SyncReport, remove_twin
from .rollout.sampler import at_least_float32, scoring_mode
from .sharding import assign, full, local, whole


def average(comparison: Comparison, name: str, reference: Tensor, policy: Tensor, alpha: float) -> None:
    """
    Move a tensor of the reference toward the policy's, and check that it did.

    Args:
        comparison ([`Comparison`]):
            Notes the result.
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
    The weights the policy's adapted modules act with, averaged over the syncs.

    Kept in float32 beside the model, one dense tensor for each adapted module: 4 bytes for each of its weights,
    whatever the dtype of the base or the rank. While the reference is scored they stand in for the base weights, with
    the adapter switched off, so that scoring costs no more than the base model. Before the first sync it equals the
    policy.

    Args:
        model (`PeftModel`):
            The policy.
        adapter (`str`):
            Name of its adapter.

    Raises:
        ConfigError: for a kind of adapter without merged weights.
    """

    mode = "merged"

    def __init__(self, model: Any, adapter: str) -> None:
        self._model, self._adapter = model, adapter
        remove_twin(model)
        self._randomness = random.Random(0)
        self._layers = _tuner_layers(model, adapter)
        with torch.no_grad():
            self._tensors = _in_blocks(lambda: effective_weights(model, adapter))

    @torch.no_grad()
    def sync(self, alpha: float, comparison: Comparison) -> SyncReport:
        """
        Average, then compare. A column of each linear layer, drawn anew for each sync, is compared with what the layer
        itself gives for a unit vector, and the whole with its being finite; everything else entry by entry.
        """
        layers = {weight_name(name, layer): layer for name, layer in self._layers.items()}
        linear = {name: width for name, layer in layers.items() if (width := _inputs_of(layer)) is not None}
        with scoring_mode(self._model):
            for name, width in linear.items():
                self._sync_linear(name, layers[name], width, alpha, comparison)
        for name, policy in effective_weights(self._model, self._adapter, skip=linear):
            if name in layers:
                _compare_with_peft(comparison, name, policy, layers[name], self._adapter)
            average(comparison, name, self._tensors[name], policy, alpha)
        return comparison.report()

    def _sync_linear(self, name: str, layer: Any, width: int, alpha: float, comparison: Comparison) -> None:
        reference = self._tensors[name]
        place = self._randomness.randrange(width)
        turned = getattr(layer, "fan_in_fan_out", False)
        own = reference.T if turned else reference
        acting, precision = _column(layer, place, width)
        expected = alpha * acting + (1 - alpha) * own[:, place]
        if _is_plain(layer, self._adapter):
            weight = dequantize_module_weight(layer.get_base_layer()).detach().to(reference.dtype)
            reference.lerp_(weight, alpha)
            factors = layer.lora_B[self._adapter].weight, layer.lora_A[self._adapter].weight
            up, down = (factor.detach().to(reference.dtype) for factor in factors)
            own.addmm_(up, down, alpha=alpha * layer.scaling[self._adapter])  # no dense difference in between
        else:
            reference.lerp_(_effective_weight(name, layer, self._adapter), alpha)
        found = own[:, place] + 0 * reference.sum()  # NaN and infinity anywhere show
        comparison.add(name, found, expected, 8 * precision * float(expected.abs().max()))

    def scoring(self) -> bool:
        """Whether the model's forward is the reference's now: the base model's, without an adapter."""
        return any(layer.disable_adapters for layer in self._layers.values())

    @contextmanager
    def weights(self) -> Iterator[None]:
        """While it is: put the reference in the place of the base weights."""
        base, kept = self._model.get_base_model(), []
        try:
            for name, tensor in self._tensors.items():
                holder, table, key, stand_in = _place(base, name, tensor)
                kept.append((getattr(holder, table), key, getattr(holder, table)[key]))
                getattr(holder, table)[key] = stand_in
            yield
        finally:
            for table, key, value in reversed(kept):
                table[key] = value

    def state(self) -> dict[str, Tensor]:
        """Everything the reference is, on the CPU."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a state. Its names and shapes have been checked."""
        for name, tensor in self._tensors.items():
            tensor.copy_(state[name])


def _in_blocks(weights: Callable[[], Iterator[tuple[str, Tensor]]]) -> dict[str, Tensor]:
    """
    Copies of tensors, those of a device and dtype in one block of memory: weights that lie scattered make the scoring
    of a CPU a few percent slower. The tensors are asked for twice, so that they need not all be there at a time.
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


def effective_weights(model: Any, adapter: str, skip: Container[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """
    What a PEFT policy acts with, where that is not its base model.

    Args:
        model (`PeftModel`):
            The policy.
        adapter (`str`):
            Name of its adapter.
        skip (`Container[str]`, *optional*, defaults to `()`):
            Names of weights that are left out.

    Yields:
        `tuple[str, Tensor]`: name in the base model, and tensor, float32 or float64: the weight of each adapted module
        (base plus difference, from the dequantized base if that is quantized; the DoRA form), trained copies of
        `modules_to_save`, and biases that are trained.

    Raises:
        ConfigError: for a module whose weight cannot be merged.
    """
    base = model.get_base_model()
    module: Any
    for name, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            if adapter in module.modules_to_save:
                for part, parameter in module.modules_to_save[adapter].named_parameters():
                    yield f"{name}.{part}", at_least_float32(parameter.detach())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise _unmergeable(name, type(module).__name__)
        elif isinstance(module, BaseTunerLayer) and _has(module, adapter):
            yield from _effective_tensors(name, module, adapter, skip)
    for name, parameter in base.named_parameters():
        outside = ".modules_to_save." not in f".{name}" and not name.startswith("value_head.")
        if parameter.requires_grad and outside and name.endswith("bias") and "lora_" not in name:
            yield name.replace(".base_layer.", "."), at_least_float32(parameter.detach())


def _effective_tensors(name: str, layer: Any, adapter: str, skip: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """Weight of an adapted layer, and its bias if the adapter has one, whether the layer itself has one or not."""
    if (weight := weight_name(name, layer)) not in skip:
        yield weight, _effective_weight(name, layer, adapter)
    if getattr(layer, "lora_bias", {}).get(adapter):
        bias = layer.get_base_layer().bias
        difference = at_least_float32(layer.lora_B[adapter].bias.detach()) * layer.scaling[adapter]
        yield f"{name}.bias", difference if bias is None else at_least_float32(bias.detach()) + difference


def _effective_weight(name: str, layer: Any, adapter: str) -> Tensor:
    base, parameter = layer.get_base_layer(), _adapted_parameter(layer)
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    dora = variant is None or "dora" in str(getattr(variant, "__name__", type(variant).__name__)).lower()
    if not hasattr(layer, "get_delta_weight") or not hasattr(base, parameter) or not dora:
        raise _unmergeable(name, type(layer).__name__ if dora else str(variant))
    stored = dequantize_module_weight(base) if parameter == "weight" else getattr(base, parameter)
    weight = at_least_float32(stored.detach())
    if variant is None:
        difference = at_least_float32(layer.get_delta_weight(adapter).detach())
        return difference.add_(weight)  # in place: it is ours
    merged = at_least_float32(variant.merge_safe(layer, adapter, weight).detach())
    getattr(layer, "_caches", {}).clear()
    return merged


def _is_plain(layer: Any, adapter: str) -> bool:
    """Whether the weight a linear layer acts with is its base plus a product of two factors: LoRA and rsLoRA."""
    return getattr(layer, "lora_variant", {}).get(adapter) is None and hasattr(layer, "lora_B")


def _unmergeable(name: str, kind: str) -> ConfigError:
    return ConfigError(
        f"The reference of this run keeps merged weights, but `{name}` is adapted by {kind}, which has none. Use "
        f"`ref_sync_mode='adapter'` with `ref_model_mixup_alpha=1.0`, or LoRA on linear and embedding modules."
    )


def _inputs_of(layer: Any) -> int | None:
    """Number of inputs of a linear layer; `None` for an embedding, a convolution and the like."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Linear):  # those of bitsandbytes, too
        return base.in_features
    return base.nx if isinstance(base, Conv1D) else None


def _column(layer: Any, place: int, width: int) -> tuple[Tensor, float]:
    """A column of the weight a layer acts with, float32, from its own forward pass; and its precision."""
    some = next(p for p in layer.parameters() if p.is_floating_point())
    unit = some.new_zeros(1, width)
    unit[0, place] = 1.0
    output = layer(unit)
    precision = max(torch.finfo(output.dtype).eps, torch.finfo(some.dtype).eps)
    if _adds_bias(layer):
        output = output - layer(torch.zeros_like(unit))
    return at_least_float32(output[0]), precision


def _adds_bias(layer: Any) -> bool:
    biased = [layer.get_base_layer(), *getattr(layer, "lora_B", {}).values()]
    return any(getattr(module, "bias", None) is not None for module in biased)


def _compare_with_peft(comparison: Comparison, name: str, weight: Tensor, layer: Any, adapter: str) -> None:
    """Whether a weight is what PEFT merges."""
    base, parameter = layer.get_base_layer(), _adapted_parameter(layer)
    kept = {key: p.data for key, p in base.named_parameters(recurse=False)}
    try:
        layer.merge(safe_merge=True, adapter_names=[adapter])
        found = at_least_float32(getattr(base, parameter).detach())
    except ValueError as error:
        raise ReferenceSyncError(f"The reference was not synced: PEFT cannot merge `{name}`: {error}") from error
    finally:
        for key, data in kept.items():
            getattr(base, key).data = data
        layer.merged_adapters.clear()
        getattr(layer, "_caches", {}).clear()
    rounding = 4 * torch.finfo(kept[parameter].dtype).eps * float(weight.abs().max())
    comparison.add(f"{name} (merged by PEFT)", found, weight, rounding)


def _quantized(module: Any) -> bool:
    return not module.weight.is_floating_point() or type(module.weight).__name__ in ("Params4bit", "Int8Params")


def _tuner_layers(model: Any, adapter: str) -> dict[str, Any]:
    """Return the layers that an adapter has factors in, by name; another adapter's are as good as not there."""
    modules = model.get_base_model().named_modules()
    return {name: module for name, module in modules if isinstance(module, BaseTunerLayer) and _has(module, adapter)}


def _has(layer: Any, adapter: str) -> bool:
    return any(adapter in getattr(layer, table, ()) for table in layer.adapter_layer_names)


def weight_name(name: str, layer: Any) -> str:
    """Return the name in the base model of the weight an adapted layer acts with."""
    nested = name.replace(".base_layer", "")  # of a module of which several parameters are adapted
    return f"{nested}.{_adapted_parameter(layer)}"


def _adapted_parameter(layer: Any) -> str:
    return getattr(layer, "parameter_name", "weight")


class _Dense(nn.Linear):
    """Stands in for a quantized layer."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight.to(input.dtype), bias)


def _place(base: Any, name: str, tensor: Tensor) -> tuple[Any, str, str, Any]:
    """Where the base model keeps what a tensor stands in for: module, its table, the key there, and the stand-in.

    The parameter is replaced and not overwritten, so that one it is tied to stays as it is.
    """
    path, _, key = name.rpartition(".")
    holder: Any = base
    for part in path.split(".") if path else ():
        if isinstance(holder, ModulesToSaveWrapper):
            holder = holder.original_module
        holder = getattr(holder, part)
    if isinstance(holder, ModulesToSaveWrapper):
        holder = holder.original_module
    if isinstance(holder, BaseTunerLayer):
        inner: Any = holder.get_base_layer()
        if key == "weight" and _quantized(inner):
            dense = _Dense(inner.in_features, inner.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(tensor, requires_grad=False)
            dense.bias = inner.bias
            return holder, "_modules", "base_layer", dense
        holder = inner
    current = holder._parameters[key]  # `None` for the bias that an adapter brings to a layer without one
    dtype = next(p.dtype for p in (current, *holder.parameters()) if p is not None)
    stand_in = nn.Parameter(tensor.to(dtype), requires_grad=False)
    return holder, "_parameters", key, stand_in


# A second model


class ModelReference:
    """
    A second model: TRL's own of full fine-tuning, or one that takes in the merged weights of a PEFT policy.

    Args:
        model (`PreTrainedModel`):
            The reference.
        policy (`PreTrainedModel` or `PeftModel`):
            The policy, of the same base.
        adapter (`str`, *optional*):
            Name of the policy's adapter, if it has one.
    """

    mode = "model"

    def __init__(self, model: Any, policy: Any, adapter: str | None = None) -> None:
        self._model, self._policy, self._adapter = model, policy, adapter
        if adapter is not None:
            for name, _ in effective_weights(policy, adapter):
                path, _, key = name.rpartition(".")
                holder = model.get_submodule(path)
                parameter = holder._parameters[key]
                own = torch.zeros_like(holder.weight[:, 0]) if parameter is None else parameter.detach().clone()
                holder._parameters[key] = nn.Parameter(own, requires_grad=False)  # not tied

    def _policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        if self._adapter is not None:
            return effective_weights(self._policy, self._adapter)
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

    def scoring(self) -> bool:
        """TRL scores with the second model by itself."""
        return False

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Nothing to exchange."""
        yield

    def state(self) -> dict[str, Tensor]:
        """All parameters, whole and on the CPU; to be called in every process."""
        state = {}
        for name, parameter in self._model.named_parameters():
            with whole([parameter]):
                state[name] = full(parameter).cpu().contiguous().clone()
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a state. Its names and shapes have been checked."""
        for name, parameter in self._model.named_parameters():
            with whole([parameter], modify=True):
                assign(parameter, state[name])
