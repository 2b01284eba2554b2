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
ADVANTAGE_ESTIMATORS = ("group", "gae", "group_gae")
GAE_UNITS = ("token", "turn")
FORCE_LEVELS = ("call", "name", "schema")
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
        force_rate (`float`, *optional*, defaults to `0.0`):
            Share of assistant turns that are made to begin with a tool call, where forcing is allowed at all.
        force_level (`str`, *optional*, defaults to `"call"`):
            What is forced: `"call"`, the template's call-opening marker alone; `"name"`, everything through a tool's
            name; `"schema"`, a whole turn of one call, its arguments constrained to the tool's JSON schema (needs the
            extra `schema`).
        assist_warmup_steps (`int`, *optional*, defaults to `0`):
            The first optimizer steps are assisted: forcing is on, the loss is supervised on the calls of the better
            rollouts, and there is no policy gradient. A multiple of the optimizer steps per rollout batch.
        disable_forcing_in_updates (`bool`, *optional*, defaults to `True`):
            No rollout that feeds a policy-gradient update is ever forced. `False` admits forced rollouts with their
            forced tokens masked.
        forced_loss_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the supervised loss in assisted steps.
        advantage_estimator (`str`, *optional*, defaults to `"group"`):
            Where advantages come from: `"group"`, GRPO's, one for a whole rollout; `"gae"`, generalized advantage
            estimation with a value head (arXiv 1506.02438), whitened over the generation batch; `"group_gae"`, the
            group advantage as terminal reward and the value head as a token-level baseline for it.
        gae_gamma (`float`, *optional*, defaults to `1.0`):
            Discount from step to step, in [0, 1].
        gae_lambda (`float`, *optional*, defaults to `0.95`):
            Weight of longer returns, in [0, 1].
        gae_unit (`str`, *optional*, defaults to `"token"`):
            What a step is: a sampled `"token"`, or all the sampled tokens of a `"turn"`.
        value_loss_coef (`float`, *optional*, defaults to `0.5`):
            Weight of the value loss.
        value_clip (`float`, *optional*, defaults to `0.2`):
            How far a value may move from the recorded one before its loss is clipped; `None` for no limit.
        value_learning_rate (`float`, *optional*):
            Learning rate of the value head; `None` is 1e-3, since the head starts from nothing.
        value_warmup_steps (`int`, *optional*, defaults to `0`):
            The first optimizer steps of reinforcement learning train the value head alone.
        value_detach (`bool`, *optional*, defaults to `True`):
            Keep the gradient of the value loss out of the policy's trunk.

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

    force_rate: float = field(
        default=0.0,
        metadata={"help": "Share of assistant turns that begin with a forced tool call, where forcing is allowed."},
    )
    force_level: str = field(
        default="call",
        metadata={
            "help": "What is forced: the call-opening marker alone, everything through a tool's name, or a whole "
            "call constrained to the tool's JSON schema.",
            "choices": list(FORCE_LEVELS),
        },
    )
    assist_warmup_steps: int = field(
        default=0,
        metadata={
            "help": "The first optimizer steps are assisted: forcing on, supervised loss on rewarded calls, no policy "
            "gradient. A multiple of the optimizer steps per rollout batch."
        },
    )
    disable_forcing_in_updates: bool = field(
        default=True,
        metadata={"help": "No rollout that feeds a policy-gradient update is ever forced."},
    )
    forced_loss_coef: float = field(
        default=1.0, metadata={"help": "Weight of the supervised loss in assisted steps."}
    )

    advantage_estimator: str = field(
        default="group",
        metadata={
            "help": "Where advantages come from: group (GRPO), gae (value head), or group_gae (group advantage, value "
            "head as token-level baseline).",
            "choices": list(ADVANTAGE_ESTIMATORS),
        },
    )
    gae_gamma: float = field(default=1.0, metadata={"help": "Discount from step to step, in [0, 1]."})
    gae_lambda: float = field(default=0.95, metadata={"help": "Weight of longer returns, in [0, 1]."})
    gae_unit: str = field(
        default="token",
        metadata={"help": "What a step of GAE is: a sampled token or a turn.", "choices": list(GAE_UNITS)},
    )
    value_loss_coef: float = field(default=0.5, metadata={"help": "Weight of the value loss."})
    value_clip: float | None = field(
        default=0.2,
        metadata={"help": "How far a value may move from the recorded one before its loss is clipped."},
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the value head. None is 1e-3."}
    )
    value_warmup_steps: int = field(
        default=0,
        metadata={"help": "The first optimizer steps of reinforcement learning train the value head alone."},
    )
    value_detach: bool = field(
        default=True, metadata={"help": "Keep the gradient of the value loss out of the policy's trunk."}
    )

    def __post_init__(self) -> None:
        if (self.num_generations or 0) < 2:
            raise ConfigError(
                f"You passed `num_generations={self.num_generations}`. GRPO compares the rollouts of a prompt with "
                f"each other and requires at least 2 generations. Set `num_generations` to 2 or more."
            )
        super().__post_init__()
        check_fields(self)

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
        if type(args) is GRPOConfig:
            config.__class__ = cls
        check_fields(config)  # type: ignore[arg-type]
        return config  # type: ignore[return-value]


def check_fields(config: ToolGRPOConfig) -> None:
    """Check the added fields, alone and against TRL's; raises [`ConfigError`]."""
    _check_choice(config, "logprob_check", LOGPROB_CHECKS)
    _check_choice(config, "rollout_backend", ROLLOUT_BACKENDS)
    for name, least in (
        ("max_concurrent_tools", 1),
        ("tool_retries", 0),
        ("max_tool_output_tokens", 1),
        ("parse_error_budget", 0),
    ):
        if not isinstance(getattr(config, name), int) or getattr(config, name) < least:
            raise ConfigError(f"You passed `{name}={getattr(config, name)!r}`; it must be at least {least}.")
    iterations = config.max_tool_calling_iterations
    if iterations is not None and iterations < 0:
        raise ConfigError(
            f"You passed `max_tool_calling_iterations={iterations}`; it is the number of turns whose calls are "
            f"answered. Pass 0 or more, or None for no limit."
        )
    for name in ("tool_timeout", "logprob_check_tolerance"):
        value = getattr(config, name)
        if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise ConfigError(f"You passed `{name}={value!r}`; it must be a positive number or None.")
    _check_forcing(config)
    _check_critic(config)
    if config.rollout_backend == "vllm":
        raise ConfigError(
            "You passed `rollout_backend='vllm'`, which this version does not have yet. Use "
            "`rollout_backend='transformers'`, or TRL's own rollouts with `use_vllm=True`."
        )
    if config.record_sample_logprobs and not config.use_vllm:  # with vLLM the rollouts are TRL's own
        _check_recording(config)


def _check_choice(config: ToolGRPOConfig, name: str, choices: tuple[str, ...]) -> None:
    if getattr(config, name) not in choices:
        raise ConfigError(f"You passed `{name}={getattr(config, name)!r}`. Choose one of {', '.join(choices)}.")


def _check_forcing(config: ToolGRPOConfig) -> None:
    """Forcing is a share, and the assisted steps end where a rollout batch ends."""
    _check_choice(config, "force_level", FORCE_LEVELS)
    if not 0 <= config.force_rate <= 1:
        raise ConfigError(f"You passed `force_rate={config.force_rate}`; it is a share of turns, between 0 and 1.")
    if config.force_rate > 0 and not config.record_sample_logprobs:
        raise ConfigError(
            "You passed `force_rate` above 0 while `record_sample_logprobs=False`. Only rollouts of this package know "
            "which tokens were forced. Set `record_sample_logprobs=True` or `force_rate=0`."
        )
    steps = config.assist_warmup_steps
    if steps < 0 or config.forced_loss_coef < 0:
        raise ConfigError(
            f"You passed `assist_warmup_steps={steps}` and `forced_loss_coef={config.forced_loss_coef}`; neither can "
            f"be negative."
        )
    if 0 < config.max_steps < steps:
        raise ConfigError(
            f"You passed `assist_warmup_steps={steps}` while `max_steps={config.max_steps}`: the warm-up would be "
            f"longer than training. Lower it, or train longer."
        )
    generate_every = (config.steps_per_generation or 1) * config.num_iterations
    if steps * config.gradient_accumulation_steps % generate_every:
        per_batch = generate_every // math.gcd(generate_every, config.gradient_accumulation_steps)
        raise ConfigError(
            f"You passed `assist_warmup_steps={steps}`, but a rollout batch feeds {per_batch} optimizer steps, and "
            f"one batch cannot be half assisted. Use a multiple of {per_batch}."
        )


def _check_critic(config: ToolGRPOConfig) -> None:
    """The fields of the critic are in range, and set only where there is a critic."""
    _check_choice(config, "advantage_estimator", ADVANTAGE_ESTIMATORS)
    _check_choice(config, "gae_unit", GAE_UNITS)
    for name in ("gae_gamma", "gae_lambda"):
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"You passed `{name}={getattr(config, name)}`; it must be between 0 and 1.")
    for name, least in (("value_loss_coef", 0), ("value_warmup_steps", 0)):
        if not getattr(config, name) >= least:
            raise ConfigError(f"You passed `{name}={getattr(config, name)}`; it cannot be negative.")
    for name in ("value_clip", "value_learning_rate"):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"You passed `{name}={value}`; it must be a positive number or None.")
    if 0 < config.max_steps < config.assist_warmup_steps + config.value_warmup_steps:
        raise ConfigError(
            f"You passed `value_warmup_steps={config.value_warmup_steps}` behind `assist_warmup_steps="
            f"{config.assist_warmup_steps}`, more than `max_steps={config.max_steps}`: the policy would never be "
            f"trained. Lower them, or train longer."
        )
    _check_estimator(config)


def _check_estimator(config: ToolGRPOConfig) -> None:
    estimator = config.advantage_estimator
    if estimator == "group":
        idle = [f.name for f in fields(ToolGRPOConfig) if f.name.startswith(("gae_", "value_"))]
        idle = [name for name in idle if getattr(config, name) != ToolGRPOConfig.__dataclass_fields__[name].default]
        if idle:
            raise ConfigError(
                f"You passed {', '.join(f'`{name}={getattr(config, name)}`' for name in idle)} while "
                f"`advantage_estimator='group'`, which has no value head for it to act on. Leave it out, or set "
                f"`advantage_estimator='gae'` or `'group_gae'`."
            )
    elif not config.record_sample_logprobs or config.use_vllm:
        raise ConfigError(
            f"You passed `advantage_estimator={estimator!r}` with rollouts of TRL's own (`use_vllm` or "
            f"`record_sample_logprobs=False`), but values are recorded in this package's own. Leave those out, or use "
            f"`advantage_estimator='group'`."
        )
    elif config.loss_type == "vespo":
        raise ConfigError(
            f"You passed `loss_type='vespo'` with `advantage_estimator={estimator!r}`. VESPO weighs a whole sequence "
            f"by one advantage. Use another `loss_type`, or `advantage_estimator='group'`."
        )


def _check_recording(config: ToolGRPOConfig) -> None:
    """Recorded log-probs are those of the full softmax of logits / temperature: nothing may reshape it."""
    if not (config.max_completion_length or 0) >= 1:
        raise ConfigError(
            f"You passed `max_completion_length={config.max_completion_length}` while `record_sample_logprobs=True`. "
            f"The recording sampler needs a budget of at least 1 token. Set a number."
        )
    if not config.temperature > 0:
        raise ConfigError(
            f"You passed `temperature={config.temperature}` while `record_sample_logprobs=True`. Tokens are sampled "
            f"and scored under the softmax of logits / temperature, which needs a temperature above 0."
        )
    extra = config.generation_kwargs if isinstance(config.generation_kwargs, dict) else {}
    options = {name: getattr(config, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
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
        if name == "temperature" and value != config.temperature:
            raise ConfigError(
                f"You passed `generation_kwargs: temperature={value}` while `temperature={config.temperature}`. "
                f"Tokens have to be sampled at the temperature they are scored at. Set `temperature` alone."
            )
        if name not in _NEUTRAL and name not in ("temperature", "cache_implementation"):
            raise ConfigError(
                f"You passed `generation_kwargs: {name}={value}` while `record_sample_logprobs=True`. The "
                f"recording sampler does not read it. Remove it, or set `record_sample_logprobs=False` for TRL's "
                f"own path."
            )
