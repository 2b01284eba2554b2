"""What a vLLM worker does in addition to its own work: load all weights of a policy, and reseed its noise.

vLLM loads this extension of its worker class by name, inside its own process.
"""

import random
from typing import Any

import numpy as np
import torch


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

        On a CPU, layers multiply by a packed copy of their weight. vLLM packs a head that is tied to the embedding
        only once, when the model is loaded, so it is packed again here.

        Args:
            folder (`str`):
                The checkpoint.
        """
        self.reload_weights(weights_path=folder)
        for module in self.model_runner.get_model().modules():
            if hasattr(module, "cpu_linear") and module.weight.numel():
                module.quant_method.process_weights_after_loading(module)
