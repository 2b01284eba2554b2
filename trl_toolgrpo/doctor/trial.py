"""One group of rollouts, checked against the trainer, and the update it would feed, which is not taken.

These checks need a run: whether rollouts work, whether the recorded log-probs match the trainer's, whether there is a
gradient, and whether all that fits into memory.
"""

import math
import resource
import time
from collections.abc import Iterator

import psutil
import torch

from ..errors import LogprobMismatchError
from ..rollout.trajectory import Trajectory
from ..types import Batch
from .result import FAULT, NOTE, OK, CheckResult, ToolTrainer


def try_run(trainer: ToolTrainer) -> Iterator[CheckResult]:
    """
    Generate the rollouts of one group, which the trainer checks against itself, and compute the update.

    Args:
        trainer ([`ToolGRPOTrainer`]):
            The trainer.

    Returns:
        `Iterator[CheckResult]`: the results, of the rollouts first.
    """
    trainer.model_wrapped = trainer.model = trainer.accelerator.prepare_model(trainer.model)
    trainer.model.train()
    row = trainer.train_dataset[0]
    started = time.perf_counter()
    try:
        batch = trainer.run.generate([dict(row) for _ in range(trainer.num_generations)])
    except LogprobMismatchError as error:
        yield CheckResult("self-check", FAULT, error.message, error.remedy)
        return
    seconds = time.perf_counter() - started
    if trainer.recording:
        yield describe(trainer.rollouts.batch.trajectories, seconds)
        yield _check_logprobs(trainer)
    else:
        count = f"{trainer.num_generations} in {seconds:.1f} s"
        yield CheckResult("rollouts", NOTE, f"{count}, on TRL's own path: no log-prob is recorded or checked.")
    yield try_update(trainer, batch)


def _check_logprobs(trainer: ToolTrainer) -> CheckResult:
    if trainer.args.logprob_check == "off":
        message = "Recorded log-probs were not compared with the trainer's: `logprob_check` is off."
        return CheckResult("self-check", NOTE, message, "Leave it at 'first'; it costs one pass.")
    tokens = sum(sum(t.trainable_mask) for t in trainer.rollouts.batch.trajectories)
    message = f"Recorded log-probs are those the trainer computes, for each of {tokens} sampled tokens."
    return CheckResult("self-check", OK, message)


def describe(trajectories: list[Trajectory], seconds: float) -> CheckResult:
    """
    Describe a group of rollouts.

    Args:
        trajectories (`list[Trajectory]`):
            The rollouts.
        seconds (`float`):
            Time they took.
    """
    calls = [call for t in trajectories for turn in t.turns for call in turn.tool_calls]
    results = [result for t in trajectories for turn in t.turns for result in turn.tool_results]
    message = (
        f"{len(trajectories)} of one prompt in {seconds:.1f} s: {len(calls)} calls, "
        f"{sum(result.is_error for result in results)} of {len(results)} answered ones failed; "
        f"stop reasons {', '.join(sorted({t.stop_reason for t in trajectories}))}."
    )
    if all(t.truncated for t in trajectories):
        remedy = "Look at `max_completion_length` and `max_tool_calling_iterations`, unless the policy is untrained."
        return CheckResult("rollouts", NOTE, f"{message} Every one was cut off.", remedy)
    if not calls:
        remedy = "If only calls earn a reward, start with `assist_warmup_steps` and `force_rate`."
        return CheckResult("rollouts", NOTE, f"{message} None called a tool.", remedy)
    return CheckResult("rollouts", OK, message)


def try_update(trainer: ToolTrainer, batch: Batch) -> CheckResult:
    """
    Compute loss and gradient of a micro-batch of the group; no step is taken.

    Args:
        trainer ([`ToolGRPOTrainer`]):
            The trainer.
        batch (`dict`):
            What its rollouts gave, tensors of shape (B, ...).
    """
    rows = min(trainer.args.per_device_train_batch_size, len(batch["completion_ids"]))
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and value.dim()}
    part = batch | {name: tensor[:rows] for name, tensor in tensors.items()}
    trainer.current_gradient_accumulation_steps = 1  # which training counts, and the loss is divided by
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, part)
    trainer.accelerator.backward(loss)
    loss = float(loss.detach())
    gradients = (p.grad for p in trainer.model.parameters() if p.grad is not None)
    norm = math.sqrt(sum(float(gradient.float().square().sum()) for gradient in gradients))
    trainer.model.zero_grad(set_to_none=True)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        message = f"The loss is {loss:.3g} and its gradient has the norm {norm:.3g}."
        return CheckResult("update", FAULT, message, "Check the model's weights and dtype, and the rewards.")
    if norm == 0:
        message = "The gradient is 0: the rewards of this group do not differ."
        return CheckResult("update", NOTE, message, "No matter if other groups differ; watch `frac_reward_zero_std`.")
    return CheckResult("update", OK, f"The gradient of one micro-batch has the norm {norm:.3g}.")


def check_memory(trainer: ToolTrainer) -> CheckResult:
    """
    Check the memory that the trial took at its peak, in addition to what the optimizer will take.

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
    message = (
        f"{count / 1e6:.1f} million parameters are trained; the trial took {peak / 1e9:.1f} GB at its peak, the "
        f"optimizer takes {state / 1e9:.1f} GB more, of {total / 1e9:.1f} GB."
    )
    remedy = "Lower `per_device_train_batch_size` or `max_completion_length`, train an adapter, or quantize."
    if peak + state <= 0.85 * total:
        return CheckResult("memory", OK, message)
    tight = peak + state <= total
    return CheckResult("memory", NOTE if tight else FAULT, f"{message}{' That is tight.' if tight else ''}", remedy)
