"""`ToolGRPOConfig`: TRL's `GRPOConfig` and the fields that recording, the tool runtime and the checks add to it.

Each option is checked when the configuration is made, by `checks.py`.
"""

import copy
import inspect
import json
import re
from dataclasses import MISSING, dataclass, fields
from types import MappingProxyType

from transformers.trainer_pt_utils import AcceleratorConfig
from trl import GRPOConfig

from ..errors import ConfigError
from ..redaction import masked
from ..types import JSONObject
from .checks import CHOICES, check_counts, check_fields, check_types


@dataclass
class ToolGRPOConfig(GRPOConfig):
    r"""
    Configuration of [`ToolGRPOTrainer`]: everything in TRL's [`~trl.GRPOConfig`], and the fields below.

    Args:
        record_sample_logprobs (`bool`, *optional*, defaults to `True`):
            Use the log-prob recorded when a token was sampled as the "old" log-prob of the ratio. `False` is TRL's own
            path, unchanged.
        strict_trajectories (`bool`, *optional*, defaults to `True`):
            Raise [`TrajectoryError`] for a rollout with a missing, short, non-finite or misnamed field, whether it was
            sampled here, by a sampler of your own or a `rollout_func`, or is read from a rollout log (`replay`).
            `False` masks such a rollout out of the update and counts it in `rollout/invalid`. `Trajectory.from_dict`
            and `read_rollouts` take the same as `strict`.
        logprob_check (`str`, *optional*, defaults to `"first"`):
            When to recompute recorded log-probs with the trainer and compare them token by token: for the `"first"`
            rollout batch, `"always"` or `"off"`.
        logprob_check_tolerance (`float`, *optional*):
            Largest difference in nats. `None` judges by what rounding can do: 1e-3 in float32 and float64; in bfloat16
            and float16 by what the policy's own log-probs differ by between two correct passes, which is measured
            in the first rollout batch: up to twice its mean and its quantiles, over all tokens and over those
            that begin a turn after tool results. `cast_lm_head_to_fp32=True` about halves it.
        sampler_correction (`str`, *optional*):
            What is done with tokens whose ratio, of the policy's probability to the sampler's, is above
            `sampler_correction_cap`: `"truncate"` holds the ratio there, `"mask"` leaves the token out of the policy
            loss. It is the one ratio of the loss, by its detached value; there is no second factor. `None` leaves
            the ratio as it is with `rollout_backend="transformers"`, and with `"vllm"` lets TRL's
            `vllm_importance_sampling_*` act, by their defaults too (`"sequence_mask"` above 3): before the first
            optimizer step on a rollout batch exactly as in TRL, afterwards as bounds of the one ratio.
        sampler_correction_cap (`float`, *optional*, defaults to `2.0`):
            Largest ratio `sampler_correction` lets through, above 1.
        shared_prompt_updates (`bool`, *optional*, defaults to `True`):
            Score the prompt of a group once for all its rollouts in a micro-batch, where the model's attention allows
            it, and put the rows of a group into one micro-batch, as far as TRL's shuffle gives them to one optimizer
            step. Loss and gradients of every step are the same up to rounding. TRL's division stays where the loss
            depends on it (`loss_type="bnpo"`, `top_entropy_quantile` below 1, `entropy_coef`, `use_adaptive_entropy`,
            the router loss of a mixture of experts), with `deterministic_rollouts`, which has one of its own, and
            where a rollout batch ends within an optimizer step.
        rollout_cache_gib (`float`, *optional*):
            Most memory, in GiB, for the keys and values of rollouts in progress on one process. A rollout batch that
            could need more is sampled in several parts. `None` is no limit on a CPU; on a CUDA GPU each process
            chooses the bound before its first rollouts, from the free memory less what optimizer, updates and sampling
            take, and prints it. A large number is no limit there.
        gpu_paths (`str`, *optional*, defaults to `"none"`):
            Faster ways of computing the same on a CUDA GPU, which are off until they have been measured on one: any
            of `"attention"` (decoding attends by a kernel that returns the log-sum-exp), `"reading"` (sampled tokens
            are read every few steps), `"capture"` (a decoding step is captured as a CUDA graph), `"updates"` (packed
            updates attend by flex attention) and `"weights"` (an engine of vLLM in the process reads all weights where
            they are on the GPU), separated by commas; `"all"` or `"none"`. They do nothing on other devices.
        deterministic_rollouts (`bool`, *optional*, defaults to `False`):
            Key the noise of sampling by seed, rollout batch, rollout and token, and admit rows to decoding in a fixed
            order: the same rollouts whatever the timing of tools or the number of processes. It costs a random number
            for each entry of the vocabulary and token, and decoding waits for tools that take longer than 8 steps.
        rollout_backend (`str`, *optional*, defaults to `"transformers"`):
            What samples: `"transformers"`, the training model itself, or `"vllm"`, set up by TRL's `vllm_*` options
            and sent the adapter of a LoRA run, or all weights, before the first rollout batch after each optimizer
            step. `vllm_mode="colocate"` is an engine in each training process; `"server"` is `python -m
            trl_toolgrpo.serve --model ...`, on another GPU or machine. TRL's `use_vllm=True` means `"vllm"`.
        max_concurrent_tools (`int`, *optional*, defaults to `64`):
            Most tool calls in flight over the whole batch.
        tool_timeout (`float`, *optional*, defaults to `30.0`):
            Time limit of one tool call in seconds; `None` for no limit. A coroutine is cancelled and a process killed
            when it is over. A function on a thread cannot be: it is answered, left to itself and counted in
            `tools/abandoned`, and when more than 64 such calls still run, training stops with `ToolRuntimeError`.
        environment_timeout (`float`, *optional*, defaults to `120.0`):
            Time limit in seconds of an environment's constructor, `reset`, `get_reward` and whatever else the trainer
            and reward functions read of it; `None` for no limit. An environment that does not keep it, or whose
            constructor, `reset` or `get_reward` raises a `TimeoutError` or [`TransientToolError`], is not used again;
            its rollout is not scored, and is counted in `environments/failures`. Many such failures in a row (more
            than a group, at least 8) stop training with [`ToolRuntimeError`].
        tool_retries (`int`, *optional*, defaults to `0`):
            Further tries of a call that raises `TransientToolError`, or returns a `ToolResult` that is an error and
            `transient`.
        max_tool_output_tokens (`int`, *optional*, defaults to `512`):
            Tokens after which a tool result is cut, with a visible marker. They count towards
            `max_completion_length`, which should be several times as large.
        parse_error_budget (`int`, *optional*, defaults to `1`):
            Malformed calls answered with a corrective tool message before the rollout stops.
        tool_mention_check (`str`, *optional*, defaults to `"auto"`):
            What is done at construction about names in prompts that resemble a tool's and are none: `"auto"`, an error
            where a system message names a tool by its words in another order (`slack_send_message` for
            `send_slack_message`), and a warning everywhere else; `"error"`, an error for each; `"warn"`, a warning for
            each; `"off"`, nothing. Calls in earlier messages and a column `tools` that name no tool are always errors.
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
            group advantage as terminal reward and the value head as a token-level baseline for it. Also an
            [`AdvantageEstimator`] of your own, as an object or as `package.module:Name`.
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
        value_epochs (`int`, *optional*, defaults to `1`):
            Passes of the value head over the tokens of an optimizer step. All but the first train the head alone, on
            the hidden states of that step, which costs next to nothing and lets a critic learn within few updates.
        value_detach (`bool`, *optional*, defaults to `True`):
            Keep the gradient of the value loss out of the policy's trunk.
        ref_sync_mode (`str`, *optional*, defaults to `"auto"`):
            How the reference of a PEFT run follows the policy with `sync_ref_model=True`: `"adapter"`, a frozen copy
            of the adapter, for a `ref_model_mixup_alpha` of 1; `"merged"`, merged weights of the adapted modules, so
            that an average is exact; `"auto"`, the one that `ref_model_mixup_alpha` allows.
        health_checks (`str`, *optional*, defaults to `"warn"`):
            What is done when a health rule finds a fault in the metrics of a step: `"warn"` says it once and writes it
            to `health.jsonl`; `"raise"` also saves a checkpoint and raises [`HealthError`]; `"off"` looks for none.
        rollout_log_limit (`float`, *optional*, defaults to `1024.0`):
            MiB that the rollout log (`rollouts` in the output folder) may take over all processes; beyond it the
            oldest batches are removed. `0` logs no rollouts.
        replay (`str`, *optional*):
            Output folder of a run whose rollout log is trained from, without sampling, calling tools or asking reward
            functions. The same model and configuration give the same weights, to the bit.
        keep_freed_memory (`bool`, *optional*, defaults to `False`):
            On a CPU with glibc: keep the memory that tensors give back, which shortens updates with a large vocabulary
            by up to a third. It holds for the whole process.

    Raises:
        ConfigError: for a combination that cannot work.
    """

    record_sample_logprobs: bool = True
    strict_trajectories: bool = True
    logprob_check: str = "first"
    logprob_check_tolerance: float | None = None
    sampler_correction: str | None = None
    sampler_correction_cap: float = 2.0
    shared_prompt_updates: bool = True
    rollout_cache_gib: float | None = None
    gpu_paths: str = "none"
    keep_freed_memory: bool = False
    deterministic_rollouts: bool = False
    rollout_backend: str = "transformers"
    max_concurrent_tools: int = 64
    tool_timeout: float | None = 30.0
    environment_timeout: float | None = 120.0
    tool_retries: int = 0
    max_tool_output_tokens: int = 512
    parse_error_budget: int = 1
    tool_mention_check: str = "auto"
    force_rate: float = 0.0
    force_level: str = "call"
    assist_warmup_steps: int = 0
    disable_forcing_in_updates: bool = True
    forced_loss_coef: float = 1.0
    advantage_estimator: str = "group"
    gae_gamma: float = 1.0
    gae_lambda: float = 0.95
    gae_unit: str = "token"
    value_loss_coef: float = 0.5
    value_clip: float | None = 0.2
    value_learning_rate: float | None = None
    value_warmup_steps: int = 0
    value_epochs: int = 1
    value_detach: bool = True
    ref_sync_mode: str = "auto"
    health_checks: str = "warn"
    rollout_log_limit: float = 1024.0
    replay: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        own_defaults = default_values(self)
        passed = {name for name, default in own_defaults.items() if getattr(self, name) != default}
        if (self.num_generations or 0) < 2:
            raise ConfigError(
                f"You passed `num_generations={self.num_generations}`. GRPO compares the rollouts of a prompt with "
                "each other and requires at least 2 generations.",
                remedy="Set `num_generations` to 2 or more.",
            )
        check_counts(self)
        try:
            super().__post_init__()
        except (ValueError, TypeError) as error:  # the latter for a key that a nested configuration does not know
            raise self._uneven_groups() or ConfigError(str(error)) from error
        check_fields(self, own_defaults)
        # No fields: they are in no dump of the configuration
        self._passed = passed
        self._begun_with: dict[str, object] | None = {name: getattr(self, name) for name in own_defaults}

    def to_dict(self) -> JSONObject:
        """
        Return the fields by name, as trackers get them, without secrets: `"[secret]"` stands for what is named for one
        at any depth, and of the logins of URLs.
        """
        found = masked(super().to_dict())
        if not isinstance(found.get("advantage_estimator"), str):
            found["advantage_estimator"] = estimator_name(self)
        return found

    def _uneven_groups(self) -> ConfigError | None:
        """Return the error for a rollout batch that does not hold whole groups."""
        size, count = self.generation_batch_size, int(self.num_generations or 0)
        if not size or not count or size % count == 0 or self.steps_per_generation is None:
            return None
        divisors = ", ".join(str(number) for number in range(2, size + 1) if size % number == 0)
        return ConfigError(
            f"You passed `num_generations={count}`, but a rollout batch has {size} rollouts "
            f"(`per_device_train_batch_size={self.per_device_train_batch_size}` times "
            f"`steps_per_generation={self.steps_per_generation}` times {self.world_size}, the number of processes), "
            f"which are no whole groups of {count}.",
            remedy=f"Set `num_generations` to one of {divisors or 'none'}, or `per_device_train_batch_size` to a "
            f"multiple of {count}.",
        )

    @classmethod
    def from_grpo_config(cls, args: GRPOConfig) -> "ToolGRPOConfig":
        """
        Take over TRL's configuration as it stands; the added fields get their defaults.

        Args:
            args (`GRPOConfig`):
                Configuration of a script written for TRL's `GRPOTrainer`.
        """
        if isinstance(args, ToolGRPOConfig):
            args._passed, args._begun_with = set_fields(args), None
            return args
        # A copy and not a new object: TRL derives fields in `__post_init__` that cannot be passed in again
        config = copy.copy(args)
        own = {f.name for f in fields(GRPOConfig)}
        for f in fields(cls):
            if f.name not in own:
                setattr(config, f.name, f.default)
        if type(args) is GRPOConfig:
            config.__class__ = cls
        check_types(config)
        check_fields(config, default_values(cls))
        return config  # type: ignore[return-value]


def estimator_name(args: GRPOConfig) -> str:
    """Return `advantage_estimator` as text: for an object, `package.module:Name` of its class."""
    given: object = getattr(args, "advantage_estimator", "group")
    return given if isinstance(given, str) else f"{type(given).__module__}:{type(given).__qualname__}"


def _describe_fields(kind: type[GRPOConfig]) -> None:
    """Give each field that a class documents what the command line shows: that text, and its choices."""
    documented = re.findall(r"^ {4}(\w+) \(`.*:\n((?: {8}.*\n?)+)", inspect.getdoc(kind) or "", re.MULTILINE)
    for name, text in documented:
        plain = re.sub(r"\[`(\w+)`\]", r"`\1`", " ".join(text.split()))
        shown: dict[str, object] = {"help": plain.replace("%", "%%")}
        shown |= {"choices": list(CHOICES[name])} if name in CHOICES else {}
        kind.__dataclass_fields__[name].metadata = MappingProxyType(shown)


_describe_fields(ToolGRPOConfig)


def default_values(kind: type[GRPOConfig] | GRPOConfig = ToolGRPOConfig) -> dict[str, object]:
    """
    Return the default of each field that can be passed to a class of configurations, made anew where it is mutable.

    Args:
        kind (`type` or `GRPOConfig`, *optional*, defaults to [`ToolGRPOConfig`]):
            The class, or a configuration of it.
    """
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(kind) if f.init}


def changed_fields(args: GRPOConfig) -> JSONObject:
    """
    Return the fields of a configuration that were set (see [`set_fields`]) and differ from their defaults, by name in
    their order, as JSON data without secrets.

    Args:
        args ([`ToolGRPOConfig`]):
            A configuration.
    """
    usual, given = default_values(args), set_fields(args)
    plain = json.loads(json.dumps(args.to_dict(), default=str))
    return {name: plain[name] for name, default in usual.items() if name in given and plain[name] != default}


# What the defaults of these fields, "none", "" and "auto", are written as at construction
_WRITTEN_ANEW: dict[str, object] = {"report_to": [], "debug": [], "pad_to_multiple_of": None}


def set_fields(args: GRPOConfig) -> set[str]:
    """
    Return the names of the fields of a configuration that were set: passed with another value than their default, or
    changed after construction and before a trainer took the configuration over. What TRL and transformers derive from
    other fields is not among them.

    Args:
        args (`GRPOConfig`):
            A configuration; of TRL's own, a field with the value that would have been derived counts as derived.
    """
    passed, before = getattr(args, "_passed", None), getattr(args, "_begun_with", None) or {}
    if passed is not None:
        found = passed | {name for name, value in before.items() if getattr(args, name) != value}
        return {name for name in found if name not in _WRITTEN_ANEW or getattr(args, name) != _WRITTEN_ANEW[name]}
    derived = derived_values(args)
    given = {name: default for name, default in default_values(args).items() if getattr(args, name) != default}
    return {name for name, default in given.items() if getattr(args, name) != derived.get(name, default)}


def derived_values(args: GRPOConfig) -> dict[str, object]:
    """
    Return what TRL and transformers put into the fields of a configuration that were left alone.

    Args:
        args (`GRPOConfig`):
            A configuration after its construction.
    """
    by_step = args.per_device_train_batch_size * args.world_size
    best = args.metric_for_best_model
    return _WRITTEN_ANEW | {
        "accelerator_config": AcceleratorConfig(),
        "activation_checkpointing": args.gradient_checkpointing,
        "activation_checkpointing_kwargs": args.gradient_checkpointing_kwargs,
        "bf16": not args.fp16,
        "dataloader_pin_memory": not args.use_cpu,
        "disable_tqdm": False,
        "do_eval": args.eval_strategy != "no",
        "eval_steps": args.logging_steps if args.eval_strategy == "steps" else None,
        "generation_batch_size": by_step * (args.steps_per_generation or 1),
        "greater_is_better": None if best is None else not best.endswith("loss"),
        "metric_for_best_model": "loss",
        "steps_per_generation": args.gradient_accumulation_steps,
        "torch_compile_backend": "inductor",
    }
