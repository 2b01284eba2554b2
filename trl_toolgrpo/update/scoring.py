"""Scoring a batch of rollouts so that each is scored as if it were alone, and a shared prompt only once.

A group is packed into one sequence: the prompt, and after it a segment for each rollout, which attends only to the
prompt and to itself and keeps the positions it would have alone. Log-probs and gradients are those of separate
sequences, up to rounding.

TRL pads prompts on the left and leaves positions to the model. That is right for a model whose positions are relative
and which hides padding well, as most do. GPT-2 counts positions from the first column, RWKV reads padding although its
mask hides it, and some rotary embeddings choose their frequencies by the longest row. Rollouts of such models that are
not packed are moved to the first column, with all padding after them, where no causal model sees it.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from ..config.fields import ToolGRPOConfig
from ..models.lm_head import base_model
from ..models.model_settings import model_setting
from ..models.rotary import RowFrequencies
from ..models.rounding import (
    COMPARED_TOKENS,
    LOW_PRECISION,
    Accepted,
    Exact,
    Rounding,
    compute_dtype,
    measure_rounding,
)
from ..rollout.engine import RolloutBatch
from ..sampling.choice import layers_beside_attention, reads_padding
from ..sampling.protocol import scoring_mode
from ..types import Batch
from .packed_attention import Piece, dense_mask, packed_attention, suits


logger = logging.getLogger(__name__)

Scores: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]
"""Log-probs and entropies of completion tokens, shape (B, T), nats, and the load-balancing loss of experts."""

PACKED_LENGTH = 4096
"""Largest number of tokens in a packed sequence, which can need a dense attention mask; larger groups are split."""
TRIAL_ROLLOUTS = 4
"""Number of rollouts that are scored both ways before packing is trusted."""


@dataclass
class PackedBatch:
    """
    Rollouts packed after the prompts they share, or one a row.

    Args:
        input_ids (`Tensor`):
            Prompt without its last token, then for each rollout that token and the completion without its last one;
            int64, shape (R, L).
        position_ids (`Tensor`, *optional*):
            Position of each token in its own sequence, int64, shape (R, L); `None` leaves them to the model.
        attention_mask (`Tensor`, *optional*):
            1 for tokens, 0 for padding, shape (R, L), if each row is a sequence of its own.
        labels (`Tensor`):
            Token that each position predicts, -100 where none, int64, shape (R, L).
        place (`Tensor`):
            Index into the flattened (R, L) of each completion token of the batch, int64, shape (B, T).
        scored (`Tensor`):
            Whether the batch has a token there, bool, shape (B, T).
        pieces (`Sequence[tuple[int, Sequence[int]]]`, *optional*):
            For each row: number of tokens of the prompt, and of each non-empty segment after it.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    labels: Tensor
    place: Tensor
    scored: Tensor
    pieces: Sequence[Piece] | None = None

    def labelled(self) -> Tensor:
        """Return flat indices of the positions that predict a token, shape (K,); index 0 if there is none."""
        found = (self.labels.reshape(-1) != -100).nonzero()[:, 0]
        return found if len(found) else found.new_zeros(1)

    def unpack(self, values: Tensor, kept: Tensor) -> Tensor:
        """Return values at the positions `kept`, shape (1, K, ...), by completion token, shape (B, T, ...), with 0
        elsewhere."""
        everywhere = values.new_zeros(self.labels.numel(), *values.shape[2:]).index_copy(0, kept, values[0])
        return everywhere[self.place] * self.scored.view(*self.scored.shape, *[1] * (values.dim() - 2))


def pack(input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> PackedBatch | None:
    """
    Pack the rollouts of a batch after the prompts they share.

    Args:
        input_ids (`Tensor`):
            Prompts, padded on the left, and completions, padded on the right, int64, shape (B, P + T).
        attention_mask (`Tensor`):
            1 for tokens, 0 for padding, shape (B, P + T).
        completion_length (`int`):
            T.

    Returns:
        [`PackedBatch`] or `None`: `None` if no prompt is shared, or nothing is gained.
    """
    prompt_mask, mask = attention_mask[:, :-completion_length], attention_mask[:, -completion_length:]
    lengths = mask.sum(dim=1).tolist()
    arange = torch.arange(completion_length, device=mask.device)
    if not torch.equal(mask.bool(), arange < mask.sum(dim=1, keepdim=True)):
        return None
    groups = _groups(input_ids, prompt_mask)
    if len(groups) == len(lengths) or not all(groups):
        return None
    sequences = _divide(groups, lengths)
    length = max(len(prompt) - 1 + sum(lengths[row] for row in rows) for prompt, rows in sequences)
    if length > PACKED_LENGTH or length * len(sequences) >= input_ids.numel():
        return None
    return _fill(sequences, input_ids, lengths, completion_length, max(length, 1))


def _groups(input_ids: Tensor, prompt_mask: Tensor) -> dict[tuple[int, ...], list[int]]:
    """Return the rows of each distinct prompt."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, (ids, known) in enumerate(zip(input_ids.tolist(), prompt_mask.tolist(), strict=True)):
        prompt = tuple(token for token, keep in zip(ids[: len(known)], known, strict=True) if keep)
        groups.setdefault(prompt, []).append(row)
    return groups


def _longest_of_a_group(
    input_ids: Tensor, attention_mask: Tensor, completion_length: int
) -> tuple[Tensor, Tensor, int]:
    """Return a batch of the longest few rollouts of the largest group."""
    rows = max(_groups(input_ids, attention_mask[:, :-completion_length]).values(), key=len)
    lengths = attention_mask[:, -completion_length:].sum(dim=1)
    rows = [row for row in rows if lengths[row]] or rows
    rows = sorted(rows, key=lambda row: int(lengths[row]), reverse=True)[:TRIAL_ROLLOUTS]
    return input_ids[rows], attention_mask[rows], completion_length


def _with_other_texts(input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> PackedBatch | None:
    """Pack the same batch with other tokens in every completion but the last; `None` if there is none to change."""
    completions = input_ids[:, -completion_length:]
    lengths = attention_mask[:, -completion_length:].sum(dim=1)
    known = input_ids[attention_mask.bool()].unique()
    if len(known) < 2 or lengths[-1] == 0 or not bool((lengths[:-1] > 1).any()):  # its last token is not read
        return None
    other = known.roll(1)[torch.searchsorted(known, completions.clamp(known[0], known[-1]))]
    other[-1] = completions[-1]
    ids = torch.cat([input_ids[:, :-completion_length], other], dim=1)
    return pack(ids, attention_mask, completion_length)


def _divide(groups: dict[tuple[int, ...], list[int]], lengths: list[int]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Return prompts with the rollouts packed after them; a group too long for one sequence gets several."""
    sequences: list[tuple[tuple[int, ...], list[int]]] = []
    for prompt, rows in groups.items():
        total = len(prompt)
        sequences.append((prompt, []))
        for row in rows:
            if sequences[-1][1] and total + lengths[row] > PACKED_LENGTH:
                sequences.append((prompt, []))
                total = len(prompt)
            sequences[-1][1].append(row)
            total += lengths[row]
    return sequences


def _fill(
    sequences: list[tuple[tuple[int, ...], list[int]]],
    input_ids: Tensor,
    lengths: list[int],
    completion_length: int,
    length: int,
) -> PackedBatch:
    """Write the sequences into tensors."""
    completions, device = input_ids[:, -completion_length:].tolist(), input_ids.device
    ids, positions, labels, pieces = [], [], [], []
    place = torch.zeros(len(lengths), completion_length, dtype=torch.long)
    for index, (prompt, rows) in enumerate(sequences):
        start = len(prompt) - 1
        own_ids, own_positions, own_labels = list(prompt[:-1]), list(range(start)), [-100] * start
        for row in rows:
            text = completions[row][: lengths[row]]
            place[row, : len(text)] = torch.arange(len(text)) + len(own_ids) + index * length
            own_ids += [prompt[-1], *text][: len(text)]
            own_positions += range(start, start + len(text))
            own_labels += text
        ids.append(own_ids)
        positions.append(own_positions)
        labels.append(own_labels)
        pieces.append((start, [lengths[row] for row in rows if lengths[row]]))

    def padded(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows], device=device)

    scored = torch.arange(completion_length) < torch.tensor(lengths)[:, None]
    tensors = padded(ids, 0), padded(positions, 0), None, padded(labels, -100)
    return PackedBatch(*tensors, place.to(device), scored.to(device), pieces)


def lay_out(input_ids: Tensor, attention_mask: Tensor, completion_length: int, aligned: bool = False) -> PackedBatch:
    """
    Return the same record for rollouts that stay as they are, one a row.

    Args:
        input_ids, attention_mask, completion_length:
            As in [`pack`].
        aligned (`bool`, *optional*, defaults to `False`):
            Whether rows are moved to the first column, with all padding after them; columns left empty are dropped.
    """
    rows, width = input_ids.shape
    columns = torch.arange(width, device=input_ids.device)
    scored = attention_mask[:, -completion_length:].bool()
    place = columns[width - completion_length :].expand(rows, -1)
    if aligned:
        start = attention_mask.long().argmax(dim=1, keepdim=True)  # the first token of each row
        source = (columns + start) % width
        mask = attention_mask.gather(1, source)
        width = int((mask.any(dim=0) * (columns + 1)).max())
        input_ids, attention_mask = input_ids.gather(1, source)[:, :width], mask[:, :width]
        place = (place - start) * scored
    labels = torch.full((rows, width), -100, device=input_ids.device)
    predicting = place.clamp(min=1) - 1 + width * torch.arange(rows, device=input_ids.device)[:, None]
    labels.view(-1)[predicting[scored]] = input_ids.gather(1, place)[scored]
    return PackedBatch(input_ids, None, attention_mask, labels, predicting, scored)


@contextmanager
def only_at(model: PreTrainedModel, kept: Tensor) -> Iterator[None]:
    """
    Have the backbone of a model return hidden states at some positions only.

    The head, a large part of the cost, then does not score positions that predict nothing.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model, unwrapped.
        kept (`Tensor`):
            Flat indices into (R, L), int64, shape (K,).
    """

    def select(module: nn.Module, given: object, output: BaseModelOutput) -> BaseModelOutput:
        hidden: Tensor = output["last_hidden_state"]
        output.last_hidden_state = hidden.reshape(-1, hidden.shape[-1])[kept][None]
        return output

    base = base_model(model)
    hook = base.base_model.register_forward_hook(select)
    try:
        yield
    finally:
        hook.remove()


def can_be_packed(model: PreTrainedModel) -> bool:
    """
    Return whether nothing is known against scoring packed sequences.

    Attention has to take a mask of its own and must not be limited to a window; no layer may read on from one rollout
    into the next; and an adapter must not put tokens of its own before the prompt.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The policy, unwrapped.
    """
    config = model.config.get_text_config()
    windowed = model_setting(config, "sliding_window") or model_setting(config, "attention_chunk_size")
    adapters = getattr(model, "peft_config", {}).values()
    return not (
        config._attn_implementation not in ("sdpa", "eager")
        or windowed
        or layers_beside_attention(model)
        or any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters)
    )


def _has_experts(model: PreTrainedModel) -> bool:
    """Return whether tokens are routed to experts, whose products are rounded by how many tokens they get."""
    config = model.config.get_text_config()
    return any(model_setting(config, name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


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


class SharedPromptScoring(GRPOTrainer):
    """
    Part of [`ToolGRPOTrainer`]: TRL's scoring pass, over packed sequences if rollouts of a batch share prompts.

    A few rollouts of the first batch are scored both ways. If the log-probs differ by more than rounding, packing does
    not suit the model, and its rollouts are scored one a row from then on. Another trial before the first pass finds
    out whether rows have to begin in the first column.
    """

    args: ToolGRPOConfig
    model: PreTrainedModel
    _recording: bool
    _aligned: bool | None = None
    _packs: bool | None = None
    _rounding: Accepted | None = None  # measured with the first rollout batch
    _ask_values = False
    _values: Tensor | None = None
    _value_inputs: Tensor | None = None

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: object,
    ) -> Scores:
        size = batch_size or len(input_ids)
        chunks = [
            (input_ids[start : start + size], attention_mask[start : start + size], logits_to_keep)
            for start in range(0, len(input_ids), size)
        ]
        multimodal = any(value is not None for value in images.values())
        parts: list[PackedBatch | None] = [None] * len(chunks)
        if not (multimodal or compute_aux_loss or self._packs is False):
            packed = [pack(*chunk) for chunk in chunks]
            if self._packs or self._try_packing(model, chunks, all(part is not None for part in packed)):
                parts = packed
        aligned = not multimodal and self._aligns(model)
        if multimodal or (None in parts and not aligned and not self._ask_values):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, size, compute_entropy, compute_aux_loss, **images
            )
        laid_out = [part or lay_out(*chunk, aligned) for part, chunk in zip(parts, chunks, strict=True)]
        return self._score_packed(model, laid_out, compute_entropy, compute_aux_loss)

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

        with self._scoring_mode(model):
            exact = compute_dtype(self.args, bare) not in LOW_PRECISION
            return reads_padding(logits, bare.config.get_text_config().vocab_size, exact)

    @contextmanager
    def _scoring_mode(self, model: nn.Module) -> Iterator[None]:
        """Run forward passes in evaluation mode, without gradients and without gradient checkpointing."""
        options: Any = self.args.gradient_checkpointing_kwargs
        bare = self.accelerator.unwrap_model(model)
        with scoring_mode(model), disable_gradient_checkpointing(bare, options):
            yield

    def _score_packed(
        self,
        model: nn.Module,
        parts: Sequence[PackedBatch],
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
    ) -> Scores:
        logps, entropies, losses, values, read = [], [], [], [], []
        bare = self.accelerator.unwrap_model(model)
        frequencies = RowFrequencies(bare)
        in_pieces = not self.args.gradient_checkpointing and suits(bare)
        options: dict[str, object] = {"with_values": True} if self._ask_values else {}
        if compute_aux_loss:
            options["output_router_logits"] = True
        attention: AbstractContextManager[None]
        for part in parts:
            mask, attention = part.attention_mask, nullcontext()
            if part.pieces is not None and in_pieces:
                attention = packed_attention(bare, part.pieces, part.input_ids.device)
            elif part.pieces is not None:
                mask = dense_mask(part.pieces, part.input_ids.shape[1]).to(part.input_ids.device)
                if bare.config.get_text_config()._attn_implementation == "eager":
                    hidden = torch.finfo(torch.float32).min
                    mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, hidden)
            positions = {} if part.position_ids is None else {"position_ids": part.position_ids}
            kept = part.labelled()
            lengths = None if part.attention_mask is None else part.attention_mask.sum(dim=1)  # else positions say it
            with self.accelerator.autocast(), only_at(bare, kept), frequencies.of(lengths), attention:
                output = model(
                    input_ids=part.input_ids,
                    attention_mask=mask,
                    shift_labels=part.labels.reshape(-1)[kept][None],
                    fused_lm_head=True,
                    **positions,
                    **options,
                )
            logps.append(part.unpack(output.log_probs, kept))
            if compute_entropy:
                entropies.append(part.unpack(output.entropy, kept))
            if compute_aux_loss:
                losses.append(output.aux_loss)
            if self._ask_values:
                values.append(part.unpack(output["token_values"], kept))
                if model.training and self.args.value_epochs > 1:
                    read.append(part.unpack(output["value_inputs"], kept))
        self._values = torch.cat(values) if values else None
        self._value_inputs = torch.cat(read) if read else None
        return (
            torch.cat(logps),
            torch.cat(entropies) if compute_entropy else None,
            torch.stack(losses).mean() if compute_aux_loss else None,
        )

    def _try_packing(self, model: nn.Module, chunks: list[tuple[Tensor, Tensor, int]], ready: bool) -> bool:
        """
        Decide with the first batch that every process can pack.

        Every process takes the same decision and runs the same number of forward passes.

        Args:
            model (`nn.Module`):
                The policy.
            chunks (`list[tuple[Tensor, Tensor, int]]`):
                The batch, as [`pack`] takes it.
            ready (`bool`):
                Whether this process can pack all of them.
        """
        bare = self.accelerator.unwrap_model(model)
        if not can_be_packed(bare):
            self._packs = False
            return False
        few = _longest_of_a_group(*chunks[0])
        packed, changed = pack(*few), _with_other_texts(*few)
        possible = ready and packed is not None and changed is not None
        everyone = torch.tensor(float(possible), device=self.accelerator.device)
        if self.accelerator.reduce(everyone, reduction="mean") < 1 or packed is None or changed is None:
            return False
        if self._rounding is None:
            self._rounding = self._measure_rounding(model, *few)
        asked, self._ask_values = self._ask_values, False
        excess, leak, failure = None, 0.0, None
        try:
            with self._scoring_mode(model):
                if self._aligns(model):
                    plain, _, _ = self._score_packed(model, [lay_out(*few, aligned=True)])
                else:
                    plain, _, _ = super()._get_per_token_logps_and_entropies(model, *few)
                first, second = (self._score_packed(model, [part])[0] for part in (packed, changed))
            excess = self._rounding.excess((first - plain).abs()[packed.scored].float().cpu())
            leak = float((first - second).abs()[-1].nan_to_num(nan=torch.inf).max())
            if _has_experts(bare) and self._rounding.excess(torch.tensor([leak])) is None:
                leak = 0.0
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
            failure = error  # the other processes wait for what this one found
        finally:
            self._ask_values = asked
        reason = self._reason_against_packing(excess, leak, failure)
        self._packs = reason is None
        if reason is not None:
            logger.warning("Rollouts are scored one by one: %s.", reason)
        return self._packs

    def _reason_against_packing(self, excess: str | None, leak: float, failure: Exception | None) -> str | None:
        """
        Judge the trial of all processes, the same in each.

        Args:
            excess (`str`, *optional*):
                Which differences between packed and separate log-probs are beyond rounding in this process.
            leak (`float`):
                How much the text of other rollouts changed the log-probs of one, nats.
            failure (`Exception`, *optional*):
                What a pass raised. Running out of memory says nothing about the model, and is raised in each process.
        """
        out_of_memory = failure is not None and should_reduce_batch_size(failure)
        found = [[out_of_memory, failure is not None, leak > 0, excess is not None]]
        found = self.accelerator.gather(torch.tensor(found, device=self.accelerator.device).float())
        short_of_memory, failed, leaks, differs = found.amax(dim=0).bool().tolist()
        if short_of_memory and out_of_memory and failure is not None:
            raise failure
        if short_of_memory:
            raise RuntimeError("Another process ran out of memory in the first pass over its rollouts.")
        if failed:
            there = "a pass over a packed group failed in another process"
            return there if failure is None else f"{type(failure).__name__}: {failure}"
        if leaks:
            return (
                f"packed after a shared prompt, the text of one changes the log-probs of another"
                f"{f' by {leak:.2e}' if leak else ', in another process'}. The model has layers that read across the "
                f"rollouts of a sequence"
            )
        if differs:
            there = excess or "in another process"
            return f"packed after a shared prompt, their log-probs are not those of separate sequences ({there})"
        return None

    def _rollout_tokens(self, output: Batch, batch: RolloutBatch) -> tuple[Tensor, Tensor, int]:
        """Return ids and mask of prompts and completions, shape (B, P + T), as [`pack`] takes them, and T."""
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        width = output["completion_ids"].size(1)
        # TRL's own mask leaves out truncated completions
        return ids, torch.cat([output["prompt_mask"], batch.attention_mask(width, ids.device)], dim=1), width

    def _score_rollouts(self, tokens: tuple[Tensor, Tensor, int]) -> Tensor:
        """Return the policy's log-probs of [`_rollout_tokens`] without gradient, nats, shape (B, T)."""
        size = self.args.per_device_train_batch_size
        with self._scoring_mode(self.model):
            return self._get_per_token_logps_and_entropies(self.model, *tokens, batch_size=size)[0]

    def _measure_rounding(self, model: nn.Module, ids: Tensor, mask: Tensor, width: int) -> Accepted:
        """
        Measure what rounding does to log-probs of the policy, on a few rollouts of one group.

        Args:
            model (`nn.Module`):
                The policy.
            ids, mask (`Tensor`):
                Prompts and completions, padded on both sides, int64, and 1 for tokens, shape (B, P + `width`).
            width (`int`):
                Padded length of the completions.
        """
        if compute_dtype(self.args, model) not in LOW_PRECISION:
            return Exact()
        ids, mask, _ = _longest_of_a_group(ids, mask, width)
        completions, scored = ids[:, -width:], mask[:, -width:].bool()
        longest = self.accelerator.gather(scored.sum(dim=1).max()[None]).max()  # the same passes in every process
        length = max(1, min(int(longest), COMPARED_TOKENS))
        prompt = ids[0, :-width][mask[0, :-width].bool()].tolist()
        padding = (0, max(0, length - width))
        completions, scored = (nn.functional.pad(x, padding)[:, :length] for x in (completions, scored))
        bare = self.accelerator.unwrap_model(model)
        with scoring_mode(bare):
            found = measure_rounding(bare, prompt, completions, scored, self.temperature, self.accelerator.autocast)
        figures = torch.tensor([[found.mean, found.doubtful, *found.quantiles]], device=self.accelerator.device)
        mean, doubtful, *quantiles = self.accelerator.gather(figures).amax(dim=0).tolist()
        return Rounding(mean, tuple(quantiles), doubtful)
