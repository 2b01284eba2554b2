"""`ToolGRPOConfig`: TRL's `GRPOConfig` and the fields that recording, the tool runtime and the checks add to it.

Owns every option and every check that needs options alone. Fed by recipes and scripts; read by all stages.
"""

import copy
import math
from dataclasses import dataclass, field, fields
from typing import Any

from trl import GRPOConfig

from .errors import ConfigError


ROLLOUT_BACKENDS = ("transformers", "vllm")
LOGPROB_CHECKS = ("first", "always", "off")

# Values at which a sampling option leaves the full softmax of logits / temperature as it is
_NEUTRAL: dict[str, tuple[Any, ...]] = {
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


@dataclass
class ToolGRPOConfig(GRPOConfig):
    r"""
    Configuration of [`ToolGRPOTrainer`]: everything in TRL's [`~trl.GRPOConfig`], and the fields below.

    Args:
        record_sample_logprobs (`bool`, *optional*, defaults to `True`):
            Use the log-prob recorded when a token was sampled as the "old" log-prob of the ratio. `False` is TRL's own
            path, unchanged.
        strict_trajectories (`bool`, *optional*, defaults to `True`):
            Raise [`TrajectoryError`] for a rollout with a missing, short, non-finite or misnamed field. `False` masks
            such a rollout out of the update and counts it in `rollout/invalid`.
        logprob_check (`str`, *optional*, defaults to `"first"`):
            When to recompute recorded log-probs with the trainer and compare them token by token: for the `"first"`
            rollout batch, `"always"` or `"off"`.
        logprob_check_tolerance (`float`, *optional*):
            Largest difference in nats. `None` picks by the compute dtype: 1e-3 in float32; 0.15 at most and 0.02 on
            average in bfloat16 and float16.
        rollout_backend (`str`, *optional*, defaults to `"transformers"`):
            What samples. Only `"transformers"`, on the training model, is built in for now.
        max_concurrent_tools (`int`, *optional*, defaults to `64`):
            Most tool calls in flight over the whole batch.
        tool_timeout (`float`, *optional*, defaults to `30.0`):
            Time limit of one tool call in seconds; `None` for no limit.
        tool_retries (`int`, *optional*, defaults to `0`):
            Further tries of a call whose error is marked transient.
        max_tool_output_tokens (`int`, *optional*, defaults to `512`):
            Tokens after which a tool result is cut, with a visible marker.
        parse_error_budget (`int`, *optional*, defaults to `1`):
            Malformed calls answered with a corrective tool message before the rollout stops.

    Raises:
        ConfigError: for a combination that cannot work.
    """

    record_sample_logprobs: bool = field(
        default=True,
        metadata={
            "help": "Use the log-prob recorded when a token was sampled as the old log-prob of the ratio; never "
            "recompute it. False is TRL's own path, unchanged."
        },
    )
    strict_trajectories: bool = field(
        default=True,
        metadata={
            "help": "Raise TrajectoryError for a rollout with a missing, short, non-finite or misnamed field. False "
            "masks such a rollout out of the update and counts it."
        },
    )
    logprob_check: str = field(
        default="first",
        metadata={
            "help": "When to recompute recorded log-probs with the trainer and compare them per token: for the first "
            "rollout batch, always or never.",
            "choices": list(LOGPROB_CHECKS),
        },
    )
    logprob_check_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Largest difference in nats between a recorded and a recomputed log-prob. None picks by the "
            "compute dtype: float32 1e-3; bfloat16 0.15 at most and 0.02 on average."
        },
    )
    rollout_backend: str = field(
        default="transformers",
        metadata={"help": "What samples the rollouts.", "choices": list(ROLLOUT_BACKENDS)},
    )
    max_concurrent_tools: int = field(
        default=64, metadata={"help": "Most tool calls in flight over the whole rollout batch."}
    )
    tool_timeout: float | None = field(
        default=30.0, metadata={"help": "Time limit of one tool call in seconds. None for no limit."}
    )
    tool_retries: int = field(
        default=0, metadata={"help": "Further tries of a tool call whose error is marked transient."}
    )
    max_tool_output_tokens: int = field(
        default=512, metadata={"help": "Tokens after which a tool result is cut, with a visible marker."}
    )
    parse_error_budget: int = field(
        default=1,
        metadata={"help": "Malformed calls answered with a corrective tool message before the rollout stops."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()

    @classmethod
    def from_grpo_config(cls, args: GRPOConfig) -> "ToolGRPOConfig":
        """
        Take over TRL's configuration as it stands; the added fields get their defaults.

        Args:
            args (`GRPOConfig`):
                Configuration of a script written for TRL's `GRPOTrainer`.
        """
        if isinstance(args, ToolGRPOConfig):
            return args
        # A copy and not a new object: TRL derives fields in `__post_init__` that cannot be passed in again
        config = copy.copy(args)
        own = {f.name for f in fields(GRPOConfig)}
        for f in fields(cls):
            if f.name not in own:
                setattr(config, f.name, f.default)
        config.__class__ = type(cls.__name__, (cls, type(args)), {}) if type(args) is not GRPOConfig else cls
        config.check()  # type: ignore[attr-defined]
        return config  # type: ignore[return-value]

    def check(self) -> None:
        """Check the added fields, alone and against TRL's; raises [`ConfigError`]."""
        self._check_choice("logprob_check", LOGPROB_CHECKS)
        self._check_choice("rollout_backend", ROLLOUT_BACKENDS)
        for name, least in (
            ("max_concurrent_tools", 1),
            ("tool_retries", 0),
            ("max_tool_output_tokens", 1),
            ("parse_error_budget", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"You passed `{name}={getattr(self, name)}`; it must be at least {least}.")
        for name in ("tool_timeout", "logprob_check_tolerance"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"You passed `{name}={value}`; it must be a positive number or None.")
        if self.rollout_backend == "vllm":
            raise ConfigError(
                "You passed `rollout_backend='vllm'`, which this version does not have yet. Use "
                "`rollout_backend='transformers'`, or TRL's own rollouts with `use_vllm=True`."
            )
        if self.record_sample_logprobs:
            self._check_recording()

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ConfigError(f"You passed `{name}={getattr(self, name)!r}`. Choose one of {', '.join(choices)}.")

    def _check_recording(self) -> None:
        """Recorded log-probs are those of the full softmax of logits / temperature: nothing may reshape it."""
        if not self.temperature > 0:
            raise ConfigError(
                f"You passed `temperature={self.temperature}` while `record_sample_logprobs=True`. Tokens are sampled "
                f"and scored under the softmax of logits / temperature, which needs a temperature above 0."
            )
        extra = self.generation_kwargs or {}
        if self.use_vllm:  # TRL's own rollouts: vLLM truncates by its own options
            extra = {}
        options = {name: getattr(self, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
        for source, given in (("", options), ("generation_kwargs: ", extra)):
            for name, value in given.items():
                if name in _NEUTRAL and value not in _NEUTRAL[name]:
                    raise ConfigError(
                        f"You passed `{source}{name}={value}` while `record_sample_logprobs=True`. The trainer scores "
                        f"the full softmax of logits / temperature, so a sampler that truncates or reshapes it biases "
                        f"every ratio by the mass it cuts off. Leave `{name}` at its neutral value "
                        f"({_NEUTRAL[name][-1]}), or set `record_sample_logprobs=False` for TRL's own path."
                    )
        for name, value in extra.items():
            if name == "temperature" and value != self.temperature:
                raise ConfigError(
                    f"You passed `generation_kwargs: temperature={value}` while `temperature={self.temperature}`. "
                    f"Tokens have to be sampled at the temperature they are scored at. Set `temperature` alone."
                )
            if name not in _NEUTRAL and name not in ("temperature", "cache_implementation"):
                raise ConfigError(
                    f"You passed `generation_kwargs: {name}={value}` while `record_sample_logprobs=True`. The recording "
                    f"sampler does not read it. Remove it, or set `record_sample_logprobs=False` for TRL's own path."
                )
