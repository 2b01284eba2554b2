"""Scoring a batch whose rollouts share prompts: a prompt goes through the model once, not once for each rollout.

Owns the packing of a group into one sequence, and the trainer's scoring pass over it, as a mixin of the trainer. The
prompt comes first; behind it stands a segment for each rollout, which attends to the prompt and to itself alone and
has the positions it would have by itself. Log-probs and gradients are those of separate sequences, up to rounding.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from .config import ToolGRPOConfig
from .diagnostics import compute_dtype
from .model_settings import model_setting
from .own_positions import AlignedBatch, OwnPositions, first_column
from .packed_attention import Piece, dense_mask, packed_attention, suits
from .rollout.backends import layers_beside_attention
from .rollout.rotary import RowFrequencies
from .rollout.sampler import scoring_mode
from .rounding import COMPARED_TOKENS, LOW_PRECISION, Accepted, Exact, Rounding, measure_rounding


logger = logging.getLogger(__name__)

PACKED_LENGTH = 4096
"""Most tokens of a packed sequence, which can need a dense attention mask; larger groups are split over several."""
TRIAL_ROLLOUTS = 4
"""Rollouts that are scored both ways before packing is trusted."""


@dataclass
class PackedBatch:
    """
    Rollouts packed behind the prompts they share.

    Args:
        input_ids (`Tensor`):
            Prompt without its last token, then for each rollout that token and the completion but for its last one;
            int64, shape (R, L).
        position_ids (`Tensor`, *optional*):
            Positions each token has in its own sequence, int64, shape (R, L); `None` leaves them to the model.
        attention_mask (`Tensor`, *optional*):
            Which tokens are no padding, shape (R, L), where each row is a sequence of its own.
        labels (`Tensor`):
            Token to be predicted at each position, -100 where none is, int64, shape (R, L).
        place (`Tensor`):
            Index into the flattened (R, L) of each completion token of the batch, int64, shape (B, T).
        scored (`Tensor`):
            Whether the batch has a token there, bool, shape (B, T).
        pieces (`Sequence[tuple[int, Sequence[int]]]`, *optional*):
            For each row: tokens of the prompt, and of each segment behind it that has any.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    labels: Tensor
    place: Tensor
    scored: Tensor
    pieces: Sequence[Piece] | None = None

    @property
    def lengths(self) -> Tensor | None:
        """Tokens of each row where it is a sequence of its own, shape (R,); else the positions say that."""
        return None if self.attention_mask is None else self.attention_mask.sum(dim=1)

    def labelled(self) -> Tensor:
        """Flat indices of the positions that predict a token, shape (K,); one of no use where there is none."""
        found = (self.labels.reshape(-1) != -100).nonzero()[:, 0]
        return found if len(found) else found.new_zeros(1)

    def unpack(self, values: Tensor, kept: Tensor) -> Tensor:
        """Values at the positions `kept`, shape (1, K, ...), as those of completion tokens, shape (B, T, ...), 0
        elsewhere."""
        everywhere = values.new_zeros(self.labels.numel(), *values.shape[2:]).index_copy(0, kept, values[0])
        return everywhere[self.place] * self.scored.view(*self.scored.shape, *[1] * (values.dim() - 2))


def pack(input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> PackedBatch | None:
    """
    Pack the rollouts of a batch behind the prompts they share.

    Args:
        input_ids (`Tensor`):
            Prompts, padded on the left, and completions, padded on the right, int64, shape (B, P + T).
        attention_mask (`Tensor`):
            1 for tokens, 0 for padding, shape (B, P + T).
        completion_length (`int`):
            T.

    Returns:
        [`PackedBatch`] or `None`: `None` if no prompt is shared, or there is nothing to gain.
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
    """Rows of each distinct prompt."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, (ids, known) in enumerate(zip(input_ids.tolist(), prompt_mask.tolist(), strict=True)):
        prompt = tuple(token for token, keep in zip(ids[: len(known)], known, strict=True) if keep)
        groups.setdefault(prompt, []).append(row)
    return groups


def _few_of_a_group(input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> tuple[Tensor, Tensor, int]:
    """A batch of the longest few rollouts of the largest group."""
    rows = max(_groups(input_ids, attention_mask[:, :-completion_length]).values(), key=len)
    lengths = attention_mask[:, -completion_length:].sum(dim=1)
    rows = [row for row in rows if lengths[row]] or rows
    rows = sorted(rows, key=lambda row: int(lengths[row]), reverse=True)[:TRIAL_ROLLOUTS]
    return input_ids[rows], attention_mask[rows], completion_length


def _with_other_texts(input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> PackedBatch | None:
    """The same batch packed, each completion but the last one with other tokens; `None` if there is none to change."""
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
    """Prompts with the rollouts that are packed behind them; a group too long for one sequence gets several."""
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
    shape, device = (len(sequences), length), input_ids.device
    ids, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    place = torch.zeros(len(lengths), completion_length, dtype=torch.long)
    completions = input_ids[:, -completion_length:].cpu()
    for index, (prompt, rows) in enumerate(sequences):
        start = len(prompt) - 1
        ids[index, :start] = torch.tensor(prompt[:-1])
        positions[index, :start] = torch.arange(start)
        for row in rows:
            count = lengths[row]
            segment = slice(start, start + count)
            if count:
                ids[index, start] = prompt[-1]
                ids[index, start + 1 : start + count] = completions[row, : count - 1]
                labels[index, segment] = completions[row, :count]
            positions[index, segment] = torch.arange(len(prompt) - 1, len(prompt) - 1 + count)
            place[row, :count] = torch.arange(start, start + count) + index * length
            start += count
    scored = torch.arange(completion_length) < torch.tensor(lengths)[:, None]
    pieces = [(len(prompt) - 1, [lengths[row] for row in rows if lengths[row]]) for prompt, rows in sequences]
    ids, positions, labels, place, scored = (tensor.to(device) for tensor in (ids, positions, labels, place, scored))
    return PackedBatch(ids, positions, None, labels, place, scored, pieces)


def lay_out(
    input_ids: Tensor, attention_mask: Tensor, completion_length: int, aligned: bool = False
) -> PackedBatch:
    """
    The same record for rollouts that stay as they are, one a row.

    Args:
        input_ids, attention_mask, completion_length:
            As in [`pack`].
        aligned (`bool`, *optional*, defaults to `False`):
            Whether rows begin in the first column, as in [`first_column`], and not after the padding of the prompt.

    Returns:
        [`PackedBatch`]: with the rows of the batch.
    """
    if aligned:
        return _lay_out_aligned(first_column(input_ids, attention_mask, completion_length))
    rows, length = input_ids.shape
    scored = attention_mask[:, -completion_length:].bool()
    labels = torch.full_like(input_ids, -100)
    first = length - completion_length - 1
    labels[:, first:-1] = input_ids[:, -completion_length:].masked_fill(~scored, -100)
    place = torch.arange(first, length - 1, device=input_ids.device) + length * torch.arange(
        rows, device=input_ids.device
    ).unsqueeze(1)
    return PackedBatch(input_ids, None, attention_mask, labels, place, scored)


def _lay_out_aligned(batch: AlignedBatch) -> PackedBatch:
    rows, length = batch.input_ids.shape
    before = batch.place.clamp(min=1) - 1  # the position that predicts a token
    flat = before + length * torch.arange(rows, device=before.device).unsqueeze(1)
    labels = torch.full_like(batch.input_ids, -100)
    labels.reshape(-1)[flat[batch.scored]] = batch.input_ids.gather(1, batch.place)[batch.scored]
    return PackedBatch(batch.input_ids, None, batch.attention_mask, labels, flat, batch.scored)


@contextmanager
def only_at(model: Any, kept: Tensor) -> Iterator[None]:
    """
    While open, the backbone of a model gives its hidden states at some positions alone, so that the head, which is a
    large part of the cost, does not score those that predict nothing.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model, unwrapped.
        kept (`Tensor`):
            Flat indices into (R, L), int64, shape (K,).
    """

    def select(module: Any, given: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden.reshape(-1, hidden.shape[-1])[kept][None]
        return output

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hook = base.base_model.register_forward_hook(select)
    try:
        yield
    finally:
        hook.remove()


def unpackable_reason(model: Any) -> str | None:
    """Why a model cannot score packed sequences; `None` if nothing is known against it."""
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is `{config._attn_implementation}`, which takes no mask of its own"
    if model_setting(config, "sliding_window") or model_setting(config, "attention_chunk_size"):
        return "its attention is limited to a window"
    others = layers_beside_attention(model)
    if others:
        return f"it has {', '.join(others)} layers, which read on from one rollout into the next"
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in getattr(model, "peft_config", {}).values()):
        return "its adapter puts tokens of its own before the prompt"
    return None


def _has_experts(model: Any) -> bool:
    """Whether tokens are routed to experts, whose products are rounded by how many tokens they get."""
    config = model.config.get_text_config()
    return any(model_setting(config, name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def _named(failure: Exception | None) -> str:
    """What has failed, for a message."""
    return "a pass over a packed group failed in another process." if failure is None else (
        f"{type(failure).__name__}: {failure}"
    )


class SharedPromptScoring(OwnPositions):
    """
    Part of [`ToolGRPOTrainer`]: TRL's scoring pass, over packed sequences where rollouts of a batch share prompts.

    A few rollouts of the first batch are scored both ways. If the log-probs differ by more than rounding, the model is
    one that packing does not suit, and TRL's way is kept for good.
    """

    args: ToolGRPOConfig
    _packs: bool | None = None
    _rounding: Accepted | None = None  # measured with the first rollout batch
    _ask_values = False
    _values: Tensor | None = None
    _value_inputs: Tensor | None = None

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
        def plain() -> Any:
            batch = (input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss)
            return super(SharedPromptScoring, self)._get_per_token_logps_and_entropies(model, *batch, **images)

        if compute_aux_loss or any(value is not None for value in images.values()):
            return plain()
        size = batch_size or len(input_ids)
        chunks = [
            (input_ids[start : start + size], attention_mask[start : start + size], logits_to_keep)
            for start in range(0, len(input_ids), size)
        ]
        parts = [None if self._packs is False else pack(*chunk) for chunk in chunks]
        if self._packs is None and not self._try_packing(model, chunks, all(part is not None for part in parts)):
            parts = [None] * len(chunks)
        if not self._ask_values and any(part is None for part in parts):
            return plain()
        aligned = self._aligns(model)
        laid_out = [part or lay_out(*chunk, aligned) for part, chunk in zip(parts, chunks, strict=True)]
        return self._score_packed(model, laid_out, compute_entropy)

    def _score_packed(self, model: Any, parts: list[PackedBatch], compute_entropy: bool) -> Any:
        logps, entropies, values, read = [], [], [], []
        bare = self.accelerator.unwrap_model(model)
        frequencies = RowFrequencies(bare)
        in_pieces = not self.args.gradient_checkpointing and suits(bare)
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
            options: dict[str, Any] = {"with_values": True} if self._ask_values else {}
            if part.position_ids is not None:
                options["position_ids"] = part.position_ids
            kept = part.labelled()
            with self.accelerator.autocast(), only_at(bare, kept), frequencies.of(part.lengths), attention:
                output = model(
                    input_ids=part.input_ids,
                    attention_mask=mask,
                    shift_labels=part.labels.reshape(-1)[kept][None],
                    fused_lm_head=True,
                    **options,
                )
            logps.append(part.unpack(output.log_probs, kept))
            if compute_entropy:
                entropies.append(part.unpack(output.entropy, kept))
            if self._ask_values:
                values.append(part.unpack(output["token_values"], kept))
                if model.training and self.args.value_epochs > 1:
                    read.append(part.unpack(output["value_inputs"], kept))
        self._values = torch.cat(values) if values else None
        self._value_inputs = torch.cat(read) if read else None
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    def _try_packing(self, model: Any, chunks: list[tuple[Tensor, Tensor, int]], ready: bool) -> bool:
        """
        Decide with the first batch that every process can pack. Every process takes the same decision, and runs the
        same number of forward passes.
        """
        bare = self.accelerator.unwrap_model(model)
        reason = unpackable_reason(bare)
        if reason is not None:
            self._packs = False
            return False
        few = _few_of_a_group(*chunks[0])
        packed, changed = pack(*few), _with_other_texts(*few)
        possible = ready and packed is not None and changed is not None
        everyone = torch.tensor(float(possible), device=self.accelerator.device)
        if self.accelerator.reduce(everyone, reduction="mean") < 1 or packed is None or changed is None:
            return False
        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        asked, self._ask_values = self._ask_values, False
        gaps, leak, failure = torch.full((1,), torch.inf), torch.inf, None
        try:
            with scoring_mode(model), disable_gradient_checkpointing(bare, checkpointing):
                plain, _, _ = super()._get_per_token_logps_and_entropies(model, *few)
                first, second = (self._score_packed(model, [part], False)[0] for part in (packed, changed))
            gaps = (first - plain).abs()[packed.scored]
            leak = float((first - second).abs()[-1].nan_to_num(nan=torch.inf).max())
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
            failure = error  # the other processes wait for what this one found
        finally:
            self._ask_values = asked
        if self._failed_anywhere(failure):
            self._packs = False
            logger.warning("Rollouts are scored one by one: %s", _named(failure))
            return False
        if self._rounding is None:
            self._rounding = self._measure_rounding(model, *few)
        return self._decide_packing(bare, gaps, leak, self._rounding)

    def _failed_anywhere(self, failure: Exception | None) -> bool:
        """
        Whether a pass has failed in some process, the same in all of them. Running out of memory says nothing about
        the model, and is raised in each.
        """
        out_of_memory = failure is not None and should_reduce_batch_size(failure)
        found = torch.tensor([[float(out_of_memory), float(failure is not None)]], device=self.accelerator.device)
        short_of_memory, failed = self.accelerator.gather(found).amax(dim=0).bool().tolist()
        if short_of_memory:
            if out_of_memory and failure is not None:
                raise failure
            raise RuntimeError("Another process ran out of memory in the first pass over its rollouts.")
        return bool(failed)

    def _decide_packing(self, bare: Any, gaps: Tensor, leak: float, accepted: Accepted) -> bool:
        """Judge the trial of all processes."""
        excess = accepted.excess(gaps.float().cpu())
        leaks = leak > 0 and not (_has_experts(bare) and accepted.excess(torch.tensor([leak])) is None)
        verdict = torch.tensor([[float(excess is not None), float(leaks)]], device=self.accelerator.device)
        differs_somewhere, leaks_somewhere = self.accelerator.gather(verdict).amax(dim=0).bool().tolist()
        self._packs = not (differs_somewhere or leaks_somewhere)
        if leaks_somewhere:
            logger.warning(
                "Rollouts are scored one by one: packed after a shared prompt, the text of one changes the log-probs "
                "of another%s. The model has layers that read across the rollouts of a sequence.",
                f" by {leak:.2e}" if leaks else ", in another process",
            )
        elif differs_somewhere:
            logger.warning(
                "Rollouts are scored one by one: packed after a shared prompt, their log-probs are not those of "
                "separate sequences (%s).",
                excess or "in another process",
            )
        return self._packs

    def _measure_rounding(self, model: Any, ids: Tensor, mask: Tensor, width: int) -> Accepted:
        """
        Measure what rounding does to log-probs of the policy, on a few rollouts of one group.

        Args:
            model (`PreTrainedModel` or `PeftModel`):
                The policy.
            ids, mask (`Tensor`):
                Prompts and completions, padded on both sides, int64, and 1 for tokens, shape (B, P + `width`).
            width (`int`):
                Padded length of the completions.
        """
        if compute_dtype(self.args, model) not in LOW_PRECISION:
            return Exact()
        rows = max(_groups(ids, mask[:, :-width]).values(), key=len)[:TRIAL_ROLLOUTS]
        ids, mask = ids[rows], mask[rows]
        completions, scored = ids[:, -width:], mask[:, -width:].bool()
        longest = self.accelerator.gather(scored.sum(dim=1).max()[None]).max()  # the same passes in every process
        length = max(1, min(int(longest), COMPARED_TOKENS))
        prompt = ids[0, :-width][mask[0, :-width].bool()].tolist()
        padding = (0, max(0, length - width))
        completions, scored = (torch.nn.functional.pad(x, padding)[:, :length] for x in (completions, scored))
        bare: Any = self.accelerator.unwrap_model(model)
        with scoring_mode(bare):
            found = measure_rounding(
                bare, prompt, completions, scored, self.temperature, self.accelerator.autocast
            )
        figures = torch.tensor([[found.mean, found.doubtful, *found.quantiles]], device=self.accelerator.device)
        mean, doubtful, *quantiles = self.accelerator.gather(figures).amax(dim=0).tolist()
        return Rounding(mean, tuple(quantiles), doubtful)
