"""The update of the policy: how a rollout batch becomes micro-batches, how each is scored, and what its ratios are.

TRL computes the loss. What it reads, and what is known without a pass, is decided here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config.batch_position import micro_batches_of
from ..rollout.engine import RolloutBatch
from ..rollout.rollouts import Rollouts
from ..trl_hooks import Run
from ..types import Batch
from .assisted_warmup import AssistedWarmup
from .logprob_check import LogprobCheck
from .micro_batches import MicroBatchSplit
from .ratio_statistics import RatioStatistics
from .sampler_correction import SamplerCorrection, correction_of
from .scoring import Scores, Scoring, Tokens


@dataclass(eq=False)
class MicroBatch:
    """
    A micro-batch whose loss is being computed.

    Args:
        given (`Batch`):
            The micro-batch.
        inputs (`Batch`):
            What TRL's loss reads: the same, or a copy whose ratio is corrected once it is scored.
        is_recorded (`bool`):
            Whether it needs no pass: it is evaluated, by the policy that sampled it.
        scores ([`Scores`], *optional*):
            What its scoring pass gave.
    """

    given: Batch
    inputs: Batch
    is_recorded: bool
    scores: Scores | None = None

    @property
    def logps(self) -> Tensor | None:
        """The policy's log-probs, nats, shape (B, T), without gradient; `None` where there is no ratio to old ones."""
        has_ratio = self.scores is not None and "old_per_token_logps" in self.given
        return self.scores.logps.detach() if self.scores is not None and has_ratio else None

    @property
    def mask(self) -> Tensor:
        """1 for tokens that train, shape (B, T)."""
        return self.given["completion_mask"] * self.given.get("tool_mask", 1)


class PolicyUpdate:
    """
    The update of a run.

    Args:
        run ([`Run`]):
            The run, its model made.
        rollouts ([`Rollouts`]):
            Its rollouts.
    """

    def __init__(self, run: Run, rollouts: Rollouts) -> None:
        self._run, self._rollouts = run, rollouts
        self.scoring = Scoring(run)
        self.split = MicroBatchSplit(run, rollouts.noise)
        self.warmup = AssistedWarmup(run, self.scoring)
        self.logprob_check = LogprobCheck(run, self.scoring)
        self.ratios = RatioStatistics()
        self.sampled_at = -1  # optimizer step at which the rollout batch in use was made
        self._micro_batch: MicroBatch | None = None  # whose loss is being computed
        self._asks_for_old_logprobs = False  # TRL's next pass over the policy does
        self._evaluates_next = False  # a batch was sampled for an evaluation, and its loss is next

    def on_train_begin(self) -> None:
        """Forget what an earlier training, which may have failed, has not logged."""
        self.ratios.reset()
        self.sampled_at = -1

    # A rollout batch

    @contextmanager
    def recorded_old_logprobs(self) -> Iterator[None]:
        """Answer TRL's pass for the old log-probs of a rollout batch, if it makes one, with those that were recorded.
        It does where optimizer steps and rollout batches are not aligned."""
        args = self._run.args
        self._asks_for_old_logprobs = args.gradient_accumulation_steps % micro_batches_of(args) != 0
        try:
            yield
        finally:
            self._asks_for_old_logprobs = False

    def on_rollouts(self, output: Batch, batch: RolloutBatch) -> None:
        """
        Take over a rollout batch that TRL has scored: its old log-probs and masks, and the check of the former.

        Args:
            output (`Batch`):
                TRL's batch, which is changed.
            batch ([`RolloutBatch`]):
                The rollouts.
        """
        run = self._run
        width, device = output["completion_ids"].size(1), run.accelerator.device
        self._evaluates_next = not run.training
        output["old_per_token_logps"] = batch.logprobs(width, device)
        # Cut-off rollouts whose last token is a stop token, and those without a record, take no part
        batch.mask_dropped(output, run.mask_truncated_completions)
        if run.training:
            output["rollout"] = torch.arange(len(batch.rollouts), device=output["completion_ids"].device)
            self.begin_batch()
            self.logprob_check.on_rollouts(self.tokens_of(output, batch), batch)

    def split_anew(self, batches: Sequence[Batch]) -> list[Batch] | None:
        """Return the micro-batches of a new rollout batch; `None` keeps TRL's, which are given."""
        parts = self.split.rows_of_parts(batches)
        return None if parts is None else regrouped(batches, parts)

    def begin_batch(self) -> None:
        """Note that the policy as it is has made the rollout batch that is used next."""
        self.sampled_at, self._evaluates_next = self._run.state.global_step, False

    def count_tokens(self, output: Batch) -> None:
        """Count the tokens that train over all processes, for losses that are averaged over them."""
        output["num_items_in_batch"] = self._run.gather_sum(output["completion_mask"] * output.get("tool_mask", 1))

    def tokens_of(self, output: Batch, batch: RolloutBatch) -> Tokens:
        """Return all tokens of a batch, also those of completions that TRL's mask leaves out."""
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        width = output["completion_ids"].size(1)
        return ids, torch.cat([output["prompt_mask"], batch.attention_mask(width, ids.device)], dim=1), width

    # A micro-batch

    @contextmanager
    def loss_of(self, inputs: Batch) -> Iterator[MicroBatch]:
        """Have TRL compute the loss of a micro-batch while open, its ratio corrected once it is scored."""
        run = self._run
        is_recorded = self._evaluates_next and not run.aux_loss_enabled and not torch.is_grad_enabled()
        self._evaluates_next = False  # before the next call the policy may have moved
        corrected = "old_per_token_logps" in inputs and correction_of(run.args) is not None
        micro_batch = self._micro_batch = MicroBatch(inputs, dict(inputs) if corrected else inputs, is_recorded)
        kept = run.use_vllm
        try:
            yield micro_batch
        finally:
            self._micro_batch, run.use_vllm = None, kept

    def score(
        self,
        model: nn.Module,
        tokens: Tokens,
        batch_size: int | None,
        compute_entropy: bool,
        compute_aux_loss: bool,
        images: dict[str, Any],
    ) -> Scores:
        """
        Score what TRL asks for: a rollout batch with the policy or a reference, or the micro-batch of a loss.

        Args:
            model (`nn.Module`):
                Which to score with.
            tokens (`tuple[Tensor, Tensor, int]`), batch_size (`int`, *optional*), images (`dict`):
                As in [`Scoring.score`].
            compute_entropy, compute_aux_loss (`bool`):
                What TRL wants in addition to log-probs.
        """
        want = ["logps"] + ["entropies"] * compute_entropy + ["aux_loss"] * compute_aux_loss
        if self._micro_batch is not None and "value_targets" in self._micro_batch.given:
            keeps_inputs = model.training and self._run.args.value_epochs > 1
            want += ["values"] + ["value_inputs"] * keeps_inputs
        recorded = self._recorded(model, tokens)
        scores = self.scoring.score(model, tokens, want, recorded, batch_size, images)
        if self._micro_batch is not None and scores is not recorded:
            self._on_scores(self._micro_batch, scores)
        return scores

    def _recorded(self, model: nn.Module, tokens: Tokens) -> Scores | None:
        """Return what the sampler has recorded of the tokens that TRL asks about now."""
        batch, (ids, _, width) = self._rollouts.batch, tokens
        if batch is None:
            return None
        if self._asks_for_old_logprobs and model is self._run.model:
            self._asks_for_old_logprobs = False  # the next pass over the policy is the reference's, with an adapter
            return Scores(batch.logprobs(width, ids.device))
        if self._micro_batch is not None and self._micro_batch.is_recorded and batch.holds(ids, width):
            entropies = batch.entropies(width, ids.device)
            return None if entropies is None else Scores(batch.logprobs(width, ids.device), entropies)
        return None

    def _on_scores(self, micro_batch: MicroBatch, scores: Scores) -> None:
        micro_batch.scores = scores
        run, correction = self._run, correction_of(self._run.args)
        if correction is not None and micro_batch.inputs is not micro_batch.given:
            moved = run.training and run.state.global_step != self.sampled_at
            SamplerCorrection(run, correction).correct(micro_batch.inputs, scores.logps, moved)

    def on_update(self, micro_batch: MicroBatch) -> None:
        """Add the ratios of a micro-batch to the statistics of the step."""
        if self._run.training and (logps := micro_batch.logps) is not None:
            fresh = self._run.state.global_step == self.sampled_at
            self.ratios.add(logps, micro_batch.given["old_per_token_logps"], micro_batch.mask, fresh)

    def on_log(self) -> None:
        """Add `ratio/*` and `sampling/*` to what is logged of training. Every process must call this."""
        accelerator = self._run.accelerator
        found = self.ratios.metrics(lambda x: accelerator.reduce(x, reduction="sum"), accelerator.gather)
        self._run.training_metrics.update({name: [value] for name, value in found.items()})
        self.ratios.reset()


def regrouped(batches: Sequence[Batch], parts: Sequence[Tensor]) -> list[Batch]:
    """
    Return the rows of some micro-batches in other micro-batches.

    Args:
        batches (`Sequence[Batch]`):
            Micro-batches as TRL splits them: tensors with a row for each rollout, and values that are equal in all.
        parts (`Sequence[Tensor]`):
            Rows of each new micro-batch, int64, counted through all of `batches`.
    """

    def pick(name: str, rows: Tensor) -> object:
        values = [batch[name] for batch in batches]
        if not isinstance(values[0], Tensor) or values[0].ndim == 0:
            return values[0]
        return torch.cat(values)[rows]

    return [{name: pick(name, rows) for name in batches[0]} for rows in parts]
