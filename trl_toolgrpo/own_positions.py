"""Whether a model scores a rollout otherwise after padding than by itself.

TRL pads prompts on the left and leaves positions to the model. That is right for a model whose positions are relative
and which hides padding well, as most do. GPT-2 counts positions from the first column, RWKV reads padding although its
mask hides it, and some rotary embeddings choose their frequencies by the longest row. Rollouts of such models are
moved to the first column, with all padding after them, where no causal model sees it.
"""

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from .config import ToolGRPOConfig
from .model_settings import model_setting
from .rollout.padding import reads_padding
from .rollout.rotary import RowFrequencies
from .rollout.sampler import scoring_mode
from .rounding import compute_dtype


def checkpointing_options(args: ToolGRPOConfig) -> dict[str, object] | None:
    """Return `gradient_checkpointing_kwargs`, which is no text once the configuration has been made."""
    options = args.gradient_checkpointing_kwargs
    return options if isinstance(options, dict) else None


class OwnPositions(GRPOTrainer):
    """Part of [`ToolGRPOTrainer`]: finds out, by a trial before the first scoring pass, which models need it."""

    args: ToolGRPOConfig
    model: PreTrainedModel
    _recording: bool
    _aligned: bool | None = None

    def _aligns(self, model: nn.Module) -> bool:
        """Return whether rollouts are moved to the first column; every process finds the same, with as many passes."""
        if not self._recording:
            return False  # TRL's own pass, unchanged
        if self._aligned is None:
            bare = self.accelerator.unwrap_model(model)
            late = RowFrequencies(bare).border is not None or scales_by_position(bare.config.get_text_config())
            self._aligned = late or self._reads_padding(model, bare)
        return self._aligned

    def _reads_padding(self, model: nn.Module, bare: PreTrainedModel) -> bool:
        device = self.accelerator.device

        def logits(ids: Tensor, mask: Tensor) -> Tensor:
            with self.accelerator.autocast():
                return model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits

        exact = compute_dtype(self.args, bare) in (torch.float32, torch.float64)
        with scoring_mode(model), disable_gradient_checkpointing(bare, checkpointing_options(self.args)):
            return reads_padding(logits, bare.config.get_text_config().vocab_size, exact)


def scales_by_position(config: PretrainedConfig) -> bool:
    """
    Return whether attention is scaled by a token's position (Ministral 3), which a short trial does not show.

    Args:
        config (`PretrainedConfig`):
            Configuration of the text model.
    """
    rotary = model_setting(config, "rope_parameters") or {}
    nested = [part for part in rotary.values() if isinstance(part, dict)]
    return any(part.get("llama_4_scaling_beta") for part in [rotary, *nested])
