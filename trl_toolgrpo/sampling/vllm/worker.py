"""What a vLLM worker does in addition to its own work: load all weights of a policy, and reseed its noise.

The weights are in a checkpoint, or in the memory of the process that trains. vLLM replaces them a layer at a time: it
holds its own weights and a copy of one layer, and reads the policy's where they are.

vLLM loads this extension of its worker class by name, inside its own process.
"""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .shared_weights import SharingError, opened_tensors


class PolicyWorker:
    """Mixed into vLLM's worker (`worker_extension_cls`)."""

    reload_weights: Any
    model_runner: Any

    def reseed(self, seed: int) -> None:
        """Restart the noise that tokens are drawn with, from a seed of 32 bits."""
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def reload_policy(self, folder: str) -> None:
        """
        Replace the weights by those of a checkpoint.

        Args:
            folder (`str`):
                The checkpoint.

        Raises:
            RuntimeError: if it lacks some of the weights.
        """
        self._reload(weights_path=folder)

    def reload_shared_policy(self, handles: bytes) -> str | None:
        """
        Replace the weights by those in the memory of another process, and return when all of them have been copied.

        Args:
            handles (`bytes`):
                From [`shared_tensors`].

        Returns:
            `str` or `None`: why they cannot be read; the weights are the previous ones then.

        Raises:
            RuntimeError: if some of the weights are missing.
        """
        if self.model_runner.model_config.quantization is not None:
            return "the engine is quantized"
        try:
            tensors = opened_tensors(handles)
        except SharingError as error:
            return str(error)
        self._reload(weights_iterator=iter(tensors))
        if any(tensor.is_cuda for _, tensor in tensors):
            torch.cuda.synchronize()
        return None

    def _reload(self, **source: Any) -> None:
        """
        Replace the weights, and check that none was left out: vLLM itself keeps such a weight as it was.

        On a CPU, layers multiply by a packed copy of their weight. vLLM packs a head that is tied to the embedding
        only once, when the model is loaded, so it is packed again here.
        """
        model = self.model_runner.get_model()
        load, loaded, expected = model.load_weights, None, _parameter_names(model)

        def load_and_remember(weights: Iterable[tuple[str, Tensor]]) -> set[str] | None:
            nonlocal loaded, expected
            # Tied parameters are one until vLLM begins; those that it makes of others are there only until then
            expected &= _parameter_names(model)
            loaded = load(weights)
            return loaded

        model.load_weights = load_and_remember
        try:
            self.reload_weights(**source)
        finally:
            del model.load_weights
        # Scales of a quantized cache need not be in a checkpoint; of a quantized model vLLM does not say what it loads
        if self.model_runner.model_config.quantization is None and loaded is not None:
            left_out = sorted(name for name in expected - loaded if not name.endswith("_scale"))
            if left_out:
                raise RuntimeError(f"the policy has no weights for {', '.join(left_out)}")
        for module in model.modules():
            if hasattr(module, "cpu_linear") and module.weight.numel():
                module.quant_method.process_weights_after_loading(module)


def _parameter_names(model: nn.Module) -> set[str]:
    """Return the names of parameters as `load_weights` does, without the layer that adapters are put around."""
    return {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()}
