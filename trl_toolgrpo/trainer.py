"""`ToolGRPOTrainer`: TRL's `GRPOTrainer` with rollouts that are exact to the token and updates that are on-policy.

TRL builds prompts, scores, computes the loss and logs. Each of its hooks is overridden here once, in the order in
which TRL calls them, and hands over to a typed part. What the parts see of the trainer is [`Run`].
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import TrainOutput
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import get_config_model_id

from .algorithms.base import AdvantageEstimator
from .algorithms.batch_advantages import BatchAdvantages
from .algorithms.registry import estimator_of
from .chat.parsing import add_missing_response_template
from .chat.response_templates import without_comments
from .checkpoints.resume import Checkpoints
from .config.checks import idle_fields, refuse_unrecorded
from .config.fields import ToolGRPOConfig, default_values
from .critic.critic import Critic
from .hub.push import HubPublisher
from .models.allocator import keep_freed_memory
from .models.lm_head import adapted_head, cast_heads, check_adapted_head, score_adapted_head, without_trls_cast
from .models.quantized import keep_trainable, same_parameters
from .monitoring.records import Records
from .reference.adapter import SyncReport, same_parameters_trained
from .reference.sync import ReferencePolicy, synced_by_us
from .rollout.cache_budget import check_cache
from .rollout.engine import check_gathering
from .rollout.forcing import ForcePolicy
from .rollout.rollouts import Rollouts, check_sampler
from .rollout.vllm_rollouts import refuse_multimodal, without_trls_vllm
from .run_folder.replay import Replay
from .run_folder.storage_failures import tolerated
from .sampling.protocol import Sampler
from .tools.tool import Tool
from .trl_hooks import Run
from .types import Batch, JSONObject, Message, Row
from .update.policy_update import PolicyUpdate
from .update.sampler_correction import correction_line
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


class ToolGRPOTrainer(GRPOTrainer):
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
        sampler ([`Sampler`], *optional*):
            Samples rollouts in place of the policy itself. What it records is checked by the strict trajectory rules,
            and by the log-prob check.

    Attributes:
        rollouts ([`Rollouts`]):
            Tools, prompts, sampler and loop, and the rollout batch in use.
        update ([`PolicyUpdate`]):
            Micro-batches, scoring, correction of the ratio, assisted warm-up.
        advantages ([`BatchAdvantages`]):
            Which groups take part, and their advantages.
        critic ([`Critic`] or `None`):
            The value head, if the estimator needs one.
        reference ([`ReferencePolicy`]):
            What the policy is compared with, and when that follows.
        records ([`Records`]):
            Files, metrics, health, trackers, progress.
        checkpoints ([`Checkpoints`]):
            What a run is resumed from.
        hub ([`HubPublisher`]):
            Pushes and the model card.
        replay ([`Replay`] or `None`):
            Rollout batches of another run.
        run ([`Run`]):
            What the parts see of this trainer.
        recording (`bool`):
            Whether rollouts are sampled here, and their log-probs recorded, rather than by TRL.

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
    recording = False
    critic: Critic | None = None
    replay: Replay | None = None
    push_in_progress: Any = None  # transformers has no such attribute until a repository is made

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
        sampler: Sampler | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = ToolGRPOConfig(f"{name.split('/')[-1]}-ToolGRPO")
        args = ToolGRPOConfig.from_grpo_config(args)
        # Whether rollouts are sampled here; with a `rollout_func` and for multimodal models TRL samples
        self.recording = args.record_sample_logprobs and rollout_func is None
        has_environments = environment_factory is not None
        _check_data(args, train_dataset, eval_dataset, bool(tools or mcp_servers), has_environments)
        check_has_values(args, model, reward_funcs)
        check_forcing(args, bool(tools or mcp_servers) or has_environments, train_dataset)
        unrecorded = None
        if not self.recording:
            unrecorded = "`record_sample_logprobs=False`" if rollout_func is None else "a `rollout_func`"
            refuse_unrecorded(args, unrecorded)
        check_sampler(sampler, args, unrecorded)
        estimator = estimator_of(args)
        if args.keep_freed_memory:
            keep_freed_memory()

        # What TRL's constructor reads
        self.args = args
        self.run = Run(self, super())
        self.rollouts = Rollouts(self.run, tools, environment_factory, mcp_servers, sampler)
        with self.rollouts.tools.closed_on_failure():
            if self.rollouts.tools.has_tools:
                check_template(processing_class)
                add_missing_response_template(processing_class)
            if self.recording:
                check_adapted_head(model, peft_config)
            given_adapter = peft_config is None and hasattr(model, "peft_config")
            with (
                synced_by_us(args, model, peft_config),
                without_trls_vllm(args, self.recording),
                without_trls_cast(args, self.recording),
                adapted_head(model) if self.recording else nullcontext(),
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
                    tools=self.rollouts.tools.for_trl or None,
                    rollout_func=rollout_func,
                    environment_factory=self.rollouts.tools.environment_factory,
                )
            given_funcs = self.reward_funcs
            self.rollouts.tools.score_without_failed()

            self._prepare_policy()
            self.reference = ReferencePolicy(self.run, given_adapter)
            if self.recording and self.run.is_multimodal:
                refuse_multimodal(args)
                check_sampler(sampler, args, "a multimodal model")
                self.recording = False
                logger.warning("The model is multimodal: TRL samples its rollouts, and no log-prob is recorded.")
            self._make_parts(estimator, force_policy)
            self.rollouts.check_prompts(train_dataset, eval_dataset)
            if rollout_func is None:  # it may add to the columns
                self._check_columns(given_funcs, train_dataset, eval_dataset)
            functions = zip(self.reward_funcs, self.reward_func_names, strict=True)
            self.reward_funcs = [checked(function, name) for function, name in functions]

    def _make_parts(self, estimator: AdvantageEstimator, force_policy: ForcePolicy | None) -> None:
        """Make the parts that need the model."""
        run = self.run
        self.update = PolicyUpdate(run, self.rollouts)
        self.records = Records(run, self.rollouts, self.update, estimator.relative_to_group)
        if self.args.replay is not None:
            self.replay = Replay(run, self.records.log, estimator.needs_values)
        if self.recording:
            self._check_recording()
            if estimator.needs_values:
                self.critic = Critic(run, self.update.scoring)
        self.advantages = BatchAdvantages(run, estimator)
        self.rollouts.prepare(force_policy, partial(self.records.print, failure="A line could not be printed"))
        self.checkpoints = Checkpoints(
            run,
            of_run={"packing": self.update.scoring.packing, "reference": self.reference},
            of_process={"carried metrics": self.records.carried, "ratios": self.update.ratios},
            given={"advantage estimator": estimator, "sampler": self.rollouts.sampler},
        )
        self.hub = HubPublisher(run, self.rollouts, self.records, self.checkpoints, estimator)
        if self.args.push_to_hub:
            self.hub.create_repository()

    def _prepare_policy(self) -> None:
        """Check and patch the policy."""
        check_optimizer(self.args)
        if self.args.beta > 0:  # without a reference, a policy that is only evaluated may be frozen
            check_policy_is_trained(self.model)
        check_head(self.model)
        check_optimizer_holds_policy(self.model, self.optimizer, self.lr_scheduler)
        keep_trainable(self.model)
        if self.recording and self.args.cast_lm_head_to_fp32:
            cast_heads(self.model, self.temperature)
            if self.ref_model is not None:
                cast_heads(self.accelerator.unwrap_model(self.ref_model), self.temperature, ("log_probs",))
        score_adapted_head(self.model)  # wraps the fused head in use, cast or not

    def _check_recording(self) -> None:
        """Check that what the policy samples is what TRL's loss is about."""
        for name, why in idle_fields(self.args, default_values()).items():
            logger.warning(f"You set `{name}`, which has no effect here: {why}.")
        self.records.print(correction_line(self.args), "The line on the correction could not be printed")
        check_gathering(self.run)
        check_cache(self.args, self.model)
        check_adapter_is_recorded(self.model)
        check_scoring(self.run)
        warn_of_dropout(self.model)

    def _check_columns(
        self, reward_funcs: "Sequence[RewardFunc]", train_dataset: _Data | None, eval_dataset: _EvaluationData | None
    ) -> None:
        """Check that the data and the run have what reward functions ask for."""
        available = {
            "trajectories": self.recording,
            "environments": self.environment_factories is not None,
            "mcp_sessions": self.recording and self.rollouts.tools.mcp is not None,
        }
        absent = [name for name, is_available in available.items() if not is_available]
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            check_columns(name, dataset, reward_funcs, self.reward_func_names, absent)

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """
        Add a callback as TRL does. A tracker that fails later does not end the run; a callback of a user does.

        Args:
            callback (`type` or `TrainerCallback`):
                A callback or its class.
        """
        super().add_callback(callback)
        if "records" in vars(self):
            self.records.failures.guard(self.callback_handler.callbacks[-1])

    # A training begins

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        Train as TRL does. A run that is resumed continues exactly where its checkpoint was written, in the middle of a
        rollout batch too; a new run first moves all that an earlier one has left in `output_dir` to a folder
        `earlier-run-1` there. When training ends, in whatever way, what was logged is on disk.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Checkpoint folder; `True` for the newest whole one in `output_dir`. Torn ones are skipped by name.
            args, kwargs:
                As in [`~transformers.Trainer.train`].

        Raises:
            CheckpointError: if there is no whole checkpoint, or it belongs to another model, adapter, data set or
                batch, or to another number of processes in the middle of a rollout batch, or another version of this
                package wrote it in another form; the message says what differs.
            CheckpointSaveError: if the output folder cannot be written to, is not shared by the machines that take
                part, or does not take the last checkpoint; if the files of an earlier run cannot be moved.
            OutputFolderInUseError: if another run writes to `output_dir`.
        """
        with self.records.of_training():
            checkpoint = self.checkpoints.begin(resume_from_checkpoint)
            self.update.on_train_begin()
            if self.critic is not None:
                self.critic.on_train_begin()
            self.hub.card.on_train_begin()
            self.rollouts.policy_was_replaced()  # steps are counted from 0 again
            result = super().train(checkpoint, *args, **kwargs)
            self.hub.card.on_train_end()
        return result

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make TRL's optimizer, with the value head in a group of its own, and check that it moves the policy."""
        given = self.optimizer is not None
        policy = self.model if model is None else model
        check_policy_is_trained(policy)
        optimizer = super().create_optimizer(model)
        if self.critic is not None:
            self.critic.join_optimizer(optimizer)
        if not (given and model is not None):  # FSDP1 has replaced the parameters since
            check_optimizer_holds_policy(policy, optimizer)
        warn_of_no_learning_rate(policy, optimizer)
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.reference.check_adapter(resume_from_checkpoint)
        with same_parameters(self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self.reference.load(resume_from_checkpoint)
            if self.critic is not None:
                self.critic.load(resume_from_checkpoint)
        self.rollouts.policy_was_replaced()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with nullcontext() if self.critic is None else self.critic.optimizer_without_head(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None and self.is_deepspeed_enabled:  # which has bypassed `_load_from_checkpoint`
                self.reference.load(checkpoint)
        if checkpoint is not None:
            self.checkpoints.load(checkpoint)
            self.records.log.load(checkpoint)

    def _run_epoch(self, **of_epoch: Any) -> None:  # type: ignore[override]  # all of them by name, as it is called
        skipped = of_epoch["epoch"] if of_epoch["epoch"] == of_epoch["epochs_trained"] else 0
        if self.checkpoints.begin_epoch(of_epoch["train_dataloader"], skipped):
            super()._run_epoch(**of_epoch)

    # A micro-batch of a training step; `_prepare_inputs` makes a rollout batch if one is due

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Take a micro-batch forwards and backwards as TRL does. The critic learns along with the policy, and the log
        gets the rollout batch after its last update."""
        if self.critic is not None:
            self.critic.before_backward(model)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.critic is not None:
            self.critic.after_backward()
        self.records.log.after_micro_batch()
        return loss

    def _prepare_inputs(self, generation_batch: Batch) -> Batch:
        if self.replay is not None and self.run.training and self.run.batch_is_due:
            return self._replayed_inputs(self.replay)
        before, counts = self.run.micro_batches, self.records.log.counts()
        inputs = super()._prepare_inputs(generation_batch)
        made = self.run.micro_batches
        if made is None or made is before:  # TRL has made no rollout batch to train on
            return inputs
        split = self.update.split_anew(made)
        if split is not None:
            self.run.micro_batches, inputs = split, split[self.run.micro_batch_index]
        self.records.log.on_batch(counts)
        return inputs

    def _replayed_inputs(self, replay: Replay) -> Batch:
        """Return the first micro-batch of a rollout batch that another run has made."""
        self.reference.before_rollouts()
        self.run.micro_batches = replay.next_batch()
        self.update.begin_batch()
        self.reference.on_replay()
        return self.run.next_micro_batch

    def _generate_and_score_completions(self, inputs: list[Row]) -> Batch:
        self.reference.before_rollouts()
        with self.records.progress.of_rollouts() as measure:
            kept = same_parameters_trained(self.model)  # which scoring with the reference's adapter changes
            with self.rollouts.for_rows(inputs), self.update.recorded_old_logprobs(), kept:
                output = super()._generate_and_score_completions([dict(row) for row in inputs])
            self.reference.on_rollouts(output)
            measure(output)
        if not self.recording:
            return output
        batch = self.rollouts.batch
        if batch is None or batch.rewards is None:
            raise RuntimeError("TRL scored completions without generating them; the installed TRL is not supported.")
        self.update.on_rollouts(output, batch)
        if self.update.warmup.active:
            self.update.warmup.on_rewards(output, batch, batch.rewards)
        elif self.run.training:
            self.advantages.admit(output, batch, batch.rewards)
            values = None if self.critic is None else self.critic.values(self.update.tokens_of(output, batch), batch)
            self.advantages.estimate(output, batch, batch.rewards, values)
        self.update.count_tokens(output)
        return output

    # Rollouts, within TRL's `_generate_and_score_completions`

    def _generate(self, prompts: list[list[Message]]) -> tuple:
        if "rollouts" not in vars(self):  # a trainer without its constructor, made to call this method alone
            return super()._generate(prompts)
        given = self.rollout_func
        self.rollout_func = self.rollouts.of_rollout_func()
        try:
            output = super()._generate(prompts)
        finally:
            self.rollout_func = given
        if self.rollouts.batch is not None:
            self.records.on_rollouts(self.rollouts.batch)
        return self.rollouts.add_fields(prompts, output)

    def _tokenize_prompts(self, prompts: list) -> tuple:
        return self.rollouts.tokenize(prompts, super()._tokenize_prompts)

    def _generate_single_turn(self, prompt_ids: list, images: list | None, *args: Any, **kwargs: Any) -> tuple:
        if not self.recording:
            return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)
        # With tools this is a placeholder: the next hook makes whole rollouts
        return self.rollouts.first_turn(prompt_ids, self.update.warmup.may_force)

    def _tool_call_loop(self, prompts: list, prompt_ids: list, *args: Any) -> tuple:
        if not self.recording:
            return super()._tool_call_loop(prompts, prompt_ids, *args)
        return self.rollouts.whole_rollouts(prompt_ids, self.update.warmup.may_force)

    # Scoring, of a rollout batch and of each micro-batch

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: object,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        tokens = input_ids, attention_mask, logits_to_keep
        with self.reference.weights_for(model):
            scores = self.update.score(model, tokens, batch_size, compute_entropy, compute_aux_loss, images)
        return scores.logps, scores.entropies, scores.aux_loss

    # Rewards, with which TRL ends a rollout batch

    def _calculate_rewards(self, inputs: list[Row], *args: list) -> Tensor:
        rewards = self.rollouts.keep_rewards(super()._calculate_rewards(inputs, *args), len(inputs))
        self.records.on_rewards(self.rollouts.batch, rewards, len(inputs))
        return rewards.scores

    # The loss of a micro-batch

    def _compute_loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        if not self.recording:
            return super()._compute_loss(model, inputs)
        if self.run.training:
            self.records.carried.before_loss()
        if "assist_mask" in inputs:
            loss = self.update.warmup.loss(model, inputs)
            return loss if self.critic is None else self.critic.with_idle_head(loss, model)
        with self.update.loss_of(inputs) as micro_batch, self.advantages.without_empty_figures(micro_batch.mask):
            loss = super()._compute_loss(model, micro_batch.inputs)
        self.update.on_update(micro_batch)
        self.records.on_update(micro_batch)
        if self.critic is None or "value_targets" not in inputs:
            return loss
        return self.critic.with_value_loss(loss, micro_batch)

    # After an optimizer step

    def sync_reference(self) -> SyncReport | None:
        """Make the reference follow the policy now; see [`ReferencePolicy.sync`]."""
        return self.reference.sync()

    # Logs and evaluations

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        Log as TRL does, with the metrics of this package, and look at the health of the run.

        Args:
            logs, start_time:
                As in TRL.

        Raises:
            HealthError: if a rule finds a fault and `health_checks="raise"`.
        """
        self.records.before_log(logs)
        if self.run.training:
            self.reference.on_log()
            if self.recording:
                self.update.on_log()
        with self.records.log.of_log():
            super().log(logs, start_time)
        self.records.after_log(logs)

    def evaluate(
        self,
        eval_dataset: _EvaluationData | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Evaluate as TRL does. All metrics of a data set have its prefix: with several, `eval_<name>_reward`. The card
        of the run includes an evaluation that follows training.

        Args:
            eval_dataset, ignore_keys, metric_key_prefix:
                As in [`~transformers.Trainer.evaluate`].

        Returns:
            `dict[str, float]`: the metrics.
        """
        self.rollouts.noise.begin_evaluation()
        with self.records.of_evaluation(metric_key_prefix):
            figures = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[arg-type]
        self.hub.card.update()
        return figures

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        pushed = self.checkpoints.save(
            partial(super()._save_checkpoint, model, trial),
            trial,
            also=self.records.log.save,
            keep=self.hub.uploading,
            rescue=self.hub.rescue,
        )
        if pushed is not None:
            self.hub.push_checkpoint(str(pushed))

    def _get_output_dir(self, trial: object) -> str:
        staging = self.checkpoints.staging
        return super()._get_output_dir(trial) if staging is None else str(staging)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save as TRL does, with the value head in a file of its own, and push under `push_to_hub`.

        Raises:
            CheckpointSaveError: if the folder does not take the model; it is then written to a temporary folder, which
                the message names.
        """
        if not _internal_call:
            return self.hub.save(output_dir)
        with self.reference.saving(checkpoint=output_dir is not None):
            super().save_model(output_dir, _internal_call)
        if output_dir is not None:
            self.reference.save(output_dir)
        if self.critic is not None:
            self.critic.save(output_dir or str(self.args.output_dir))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.critic is not None:
            state_dict = self.critic.without_head(state_dict)
        with self.hub.without_secrets(), self.reference.left_out():
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        write = partial(super()._save_optimizer_and_scheduler, output_dir)
        self.checkpoints.save_optimizer_and_scheduler(output_dir, write)

    def _save_scaler(self, output_dir: str) -> None:
        with tolerated():
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        with tolerated():
            super()._save_rng_state(output_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.checkpoints.ask_for_push():
            self.hub.push_checkpoint(checkpoint_folder)

    # A training ends

    def _finalize_training(self, trial: object, num_train_samples: object, start_time: float) -> TrainOutput:
        self._finish_current_push()  # before TRL removes the checkpoints other than the best one
        return super()._finalize_training(trial, num_train_samples, self.records.log.start_time())

    def _load_best_model(self) -> None:
        with same_parameters(self.model):
            super()._load_best_model()
            if self.critic is not None and self.state.best_model_checkpoint is not None:
                self.critic.load(self.state.best_model_checkpoint)
        self.rollouts.policy_was_replaced()

    # The Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository; where the Hub refuses or cannot be reached, log it and try again at the next push."""
        if "hub" in vars(self):  # not yet in TRL's constructor, which calls this
            self.hub.create_repository(token, private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Push the adapter (or model), the value head, the tokenizer and a model card to `hub_model_id`.

        What is pushed is written to the folder `hub` in `output_dir` first and stays there.

        Args:
            commit_message, blocking, token, revision, private, kwargs:
                As in [`~transformers.Trainer.push_to_hub`]; `kwargs` go to the model card.

        Returns:
            `CommitInfo`, or a `Future` of one with `blocking=False`; `None` in all processes but the first.

        Raises:
            HubPushError: if the Hub refuses or cannot be reached; says where the work is and the command that pushes
                it later. A push that a save starts is logged instead, and the run goes on.
        """
        return self.hub.push(commit_message, blocking, token, revision, private, kwargs)

    def create_model_card(  # type: ignore[override]  # TRL's signature, not that of transformers
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write the model card: how the model is loaded, its task, tools, rewards and curves, the configuration, and the
        command that reproduces it. Secrets are replaced. A `README.md` that is no model card is left alone.

        Args:
            model_name, dataset_name, tags:
                As in TRL.
        """
        self.hub.card.write(model_name, dataset_name, tags)


def _check_data(
    args: ToolGRPOConfig,
    train_dataset: _Data | None,
    eval_dataset: _EvaluationData | None,
    has_tools: bool,
    has_environments: bool,
) -> None:
    """Check the data sets before TRL's constructor reads them."""
    for name, dataset in named_datasets(train_dataset, eval_dataset):
        check_dataset(name, dataset, has_tools, has_environments)
    check_rows(args, train_dataset)
    check_best_metric(args, eval_dataset)
