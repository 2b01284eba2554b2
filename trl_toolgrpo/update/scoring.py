"""Scoring: log-probs, entropies and values of the tokens of rollouts, each scored as if its rollout were alone.

[`Scoring.score`] is the one way to score. Groups are packed after the prompt they share where that suits the model.
Rollouts that are not packed are scored one a row.

TRL pads prompts on the left and leaves positions to the model. That is right for a model whose positions are relative
and which hides padding well, as most do. GPT-2 counts positions from the first column, RWKV reads padding although its
mask hides it, and some rotary embeddings choose their frequencies by the longest row. Rollouts of such models that are
not packed are moved to the first column, with all padding after them, where no causal model sees it.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from trl.models.utils import disable_gradient_checkpointing

from ..models.lm_head import base_model
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
from ..sampling.choice import reads_padding
from ..sampling.protocol import scoring_mode
from ..trl_hooks import Run, attention_implementation, is_checkpointed
from ..types import JSONObject
from .block_attention import BLOCK, BlockAttention, flex_attention_of
from .packed_attention import PackedAttention, PieceAttention, dense_mask, packed_attention, suits
from .packing import (
    TRIAL_ROLLOUTS,
    PackedBatch,
    has_experts,
    lay_out,
    longest_of_a_group,
    obstacle_to_packing,
    pack,
    scales_by_position,
    with_other_texts,
)


logger = logging.getLogger(__name__)

Tokens: TypeAlias = tuple[Tensor, Tensor, int]
"""Prompts, padded on the left, and completions, padded on the right, int64, shape (B, P + T); 1 for tokens and 0 for
padding, shape (B, P + T); and T."""

LOGPS = ("logps",)
"""What is wanted of a pass by default."""


@dataclass
class Scores:
    """
    What is known of the completion tokens of a batch. The names are those that a caller asks for.

    Args:
        logps (`Tensor`):
            Log-probs, nats, shape (B, T).
        entropies (`Tensor`, *optional*):
            Entropies, nats, shape (B, T).
        values (`Tensor`, *optional*):
            V(s_t) before each token, shape (B, T).
        value_inputs (`Tensor`, *optional*):
            The hidden states that the value head has read, detached, shape (B, T, H).
        aux_loss (`Tensor`, *optional*):
            Load-balancing loss of experts, a scalar.
    """

    logps: Tensor
    entropies: Tensor | None = None
    values: Tensor | None = None
    value_inputs: Tensor | None = None
    aux_loss: Tensor | None = None

    def hold(self, want: Collection[str]) -> bool:
        """Return whether all that is wanted is known."""
        return all(getattr(self, name) is not None for name in want)

    @classmethod
    def joined(cls, parts: Sequence["Scores"]) -> "Scores":
        """Return the scores of several batches as those of one; the losses of experts are averaged."""
        found: dict[str, Tensor | None] = {}
        for name in (f.name for f in fields(cls)):
            tensors = [value for part in parts if (value := getattr(part, name)) is not None]
            found[name] = None
            if tensors:
                found[name] = torch.stack(tensors).mean() if name == "aux_loss" else torch.cat(tensors)
        return cls(**found)  # type: ignore[arg-type]


@dataclass
class Packing:
    """
    Whether groups are packed after the prompt they share.

    Args:
        active (`bool`, *optional*):
            The decision; `None` as long as no batch has allowed one.
        reason (`str`, *optional*):
            Why groups are not packed, in words; `None` if they are, or may be.
    """

    active: bool | None = None
    reason: str | None = None

    def refuse(self, reason: str) -> None:
        """Decide against packing, for good."""
        self.active, self.reason = False, reason

    def state_dict(self) -> JSONObject:
        """Return the decision, for a checkpoint: a resumed run continues in the same way."""
        return {"active": self.active, "reason": self.reason}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a decision, unless this run's configuration has decided against packing."""
        if self.active is not False:
            self.active, self.reason = state["active"], state["reason"]


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


class Scoring:
    """
    Scores batches of rollouts with a policy or a reference model.

    A few rollouts of the first batch are scored both ways. If the log-probs differ by more than rounding, packing does
    not suit the model, and its rollouts are scored one a row from then on. Another trial before the first pass finds
    out whether rows have to begin in the first column.

    Args:
        run ([`Run`]):
            The run, its model made.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.packing = Packing()
        self.rounding: Accepted | None = None  # measured with the first rollout batch
        self._aligned: bool | None = None
        self._flex = flex_attention_of(run.args, run.accelerator.device)
        # TRL's own pass, unchanged: which tokens are above a quantile of the entropies depends on rounding, too
        if not run.recording:
            self.packing.refuse("rollouts and their scoring are TRL's own")
        elif not run.args.shared_prompt_updates:
            self.packing.refuse("`shared_prompt_updates=False`")
        elif run.top_entropy_quantile < 1.0:
            self.packing.refuse("`top_entropy_quantile` is below 1, and which tokens it takes depends on rounding")
        elif run.aux_loss_enabled:
            self.packing.reason = "the router loss is on, and is not that of packed rows; other passes may be packed"

    def score(
        self,
        model: nn.Module,
        tokens: Tokens,
        want: Collection[str] = LOGPS,
        recorded: Scores | None = None,
        batch_size: int | None = None,
        images: Mapping[str, Any] | None = None,
    ) -> Scores:
        """
        Score the completion tokens of a batch. Every process must call this, with as many rows.

        Args:
            model (`nn.Module`):
                The policy or a reference, wrapped or not.
            tokens (`tuple[Tensor, Tensor, int]`):
                The batch, see [`Tokens`].
            want (`Collection[str]`, *optional*, defaults to `("logps",)`):
                Names of [`Scores`].
            recorded ([`Scores`], *optional*):
                What is known of these tokens without a pass; returned as it is if it holds all that is wanted.
            batch_size (`int`, *optional*):
                Rows of one pass.
            images (`Mapping[str, Any]`, *optional*):
                What a multimodal model gets in addition; TRL's own pass reads it.

        Returns:
            [`Scores`]
        """
        if recorded is not None and recorded.hold(want):
            return recorded
        ids, mask, width = tokens
        size = batch_size or len(ids)
        chunks = [(ids[at : at + size], mask[at : at + size], width) for at in range(0, len(ids), size)]
        multimodal = any(value is not None for value in (images or {}).values())
        parts = self._packed(model, chunks, possible=not multimodal and "aux_loss" not in want)
        aligned = not multimodal and self._aligns(model)
        if multimodal or (None in parts and not aligned and "values" not in want):
            asked = {"compute_entropy": "entropies" in want, "compute_aux_loss": "aux_loss" in want}
            logps, entropies, aux_loss = self._run.trl_scores(model, ids, mask, width, size, **asked, **(images or {}))
            return Scores(logps, entropies, aux_loss=aux_loss)
        laid_out = [part or lay_out(*chunk, aligned) for part, chunk in zip(parts, chunks, strict=True)]
        frequencies = RowFrequencies(self._run.accelerator.unwrap_model(model))
        return Scores.joined([self._pass(model, part, want, frequencies) for part in laid_out])

    @contextmanager
    def without_training(self, model: nn.Module) -> Iterator[None]:
        """Run forward passes in evaluation mode, without gradients and without gradient checkpointing."""
        options: Any = self._run.args.gradient_checkpointing_kwargs
        bare = self._run.accelerator.unwrap_model(model)
        with scoring_mode(model), disable_gradient_checkpointing(bare, options):
            yield

    def score_policy(self, tokens: Tokens, want: Collection[str] = LOGPS) -> Scores:
        """Score a batch with the policy as it is, without gradients."""
        run = self._run
        with self.without_training(run.model):
            return self.score(run.model, tokens, want, batch_size=run.args.per_device_train_batch_size)

    def _pass(
        self, model: nn.Module, part: PackedBatch, want: Collection[str], frequencies: RowFrequencies | None = None
    ) -> Scores:
        """Score rollouts that are laid out, in one forward pass."""
        args, accelerator = self._run.args, self._run.accelerator
        bare = accelerator.unwrap_model(model)
        pieces, mask, device = part.pieces, part.attention_mask, part.input_ids.device
        attention: AbstractContextManager[None] = nullcontext()
        # A compiled model would be compiled anew for every batch whose recomputation has a context of its own
        recompiled = args.torch_compile and is_checkpointed(bare)
        if pieces is not None and suits(bare) and not recompiled:
            if self._flex is not None:
                part = part.padded(BLOCK)
                attend: PackedAttention = BlockAttention(self._flex, pieces, part.input_ids.shape[1], device)
            else:
                attend = PieceAttention(pieces, device)
            attention = packed_attention(bare, attend)
        elif pieces is not None:
            mask = dense_mask(pieces, part.input_ids.shape[1]).to(device)
            if attention_implementation(bare.config.get_text_config()) == "eager":
                hidden = torch.finfo(torch.float32).min
                mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, hidden)
        options: dict[str, object] = {} if part.position_ids is None else {"position_ids": part.position_ids}
        options |= {"with_values": True} if "values" in want else {}
        options |= {"output_router_logits": True} if "aux_loss" in want else {}
        kept = part.labelled()
        lengths = None if part.attention_mask is None else part.attention_mask.sum(dim=1)  # else positions say it
        with accelerator.autocast(), only_at(bare, kept), (frequencies or RowFrequencies(bare)).of(lengths), attention:
            output = model(
                input_ids=part.input_ids,
                attention_mask=mask,
                shift_labels=part.labels.reshape(-1)[kept][None],
                fused_lm_head=True,
                **options,
            )
        return Scores(
            part.unpack(output.log_probs, kept),
            part.unpack(output.entropy, kept) if "entropies" in want else None,
            part.unpack(output["token_values"], kept) if "values" in want else None,
            part.unpack(output["value_inputs"], kept) if "value_inputs" in want else None,
            output.aux_loss if "aux_loss" in want else None,
        )

    # Where rows begin

    def _aligns(self, model: nn.Module) -> bool:
        """Return whether rollouts are moved to the first column; every process finds the same, with as many passes."""
        if not self._run.recording:
            return False  # TRL's own pass, unchanged
        if self._aligned is None:
            bare = self._run.accelerator.unwrap_model(model)
            late = RowFrequencies(bare).border is not None or scales_by_position(bare.config.get_text_config())
            self._aligned = late or self._reads_padding(model, bare)
        return self._aligned

    def _reads_padding(self, model: nn.Module, bare: PreTrainedModel) -> bool:
        accelerator = self._run.accelerator
        device = accelerator.device

        def logits(ids: Tensor, mask: Tensor) -> Tensor:
            with accelerator.autocast():
                return model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits

        with self.without_training(model):
            exact = compute_dtype(self._run.args, bare) not in LOW_PRECISION
            return reads_padding(logits, bare.config.get_text_config().vocab_size, exact)

    # Packing

    def _packed(self, model: nn.Module, chunks: list[Tokens], possible: bool) -> list[PackedBatch | None]:
        """Return each chunk packed; `None` for one that is scored a rollout a row."""
        unpacked: list[PackedBatch | None] = [None] * len(chunks)
        if not possible or self.packing.active is False:
            return unpacked
        packed = [pack(*chunk) for chunk in chunks]
        if self.packing.active is None:
            self._decide_packing(model, chunks[0], ready=None not in packed)
        return packed if self.packing.active else unpacked

    def _decide_packing(self, model: nn.Module, chunk: Tokens, ready: bool) -> None:
        """
        Decide about packing with the first batch that every process can pack.

        Every process takes the same decision and runs the same number of forward passes.

        Args:
            model (`nn.Module`):
                The policy.
            chunk (`tuple[Tensor, Tensor, int]`):
                Rollouts to try it with.
            ready (`bool`):
                Whether this process can pack its whole batch.
        """
        run, bare = self._run, self._run.accelerator.unwrap_model(model)
        obstacle = obstacle_to_packing(bare)
        if obstacle is not None:
            return self.packing.refuse(obstacle)
        few = longest_of_a_group(*chunk)
        packed, changed = pack(*few), with_other_texts(*few)
        possible = ready and packed is not None and changed is not None
        everyone = torch.tensor(float(possible), device=run.accelerator.device)
        if run.accelerator.reduce(everyone, reduction="mean") < 1 or packed is None or changed is None:
            return None
        if self.rounding is None:
            self.rounding = self.measure_rounding(model, few)
        excess, leak, failure = None, 0.0, None
        try:
            with self.without_training(model):
                if self._aligns(model):
                    plain = self._pass(model, lay_out(*few, aligned=True), LOGPS).logps
                else:
                    plain = run.trl_scores(model, *few)[0]
                first, second = (self._pass(model, part, LOGPS).logps for part in (packed, changed))
            excess = self.rounding.excess((first - plain).abs()[packed.scored].float().cpu())
            leak = float((first - second).abs()[-1].nan_to_num(nan=torch.inf).max())
            if has_experts(bare) and self.rounding.excess(torch.tensor([leak])) is None:
                leak = 0.0
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
            failure = error  # the other processes wait for what this one found
        reason = self._reason_against_packing(excess, leak, failure)
        if reason is None:
            self.packing.active, self.packing.reason = True, None
            return None
        logger.warning("Rollouts are scored one by one: %s.", reason)
        return self.packing.refuse(reason)

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
        found = self._run.accelerator.gather(torch.tensor(found, device=self._run.accelerator.device).float())
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

    # Rounding

    def measure_rounding(self, model: nn.Module, tokens: Tokens) -> Accepted:
        """
        Measure what rounding does to log-probs of a policy, on a few rollouts of one group.

        Args:
            model (`nn.Module`):
                The policy.
            tokens (`tuple[Tensor, Tensor, int]`):
                The batch, see [`Tokens`].
        """
        if compute_dtype(self._run.args, model) not in LOW_PRECISION:
            return Exact()
        accelerator = self._run.accelerator
        ids, mask, width = longest_of_a_group(*tokens)
        # As many passes in every process: rollouts that are missing are scored again, and not counted
        rows = torch.arange(TRIAL_ROLLOUTS, device=ids.device)
        counted = (rows < len(ids))[:, None]
        ids, mask = ids[rows % len(ids)], mask[rows % len(ids)]
        completions, scored = ids[:, -width:], mask[:, -width:].bool() & counted
        longest = accelerator.gather(scored.sum(dim=1).max()[None]).max()
        length = max(1, min(int(longest), COMPARED_TOKENS))
        prompt = ids[0, :-width][mask[0, :-width].bool()].tolist()
        padding = (0, max(0, length - width))
        completions, scored = (nn.functional.pad(x, padding)[:, :length] for x in (completions, scored))
        bare = accelerator.unwrap_model(model)
        with scoring_mode(bare):
            found = measure_rounding(bare, prompt, completions, scored, self._run.temperature, accelerator.autocast)
        figures = torch.tensor([[found.mean, found.doubtful, *found.quantiles]], device=accelerator.device)
        mean, doubtful, *quantiles = accelerator.gather(figures).amax(dim=0).tolist()
        return Rounding(mean, tuple(quantiles), doubtful)
