"""`ToolGRPOTrainer`: TRL's `GRPOTrainer` with rollouts that are exact to the token and updates that are what they claim.

Owns the wiring of all stages into TRL's hooks, and no algorithm. TRL builds prompts, scores, computes the loss and logs;
this class replaces how text is produced, keeps the log-probs recorded while it was, and adds figures and checks.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl import GRPOTrainer
from trl.chat_template_utils import (
    add_response_schema,
    get_training_chat_template,
    is_chat_template_prefix_preserving,
)
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, start_event_loop_in_daemon

from .checks import check_dataset, check_tool_names, named_datasets
from .config import ToolGRPOConfig
from .diagnostics import (
    RatioStatistics,
    check_logprobs,
    check_tolerance,
    console_line,
    rollout_counts,
    rollout_metrics,
)
from .errors import ConfigError, TrajectoryError
from .rollout.backends import make_sampler, unsupported_reason
from .rollout.chat import ToolChat
from .rollout.loop import Rollout, RolloutLimits, RolloutLoop, RolloutRequest
from .rollout.parsing import add_missing_response_template
from .tools.arguments import check_schema
from .tools.environments import on_own_thread
from .tools.execute import ToolExecutor
from .tools.functions import environment_tools, index_tools
from .tools.prompt import PromptTool
from .tools.types import Tool
from .trajectory import Trajectory


logger = logging.getLogger(__name__)


class ToolGRPOTrainer(GRPOTrainer):
    """
    Drop-in for TRL's [`~trl.GRPOTrainer`] (arXiv 2402.03300) that trains a policy to call tools.

    Rollouts run on a sampler of its own: the log-prob of every token is recorded as it is sampled and used as the old
    log-prob of the ratio, tools run concurrently off the decode path, and tool output can never become a control token.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`), reward_funcs, train_dataset, eval_dataset, processing_class,
        reward_processing_classes, callbacks, optimizers, quantization_config, peft_config, rollout_func:
            As in [`~trl.GRPOTrainer`]. Reward functions also get `trajectories`, a list of [`Trajectory`].
        args ([`ToolGRPOConfig`] or [`~trl.GRPOConfig`], *optional*):
            Configuration; TRL's own is taken over with the defaults of the added fields.
        tools (`list[Callable | Tool]`, *optional*):
            Functions, coroutine functions, `functools.partial`s, callable objects and [`Tool`]s.
        environment_factory (`Callable` or `dict[str, Callable]`, *optional*):
            As in TRL. Each environment lives on a thread of its own; an attribute `tools` (a list, set by `reset`) gives
            a rollout tools of its own.

    Raises:
        ConfigError, DatasetError, ToolSchemaError, ToolNameError, ChatTemplateError: at construction, for arguments that
            cannot work together.
        LogprobMismatchError: while training, if recorded and recomputed log-probs differ beyond the tolerance.
        TrajectoryError: while training, for a rollout record that breaks its contract.
    """

    _tag_names = ["trl", "grpo", "trl_toolgrpo"]
    _name = "ToolGRPO"

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable | Tool] | None = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = ToolGRPOConfig(f"{name.split('/')[-1]}-{self._name}")
        args = ToolGRPOConfig.from_grpo_config(args)
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            check_dataset(name, dataset, bool(tools), environment_factory is not None)
        own = list(index_tools(tools or []).values())
        for tool in own:
            check_schema(tool)
        # Whether rollouts are this package's; vLLM, a `rollout_func` and multimodal models take TRL's way
        self._recording = args.record_sample_logprobs and not args.use_vllm and rollout_func is None
        self._own_tools = own
        self._executor: ToolExecutor | None = None
        if self._recording:
            self._executor = ToolExecutor(
                args.max_concurrent_tools, args.tool_timeout, args.tool_retries, event_loop=self._event_loop
            )
            environment_factory = _with_threads(environment_factory, self._executor)
        if (own or environment_factory is not None) and processing_class is not None:
            add_missing_response_template(getattr(processing_class, "tokenizer", processing_class))
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=self._tools_for_trl(tools, own),
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        self._prepare_recording()
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            if self.environment_factories is None or not self._environments_bring_tools:
                check_tool_names(name, dataset, [*own, *self._environment_tools])

    def _tools_for_trl(self, tools: list[Callable | Tool] | None, own: list[Tool]) -> list[Any] | None:
        """Schemas while recording, so that every kind of tool renders alike; else what was passed, as far as TRL can."""
        if not self._recording:
            return [PromptTool(tool) if isinstance(tool, Tool) else tool for tool in tools or []] or None
        return [PromptTool(tool) for tool in own] or None

    def _prepare_recording(self) -> None:
        """Everything recording needs that TRL's constructor had to make first."""
        self._environment_tools: list[Tool] = []
        self._environments_bring_tools = False
        self._chat: ToolChat | None = None
        self._sampler_supported: bool | None = None
        self._rollouts: list[Rollout] | None = None
        self._invalid: list[bool] = []
        self._skip_scoring = False
        self._captured: Tensor | None = None
        self._capturing = False
        self._ratio = RatioStatistics()
        self._sampled_at = -1
        self._carried: dict[str, float] = {}  # figures of the current rollout batch, for steps that reuse it
        self._checked = self.args.logprob_check == "off"
        if self._recording and self._is_vlm:
            self._recording = False
            logger.warning(
                "%s is multimodal: its rollouts run on TRL's own path, and log-probs are not recorded while sampling.",
                type(self.model).__name__,
            )
        if not self._recording:
            return
        if self.use_transformers_continuous_batching:
            logger.warning("`use_transformers_continuous_batching` has no effect: the recording sampler batches itself.")
        self._warn_of_dropout()
        if self.environment_factories is not None:
            self._read_environments()
        self._standalone_tools: list[Any] = []  # called by the executor, not by TRL's loop
        if self.tools:
            self._chat = ToolChat(
                self._tokenizer, self.eos_token_ids, self.chat_template, dict(self.chat_template_kwargs)
            )

    def _read_environments(self) -> None:
        """Hold the methods of environments as schemas too, and refuse names that a standalone tool has."""
        own = [PromptTool(tool) for tool in self._own_tools]
        for name, pool in self._environment_pool.items():
            methods = environment_tools(pool[0])
            index_tools([*self._own_tools, *methods])
            for tool in methods:
                check_schema(tool)
            self._env_tools[name] = own + [PromptTool(tool) for tool in methods]
            self._environment_tools += methods
            self._environments_bring_tools |= hasattr(pool[0], "tools")
        had_tools = bool(self.tools)
        self.tools = own + [PromptTool(tool) for tool in self._environment_tools]
        if not had_tools and self._environments_bring_tools:
            self._expect_tools()

    def _expect_tools(self) -> None:
        """What TRL does for tools it knows at construction, for tools that only a reset environment knows."""
        unknown = Tool("tool", "Known at reset.", {"type": "object", "properties": {}}, lambda: None)
        self.tools = [PromptTool(unknown)]
        if getattr(self._tokenizer, "response_template", None) is None:
            add_response_schema(self.processing_class)
        if not is_chat_template_prefix_preserving(self.processing_class):
            self.chat_template = get_training_chat_template(self.processing_class)

    def _warn_of_dropout(self) -> None:
        active = {type(m).__name__ for m in self.model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0}
        if active and not self.args.disable_dropout:
            logger.warning(
                "The policy has active dropout. Tokens are sampled without it and trained with it, so the ratio is not 1 "
                "even before the first update. Set `disable_dropout=True`."
            )

    def _event_loop(self) -> Any:
        """TRL's loop for coroutines, so that tools and reward functions share clients; started if TRL had no need."""
        if not self._has_async_funcs:
            started = start_event_loop_in_daemon(name="ToolGRPOTrainer-AsyncLoop")
            self.async_loop_thread, self.async_loop, self.async_loop_ready_event = started
            self.async_loop_ready_event.wait()
            self._has_async_funcs = True
        return self.async_loop

    # Rollouts

    def _tokenize_prompts(self, prompts: list) -> Any:
        """TRL's rendering, each prompt with the tools of its own environment where environments bring some."""
        if not self._recording or self.environments is None or not self._environments_bring_tools:
            return super()._tokenize_prompts(prompts)
        own = [PromptTool(tool) for tool in self._own_tools]
        environments, tools = self._batch_environments, self._env_tools
        self._env_tools = {
            row: own + [PromptTool(tool) for tool in environment_tools(environment)]
            for row, environment in enumerate(self.environments)
        }
        self._batch_environments = list(range(len(prompts)))
        try:
            return super()._tokenize_prompts(prompts)
        finally:
            self._batch_environments, self._env_tools = environments, tools

    def _generate_single_turn(self, prompt_ids: list, images: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's first turn. With tools a rollout is one state machine, run as a whole in `_tool_call_loop`."""
        if not self._recording:
            return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)
        if self.tools:
            return [[self._tokenizer.eos_token_id] for _ in prompt_ids], None
        trajectories = [rollout.trajectory for rollout in self._roll_out(prompt_ids)]
        return [t.completion_ids for t in trajectories], [t.logprobs for t in trajectories]

    def _tool_call_loop(self, prompts: list, prompt_ids: list, *args: Any) -> Any:
        """TRL's tool loop, which here is the whole rollout."""
        if not self._recording:
            return super()._tool_call_loop(prompts, prompt_ids, *args)
        rollouts = self._roll_out(prompt_ids)
        trajectories = [rollout.trajectory for rollout in rollouts]
        results = [result for t in trajectories for turn in t.turns for result in turn.tool_results]
        return (
            [t.tool_mask for t in trajectories],
            [rollout.messages for rollout in rollouts],
            [t.completion_ids for t in trajectories],
            [t.logprobs for t in trajectories],
            len(results),
            sum(result.is_error for result in results),
            [[] for _ in trajectories],
        )

    def _roll_out(self, prompt_ids: list[list[int]]) -> list[Rollout]:
        """Sample every rollout of this process to its end; no step of it waits for another process."""
        requests = self._requests(prompt_ids)
        limits = RolloutLimits(
            max_completion_length=self.max_completion_length,
            max_tool_calling_iterations=self.max_tool_calling_iterations,
            max_tool_output_tokens=self.args.max_tool_output_tokens,
            parse_error_budget=self.args.parse_error_budget,
        )
        with profiling_context(self, "rollout"), self._policy() as policy:
            sampler = make_sampler(
                policy,
                self._is_supported(policy),
                stop_ids=self.eos_token_ids,
                pad_id=self._tokenizer.pad_token_id,
                temperature=self.temperature,
                autocast=self.accelerator.autocast,
            )
            with sampler.open(prompt_ids, self.max_completion_length) as session:
                loop = RolloutLoop(session, requests, limits, self._chat, self._executor)
                rollouts = loop.run()
        self._rollout_stats = loop.stats
        self._validate(rollouts)
        self._rollouts = rollouts
        return rollouts

    def _requests(self, prompt_ids: list[list[int]]) -> list[RolloutRequest]:
        if not self.tools:
            return [RolloutRequest(ids) for ids in prompt_ids]
        if not self.environments:
            tools = index_tools(self._own_tools)
            return [RolloutRequest(ids, tools) for ids in prompt_ids]
        requests = []
        for ids, environment in zip(prompt_ids, self.environments, strict=True):
            owned = environment_tools(environment)
            tools = index_tools([*self._own_tools, *owned])
            requests.append(RolloutRequest(ids, tools, environment, frozenset(tool.name for tool in owned)))
        return requests

    @contextmanager
    def _policy(self) -> Iterator[Any]:
        """The unwrapped policy with its parameters gathered, as TRL prepares it for generation."""
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as policy,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            yield policy

    def _is_supported(self, policy: Any) -> bool:
        if self._sampler_supported is None:
            size = policy.get_input_embeddings().weight.shape[0]
            reason = unsupported_reason(policy, [(index * 7 + 3) % size for index in range(8)])
            self._sampler_supported = reason is None
            if reason is not None:
                logger.warning("Sampling falls back to `model.generate` for this model: %s.", reason)
        return self._sampler_supported

    def _validate(self, rollouts: list[Rollout]) -> None:
        """Raise for a broken record, or mask it out where `strict_trajectories=False`."""
        self._invalid = [False] * len(rollouts)
        for row, rollout in enumerate(rollouts):
            try:
                rollout.trajectory.validate(row)
            except TrajectoryError as error:
                if self.args.strict_trajectories:
                    raise
                logger.warning("Masked out of the update: %s", error)
                self._invalid[row] = True
                self._mask_out(rollout.trajectory)

    @staticmethod
    def _mask_out(trajectory: Trajectory) -> None:
        """Leave nothing to train on; the log-probs of masked tokens are 0.0 by convention."""
        count = len(trajectory.completion_ids)
        trajectory.logprobs, trajectory.tool_mask = [0.0] * count, [0] * count
        trajectory.forced_mask = [0] * count

    def _generate(self, prompts: list) -> Any:
        output = super()._generate(prompts)
        if not self._recording or self._rollouts is None:
            return output
        trajectories = [rollout.trajectory for rollout in self._rollouts]
        self._log_rollouts(trajectories)
        *rest, extra_fields, images, tool_images = output
        return (*rest, {**extra_fields, "trajectories": trajectories}, images, tool_images)

    def _log_rollouts(self, trajectories: list[Trajectory]) -> None:
        """Add this package's figures, and correct TRL's where it takes the last token for the stop reason."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        stats = self._rollout_stats
        counts = rollout_counts(trajectories, stats.seconds, stats.tool_wait_seconds, sum(self._invalid))
        for name, value in rollout_metrics(gather_object([counts]), bool(self.tools)).items():
            metrics[name].append(value)
        device = self.accelerator.device
        lengths = torch.tensor([sum(t.tool_mask) for t in trajectories], device=device, dtype=torch.float32)
        truncated = self.accelerator.gather(torch.tensor([t.truncated for t in trajectories], device=device))
        ended = self.accelerator.gather(lengths)[~truncated]
        ended = ended if len(ended) else torch.zeros(1, device=device)
        metrics["completions/clipped_ratio"][-1] = truncated.float().mean().item()
        for name, value in (("mean", ended.mean()), ("min", ended.min()), ("max", ended.max())):
            metrics[f"completions/{name}_terminated_length"][-1] = value.item()

    # Scoring

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._recording:
            return super()._generate_and_score_completions(inputs)
        self._skip_scoring = True  # the old log-probs are known: TRL's pass for them is not run
        self._rollouts = None
        try:
            output = super()._generate_and_score_completions([dict(row) for row in inputs])
        finally:
            self._skip_scoring = False
        self._drop_stuck_environments()
        trajectories = [rollout.trajectory for rollout in self._rollouts or []]
        output["old_per_token_logps"] = output["sampling_per_token_logps"]
        self._correct_masks(output, trajectories)
        if self.model.training:
            self._sampled_at = self.state.global_step
            self._check_recorded(output, trajectories)
        return output

    def _correct_masks(self, output: dict[str, Any], trajectories: list[Trajectory]) -> None:
        """Mask rollouts that ended early although their last token is a stop token, and those that were invalid."""
        if not self.mask_truncated_completions and self.args.strict_trajectories:
            return
        drop = [
            bad or (self.mask_truncated_completions and t.truncated)
            for bad, t in zip(self._invalid, trajectories, strict=True)
        ]
        keep = ~torch.tensor(drop, device=output["completion_mask"].device)[:, None]
        output["completion_mask"] = output["completion_mask"] * keep
        mask = output["completion_mask"]
        if "tool_mask" in output:
            output["tool_mask"] = output["tool_mask"] * keep
            mask = mask * output["tool_mask"]
        output["num_items_in_batch"] = self.accelerator.gather(mask.sum()).sum()

    def _drop_stuck_environments(self) -> None:
        """Environments whose thread hangs are not handed out again."""
        if self.environments and self._executor is not None:
            for name, pool in self._environment_pool.items():
                stuck = [environment for environment in pool if self._executor.is_abandoned(environment)]
                self._environment_pool[name] = [environment for environment in pool if environment not in stuck]

    def _check_recorded(self, output: dict[str, Any], trajectories: list[Trajectory]) -> None:
        """The self-check: the trainer's own log-probs of the batch against those that were recorded."""
        if self._checked:
            return
        self._checked = self.args.logprob_check == "first"
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        completion_mask = torch.zeros_like(output["completion_mask"])
        for row, trajectory in enumerate(trajectories):
            completion_mask[row, : len(trajectory.completion_ids)] = 1
        attention_mask = torch.cat([output["prompt_mask"], completion_mask], dim=1)
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                logps, _, _ = super()._get_per_token_logps_and_entropies(
                    self.model,
                    ids,
                    attention_mask,
                    completion_mask.size(1),
                    batch_size=self.args.per_device_train_batch_size,
                )
        finally:
            for module in training:
                module.training = True
        tolerance = check_tolerance(self._compute_dtype, self.args.logprob_check_tolerance)
        check_logprobs(logps, trajectories, tolerance, self.args.rollout_backend)

    @property
    def _compute_dtype(self) -> torch.dtype:
        """Dtype the policy computes in, autocast and low-precision bases included."""
        if self.args.bf16 or self.args.fp16:
            return torch.bfloat16 if self.args.bf16 else torch.float16
        dtypes = {p.dtype for p in self.model.parameters()} - {torch.uint8, torch.int8}
        return torch.bfloat16 if dtypes & {torch.bfloat16, torch.float16} else torch.float32

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        if self._skip_scoring and model is self.model and self._scores_old_logprobs():
            self._skip_scoring = False  # the next pass over the policy is the reference's, with its own adapter
            return self._recorded_logps(input_ids.device, logits_to_keep), None, None
        output = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        if self._capturing:
            self._captured = output[0].detach()
        return output

    def _scores_old_logprobs(self) -> bool:
        """Whether TRL's first pass of this batch is the one for old log-probs: when steps and batches are not aligned."""
        return self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) != 0

    def _recorded_logps(self, device: torch.device, width: int) -> Tensor:
        rollouts = self._rollouts or []
        recorded = torch.zeros(len(rollouts), width)
        for row, rollout in enumerate(rollouts):
            recorded[row, : len(rollout.trajectory.logprobs)] = torch.tensor(rollout.trajectory.logprobs)
        return recorded.to(device)

    # Updates

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not self._recording:
            return super()._compute_loss(model, inputs)
        self._capturing = True
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._capturing = False
        if self.model.training and self._captured is not None:
            mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            fresh = self.state.global_step == self._sampled_at
            self._ratio.add(self._captured, inputs["old_per_token_logps"], mask, fresh)
        self._captured = None
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        training = self._recording and self.model.training
        if training:
            self._carry_over()
            reduce_sum = lambda x: self.accelerator.reduce(x, reduction="sum")  # noqa: E731
            for name, value in self._ratio.metrics(reduce_sum, self.accelerator.gather).items():
                self._metrics["train"][name] = [value]
            self._ratio.reset()
        super().log(logs, start_time)
        line = console_line({**self._carried, **logs}) if training else None
        if line is not None and self.accelerator.is_main_process:
            print(line, flush=True)

    def _carry_over(self) -> None:
        """A step that reuses a rollout batch has its share of forced tokens, and tells of its tool calls."""
        metrics = self._metrics["train"]
        for name in ("forced/fraction", "tools/call_frequency", "tools/failure_frequency"):
            if metrics.get(name):
                self._carried[name] = sum(metrics[name]) / len(metrics[name])
        if "forced/fraction" in self._carried and self._ratio.filled:
            metrics["forced/fraction"] = [self._carried["forced/fraction"]]


def _with_threads(factory: Any, executor: ToolExecutor) -> Any:
    if isinstance(factory, dict):
        return {name: on_own_thread(make, executor) for name, make in factory.items()}
    if factory is not None and not callable(factory):
        raise ConfigError(f"You passed `environment_factory={factory!r}`, which cannot be called. Pass a class.")
    return None if factory is None else on_own_thread(factory, executor)
