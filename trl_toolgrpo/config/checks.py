"""Checks of the options alone, when a configuration is made: they are in range, and can work together.

Checks that need the model, the tokenizer or the data are made by the trainer.
"""

import json
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias, Union, get_args, get_origin, get_type_hints

from trl import GRPOConfig

from ..errors import ConfigError
from .batch_position import micro_batches_of


Config: TypeAlias = Any
"""A [`ToolGRPOConfig`], whose module imports this one."""

CHOICES: dict[str, tuple[str, ...]] = {
    "logprob_check": ("first", "always", "off"),
    "sampler_correction": ("truncate", "mask"),
    "rollout_backend": ("transformers", "vllm"),
    "tool_mention_check": ("auto", "error", "warn", "off"),
    "force_level": ("call", "name", "schema"),
    "gae_unit": ("token", "turn"),
    "ref_sync_mode": ("auto", "adapter", "merged"),
    "health_checks": ("warn", "raise", "off"),
}
"""What the added fields of texts take."""

GPU_PATHS = ("attention", "reading", "capture", "updates", "weights")
"""What `gpu_paths` can turn on."""

ESTIMATORS = {
    "group": "trl_toolgrpo.algorithms.group:GroupRelative",
    "gae": "trl_toolgrpo.algorithms.gae:GeneralizedAdvantages",
    "group_gae": "trl_toolgrpo.algorithms.group_gae:GroupBaselineAdvantages",
}
"""The built-in values of `advantage_estimator`, each with the class that it stands for. Add one of your own here."""

# Of TRL's fields, which TRL reads when the first rollouts have been made
TRL_CHOICES = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}
_VLLM_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

_LEAST = {
    **dict.fromkeys(("max_concurrent_tools", "max_tool_output_tokens", "value_epochs"), 1),
    **dict.fromkeys(("tool_retries", "parse_error_budget", "value_loss_coef", "value_warmup_steps"), 0),
    **dict.fromkeys(("assist_warmup_steps", "forced_loss_coef", "max_tool_calling_iterations"), 0),
    "rollout_log_limit": 0,
}
_POSITIVE = (
    *("tool_timeout", "environment_timeout", "logprob_check_tolerance", "rollout_cache_gib"),
    *("value_clip", "value_learning_rate"),
)

# What acts on rollouts of this package alone: its neutral value, what TRL's rollouts lack, and what TRL has instead
_OWN_ROLLOUTS: dict[str, tuple[object, str, str]] = {
    "sampler_correction": (
        *(None, "whose ratio is not this package's"),
        " TRL's own correction is `vllm_importance_sampling_correction`.",
    ),
    "advantage_estimator": ("group", "whose advantages are TRL's", ""),
    "deterministic_rollouts": (False, "whose noise is not this package's", ""),
    "force_rate": (0, "which do not know which tokens were forced", ""),
    "assist_warmup_steps": (0, "which do not know which tokens were forced", ""),
    "rollout_backend": ("transformers", "which this package does not sample", " TRL's vLLM is `use_vllm=True`."),
    "replay": (None, "which are in no rollout log", ""),
}

# Values at which a sampling option leaves the full softmax of logits / temperature as it is
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "top_p": (None, 1, 1.0),
    "top_k": (None, 0),
    "min_p": (None, 0, 0.0),
    "typical_p": (None, 1, 1.0),
    "epsilon_cutoff": (None, 0, 0.0),
    "eta_cutoff": (None, 0, 0.0),
    "repetition_penalty": (None, 1, 1.0),
    "do_sample": (None, True),
    "num_beams": (None, 1),
}


# Of TRL's fields that are annotated as numbers: None clips no gradient and leaves the softmax as it is
_ALSO_NONE = ("max_grad_norm", "top_p", "top_k", "repetition_penalty")


@cache
def field_types(kind: type) -> dict[str, object]:
    """
    Return what each field of a dataclass is annotated with.

    Args:
        kind (`type`):
            The dataclass.
    """
    hints = get_type_hints(kind)
    return hints | {name: hints[name] | None for name in _ALSO_NONE if name in hints}


def gpu_paths_of(text: str) -> frozenset[str]:
    """
    Return the faster ways that are turned on.

    Args:
        text (`str`):
            Value of `gpu_paths`.

    Raises:
        ConfigError: for a name that is none of `GPU_PATHS`.
    """
    if text in ("none", "all"):
        return frozenset(GPU_PATHS if text == "all" else ())
    names = frozenset(name.strip() for name in text.split(","))
    if unknown := names - set(GPU_PATHS):
        raise ConfigError(
            f"You passed `gpu_paths={text!r}`, which names {', '.join(map(repr, sorted(unknown)))}.",
            remedy=f"Choose 'all', 'none', or some of {', '.join(GPU_PATHS)}, separated by commas.",
        )
    return names


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


# Of each type of a field: what it is called, and what fits; a path is as good as its text
_KINDS: dict[object, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda value: value in (0, 1)),
    int: ("a whole number", lambda value: _is_number(value) and float(value).is_integer()),
    float: ("a number", _is_number),
    dict: ("a mapping", lambda value: isinstance(value, Mapping)),
    list: ("a list", lambda value: isinstance(value, list | tuple | set)),
    str: ("text", lambda value: not isinstance(value, Mapping | list | tuple | set | None)),
    types.NoneType: ("", lambda value: value is None),
}


def wrong_type(value: object, hint: object) -> str | None:
    """
    Return what a field takes, where a value surely is of another type; `None` for one that may be right.

    Args:
        value (`object`):
            The value.
        hint (`object`):
            Annotation of the field. Of types other than numbers, truth values, text, lists and mappings nothing is
            said.
    """
    kinds = _members(hint)
    if not all(kind in _KINDS for kind in kinds) or any(_KINDS[kind][1](value) for kind in kinds):
        return None
    return " or ".join(filter(None, (_KINDS[kind][0] for kind in kinds)))


def as_whole(value: object, hint: object) -> object:
    """
    Return a value, as an `int` where it is a whole number and its field takes no other.

    Args:
        value, hint:
            As in [`wrong_type`], which has found nothing wrong.
    """
    if set(_members(hint)) - {type(None)} == {int} and isinstance(value, Real) and not isinstance(value, int):
        return int(value)  # type: ignore[call-overload]  # of NumPy's numbers too
    return value


def _members(hint: object) -> list[object]:
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [get_origin(member) or member for member in members]


def check_types(config: Config) -> None:
    """
    Check that the values of a configuration are of the types of its fields; whole numbers such as 3.0 become `int`s.

    Args:
        config ([`ToolGRPOConfig`]):
            A dataclass, such as a [`ToolGRPOConfig`] before TRL has read its fields.

    Raises:
        ConfigError: for a text where a number, a truth value or a mapping should be, and the like.
    """
    kind: type = type(config)
    for name, hint in field_types(kind).items():
        if not hasattr(config, name):
            continue
        value = getattr(config, name)
        wanted = wrong_type(value, hint)
        if value is None and name in GRPOConfig.__dataclass_fields__ and not {int, float}.intersection(_members(hint)):
            wanted = None  # as good as False, and of texts the choices say it
        if isinstance(value, str | Real) and name in _MAPPINGS and not _is_json_object(str(value)):
            wanted = "a mapping, such as {'key': value}, or its JSON text"
            if not name.endswith("_kwargs"):
                wanted = None if Path(str(value)).is_file() else f"{wanted}, or the path of a JSON file"
        if wanted is not None:
            found = "text" if isinstance(value, str) else f"of type {type(value).__name__}"
            raise ConfigError(f"You passed `{name}={value!r}`, which is {found}.", remedy=f"Pass {wanted}.")
        if (whole := as_whole(value, hint)) is not value:
            setattr(config, name, whole)


# Fields of mappings that TRL also reads from text; that of `deepspeed` may be encoded
_MAPPINGS = frozenset(GRPOConfig._VALID_DICT_FIELDS) - {"deepspeed"}


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def check_counts(config: Config) -> None:
    """
    Check the sizes of batches, which TRL divides by each other.

    Args:
        config ([`ToolGRPOConfig`]):
            A [`ToolGRPOConfig`] before TRL has read its fields.

    Raises:
        ConfigError: for one below 1.
    """
    batches = ("per_device_train_batch_size", "generation_batch_size", "steps_per_generation", "num_iterations")
    _check_least(config, dict.fromkeys((*batches, "gradient_accumulation_steps"), 1))


def _check_least(config: Config, least: Mapping[str, int]) -> None:
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and not value >= bound:
            raise ConfigError(f"You passed `{name}={value!r}`; it must be at least {bound}.")


def check_fields(config: Config, defaults: dict[str, object]) -> None:
    """
    Check the added fields, alone and against TRL's.

    Args:
        config ([`ToolGRPOConfig`]):
            The configuration.
        defaults (`dict[str, object]`):
            Default of each of its fields.

    Raises:
        ConfigError: for a combination that cannot work.
    """
    _check_ranges(config)
    if not config.record_sample_logprobs:
        # Assisted steps are refused by the trainer, as a configuration may have them for another run
        names = [name for name in _OWN_ROLLOUTS if name != "assist_warmup_steps"]
        refuse_unrecorded(config, "`record_sample_logprobs=False`", names)
    _check_correction(config, defaults)
    _check_saving(config)
    _check_forcing(config)
    _check_critic(config, defaults)
    _check_reference(config)
    _check_vllm(config)
    if config.record_sample_logprobs:
        _check_recording(config)


def _check_ranges(config: Config) -> None:
    """Check each field by itself."""
    for name, choices in (CHOICES | TRL_CHOICES | {"vllm_mode": ("colocate", "server")}).items():
        if name != "sampler_correction" or config.sampler_correction is not None:
            _check_choice(config, name, choices)
    given = config.advantage_estimator
    if isinstance(given, str) and given not in ESTIMATORS and not re.fullmatch(r"[\w.]+:\w+", given):
        raise ConfigError(
            f"You passed `advantage_estimator={given!r}`.",
            remedy=f"Choose one of {', '.join(ESTIMATORS)}, or name a class of your own as `package.module:Name`.",
        )
    gpu_paths_of(config.gpu_paths)
    _check_least(config, _LEAST)
    for name in _POSITIVE:
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"You passed `{name}={value!r}`; it must be a positive number or None.")
    for name in ("force_rate", "gae_gamma", "gae_lambda"):
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"You passed `{name}={getattr(config, name)}`; it must be between 0 and 1.")


def refuse_unrecorded(config: Config, whose: str, names: Iterable[str] = tuple(_OWN_ROLLOUTS)) -> None:
    """
    Check that nothing is asked for that acts on recorded rollouts alone, where rollouts are TRL's own.

    Args:
        config ([`ToolGRPOConfig`]):
            The configuration.
        whose (`str`):
            What makes them TRL's own, for the message.
        names (`Iterable[str]`, *optional*):
            The options to look at, by default all that act on recorded rollouts.

    Raises:
        ConfigError: naming the option.
    """
    for name in names:
        value, (neutral, lack, instead) = getattr(config, name), _OWN_ROLLOUTS[name]
        # `use_vllm`, which is TRL's own option, sets the backend
        is_derived = name == "rollout_backend" and config.use_vllm and config.record_sample_logprobs
        if value != neutral and not is_derived:
            shown = value if isinstance(value, (str, int, float)) else type(value).__name__
            raise ConfigError(
                f"You passed `{name}={shown!r}` with rollouts of TRL's own ({whose}), {lack}.",
                remedy=f"Leave one of them out.{instead}",
            )


def _check_choice(config: Config, name: str, choices: tuple[str, ...]) -> None:
    if (value := getattr(config, name)) not in choices:
        raise ConfigError(f"You passed `{name}={value!r}`.", remedy=f"Choose one of {', '.join(choices)}.")


def _check_correction(config: Config, defaults: dict[str, object]) -> None:
    """Check that a cap of the ratio has a correction that it belongs to."""
    mode, cap = config.sampler_correction, config.sampler_correction_cap
    if not (math.isfinite(cap) and cap > 1):
        raise ConfigError(f"You passed `sampler_correction_cap={cap}`; it is the largest ratio, a number above 1.")
    if mode is None and cap != defaults["sampler_correction_cap"]:
        raise ConfigError(
            f"You passed `sampler_correction_cap={cap}` while `sampler_correction=None`: nothing is capped.",
            remedy="Set `sampler_correction` to 'truncate' or 'mask', or leave the cap out.",
        )


def _check_vllm(config: Config) -> None:
    """Check that vLLM can do what it is asked for; `use_vllm` means the backend, except for rollouts of TRL's own."""
    if config.use_vllm and config.record_sample_logprobs:
        config.rollout_backend = "vllm"
    if config.rollout_backend != "vllm":
        return
    if config.vllm_structured_outputs_regex is not None:
        raise ConfigError(
            "You passed `vllm_structured_outputs_regex` while `record_sample_logprobs=True`. Tokens under a "
            "constraint are not drawn from the distribution the trainer scores.",
            remedy="Leave it out, or set `record_sample_logprobs=False` for TRL's own path.",
        )
    if config.cast_lm_head_to_fp32:
        raise ConfigError(
            "You passed `cast_lm_head_to_fp32=True` with vLLM, which computes logits in the policy's own dtype, so "
            "that the two sides of every ratio would differ by more than with neither head in float32.",
            remedy="Leave it at False, or set `rollout_backend='transformers'`.",
        )
    if config.force_rate > 0 and config.force_level == "schema":
        raise ConfigError(
            "You passed `force_level='schema'` with vLLM, which samples without this package's constraints.",
            remedy="Use `force_level='call'` or 'name', or `rollout_backend='transformers'`.",
        )
    if config.deterministic_rollouts:
        raise ConfigError(
            "You passed `deterministic_rollouts=True` with vLLM, whose noise is not this package's.",
            remedy="Leave one of them out.",
        )
    if config.sampler_correction is None and config.vllm_importance_sampling_correction:
        _check_choice(config, "vllm_importance_sampling_mode", _VLLM_CORRECTIONS)
        if config.loss_type == "vespo" and config.vllm_importance_sampling_mode.startswith("sequence"):
            raise ConfigError(
                "You passed `loss_type='vespo'` with vLLM and "
                f"`vllm_importance_sampling_mode={config.vllm_importance_sampling_mode!r}`. VESPO weighs a sequence "
                "by the ratios of its tokens, so that each must be bounded by itself.",
                remedy="Set `vllm_importance_sampling_mode` to 'token_truncate' or 'token_mask', or "
                "`vllm_importance_sampling_correction=False`.",
            )


_SERVER = ("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout")
_ENGINE = {  # what `python -m trl_toolgrpo.serve` is told instead
    "vllm_gpu_memory_utilization": "--gpu-memory-utilization",
    "vllm_tensor_parallel_size": "--tensor-parallel-size",
    "vllm_max_model_length": "--max-model-len",
    "vllm_model_impl": "--engine-args",
    "vllm_enable_sleep_mode": "--engine-args",
}


def idle_fields(config: Config, defaults: dict[str, object]) -> dict[str, str]:
    """
    Return the fields of TRL's that were set and have no effect on a recorded run, each with the reason.

    What would make other rollouts or other updates than TRL's is refused by [`check_fields`]; these fields only say
    how a part of TRL's that is not in use does its work.

    Args:
        config ([`ToolGRPOConfig`]):
            The configuration.
        defaults (`dict[str, object]`):
            Default of each of its fields.
    """
    own_cache = "the sampler keeps keys and values in a cache of its own, which `rollout_cache_gib` bounds"
    idle = {
        "cache_implementation": own_cache,
        "use_transformers_continuous_batching": "the sampler batches by itself",
        "use_transformers_paged": "the sampler batches by itself",
        "transformers_continuous_batching_config": "the sampler batches by itself",
        "vllm_group_port": "the policy is sent to a server through its own port, without a process group",
    }
    if isinstance(config.generation_kwargs, dict) and config.generation_kwargs.get("cache_implementation") is not None:
        idle["generation_kwargs: cache_implementation"] = own_cache
    if config.advantage_estimator == "gae":
        whitened = "advantages of `advantage_estimator='gae'` are estimated from rewards and whitened"
        idle |= {"scale_rewards": whitened, "multi_objective_aggregation": whitened}
    of_vllm = [name for name in defaults if name.startswith("vllm_")]
    corrections = [name for name in of_vllm if name.startswith("vllm_importance_sampling_")]
    if config.rollout_backend != "vllm":
        idle |= dict.fromkeys(of_vllm, "rollouts are not sampled with vLLM, which `use_vllm=True` asks for")
    else:
        if config.vllm_mode == "server":
            idle |= {name: f"the engine is the server's, which takes `{flag}`" for name, flag in _ENGINE.items()}
            if config.vllm_server_base_url is not None:
                idle |= dict.fromkeys(_SERVER[1:3], "`vllm_server_base_url` says where the server is")
        else:
            idle |= dict.fromkeys(_SERVER, "there is no server with `vllm_mode='colocate'`")
        if config.sampler_correction is not None:
            idle |= dict.fromkeys(corrections, "`sampler_correction` takes its place")
        elif not config.vllm_importance_sampling_correction:
            corrections.remove("vllm_importance_sampling_correction")
            idle |= dict.fromkeys(corrections, "`vllm_importance_sampling_correction=False` turns it off")
    # TRL writes False as "none" and True as "group" at construction
    neutral = {**defaults, "scale_rewards": "group"}
    return {name: why for name, why in idle.items() if name not in neutral or getattr(config, name) != neutral[name]}


def _check_saving(config: Config) -> None:
    """Check that checkpoints are written once, between two optimizer steps."""
    if config.save_on_each_node:
        raise ConfigError(
            "You passed `save_on_each_node=True`. Every process adds its part to one checkpoint, which machines that "
            "each write their own would take apart.",
            remedy="Leave it out, and pass an `output_dir` that all machines share.",
        )
    if config.enable_jit_checkpoint:
        raise ConfigError(
            "You passed `enable_jit_checkpoint=True`, which saves in the middle of an optimizer step: a run that "
            "resumed from there would lose a rollout batch.",
            remedy="Leave it out, and lower `save_steps`.",
        )


def _check_forcing(config: Config) -> None:
    """Check that the assisted steps end within training, and where a rollout batch ends."""
    steps = config.assist_warmup_steps
    if 0 < config.max_steps < steps:
        raise ConfigError(
            f"You passed `assist_warmup_steps={steps}` while `max_steps={config.max_steps}`: the warm-up would be "
            "longer than training.",
            remedy="Lower it, or train longer.",
        )
    generate_every = micro_batches_of(config)
    if steps * config.gradient_accumulation_steps % generate_every:
        per_batch = generate_every // math.gcd(generate_every, config.gradient_accumulation_steps)
        raise ConfigError(
            f"You passed `assist_warmup_steps={steps}`, but a rollout batch feeds {per_batch} optimizer steps, and "
            "one batch cannot be half assisted.",
            remedy=f"Use a multiple of {per_batch}.",
        )


def _check_critic(config: Config, defaults: dict[str, object]) -> None:
    """Check that the policy is trained too, and that the fields of the critic are set only where there is one."""
    if 0 < config.max_steps < config.assist_warmup_steps + config.value_warmup_steps:
        raise ConfigError(
            f"You passed `value_warmup_steps={config.value_warmup_steps}` after "
            f"`assist_warmup_steps={config.assist_warmup_steps}`, more than `max_steps={config.max_steps}`: the "
            "policy would never be trained.",
            remedy="Lower them, or train longer.",
        )
    estimator = config.advantage_estimator
    if estimator == "group":
        idle = [name for name in defaults if name.startswith(("gae_", "value_"))]
        idle = [name for name in idle if getattr(config, name) != defaults[name]]
        if idle:
            raise ConfigError(
                f"You passed {', '.join(f'`{name}={getattr(config, name)}`' for name in idle)} while "
                "`advantage_estimator='group'`, which has no value head for it to act on.",
                remedy="Leave it out, or set `advantage_estimator='gae'` or `'group_gae'`.",
            )
    elif config.loss_type == "vespo" and estimator in ("gae", "group_gae"):
        raise ConfigError(
            f"You passed `loss_type='vespo'` with `advantage_estimator={estimator!r}`. VESPO weighs a whole sequence "
            "by one advantage.",
            remedy="Use another `loss_type`, or `advantage_estimator='group'`.",
        )


def _check_reference(config: Config) -> None:
    """Check that there is a reference to sync, and that it moves."""
    if not config.sync_ref_model:
        return
    alpha, steps = config.ref_model_mixup_alpha, config.ref_model_sync_steps
    if config.beta == 0:
        raise ConfigError(
            "You passed `sync_ref_model=True` while `beta=0`: without a KL term there is no reference model to sync.",
            remedy="Set `beta` above 0, or `sync_ref_model=False`.",
        )
    if not 0 < alpha <= 1:
        raise ConfigError(
            f"You passed `ref_model_mixup_alpha={alpha}`. It is the weight of the policy in the new reference, above "
            f"0 (which would never move it) and at most 1 (which copies the policy)."
        )
    if steps < 1:
        raise ConfigError(f"You passed `ref_model_sync_steps={steps}`; it must be at least 1 optimizer step.")
    if config.ref_sync_mode == "adapter" and alpha < 1:
        raise ConfigError(
            f"You passed `ref_sync_mode='adapter'` while `ref_model_mixup_alpha={alpha}`. An average of two "
            "adapters' factors is not the average of their weights.",
            remedy="Use `ref_sync_mode='merged'` or 'auto', or set `ref_model_mixup_alpha` to 1.",
        )


def _check_recording(config: Config) -> None:
    """Check that nothing reshapes the full softmax of logits / temperature, which log-probs are recorded of."""
    if not (config.max_completion_length or 0) >= 1:
        raise ConfigError(
            f"You passed `max_completion_length={config.max_completion_length}` while `record_sample_logprobs=True`. "
            "The recording sampler needs a budget of at least 1 token.",
            remedy="Set a number.",
        )
    if config.neftune_noise_alpha:
        raise ConfigError(
            f"You passed `neftune_noise_alpha={config.neftune_noise_alpha}` while `record_sample_logprobs=True`. The "
            "noise it adds to embeddings in training is not there when tokens are sampled, so every ratio is off.",
            remedy="Leave it out, or set `record_sample_logprobs=False` for TRL's own path.",
        )
    if not config.temperature > 0:
        raise ConfigError(
            f"You passed `temperature={config.temperature}` while `record_sample_logprobs=True`. Tokens are sampled "
            f"and scored under the softmax of logits / temperature, which needs a temperature above 0."
        )
    options = {name: getattr(config, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
    extra = config.generation_kwargs if isinstance(config.generation_kwargs, dict) else {}
    for label, value in (options | {f"generation_kwargs: {name}": value for name, value in extra.items()}).items():
        name = label.removeprefix("generation_kwargs: ")
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            raise ConfigError(
                f"You passed `{label}={value}` while `record_sample_logprobs=True`. The trainer scores the full "
                "softmax of logits / temperature, so a sampler that truncates or reshapes it biases every ratio by "
                "the mass it cuts off.",
                remedy=f"Leave `{name}` at its neutral value ({_NEUTRAL[name][-1]}), or set "
                "`record_sample_logprobs=False` for TRL's own path.",
            )
        if name == "temperature" and value != config.temperature:
            raise ConfigError(
                f"You passed `{label}={value}` while `temperature={config.temperature}`. Tokens have to be sampled "
                "at the temperature they are scored at.",
                remedy="Set `temperature` alone.",
            )
        if name not in (*_NEUTRAL, "temperature", "cache_implementation"):
            raise ConfigError(
                f"You passed `{label}={value}` while `record_sample_logprobs=True`. The recording sampler does not "
                "read it.",
                remedy="Remove it, or set `record_sample_logprobs=False` for TRL's own path.",
            )
