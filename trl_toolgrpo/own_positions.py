"""Scoring in which each rollout has the positions and the context that it has by itself.

TRL pads prompts on the left and leaves positions to the model. That is right for a model whose positions are relative
and which hides padding well, as most do. GPT-2 counts positions from the first column, RWKV reads padding although its
mask hides it, and some rotary embeddings have frequencies by the length of the longest row. For those, rollouts are
moved to the first column, with all padding after them, where no causal model sees it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from .config import ToolGRPOConfig
from .diagnostics import compute_dtype
from .model_settings import model_setting
from .rollout.backends import reads_padding
from .rollout.rotary import RowFrequencies
from .rollout.sampler import scoring_mode


@dataclass
class AlignedBatch:
    """
    Rollouts that begin in the first column.

    Args:
        input_ids, attention_mask (`Tensor`):
            As in TRL's scoring pass, int64, shape (B, L), all padding on the right.
        place (`Tensor`):
            Column of each completion token of the batch, int64, shape (B, T); the first one where there is none.
        scored (`Tensor`):
            Whether the batch has a token there, bool, shape (B, T).
    """

    input_ids: Tensor
    attention_mask: Tensor
    place: Tensor
    scored: Tensor

    @property
    def scored_width(self) -> int:
        """Last columns that hold all completion tokens of the batch."""
        first = torch.where(self.scored, self.place, self.input_ids.shape[1] - 1).min()
        return self.input_ids.shape[1] - int(first)

    def completions(self, values: Tensor) -> Tensor:
        """Values of the last columns, shape (B, W), as those of completion tokens, shape (B, T), 0 elsewhere."""
        place = self.place - (self.input_ids.shape[1] - values.shape[1])
        return values.gather(1, place.clamp(min=0)) * self.scored


def first_column(input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> AlignedBatch:
    """
    Move the rollouts of a batch to its first column, and leave out columns that are empty then.

    Args:
        input_ids (`Tensor`):
            Prompts, padded on the left, and completions, padded on the right, int64, shape (B, P + T).
        attention_mask (`Tensor`):
            1 for tokens, 0 for padding, shape (B, P + T).
        completion_length (`int`):
            T.
    """
    width = input_ids.shape[1]
    columns = torch.arange(width, device=input_ids.device)
    start = attention_mask.long().argmax(dim=1, keepdim=True)  # the first token of each row
    source = (columns + start) % width
    scored = attention_mask[:, -completion_length:].bool()
    mask = attention_mask.gather(1, source)
    used = int((mask.any(dim=0) * (columns + 1)).max())
    place = (columns[width - completion_length :] - start) * scored
    return AlignedBatch(input_ids.gather(1, source)[:, :used], mask[:, :used], place, scored)


class OwnPositions(GRPOTrainer):
    """
    Part of [`ToolGRPOTrainer`]: TRL's scoring pass, over rollouts that begin in the first column where the model says
    something else of them after padding. A trial before the first pass finds out; TRL's pass stays as it is for all
    other models.
    """

    args: ToolGRPOConfig
    _recording: bool
    _aligned: bool | None = None

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> Any:
        if not self._aligns(model) or any(value is not None for value in images.values()):
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **images,
            )
        frequencies = RowFrequencies(self.accelerator.unwrap_model(model))
        logps, entropies, losses = [], [], []
        size = batch_size or len(input_ids)
        for start in range(0, len(input_ids), size):
            rows = slice(start, start + size)
            batch = first_column(input_ids[rows], attention_mask[rows], logits_to_keep)
            with frequencies.of(batch.attention_mask.sum(dim=1)):
                scores, entropy, loss = super()._get_per_token_logps_and_entropies(
                    model,
                    batch.input_ids,
                    batch.attention_mask,
                    batch.scored_width,
                    None,
                    compute_entropy,
                    compute_aux_loss,
                )
            logps.append(batch.completions(scores))
            if compute_entropy:
                entropies.append(batch.completions(entropy))
            losses.append(loss)
        return (
            torch.cat(logps),
            torch.cat(entropies) if compute_entropy else None,
            torch.stack(losses).mean() if compute_aux_loss else None,
        )

    def _aligns(self, model: Any) -> bool:
        """Whether rollouts are moved to the first column. Every process finds the same, with as many passes."""
        if not self._recording:
            return False  # TRL's own pass, unchanged
        if self._aligned is None:
            bare = self.accelerator.unwrap_model(model)
            late = RowFrequencies(bare).border is not None or scales_by_position(bare.config.get_text_config())
            self._aligned = late or self._reads_padding(model, bare)
        return self._aligned

    def _reads_padding(self, model: Any, bare: Any) -> bool:
        device = self.accelerator.device

        def logits(ids: Tensor, mask: Tensor) -> Tensor:
            with self.accelerator.autocast():
                return model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits

        exact = compute_dtype(self.args, bare) in (torch.float32, torch.float64)
        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        with scoring_mode(model), disable_gradient_checkpointing(bare, checkpointing):
            return reads_padding(logits, bare.config.get_text_config().vocab_size, exact)


def scales_by_position(config: Any) -> bool:
    """
    Return whether attention is scaled by a token's position (Ministral 3), which a short trial does not show.

    Args:
        config (`PretrainedConfig`):
            Configuration of the text model.
    """
    rotary = model_setting(config, "rope_parameters") or {}
    nested = [part for part in rotary.values() if isinstance(part, dict)]
    return any(part.get("llama_4_scaling_beta") for part in [rotary, *nested])
