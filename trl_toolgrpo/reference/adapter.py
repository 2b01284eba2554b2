"""The reference as a frozen copy of the policy's adapter, and the check that a sync did what it should."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..errors import ConfigError
from ..models.rounding import widest
from ..models.sharding import assign, assign_all, full, local, whole, whole_copies
from ..types import JSONObject


ADAPTER = "ref"  # the name under which TRL looks for a reference adapter


@dataclass(frozen=True)
class SyncReport:
    """
    What a sync did, as verified after it.

    Args:
        tensors (`int`):
            Number of tensors compared.
        differ (`tuple[str, ...]`):
            Names of the tensors that are not what the sync should have made them.
        max_abs_diff (`float`):
            Largest absolute difference found, rounding included.
        seconds (`float`):
            Time taken, the comparison included.
    """

    tensors: int
    differ: tuple[str, ...]
    max_abs_diff: float
    seconds: float


class Comparison:
    """
    Differences of tensors over all processes, collected one by one.

    Args:
        gather (`Callable`, *optional*):
            Concatenates a tensor of each process along the first dimension; each process may hold a share of every
            parameter.
    """

    def __init__(self, gather: Callable[[Tensor], Tensor] | None = None) -> None:
        self._gather = gather or (lambda tensor: tensor)
        self._found: dict[str, Tensor] = {}
        self._start = time.perf_counter()

    def add(self, name: str, found: Tensor, expected: Tensor, tolerance: float = 0.0) -> None:
        """Compare two tensors; NaN differs from everything."""
        difference = (found - expected).abs().max() if found.numel() else found.new_zeros(())
        differs = ~(difference <= tolerance)
        self._found[name] = torch.stack([differs, difference]).to(widest(found.device))

    def report(self) -> SyncReport:
        """Return the result, the same in every process."""
        shares = self._gather(torch.stack(list(self._found.values()))[None])  # (processes, tensors, 2)
        differs, differences = shares.amax(dim=0).unbind(dim=1)
        names = tuple(name for name, found in zip(self._found, differs.tolist(), strict=True) if found)
        return SyncReport(len(self._found), names, float(differences.max()), time.perf_counter() - self._start)


@contextmanager
def same_parameters_trained(model: nn.Module) -> Iterator[None]:
    """Put back, at the end, which parameters require a gradient: PEFT changes it when it switches adapters."""
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad != trained.get(name, parameter.requires_grad):
                parameter.requires_grad_(trained[name])


def remove_twin(model: PeftModel) -> None:
    """Remove the reference adapter that an earlier trainer has left in a policy, and change nothing else."""
    if ADAPTER in model.peft_config:
        with same_parameters_trained(model):
            model.delete_adapter(ADAPTER)


class AdapterReference:
    """
    A frozen second adapter, a copy of the policy's, at the cost of one adapter.

    Factors, magnitudes (DoRA) and `modules_to_save` are part of the adapter; biases that are trained in place are kept
    separately. Before the first sync it equals the policy.

    Args:
        model (`PeftModel`):
            The policy, before its parameters are sharded.
        adapter (`str`):
            Name of the policy's adapter.

    Raises:
        ConfigError: if something is trained that no adapter holds.
    """

    mode = "adapter"

    def __init__(self, model: PeftModel, adapter: str) -> None:
        self._model, self._adapter = model, adapter
        with same_parameters_trained(model):
            remove_twin(model)
            self._add_twin()
        for name, parameter in model.named_parameters():
            if f".{ADAPTER}." in f"{name}.":
                parameter.requires_grad_(False)
        pairs = {name: (own, twin) for name, own, twin in self._pairs()}
        with torch.no_grad():
            for own, twin in pairs.values():
                twin.data = twin.data.to(own.dtype)
                twin.copy_(own)
        alone = [n for n, p in model.named_parameters() if p.requires_grad and n not in pairs]
        others = [name for name in alone if not name.endswith("bias") and "value_head." not in name]
        if others:
            raise ConfigError(
                f"You passed `beta` above 0 for an adapter, but these parameters are trained outside of it: "
                f"{', '.join(others[:5])}. No reference adapter can hold them.",
                remedy="Name their modules in `modules_to_save`, or freeze them.",
            )
        self._biases = {n: model.get_parameter(n).detach().clone() for n in alone if "value_head." not in n}

    def _add_twin(self) -> None:
        """Add the reference adapter, which has the configuration of the policy's and leaves the base as it is."""
        config = copy.deepcopy(self._model.peft_config[self._adapter])
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # others change the base weights when an adapter is added
        if hasattr(config, "bias"):
            config.bias = "none"  # a base weight cannot be trained by two adapters
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        try:
            self._model.add_adapter(ADAPTER, config)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ConfigError(
                f"You passed `beta` above 0 for an adapter of type {kind}, whose reference is a second adapter, and "
                f"PEFT cannot add one: {error}",
                remedy="Set `beta=0`, or use LoRA (`LoraConfig`).",
            ) from error

    def _pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield each tensor of the policy's adapter with that of the reference, as they are now: sharded or not."""
        tensors: dict[str, Tensor] = dict(self._model.named_parameters(remove_duplicate=False))
        tensors.update(self._model.named_buffers(remove_duplicate=False))
        for name, tensor in tensors.items():
            parts = name.split(".")
            places = (i for i, part in enumerate(parts) if part == self._adapter)
            twins = (".".join([*parts[:i], ADAPTER, *parts[i + 1 :]]) for i in places)
            twin = next((tensors[candidate] for candidate in twins if candidate in tensors), None)
            if twin is not None:
                yield name, tensor, twin

    @torch.no_grad()
    def sync(self, alpha: float, comparison: Comparison) -> SyncReport:
        """Copy the policy's adapter, then compare."""
        pairs = list(self._pairs())
        with whole([t for _, *both in pairs for t in both], modify=True):
            for _, own, twin in pairs:
                local(twin).copy_(local(own))
        with whole([t for _, *both in pairs for t in both]):
            for name, own, twin in pairs:
                comparison.add(name, local(twin), local(own))
        for name, kept in self._biases.items():
            kept.copy_(full(self._model.get_parameter(name)))
            comparison.add(name, kept, full(self._model.get_parameter(name)))
        return comparison.report()

    def scoring(self) -> bool:
        """Return whether the model's forward pass is the reference's now."""
        return self._model.active_adapter == ADAPTER

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Replace the biases that are trained in place by the reference's, while the context is open."""
        current = {name: self._model.get_parameter(name) for name in self._biases}
        policy = {name: full(parameter).clone() for name, parameter in current.items()}
        try:
            for name, parameter in current.items():
                assign(parameter, self._biases[name])
            yield
        finally:
            for name, parameter in current.items():
                assign(parameter, policy[name])

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, twin) for name, _, twin in self._pairs())
        yield from self._biases.items()

    def state(self) -> dict[str, Tensor]:
        """Return the whole reference, on the CPU; every process has to call it."""
        return whole_copies(self._named())

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a state whose names and shapes have been checked."""
        assign_all(self._named(), state)


_ADAPTER = ("peft_type", "r", "lora_alpha", "use_dora", "use_rslora", "bias", "modules_to_save", "target_modules")


def describe_adapter(config: JSONObject) -> JSONObject:
    """Describe what must match in an adapter's configuration, as plain values."""
    found = {name: getattr(config.get(name), "value", config.get(name)) for name in _ADAPTER}
    return {name: sorted(value) if isinstance(value, (list, tuple, set)) else value for name, value in found.items()}
