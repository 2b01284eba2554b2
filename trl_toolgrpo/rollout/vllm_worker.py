"""What a worker of vLLM does beside its own work: take all weights of a policy, and draw with noise of its own.

Owns an extension of vLLM's worker class, which vLLM loads by name inside its own process. Fed by `vllm_engine.py`.
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
        """Begin the noise that tokens are drawn with anew; the seed is a number of 32 bits."""
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def reload_policy(self, folder: str) -> None:
        """
        Replace the weights by those of a checkpoint.

        On a CPU layers multiply by a packed copy of their weight, and vLLM packs a head that is tied to the embedding
        only once, when the model is loaded: here it is packed again.

        Args:
            folder (`str`):
                The checkpoint.
        """
        self.reload_weights(weights_path=folder)
        for module in self.model_runner.get_model().modules():
            if hasattr(module, "cpu_linear") and module.weight.numel():
                module.quant_method.process_weights_after_loading(module)
