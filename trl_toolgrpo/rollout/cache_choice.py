"""How much of a GPU's free memory the keys and values of rollouts may take, with room for the update after them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..config.batch_position import micro_batches_of
from ..config.fields import ToolGRPOConfig
from ..memory import ModelShape, estimate_memory, sampling_memory
from ..models.model_settings import model_setting
from ..models.rounding import compute_dtype
from ..models.sharding import local
from ..sampling.model_sampler import PREFILL_TOKENS
from ..trl_hooks import Run


MARGIN = 0.1
"""Share of the free memory that is left alone: for fragmentation, workspaces of kernels, and communication."""


@dataclass(frozen=True)
class DeviceMemory:
    """
    Memory of a GPU, in bytes.

    Args:
        free (`int`):
            What the driver can still give to this process.
        reserved, allocated (`int`):
            What torch's caching allocator holds, and what tensors use of that.
    """

    free: int
    reserved: int
    allocated: int

    @property
    def available(self) -> int:
        """What further tensors can take."""
        return self.free + self.reserved - self.allocated


@dataclass(frozen=True)
class MemoryNeeds:
    """
    What a run takes in addition to what is there before its first rollouts, and to keys and values, in bytes.

    Args:
        lasting (`float`):
            What later rollouts find there: optimizer state, and gradients where rollouts are sampled between the
            micro-batches of an optimizer step.
        update (`float`):
            What an update takes and gives back: activations, the logits of a tile, and gradients; `math.inf` where
            that is not known.
        sampling (`float`):
            What sampling takes and gives back.
    """

    lasting: float
    update: float
    sampling: float


@dataclass(frozen=True)
class ChosenCache:
    """
    The bound on the keys and values of rollouts in progress that follows from the memory of a GPU.

    Args:
        memory ([`DeviceMemory`]):
            Before the first rollouts.
        needs ([`MemoryNeeds`]):
            Of the run.
    """

    memory: DeviceMemory
    needs: MemoryNeeds

    @property
    def left(self) -> float:
        """What is left for sampling and updates, which take turns, in bytes."""
        return max(0.0, (1 - MARGIN) * self.memory.available - self.needs.lasting)

    @property
    def kept(self) -> float:
        """What is kept of that for other things than keys and values, in bytes: at least what sampling takes, and what
        an update takes up to half, since it finds the rest where keys and values were."""
        return min(self.left, max(self.needs.sampling, min(self.needs.update, self.left / 2)))

    @property
    def bytes(self) -> float:
        """The bound."""
        return self.left - self.kept

    def __str__(self) -> str:
        gib = {
            "chosen": self.bytes,
            "free": self.memory.available,
            "lasting": self.needs.lasting,
            "kept": self.kept,
            "margin": MARGIN * self.memory.available,
        }
        return (
            "{chosen:.3g} GiB for the keys and values of rollouts in progress, of {free:.3g} free on the GPU; "
            "{lasting:.3g} are kept for the optimizer, {kept:.3g} for updates and sampling, {margin:.3g} as a margin"
        ).format(**{name: value / 2**30 for name, value in gib.items()})


def device_memory(device: torch.device) -> DeviceMemory | None:
    """Return the memory of a CUDA GPU; `None` for another device."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return DeviceMemory(free, torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device))


def choose_cache(
    run: Run, model: PreTrainedModel, prompts: Sequence[Sequence[int]], supported: bool
) -> ChosenCache | None:
    """
    Choose the bound on the keys and values of rollouts in progress, before the first rollout batch.

    Args:
        run ([`Run`]):
            The run.
        model (`PreTrainedModel` or `PeftModel`):
            The policy, unwrapped, its parameters gathered.
        prompts (`Sequence[Sequence[int]]`):
            The first prompts.
        supported (`bool`):
            Whether the default sampler samples.

    Returns:
        [`ChosenCache`] or `None`: `None` for no limit, on a device that is no CUDA GPU.
    """
    memory = device_memory(run.accelerator.device)
    return None if memory is None else ChosenCache(memory, memory_needs(run, model, prompts, supported))


def memory_needs(run: Run, model: PreTrainedModel, prompts: Sequence[Sequence[int]], supported: bool) -> MemoryNeeds:
    """
    Return what a run takes in addition to what is there and to keys and values; arguments as for [`choose_cache`].
    """
    args, config = run.args, model.config.get_text_config()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    processes = run.accelerator.num_processes if run.is_fsdp_enabled or run.is_deepspeed_enabled else 1
    present = _bytes(local(p.grad) for p in trained if p.grad is not None)
    gradients = max(0.0, _bytes(trained) / processes - present)
    # DeepSpeed makes its state when it takes the model over; others make theirs in the first step
    made = run.is_deepspeed_enabled or _has_state(run.optimizer)
    lasting = 0.0 if made else _optimizer_bytes(args, trained) / processes
    shape, longest = _shape(config), max(map(len, prompts), default=1)
    if shape is None or not supported:  # such as `model.generate`, which reads whole histories at a time
        update, sampling = math.inf, 0.0
    else:
        update = _activations(args, model, shape, longest)
        sampling = _sampling(run, model, shape, longest)
    if micro_batches_of(args) % args.gradient_accumulation_steps:  # gradients are there while others are sampled
        return MemoryNeeds(lasting + gradients, update, sampling)
    return MemoryNeeds(lasting, update + gradients, sampling)


def _shape(config: PreTrainedConfig) -> ModelShape | None:
    """Return the shape of a model; `None` for one that is built in another way."""
    try:
        shape = ModelShape.from_config(config)
        return shape if shape.parameters > 0 else None
    except (AttributeError, TypeError, ValueError):  # also where a size is missing, such as GPT-2's
        return None


def _activations(args: ToolGRPOConfig, model: PreTrainedModel, shape: ModelShape, prompt: int) -> float:
    """Return the activations of a micro-batch, in bytes."""
    return estimate_memory(
        shape,
        "lora" if isinstance(model, PeftModel) else "full",
        micro_batch=args.per_device_train_batch_size,
        prompt_length=prompt,
        completion_length=args.max_completion_length or 1,
        compute_bytes=compute_dtype(args, model).itemsize,
        gradient_checkpointing=args.gradient_checkpointing,
    ).activations


def _sampling(run: Run, model: PreTrainedModel, shape: ModelShape, prompt: int) -> float:
    """Return what sampling takes in addition to keys and values, in bytes."""
    args, config = run.args, model.config.get_text_config()
    rollouts = max(
        args.per_device_train_batch_size * (args.steps_per_generation or 1), args.per_device_eval_batch_size
    )
    prompts = -(-rollouts // (args.num_generations or 1))
    output = args.max_tool_output_tokens if run.tools else 1
    read = max(prompt, output, min(PREFILL_TOKENS, max(prompts * prompt, rollouts * output)))
    # Plain prompts are read by a kernel that holds no scores
    holds_scores = bool(run.tools) or model_setting(config, "sliding_window") is not None
    attended = max(prompt, args.max_completion_length or 1) if holds_scores else 0
    copies = 0.0
    if args.bf16 or args.fp16:  # autocast keeps its copies of trained weights until sampling ends
        copies = sum(2.0 * p.numel() for p in model.parameters() if p.requires_grad and p.dtype == torch.float32)
    if args.cast_lm_head_to_fp32:
        copies += 4.0 * shape.vocab_size * shape.hidden_size
    size = compute_dtype(args, model).itemsize
    return copies + sampling_memory(shape, rollouts, read, attended, size, isinstance(model, PeftModel))


def _optimizer_bytes(args: ToolGRPOConfig, trained: Sequence[nn.Parameter]) -> float:
    """Return the size of an optimizer's state: Adam's two moments, unless its name says otherwise."""
    name = str(getattr(args.optim, "value", args.optim))
    if name.startswith(("paged_", "sgd", "adafactor")):  # in the host's memory, none, or a row and a column
        return 0.0
    return 2.0 * (sum(p.numel() for p in trained) if "8bit" in name else _bytes(trained))


def _has_state(optimizer: object) -> bool:
    """Return whether an optimizer has made its state: that of a resumed run has."""
    state = getattr(optimizer, "state", None)
    return isinstance(state, Mapping) and len(state) > 0


def _bytes(tensors: Iterable[Tensor]) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
