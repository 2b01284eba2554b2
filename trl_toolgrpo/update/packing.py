"""Rollouts packed after the prompts they share, so that a shared prompt is scored once.

A group is packed into one sequence: the prompt, and after it a segment for each rollout, which attends only to the
prompt and to itself and keeps the positions it would have alone. Log-probs and gradients are those of separate
sequences, up to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..models.model_settings import model_setting
from ..sampling.choice import layers_beside_attention
from ..trl_hooks import attention_implementation
from .packed_attention import Piece


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

    def padded(self, multiple: int) -> "PackedBatch":
        """Return the same with L rounded up to a multiple of a number, for packed sequences."""
        length = self.labels.shape[1]
        more = -length % multiple

        def wider(tensor: Tensor, value: int) -> Tensor:
            return nn.functional.pad(tensor, (0, more), value=value)

        ids, labels = wider(self.input_ids, 0), wider(self.labels, -100)
        positions = None if self.position_ids is None else wider(self.position_ids, 0)
        place = self.place + self.place // length * more
        return replace(self, input_ids=ids, position_ids=positions, labels=labels, place=place)


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
    groups = rows_of_prompts(input_ids, prompt_mask)
    if len(groups) == len(lengths) or not all(groups):
        return None
    sequences = _divide(groups, lengths)
    length = max(len(prompt) - 1 + sum(lengths[row] for row in rows) for prompt, rows in sequences)
    if length > PACKED_LENGTH or length * len(sequences) >= input_ids.numel():
        return None
    return _fill(sequences, input_ids, lengths, completion_length, max(length, 1))


def rows_of_prompts(input_ids: Tensor, prompt_mask: Tensor) -> dict[tuple[int, ...], list[int]]:
    """Return the rows of each distinct prompt."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, (ids, known) in enumerate(zip(input_ids.tolist(), prompt_mask.tolist(), strict=True)):
        prompt = tuple(token for token, keep in zip(ids[: len(known)], known, strict=True) if keep)
        groups.setdefault(prompt, []).append(row)
    return groups


def longest_of_a_group(
    input_ids: Tensor, attention_mask: Tensor, completion_length: int
) -> tuple[Tensor, Tensor, int]:
    """Return a batch of the longest few rollouts of the largest group."""
    rows = max(rows_of_prompts(input_ids, attention_mask[:, :-completion_length]).values(), key=len)
    lengths = attention_mask[:, -completion_length:].sum(dim=1)
    rows = [row for row in rows if lengths[row]] or rows
    rows = sorted(rows, key=lambda row: int(lengths[row]), reverse=True)[:TRIAL_ROLLOUTS]
    return input_ids[rows], attention_mask[rows], completion_length


def with_other_texts(input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> PackedBatch | None:
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


def obstacle_to_packing(model: PreTrainedModel) -> str | None:
    """
    Return what is known against scoring packed sequences; `None` if nothing is.

    Attention has to take a mask of its own and must not be limited to a window; no layer may read on from one rollout
    into the next; and an adapter must not put tokens of its own before the prompt.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The policy, unwrapped.
    """
    config = model.config.get_text_config()
    adapters = getattr(model, "peft_config", {}).values()
    attention = attention_implementation(config)
    if attention not in ("sdpa", "eager"):
        return f"`attn_implementation={attention!r}` takes no mask of a packed sequence"
    if model_setting(config, "sliding_window") or model_setting(config, "attention_chunk_size"):
        return "attention is limited to a window"
    if layers_beside_attention(model):
        return "layers other than attention read on from one rollout into the next"
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters):
        return "the adapter puts tokens of its own before the prompt"
    return None


def has_experts(model: PreTrainedModel) -> bool:
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
