"""Which sampler a model gets: by what it declares, and by a trial on a few tokens that must agree with the model's own
forward pass.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from ..models.lm_head import base_model
from ..models.model_settings import model_setting
from ..models.rounding import Accepted, Exact, Rounding, measure_rounding, widest
from ..models.temporary_attribute import temporary_attribute
from ..trl_hooks import forward_without_autocast, has_replaceable_attention, is_stateful
from .generate_sampler import GenerateSampler, without_generation_settings
from .model_sampler import ModelSampler
from .protocol import Autocast, at_least_float32, scoring_mode


logger = logging.getLogger(__name__)

TOKENS, PADDING = 12, 9
"""Tokens of the trial of padding, and padding tokens before them."""

DEVICES = ("cpu", "cuda", "mps")
"""Types of devices that the default sampler is written for."""

_PLAIN_LAYERS = {"attention", "full_attention", "sliding_attention", "dense", "mlp", "moe", "sparse"}
"""Kinds of layers in which a token depends on others through attention alone, or on no others."""


def unsupported_reason(
    model: PreTrainedModel, token_ids: Sequence[int], autocast: Autocast = nullcontext
) -> str | None:
    """
    Return why the default sampler cannot handle a model, or `None` if it can.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The policy, unwrapped.
        token_ids (`Sequence[int]`):
            A few valid token ids for the trial.
        autocast (`Callable`, *optional*):
            Makes the autocast context that the trainer scores under.
    """
    device = next(model.parameters()).device.type
    if device not in DEVICES:
        return f"it is on a device of type `{device}`, and the default sampler is written for {', '.join(DEVICES)}"
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return f"{model.active_peft_config.peft_type.value} puts learned tokens before the prompt"
    base = base_model(model)
    config = base.config.get_text_config()
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if not has_replaceable_attention(base):
        return "its attention does not go through transformers' attention interface"
    others = layers_beside_attention(base)
    if others:
        return f"it has {', '.join(others)} layers"
    bare = forward_without_autocast(base)
    with nullcontext() if bare is None else temporary_attribute(base, "forward", bare):  # to try float32 exactly
        reason = _trial(base, list(token_ids))
    with autocast():
        low_precision = torch.is_autocast_enabled(next(base.parameters()).device.type)
    if reason is None and low_precision:  # again in the dtype of training, where other kernels run
        reason = _trial(base, list(token_ids), autocast, low_precision)
    return reason


def _is_exact(model: nn.Module) -> bool:
    """Return whether a model computes in float32 or better, outside autocast."""
    return all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point())


def layers_beside_attention(model: PreTrainedModel) -> list[str]:
    """
    Return the kinds of layers of a model, other than full and sliding attention, through which a token depends on
    others: convolutions, state-space, linear-attention and recurrent layers. Sorted; empty for a plain transformer.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The policy, unwrapped.
    """
    base = base_model(model)
    config = base.config.get_text_config()
    declared = {*(model_setting(config, "layer_types") or ()), *(model_setting(config, "layers_block_type") or ())}
    found = {str(kind) for kind in declared} - _PLAIN_LAYERS
    if not found and any(isinstance(module, nn.modules.conv._ConvNd) for module in base.modules()):
        found.add("convolution")
    stateful = is_stateful(base) or any(isinstance(m, nn.RNNBase) for m in base.modules())
    if not found and stateful:
        found.add("recurrent")
    return sorted(found)


def generates_padded(model: PreTrainedModel) -> bool:
    """
    Return whether `model.generate` treats rows of a padded batch like each of them alone.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The policy, unwrapped.
    """
    device = next(model.parameters()).device
    long, other = trial_rows(model.config.get_text_config().vocab_size)
    rows = [long, other[-3:]]
    ids = torch.tensor([[0] * (len(long) - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (len(long) - len(row)) + [1] * len(row) for row in rows], device=device)
    with scoring_mode(model), without_generation_settings(model):
        settings = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, disable_compile=True)
        try:
            output = cast(GenerationMixin, model).generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                output_logits=True,
                return_dict_in_generate=True,
                synced_gpus=False,
            )
        except (RuntimeError, ValueError, IndexError):  # such as no number to draw a token by
            return False
        found = torch.stack(output.logits, dim=1)
        alone = [
            model(input_ids=sequence[None, len(long) - len(row) :], use_cache=False).logits[0, -4:-1]
            for row, sequence in zip(rows, output.sequences, strict=True)
        ]
    return not differs(found, torch.stack(alone), alone[1] - alone[0], _is_exact(model))


def make_sampler(
    model: PreTrainedModel,
    supported: bool,
    pads: bool = True,
    paths: frozenset[str] = frozenset(),
    **options: Any,
) -> ModelSampler | GenerateSampler:
    """Return the default sampler if the model is supported, else the plain one; `options` as for [`ModelSampler`]."""
    if supported:
        return ModelSampler(model, paths=paths, **options)
    return GenerateSampler(model, pads=pads, **options)


def _trial(
    model: PreTrainedModel, tokens: list[int], autocast: Autocast = nullcontext, low_precision: bool = False
) -> str | None:
    """Sample a few tokens and compare their log-probs with the model's own forward pass over the same text; return
    what is wrong with them, or `None`."""
    prompts = [tokens[:5], tokens[:5], tokens[2:4]]
    exact = _is_exact(model) and not low_precision
    more = 0 if exact else 30  # enough tokens for a mean, where rounding has to be told from a fault
    histories = [list(prompt) for prompt in prompts]
    recorded: list[list[tuple[int, float]]] = [[] for _ in prompts]
    turns = [0] * len(prompts)
    state = torch.get_rng_state()  # the trial must not shift the run's random numbers
    try:
        with ModelSampler(model, stop_ids=(), pad_id=tokens[0], autocast=autocast).open(prompts, 16 + more) as session:
            for row in range(len(prompts)):
                session.extend(row, [], 2 + row + more)
            while session.busy:
                for sampled in session.step():
                    row = sampled.row
                    recorded[row] += zip(range(len(histories[row]), 1 << 30), sampled.logprobs, strict=False)
                    histories[row] += sampled.token_ids
                    turns[row] += 1
                    if turns[row] == 1:
                        histories[row] += tokens[: 2 + row]
                        session.extend(row, tokens[: 2 + row], 2)
        plain = [_plain_logprobs(model, history, autocast) for history in histories]
        gaps = torch.cat([
            (torch.tensor([value for _, value in pairs]) - scores[[place - 1 for place, _ in pairs]]).abs()
            for pairs, scores in zip(recorded, plain, strict=True)
        ])  # fmt: skip
        accepted: Accepted = Exact() if exact else _rounding(model, histories, autocast)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
        logger.debug("The trial of the default sampler failed.", exc_info=True)
        return f"the trial failed with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        torch.set_rng_state(state)
    excess = accepted.excess(gaps)
    return None if excess is None else f"its log-probs in the trial are not those of a plain pass: {excess}"


def _plain_logprobs(model: PreTrainedModel, history: list[int], autocast: Autocast) -> Tensor:
    """Return log-probs of all tokens but the first, from one pass without a cache, nats, shape (T - 1,)."""
    with scoring_mode(model), autocast():
        ids = torch.tensor([history], device=next(model.parameters()).device)
        scores = torch.log_softmax(at_least_float32(model(input_ids=ids, use_cache=False).logits[0]), dim=-1)
    return scores[:-1].gather(-1, ids[0, 1:, None])[:, 0].cpu()


def _rounding(model: PreTrainedModel, histories: list[list[int]], autocast: Autocast) -> Rounding:
    """Measure the rounding of two correct passes over the same texts."""
    device, found = next(model.parameters()).device, []
    for history in histories:
        rest = torch.tensor([history[1:]], device=device)
        with scoring_mode(model):
            found.append(measure_rounding(model, history[:1], rest, torch.ones_like(rest).bool(), 1.0, autocast))
    means, quantiles = [part.mean for part in found], zip(*(part.quantiles for part in found), strict=True)
    return Rounding(max(means), tuple(max(values) for values in quantiles))


def reads_padding(logits: Callable[[Tensor, Tensor], Tensor], vocabulary: int, exact: bool) -> bool:
    """
    Return whether padding on the left changes a model's logits for the tokens after it.

    It does if the model ignores the mask (RWKV), or counts positions from the first column (GPT-2).

    Args:
        logits (`Callable[[Tensor, Tensor], Tensor]`):
            Gives the logits (B, T, V) for token ids and a mask, int64, shape (B, T).
        vocabulary (`int`):
            Number of token ids.
        exact (`bool`):
            Whether the model computes in float32 or better.
    """
    tokens, other = trial_rows(vocabulary)
    half = TOKENS // 2
    ids = torch.tensor([tokens, other])
    plain = logits(ids, torch.ones_like(ids))[:, half:]
    padded = torch.tensor([[pad % vocabulary] * PADDING + tokens for pad in (1, 2)])
    mask = torch.ones_like(padded)
    mask[:, :PADDING] = 0
    found = logits(padded, mask)[:, PADDING + half :]
    return differs(found, plain[:1].expand_as(found), plain[1] - plain[0], exact)


def trial_rows(vocabulary: int) -> tuple[list[int], list[int]]:
    """Return two rows of token ids with the same second half."""
    tokens = [(7 * index + 3) % vocabulary for index in range(TOKENS)]
    half = TOKENS // 2
    return tokens, [(5 * index + 4) % vocabulary for index in range(half)] + tokens[half:]


def differs(found: Tensor, expected: Tensor, effect: Tensor, exact: bool) -> bool:
    """
    Return whether logits differ by more than rounding.

    Their difference is compared with the effect of other preceding tokens: rounding is far below that in every dtype,
    and a fault is not, however small the logits of an untrained model are.

    Args:
        found, expected (`Tensor`):
            The logits, of the same shape.
        effect (`Tensor`):
            Differences between logits after different tokens, any shape.
        exact (`bool`):
            Whether the model computes in float32 or better.
    """
    found, expected, effect = (tensor.to(widest(tensor.device)) for tensor in (found, expected, effect))
    gap, size = (found - expected).abs().max(), expected.abs().max()
    limit = (1e-3 if exact else 2e-2) * effect.abs().max() + (1e-6 if exact else 1e-2) * size
    return not bool(gap <= limit)  # also where it is not a number
