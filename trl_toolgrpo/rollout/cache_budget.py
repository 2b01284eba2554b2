"""How many rollouts fit into a bound on memory, and the division of a rollout batch into parts that do."""

from collections.abc import Sequence
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from ..config.fields import ToolGRPOConfig
from ..errors import ConfigError
from ..models.model_settings import stored_values


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


def stored_tokens(args: ToolGRPOConfig, model: PreTrainedModel) -> int | None:
    """Return how many tokens' keys and values fit into `rollout_cache_gib`; `None` for no limit."""
    if args.rollout_cache_gib is None:
        return None
    return int(args.rollout_cache_gib * 2**30) // bytes_per_token(args, model)


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
    args: ToolGRPOConfig, model: PreTrainedModel, prompts: Sequence[Sequence[int]], shares: bool = True
) -> list[tuple[int, int]]:
    """
    Divide rollouts into parts that each fit into `rollout_cache_gib`, however long they become.

    Args:
        args ([`ToolGRPOConfig`]):
            Limits.
        model (`PreTrainedModel` or `PeftModel`):
            The policy.
        prompts (`Sequence[Sequence[int]]`):
            The prompt of each rollout.
        shares (`bool`, *optional*, defaults to `True`):
            Whether rollouts of a part with equal prompts share its keys and values, as with [`ModelSampler`].

    Returns:
        `list[tuple[int, int]]`: where each part begins and ends; parts have the same size if that fits.

    Raises:
        ConfigError: if one rollout alone does not fit.
    """
    limit, own = stored_tokens(args, model), (args.max_completion_length or 1) + 1
    if limit is None:
        return [(0, len(prompts))]
    longest = max(map(len, prompts))
    if longest + own > limit:
        raise _size_error(args, model, limit, longest + own, f"its prompt of {longest} tokens")
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


def _size_error(args: ToolGRPOConfig, model: PreTrainedModel, limit: int, needed: int, prompt: str) -> ConfigError:
    least = needed * bytes_per_token(args, model) / 2**30
    return ConfigError(
        f"You passed `rollout_cache_gib={args.rollout_cache_gib}`, which holds the keys and values of {limit} tokens "
        f"of this model. One rollout with {prompt} and `max_completion_length={args.max_completion_length}` can need "
        f"{needed}.",
        remedy=f"Pass at least {least:.3g}, or lower `max_completion_length`.",
    )
