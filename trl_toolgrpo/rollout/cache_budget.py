"""How many rollouts fit into a bound on memory, and the division of a rollout batch into parts that do."""

import math
from collections.abc import Sequence
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from ..config.fields import ToolGRPOConfig
from ..errors import ConfigError
from ..models.model_settings import stored_values
from .cache_choice import ChosenCache


def bytes_per_token(args: ToolGRPOConfig, model: PreTrainedModel) -> int:
    """
    Return the memory of the keys and values of one token, over all layers, in bytes.

    Args:
        args ([`ToolGRPOConfig`]):
            Says whether the model runs under autocast.
        model (`PreTrainedModel` or `PeftModel`):
            The policy.
    """
    embeddings = cast(nn.Embedding, model.get_input_embeddings())
    item = 2 if args.bf16 or args.fp16 else embeddings.weight.element_size()
    return stored_values(model.config.get_text_config()) * item


def stored_tokens(args: ToolGRPOConfig, model: PreTrainedModel, chosen: ChosenCache | None = None) -> int | None:
    """Return how many tokens' keys and values fit into `rollout_cache_gib`, or into what was chosen where that is
    `None`; `None` for no limit."""
    if args.rollout_cache_gib is not None:
        return int(args.rollout_cache_gib * 2**30) // bytes_per_token(args, model)
    return None if chosen is None else int(chosen.bytes) // bytes_per_token(args, model)


def check_cache(args: ToolGRPOConfig, model: PreTrainedModel) -> None:
    """
    Check that one rollout fits, as far as that is known without its prompt.

    Raises:
        ConfigError: if it does not.
    """
    limit, needed = stored_tokens(args, model), (args.max_completion_length or 1) + 2
    if limit is not None and needed > limit:
        raise _size_error(args, model, limit, needed, "a prompt of one token")


def parts_that_fit(
    args: ToolGRPOConfig,
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    shares: bool = True,
    chosen: ChosenCache | None = None,
) -> list[tuple[int, int]]:
    """
    Divide rollouts into parts that each fit into `rollout_cache_gib`, however long they become. Processes may divide
    theirs differently: no rollout waits for another process.

    Args:
        args ([`ToolGRPOConfig`]):
            Limits.
        model (`PreTrainedModel` or `PeftModel`):
            The policy.
        prompts (`Sequence[Sequence[int]]`):
            The prompt of each rollout.
        shares (`bool`, *optional*, defaults to `True`):
            Whether rollouts of a part with equal prompts share its keys and values, as with [`ModelSampler`].
        chosen ([`ChosenCache`], *optional*):
            The bound where `rollout_cache_gib` is `None`; by default there is none.

    Returns:
        `list[tuple[int, int]]`: where each part begins and ends; parts have the same size if that fits.

    Raises:
        ConfigError: if one rollout alone does not fit.
    """
    limit, own = stored_tokens(args, model, chosen), (args.max_completion_length or 1) + 1
    if limit is None or not prompts:
        return [(0, len(prompts))]
    longest = max(map(len, prompts))
    if longest + own > limit:
        raise _size_error(args, model, limit, longest + own, f"its prompt of {longest} tokens", chosen)
    parts, start = [], 0
    for row in range(1, len(prompts)):
        if _cost(prompts[start : row + 1], own, shares) > limit:
            parts.append((start, row))
            start = row
    parts.append((start, len(prompts)))
    size = -(-len(prompts) // len(parts))
    even = [(first, min(first + size, len(prompts))) for first in range(0, len(prompts), size)]
    return even if all(_cost(prompts[first:stop], own, shares) <= limit for first, stop in even) else parts


def _cost(prompts: Sequence[Sequence[int]], own: int, shares: bool) -> int:
    """Return the most tokens stored: prompts, shared or not, padded to the longest, and each rollout's own."""
    stored = len({tuple(prompt) for prompt in prompts}) if shares else len(prompts)
    return stored * max(map(len, prompts)) + len(prompts) * own


def _size_error(
    args: ToolGRPOConfig,
    model: PreTrainedModel,
    limit: int,
    needed: int,
    prompt: str,
    chosen: ChosenCache | None = None,
) -> ConfigError:
    least = _rounded_up(needed * bytes_per_token(args, model) / 2**30)
    rollout = (
        f"One rollout with {prompt} and `max_completion_length={args.max_completion_length}` can need {needed}, which "
        f"is {least} GiB."
    )
    if args.rollout_cache_gib is not None or chosen is None:
        return ConfigError(
            f"You passed `rollout_cache_gib={args.rollout_cache_gib}`, which holds the keys and values of {limit} "
            f"tokens of this model. {rollout}",
            remedy=f"Pass at least {least}, or lower `max_completion_length`.",
        )
    return ConfigError(
        f"The GPU has too little memory left for rollouts: {chosen}. That holds {limit} tokens of this model. "
        f"{rollout}",
        remedy="Lower `max_completion_length` or `per_device_train_batch_size`, set `gradient_checkpointing=True`, or "
        f"end what else uses the GPU; or pass `rollout_cache_gib`, at least {least}, to set the bound yourself.",
    )


def _rounded_up(gib: float) -> str:
    """Return a number with three digits that is not below the given one."""
    step = 10.0 ** (math.floor(math.log10(gib)) - 2)
    return f"{math.ceil(gib / step) * step:.3g}"
