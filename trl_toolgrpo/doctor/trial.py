"""One group of rollouts, checked against the trainer, and the update it would feed, without taking it.

Owns the questions that only running answers: do rollouts work, are the recorded log-probs the trainer's, is there a
gradient, and does all that fit into memory.
"""

import math
import resource
import time
from typing import Any

import psutil
import torch

from ..errors import LogprobMismatchError
from ..trajectory import Trajectory
from .findings import FAULT, NOTE, OK, Finding


def try_rollouts(trainer: Any) -> tuple[list[Finding], dict[str, Any] | None]:
    """
    Make the rollouts of one group, which the trainer checks against itself.

    Args:
        trainer ([`ToolGRPOTrainer`]):
            The trainer.

    Returns:
        `tuple[list[Finding], dict | None]`: the answers, and the batch that an update would get.
    """
    trainer.model_wrapped = trainer.model = trainer.accelerator.prepare_model(trainer.model)
    trainer.model.train()
    row = trainer.train_dataset[0]
    started = time.perf_counter()
    try:
        batch = trainer._generate_and_score_completions([dict(row) for _ in range(trainer.num_generations)])
    except LogprobMismatchError as error:
        words, _, remedy = str(error).rpartition("Check that ")
        return [Finding("self-check", FAULT, words.strip() or str(error), f"Check that {remedy}")], None
    seconds = time.perf_counter() - started
    if not trainer._recording:
        words = f"{trainer.num_generations} in {seconds:.1f} s, on TRL's own path: no log-prob is recorded or checked."
        return [Finding("rollouts", NOTE, words)], batch
    found = [describe(trainer._batch.trajectories, seconds)]
    if trainer.args.logprob_check == "off":
        words = "Recorded log-probs were not compared with the trainer's: `logprob_check` is off."
        return [*found, Finding("self-check", NOTE, words, "Leave it at 'first'; it costs one pass.")], batch
    tokens = sum(sum(t.trainable_mask) for t in trainer._batch.trajectories)
    words = f"Recorded log-probs are those the trainer computes, for each of {tokens} sampled tokens."
    return [*found, Finding("self-check", OK, words)], batch


def describe(trajectories: list[Trajectory], seconds: float) -> Finding:
    """
    What came of a group of rollouts.

    Args:
        trajectories (`list[Trajectory]`):
            The rollouts.
        seconds (`float`):
            Time they took.
    """
    calls = [call for t in trajectories for turn in t.turns for call in turn.tool_calls]
    results = [result for t in trajectories for turn in t.turns for result in turn.tool_results]
    failed = sum(result.is_error for result in results)
    stops = sorted({t.stop_reason for t in trajectories})
    words = (
        f"{len(trajectories)} of one prompt in {seconds:.1f} s: {len(calls)} calls, {failed} of {len(results)} "
        f"answered ones failed; stop reasons {', '.join(stops)}."
    )
    if all(t.truncated for t in trajectories):
        remedy = "Look at `max_completion_length` and `max_tool_calling_iterations`, unless the policy is untrained."
        return Finding("rollouts", NOTE, f"{words} Every one was cut off.", remedy)
    if not calls:
        remedy = "If only calls earn a reward, start with `assist_warmup_steps` and `force_rate`."
        return Finding("rollouts", NOTE, f"{words} None called a tool.", remedy)
    return Finding("rollouts", OK, words)


def try_update(trainer: Any, batch: dict[str, Any]) -> Finding:
    """
    Loss and gradient of the group, in micro-batches as training has them; no step is taken.

    Args:
        trainer ([`ToolGRPOTrainer`]):
            The trainer.
        batch (`dict`):
            What its rollouts gave.
    """
    rows = min(trainer.args.per_device_train_batch_size, len(batch["completion_ids"]))
    part = {
        name: value[:rows] if isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in batch.items()
    }
    trainer.current_gradient_accumulation_steps = 1  # which training counts, and the loss is divided by
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, part)
    trainer.accelerator.backward(loss)
    loss = float(loss.detach())
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float(gradient.float().square().sum()) for gradient in gradients))
    trainer.model.zero_grad(set_to_none=True)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        words = f"The loss is {loss:.3g} and its gradient has the norm {norm:.3g}."
        return Finding("update", FAULT, words, "Check the model's weights and dtype, and what the rewards return.")
    if norm == 0:
        words = "The gradient is 0: the rewards of this group do not differ."
        return Finding("update", NOTE, words, "No matter if other groups differ; watch `frac_reward_zero_std`.")
    return Finding("update", OK, f"The gradient of one micro-batch has the norm {norm:.3g}.")


def check_memory(trainer: Any) -> Finding:
    """
    What the trial took at its peak, and what the optimizer will take beside it.

    Args:
        trainer ([`ToolGRPOTrainer`]):
            The trainer, after the trial.
    """
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    state = sum(2 * p.numel() * p.element_size() for p in trained)  # Adam's two moments
    if torch.cuda.is_available() and trainer.accelerator.device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        total = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    count = sum(p.numel() for p in trained)
    words = (
        f"{count / 1e6:.1f} million parameters are trained; the trial took {peak / 1e9:.1f} GB at its peak, the "
        f"optimizer takes {state / 1e9:.1f} GB more, of {total / 1e9:.1f} GB."
    )
    remedy = (
        "Lower `per_device_train_batch_size` or `max_completion_length`, train an adapter (`use_peft`), or quantize."
    )
    if peak + state > total:
        return Finding("memory", FAULT, words, remedy)
    if peak + state > 0.85 * total:
        return Finding("memory", NOTE, f"{words} That is tight.", remedy)
    return Finding("memory", OK, words)
