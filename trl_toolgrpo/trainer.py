"""`ToolGRPOTrainer`: TRL's `GRPOTrainer` with rollouts that are exact to the token and updates that are on-policy.

TRL builds prompts, scores, computes the loss and logs. This class replaces how text is produced, keeps the log-probs
that were recorded meanwhile, and adds metrics and checks.
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.extras.profiling import profiling_context
from trl.trainer.utils import get_config_model_id

from .chat.parsing import add_missing_response_template
from .chat.response_templates import without_comments
from .checkpoints.resume import ExactResume
from .config.batch_position import micro_batches_of
from .config.checks import idle_fields, refuse_unrecorded
from .config.fields import ToolGRPOConfig, default_values
from .critic.critic import Critic
from .errors import LogprobMismatchError
from .hub.push import HubPush
from .models.allocator import keep_freed_memory
from .models.lm_head import adapted_head, cast_heads, check_adapted_head, score_adapted_head, without_trls_cast
from .models.quantized import keep_trainable, same_parameters
from .models.rounding import Exact
from .monitoring.metrics import averages, console_line, length_metrics, rollout_counts, rollout_metrics
from .monitoring.trackers import Live
from .reference.sync import ReferenceSync, synced_by_us
from .rollout.cache_budget import check_cache
from .rollout.engine import RolloutBatch, RolloutEngine, check_gathering, unwrapped_policy
from .rollout.forcing import ForcePolicy
from .rollout.given_rollouts import checked_rollouts
from .rollout.loop import RolloutRequest
from .rollout.tools_of_rollouts import RolloutTools
from .rollout.vllm_rollouts import VLLMRollouts, refuse_multimodal, without_trls_vllm
from .run_folder.replay import Replay
from .tools.prompt_tool import PromptTool
from .tools.runtime.environments import EnvironmentFailures, on_own_thread
from .tools.runtime.executor import ToolExecutor
from .tools.tool import Tool
from .tools.toolset import ToolSet
from .types import Batch, JSONObject, Message, Row
from .update.assisted_warmup import AssistedWarmup
from .update.deterministic import Determinism
from .update.logprob_check import check_logprobs
from .update.micro_batches import GroupedUpdates
from .update.ratio_statistics import RatioStatistics
from .update.sampler_correction import SamplerCorrection, correction_line
from .update.scoring import Scores, SharedPromptScoring
from .update.scoring_trial import check_scoring
from .validation.chat_templates import check_forcing, check_template
from .validation.data import check_best_metric, check_dataset, check_rows, named_datasets
from .validation.rewards import check_columns, checked
from .validation.trainable_parameters import (
    check_adapter_is_recorded,
    check_has_values,
    check_head,
    check_optimizer,
    check_optimizer_holds_policy,
    check_policy_is_trained,
    warn_of_dropout,
    warn_of_no_learning_rate,
)


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig
    from trl.trainer.grpo_trainer import EnvironmentFactory, RewardFunc, RolloutFunc

    from .tools.mcp.config import MCPServer

logger = logging.getLogger(__name__)

_Data: TypeAlias = Dataset | IterableDataset
_EvaluationData: TypeAlias = _Data | DatasetDict | IterableDatasetDict | dict[str, _Data]


class ToolGRPOTrainer(
    Replay, Live, ExactResume, HubPush, Determinism, AssistedWarmup, Critic, ReferenceSync, GroupedUpdates,
    SamplerCorrection, SharedPromptScoring, RolloutTools, VLLMRollouts, GRPOTrainer,
):  # fmt: skip
    """
    Drop-in replacement for TRL's [`~trl.GRPOTrainer`] (arXiv 2402.03300) that trains a policy to call tools.

    Rollouts run on a sampler of this package: the log-prob of every token is recorded when it is sampled and used as
    the old log-prob of the ratio, tools run concurrently with decoding, and tool output can never become a control
    token.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`), reward_funcs, train_dataset, eval_dataset, processing_class,
        reward_processing_classes, callbacks, optimizers, quantization_config, peft_config, rollout_func:
            As in [`~trl.GRPOTrainer`]. Reward functions also get `trajectories`, a list of [`Trajectory`].
        args ([`ToolGRPOConfig`] or [`~trl.GRPOConfig`], *optional*):
            Configuration; the added fields of TRL's own get their defaults.
        tools (`list[Callable | Tool]`, *optional*):
            Functions, coroutine functions, `functools.partial`s, callable objects and [`Tool`]s.
        environment_factory (`Callable` or `dict[str, Callable]`, *optional*):
            As in TRL. Each environment lives on its own thread. An environment with an attribute `tools` (a list,
            which `reset` may change) gives each rollout its own tools.
        force_policy (`Callable`, *optional*):
            `force_policy(trajectory, tools)` returns the name of the tool of a forced call; uniform by default.
        mcp_servers (`list[MCPServer | dict]` or `dict`, *optional*):
            Servers whose tools the policy gets: [`MCPServer`]s, dicts of their arguments, or the `mcpServers` of an
            MCP client's configuration. They are started now and end with the run. Reward functions also get
            `mcp_sessions`, an [`MCPSession`] for each rollout.

    Raises:
        ConfigError, DatasetError, ToolSchemaError, ToolNameError, ChatTemplateError, MCPServerError: at
            construction, for arguments that cannot work together and servers that do not start.
        HealthError: while training, if a rule finds a fault and `health_checks="raise"`.
        LogprobMismatchError: while training, if recorded and recomputed log-probs differ beyond the tolerance.
        TrajectoryError: while training, for a rollout record that breaks its contract.
        ReferenceSyncError: while training, if the reference is not what a sync should have made it.
    """

    _tag_names = ["trl", "grpo", "trl_toolgrpo"]  # noqa: RUF012
    args: ToolGRPOConfig
    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    _recording = _skip_scoring = _capturing = _evaluating = _unevaluated = False
    _eval_prefix = "eval"  # of the evaluation in progress
    _batch: RolloutBatch | None = None
    _captured: Tensor | None = None

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: "RewardFunc | list[RewardFunc] | None" = None,
        args: GRPOConfig | None = None,
        train_dataset: _Data | None = None,
        eval_dataset: _EvaluationData | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        tools: list[Callable | Tool] | None = None,
        rollout_func: "RolloutFunc | None" = None,
        environment_factory: "EnvironmentFactory | dict[str, EnvironmentFactory] | None" = None,
        force_policy: ForcePolicy | None = None,
        mcp_servers: "list[MCPServer | JSONObject] | JSONObject | None" = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = ToolGRPOConfig(f"{name.split('/')[-1]}-ToolGRPO")
        args = ToolGRPOConfig.from_grpo_config(args)
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            check_dataset(name, dataset, bool(tools or mcp_servers), environment_factory is not None)
        check_rows(args, train_dataset)
        check_best_metric(args, eval_dataset)
        check_has_values(args, model, reward_funcs)
        if args.keep_freed_memory:
            keep_freed_memory()
        # Whether rollouts are sampled here; with a `rollout_func` and for multimodal models TRL samples
        self._recording = args.record_sample_logprobs and rollout_func is None
        check_forcing(args, bool(tools or environment_factory or mcp_servers), train_dataset)
        if not self._recording:
            refuse_unrecorded(args, "`record_sample_logprobs=False`" if rollout_func is None else "a `rollout_func`")
        tools = self._start_servers(mcp_servers, tools, environment_factory)
        toolset = self._toolset = ToolSet(tools)
        self._executor = None
        # More than a group, so that no single prompt can stop the run
        failures = self._environment_failures = EnvironmentFailures(max(8, (args.num_generations or 0) + 1))
        trl_tools = [PromptTool(tool) if isinstance(tool, Tool) else tool for tool in tools or []]
        if self._recording or environment_factory is not None:
            # Not on TRL's event loop: a tool that blocks it or ends its thread would stop the reward functions, too
            warm = toolset.own if self._recording else []
            limits = args.max_concurrent_tools, args.tool_timeout, args.tool_retries
            executor = ToolExecutor(*limits, warm=warm, environment_timeout=args.environment_timeout)
            self._executor = executor
            weakref.finalize(self, executor.shutdown)
            environment_factory = on_own_thread(environment_factory, executor, failures, self._recording)  # type: ignore[assignment, arg-type]
        if self._recording:
            trl_tools = list(toolset.prompt_tools())
        if tools or environment_factory is not None:
            check_template(processing_class)
            add_missing_response_template(processing_class)
        if self._recording:
            check_adapted_head(model, peft_config)
        given_adapter = peft_config is None and hasattr(model, "peft_config")
        with (
            synced_by_us(args, model, peft_config),
            without_trls_vllm(args, self._recording),
            without_trls_cast(args, self._recording),
            adapted_head(model) if self._recording else nullcontext(),
            without_comments(processing_class),
        ):
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
                tools=trl_tools or None,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )
        given_funcs = self.reward_funcs
        self._score_without_failed()
        self._prepare_recording(force_policy, given_adapter)
        self._check_prompts(train_dataset, eval_dataset)
        if rollout_func is None:  # it may add to the columns
            self._check_columns(given_funcs, train_dataset, eval_dataset)
        functions = zip(self.reward_funcs, self.reward_func_names, strict=True)
        self.reward_funcs = [checked(function, name) for function, name in functions]

    def _check_columns(
        self, reward_funcs: "Sequence[RewardFunc]", train_dataset: _Data | None, eval_dataset: _EvaluationData | None
    ) -> None:
        """Check that the data and the run have what reward functions ask for."""
        available = {
            "trajectories": self._recording,
            "environments": self.environment_factories is not None,
            "mcp_sessions": self._recording and self._mcp is not None,
        }
        absent = [name for name, is_available in available.items() if not is_available]
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            check_columns(name, dataset, reward_funcs, self.reward_func_names, absent)

    def _prepare_recording(self, force_policy: ForcePolicy | None, given_adapter: bool) -> None:
        """Prepare everything that needs the model, which TRL's constructor has made."""
        self._prepare_policy(given_adapter)
        self._prepare_run_log()
        self._ratio = RatioStatistics()
        self._sampled_at = -1
        self._carried: dict[str, float] = {}  # metrics of the current rollout batch, for steps that reuse it
        self._forced_shares: list[float] = []  # `forced/fraction` of the batch of each micro-batch not yet logged
        self._checked = self.args.logprob_check == "off"
        if self._recording and self._is_vlm:
            refuse_multimodal(self.args)
            self._recording = False
            logger.warning("The model is multimodal: TRL samples its rollouts, and no log-prob is recorded.")
        # TRL's own pass, unchanged: which tokens are above a quantile of the entropies depends on rounding, too
        if not self._recording or not self.args.shared_prompt_updates or self.top_entropy_quantile < 1.0:
            self._packs = False
        if not self._recording:
            if self._mcp is not None:
                self._make_chat()
            return
        for name, why in idle_fields(self.args, default_values()).items():
            logger.warning(f"You set `{name}`, which has no effect here: {why}.")
        self._print(correction_line(self.args), "The line on the correction could not be printed")
        check_gathering(self)
        check_cache(self.args, self.model)
        check_adapter_is_recorded(self.model)
        check_scoring(self)
        warn_of_dropout(self.model)
        self._prepare_critic()
        if self.environment_factories is not None:
            self._read_environments()
        self._standalone_tools: list[Callable] = []  # the executor calls tools, not TRL's loop
        chat = self._make_chat() if self.tools else None
        pad_id = self._tokenizer.pad_token_id
        self._engine = RolloutEngine(self.args, self.eos_token_ids, pad_id, chat, self._executor, force_policy)
        self._engine.redactor = self._redactor
        self._prepare_vllm()

    def _prepare_policy(self, given_adapter: bool) -> None:
        """Check and patch the policy, and make its reference."""
        check_optimizer(self.args)
        if self.args.beta > 0:  # without a reference, a policy that is only evaluated may be frozen
            check_policy_is_trained(self.model)
        check_head(self.model)
        check_optimizer_holds_policy(self.model, self.optimizer, self.lr_scheduler)
        keep_trainable(self.model)
        if self._recording and self.args.cast_lm_head_to_fp32:
            cast_heads(self.model, self.temperature)
            if self.ref_model is not None:
                cast_heads(self.accelerator.unwrap_model(self.ref_model), self.temperature, ("log_probs",))
        score_adapted_head(self.model)  # wraps the fused head in use, cast or not
        self._prepare_reference(given_adapter)

    # Rollouts

    def _tokenize_prompts(self, prompts: list) -> tuple:
        """Render prompts as TRL does, each with the tools of its own environment if environments bring some."""
        if not self._recording or self.environments is None or not self._toolset.decided_at_reset:
            return super()._tokenize_prompts(prompts)
        kept = self._batch_environments, self._env_tools
        prompt_tools = self._toolset.prompt_tools
        self._env_tools = {row: self._tools_of(e, prompt_tools) for row, e in enumerate(self.environments)}
        self._batch_environments = list(range(len(prompts)))
        try:
            return super()._tokenize_prompts(prompts)
        finally:
            self._batch_environments, self._env_tools = kept

    def _generate_single_turn(self, prompt_ids: list, images: list | None, *args: Any, **kwargs: Any) -> tuple:
        """Sample TRL's first turn. With tools a rollout is one state machine, run as a whole in `_tool_call_loop`."""
        if not self._recording:
            return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)
        if self.tools:
            return [[self._tokenizer.eos_token_id] for _ in prompt_ids], None
        trajectories = self._roll_out(prompt_ids).trajectories
        return [t.completion_ids for t in trajectories], [t.logprobs for t in trajectories]

    def _tool_call_loop(self, prompts: list, prompt_ids: list, *args: Any) -> tuple:
        """Run the whole rollout in place of TRL's tool loop."""
        if not self._recording:
            return super()._tool_call_loop(prompts, prompt_ids, *args)
        batch = self._roll_out(prompt_ids)
        trajectories = batch.trajectories
        results = [result for t in trajectories for turn in t.turns for result in turn.tool_results]
        return (
            [t.trainable_mask for t in trajectories],
            [rollout.messages for rollout in batch.rollouts],
            [t.completion_ids for t in trajectories],
            [t.logprobs for t in trajectories],
            len(results),
            sum(result.is_error for result in results),
            [[] for _ in trajectories],
        )

    def _roll_out(self, prompt_ids: list[list[int]]) -> RolloutBatch:
        """Sample every rollout of this process to its end; no step of it waits for another process."""
        environments = self.environments or [None] * len(prompt_ids)
        requests = []
        for ids, environment in zip(prompt_ids, environments, strict=True):
            tools, owned = self._tools_of(environment, self._toolset.of_rollout) if self.tools else ({}, frozenset())
            failed = self._environment_failures.includes(environment)
            requests.append(RolloutRequest(ids, tools, None if failed else environment, owned, failed))
        requests = self._lend_servers(requests)
        noise = self._rollout_noise(len(requests))
        with profiling_context(self, "rollout"), unwrapped_policy(self) as policy:
            self._send_policy(policy)
            self._batch = self._engine.run(policy, requests, self.accelerator.autocast, self._may_force, noise)
        return self._batch

    def _generate(self, prompts: list[list[Message]]) -> tuple:
        given, metrics = self.rollout_func, self._metrics["train" if self.model.training else "eval"]
        if given is not None:
            self.rollout_func = checked_rollouts(
                given,
                self.args.strict_trajectories,
                lambda invalid: metrics["rollout/invalid"].append(float(invalid)),
                self._tokenizer.pad_token_id,
            )
        try:
            output = super()._generate(prompts)
        finally:
            self.rollout_func = given
        if not self._recording or self._batch is None:
            return output
        self._log_rollouts(self._batch)
        prompt_ids, *rest, extra_fields, images, tool_images = output
        # A prompt longer than the model has no completion to learn from, and scoring could not read it
        prompt_ids = [
            ids[-1:] if long else ids for ids, long in zip(prompt_ids, self._batch.without_room, strict=True)
        ]
        fields = {**extra_fields, "trajectories": self._batch.trajectories}
        return (prompt_ids, *rest, fields, images, tool_images)

    def _log_rollouts(self, batch: RolloutBatch) -> None:
        """Add this package's metrics, and correct those that TRL judges by the last token of a rollout."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        trajectories, stats = batch.trajectories, batch.stats
        names = [tool.name for tool in self._toolset.known]
        times = stats.seconds, stats.tool_wait_seconds
        counts = rollout_counts(trajectories, *times, sum(batch.invalid), names, batch.unconstrained, stats.abandoned)
        for name, value in rollout_metrics(gather_object([counts]), bool(self.tools)).items():
            metrics[name].append(value)
        found = torch.tensor([[float(sum(t.tool_mask)), t.truncated] for t in trajectories])
        lengths, truncated = self.accelerator.gather(found.to(self.accelerator.device)).unbind(dim=1)
        for name, value in length_metrics(lengths, truncated.bool()).items():
            metrics[name][-1] = value

    # Scoring

    def _generate_and_score_completions(self, inputs: list[Row]) -> Batch:
        if not self._recording:
            return super()._generate_and_score_completions(inputs)
        self._skip_scoring = True  # TRL's pass for old log-probs, which are known
        self._batch = None
        try:
            output = super()._generate_and_score_completions([dict(row) for row in inputs])
        finally:
            self._skip_scoring = False
        if self._batch is None:
            raise RuntimeError("TRL scored completions without generating them; the installed TRL is not supported.")
        self._unevaluated = not self.model.training
        output["old_per_token_logps"] = self._batch.logprobs(output["completion_ids"].size(1), self.accelerator.device)
        self._correct_masks(output, self._batch)
        if self.model.training:
            self._sampled_at = self.state.global_step
            self._check_recorded(output, self._batch)
        if self._assisted:
            self._assist(output, self._batch)
        elif self.model.training:
            self._estimate_advantages(output, self._batch)
        return output

    def _correct_masks(self, output: Batch, batch: RolloutBatch) -> None:
        """Mask rollouts that were cut off although their last token is a stop token, and those without a record."""
        batch.mask_dropped(output, self.mask_truncated_completions)
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        output["num_items_in_batch"] = self.accelerator.gather(mask.sum()).sum()

    def _check_recorded(self, output: Batch, batch: RolloutBatch) -> None:
        """Check the trainer's own log-probs of a batch against those that were recorded."""
        if self._checked:
            return
        self._checked = self.args.logprob_check == "first"
        tokens = self._rollout_tokens(output, batch)
        logps = self._score_rollouts(tokens)
        known, tolerance = self._rounding, self.args.logprob_check_tolerance
        self._rounding = known or self._measure_rounding(self.model, *tokens)
        accepted = self._rounding if tolerance is None else Exact(tolerance)
        try:
            check_logprobs(logps, batch.trajectories, accepted, self.args.rollout_backend, gather_object)
        except LogprobMismatchError:
            if known is None or tolerance is not None or isinstance(known, Exact):
                raise
            # The policy has moved since its rounding was measured; what this batch shows decides
            self._rounding = self._measure_rounding(self.model, *tokens)
            check_logprobs(logps, batch.trajectories, self._rounding, self.args.rollout_backend, gather_object)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Scores:
        if self._skip_scoring and self._batch is not None and model is self.model and self._scores_old_logprobs():
            self._skip_scoring = False  # the next pass over the policy is the reference's, with its own adapter
            return self._batch.logprobs(logits_to_keep, input_ids.device), None, None
        if self._evaluating and self._batch is not None and self._batch.holds(input_ids, logits_to_keep):
            # The policy is still the one that sampled: its log-probs and entropies are known
            entropies = self._batch.entropies(logits_to_keep, input_ids.device)
            if entropies is not None:
                return self._batch.logprobs(logits_to_keep, input_ids.device), entropies, None
        output = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        if self._capturing:
            self._captured = output[0].detach()
        return output

    def _scores_old_logprobs(self) -> bool:
        """Return whether TRL's first pass over a batch is for old log-probs: if steps and batches are not aligned."""
        return self.args.gradient_accumulation_steps % micro_batches_of(self.args) != 0

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with same_parameters(self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with same_parameters(self.model):
            super()._load_best_model()

    # Updates

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make TRL's optimizer, and check that it moves the policy."""
        given = self.optimizer is not None
        policy = self.model if model is None else model
        check_policy_is_trained(policy)
        optimizer = super().create_optimizer(model)
        if not (given and model is not None):  # FSDP1 has replaced the parameters since
            check_optimizer_holds_policy(policy, optimizer)
        warn_of_no_learning_rate(policy, optimizer)
        return optimizer

    def _compute_loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        if not self._recording:
            return super()._compute_loss(model, inputs)
        if self.model.training:
            self._carry_over()
        if "assist_mask" in inputs:
            return self._touch_value_head(self._assisted_loss(model, inputs))
        self._capturing, self._ask_values = True, "value_targets" in inputs
        self._evaluating = self._unevaluated and not self.aux_loss_enabled and not torch.is_grad_enabled()
        self._unevaluated = False  # before the next call the policy may have moved
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._capturing = self._ask_values = self._evaluating = False
        if self.model.training and self._captured is not None and "old_per_token_logps" in inputs:
            mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            fresh = self.state.global_step == self._sampled_at
            self._ratio.add(self._captured, inputs["old_per_token_logps"], mask, fresh)
            self._note_ratios(inputs, self._captured, mask)
        self._captured = None
        return self._add_value_loss(loss, inputs) if "value_targets" in inputs else loss

    def _carry_over(self) -> None:
        """Keep the metrics of a rollout batch that steps which reuse it log again."""
        metrics = self._metrics["train"]
        for name in ("forced/fraction", "tools/call_frequency", "tools/failure_frequency"):
            if metrics.get(name):
                self._carried[name] = metrics[name][-1]
        if "forced/fraction" in self._carried:
            self._forced_shares.append(self._carried["forced/fraction"])

    # Metrics

    def evaluate(
        self,
        eval_dataset: _EvaluationData | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Evaluate as TRL does. All metrics of a data set have its prefix: with several, `eval_<name>_reward`.

        Args:
            eval_dataset, ignore_keys, metric_key_prefix:
                As in [`~transformers.Trainer.evaluate`].

        Returns:
            `dict[str, float]`: the metrics.
        """
        before, self._eval_prefix, self._evaluated = self._eval_prefix, metric_key_prefix, 0
        self._metrics["eval"].clear()  # of an evaluation that failed, or of `predict`
        try:
            with self._log_failures.of_profiling():
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._eval_prefix = before

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not self.model.training and self._eval_prefix != "eval":  # TRL would write `eval_` before each of them
            figures = averages(self._metrics["eval"])
            logs.update({f"{self._eval_prefix}_{name}": x for name, x in figures.items()})  # type: ignore[misc]
            self._metrics["eval"].clear()
        training = self._recording and self.model.training
        if training:
            if self._forced_shares:
                self._metrics["train"]["forced/fraction"], self._forced_shares = self._forced_shares, []
            found = self._ratio.metrics(lambda x: self.accelerator.reduce(x, reduction="sum"), self.accelerator.gather)
            self._metrics["train"].update({name: [value] for name, value in found.items()})
            self._ratio.reset()
        super().log(logs, start_time)
        if training:
            self._print(console_line({**self._carried, **logs}), "The line of a step could not be printed")

    def _print(self, line: str | None, failure: str) -> None:
        """Print a line in the main process; a terminal that is gone must not end the run."""
        if line is not None and self.accelerator.is_main_process:
            with self._log_failures.tolerated(failure):
                print(line, flush=True)
