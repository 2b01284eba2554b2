"""What this package knows of TRL, transformers and torch beyond their public interfaces, all of it in this file.

[`Run`] is a trainer as the parts of this package see it: TRL's private attributes have public names here, and the
place in the rollout batch is computed here alone. The tables at the end hold what an installed release is tested for.
"""

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer_callback import CallbackHandler
from transformers.utils.chat_parsing.response_parser import _coerce
from trl.extras.profiling import ProfilingContext, profiling_context
from trl.models import unwrap_model_for_generation

from .config.batch_position import micro_batches_of
from .config.fields import ToolGRPOConfig
from .types import Batch, JSONObject


if TYPE_CHECKING:
    from accelerate import Accelerator


ATTRIBUTES = {
    "step": "_step",
    "micro_batches": "_buffered_inputs",
    "metrics_by_mode": "_metrics",
    "completions_table": "_logs",
    "pending_columns": "_pending_extra_logs",
    "unlogged_loss": "_tr_loss",
    "last_logged_step": "_globalstep_last_logged",
    "tokenizer": "_tokenizer",
    "is_multimodal": "_is_vlm",
    "has_entropy_bonus": "_entropy_bonus_enabled",
    "tools_of_environments": "_env_tools",
    "environment_pool": "_environment_pool",
    "environment_of_rows": "_batch_environments",
    "standalone_tools": "_standalone_tools",
}
"""Names of [`Run`], and the attributes of TRL's and transformers' trainers that they stand for."""


class Run:
    """
    A training run as the parts of the trainer see it.

    The annotated names below are the trainer's own attributes, or those of [`ATTRIBUTES`]; they can be read and set. A
    part is tested without a trainer by giving it a `Run` over any object that has what the part reads.

    Args:
        trainer ([`ToolGRPOTrainer`] or any object):
            Whose attributes these are.
        trl (`GRPOTrainer`, *optional*):
            The same trainer without this package's overrides, as `super()` gives it.
    """

    # Public in TRL and transformers
    args: ToolGRPOConfig
    model: PreTrainedModel
    model_wrapped: nn.Module
    ref_model: nn.Module | None
    accelerator: "Accelerator"
    state: TrainerState
    control: TrainerControl
    callback_handler: CallbackHandler
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: Any
    processing_class: Any
    chat_template: str | None
    chat_template_kwargs: JSONObject
    train_dataset: Any
    tools: list
    environments: list | None
    environment_factories: Any
    rollout_func: Any
    reward_funcs: list
    reward_func_names: list[str]
    reward_weights: Tensor
    num_generations: int
    eos_token_ids: list[int]
    temperature: float
    beta: float
    use_vllm: bool
    log_completions: bool
    mask_truncated_completions: bool
    top_entropy_quantile: float
    aux_loss_enabled: bool
    router_aux_loss_coef: float
    current_gradient_accumulation_steps: int
    hub_model_id: str | None
    push_in_progress: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    # This package's
    recording: bool
    # TRL's private ones, by the names of `ATTRIBUTES`
    step: int
    micro_batches: list[Batch] | None
    metrics_by_mode: dict[str, Any]
    completions_table: Any
    pending_columns: Any
    unlogged_loss: Tensor
    last_logged_step: int
    tokenizer: PreTrainedTokenizerBase
    is_multimodal: bool
    has_entropy_bonus: bool
    tools_of_environments: dict[Hashable, list]
    environment_pool: dict[Hashable, list]
    environment_of_rows: list
    standalone_tools: list

    def __init__(self, trainer: Any, trl: Any = None) -> None:
        self._trainer, self._trl = trainer, trl
        self.loss_to_take_up: tuple[Tensor, int] | None = None  # that a resumed run had not logged

    def __getattr__(self, name: str) -> Any:
        if name not in Run.__annotations__:
            raise AttributeError(f"A run has no `{name}`.")
        return getattr(self._trainer, ATTRIBUTES.get(name, name))

    def __setattr__(self, name: str, value: object) -> None:
        if name in Run.__annotations__:
            setattr(self._trainer, ATTRIBUTES.get(name, name), value)
        else:
            super().__setattr__(name, value)

    @property
    def training(self) -> bool:
        """Whether the policy is in training mode, rather than evaluated."""
        return self.model.training

    @property
    def metrics(self) -> dict[str, list[float]]:
        """The figures collected for the next log, of training or of the evaluation in progress."""
        return self.metrics_by_mode["train" if self.training else "eval"]

    @property
    def training_metrics(self) -> dict[str, list[float]]:
        """The figures collected for the next log of training."""
        return self.metrics_by_mode["train"]

    @property
    def bare_model(self) -> Any:
        """The policy without what wraps it for training."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the first of all."""
        return self.accelerator.is_main_process

    def gather_sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor's values over all processes, a scalar."""
        return self.accelerator.gather(values.sum()).sum()

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a callback to the trainer."""
        self._trainer.add_callback(callback)

    def pop_callback(self, kind: type[TrainerCallback]) -> TrainerCallback | None:
        """Remove the first callback of a class from the trainer, and return it."""
        return self._trainer.pop_callback(kind)

    # Where training is in its rollout batches

    @property
    def batch_number(self) -> int:
        """Number of the rollout batch that the next micro-batch belongs to, from 0, over the whole run."""
        return self.step // micro_batches_of(self.args)

    @property
    def batch_is_due(self) -> bool:
        """Whether the next micro-batch belongs to a new rollout batch, as TRL decides it."""
        return self.step % micro_batches_of(self.args) == 0 or self.micro_batches is None

    @property
    def batch_in_use(self) -> bool:
        """Whether the present rollout batch has micro-batches left to feed."""
        return not self.batch_is_due

    @property
    def micro_batch_index(self) -> int:
        """Index of the next micro-batch in its rollout batch."""
        return self.step % (self.args.steps_per_generation or 1)

    @property
    def next_micro_batch(self) -> Batch:
        """The micro-batch that the next step takes."""
        if self.micro_batches is None:
            raise RuntimeError("There is no next micro-batch, since no rollout batch was made yet.")
        return self.micro_batches[self.micro_batch_index]

    def state_dict(self) -> JSONObject:
        """Return where this process is in the run, in addition to what transformers keeps: tensors and plain data."""
        return {
            "step": self.step,
            "batches": list(self.micro_batches or ()) if self.batch_in_use else [],
            "metrics": {name: list(values) for name, values in self.training_metrics.items()},
            "loss": self.unlogged_loss,
            "last_logged": self.last_logged_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Continue from where a process was. The loss that was not logged yet is taken up by
        [`Run.take_up_unlogged_loss`], since transformers begins an epoch with none.
        """
        self.step = state["step"]
        self.micro_batches = [dict(batch) for batch in state["batches"]] or None
        metrics = self.training_metrics
        metrics.clear()
        metrics.update({name: list(values) for name, values in state["metrics"].items()})
        self.loss_to_take_up = (state["loss"], state["last_logged"])

    def take_up_unlogged_loss(self) -> None:
        """Add the loss that a resumed run had not logged yet; does nothing for a run that was not resumed."""
        if self.loss_to_take_up is not None:
            loss, self.last_logged_step = self.loss_to_take_up
            self.unlogged_loss, self.loss_to_take_up = self.unlogged_loss + loss, None

    def forget_place(self) -> None:
        """Begin with a rollout batch, also where this trainer has trained before."""
        self.step, self.micro_batches = 0, None

    def forget_unlogged_loss(self) -> None:
        """Take up no loss of an earlier training."""
        self.loss_to_take_up = None

    # TRL's own methods

    def trl_scores(
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
        """Return log-probs and entropies of completion tokens, nats, shape (B, T), and the router loss, from TRL's own
        scoring pass."""
        return self._trl._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss, **images
        )

    def generate(self, rows: list[JSONObject]) -> Batch:
        """Make a rollout batch of some rows of the data set, as a training step does."""
        return self._trainer._generate_and_score_completions(rows)

    def output_folder(self, trial: object = None) -> str:
        """Return the folder that checkpoints are written to."""
        return self._trainer._get_output_dir(trial)

    def save_checkpoint(self, trial: object = None) -> None:
        """Write a checkpoint now, as the save strategy does."""
        self._trainer._save_checkpoint(self.model, trial=trial)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def save_model(self) -> None:
        """Write the model to `output_dir`, without a push."""
        self._trainer.save_model(_internal_call=True)

    def push_to_hub(self, message: str, blocking: bool) -> Any:
        """Push the model, as the trainer does."""
        return self._trainer.push_to_hub(message, blocking)

    def create_repository(self, token: str | None, private: bool | None) -> None:
        """Create the repository on the Hub, as transformers does."""
        self._trl.init_hf_repo(token, private)

    def create_model_card(self, **kwargs: Any) -> None:
        """Write the model card, as the trainer does."""
        self._trainer.create_model_card(**kwargs)

    def trl_model_card(self, name: str, dataset_name: str | None, tags: Sequence[str]) -> None:
        """Write TRL's own model card to `output_dir`."""
        self._trl.create_model_card(name, dataset_name, list(tags))

    def finish_current_push(self) -> None:
        """Wait for the push in progress."""
        self._trainer._finish_current_push()

    @contextmanager
    def arguments(self, args: ToolGRPOConfig) -> Iterator[None]:
        """Have the trainer read another configuration while open."""
        usual, self._trainer.args = self._trainer.args, args
        try:
            yield
        finally:
            self._trainer.args = usual

    def profiled(self, name: str) -> AbstractContextManager[None]:
        """Have TRL's profiler time a part of a step."""
        return profiling_context(self._trainer, name)

    @contextmanager
    def gathered_policy(self) -> Iterator[PreTrainedModel]:
        """Unwrap the policy and gather its parameters, as TRL prepares it for generation, without gradients."""
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,  # type: ignore[arg-type]
            ) as policy,
            torch.no_grad(),
            self._trainer._dist.summon_full_params(self.model_wrapped, recurse=False),
            gathered_parameters(policy),
        ):
            yield policy


@contextmanager
def gathered_parameters(model: nn.Module) -> Iterator[None]:
    """
    Gather the parameters that FSDP2 has sharded, once for a whole rollout batch.

    Otherwise every forward pass is a collective, and processes whose rollouts differ in length wait for each other
    forever. Does nothing for a model that is not sharded.

    Args:
        model (`nn.Module`):
            The policy.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if sharded:
        state: Any = sharded[0]._get_fsdp_state()
        if state._is_root is None:  # before its first pass, or the part that sampling calls would become the root
            state._lazy_init()
    settings = [setting for module in sharded for setting in _reshard_settings(module, module is sharded[0])]
    for module in sharded:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for group, reshards_to in settings:
            group.post_forward_mesh_info = reshards_to
        for module in sharded:
            module.reshard()


def _reshard_settings(module: FSDPModule, is_root: bool) -> Iterable[tuple[Any, Any]]:
    """Return the parameter groups of a module, each with what it reshards to after a forward pass; `None` if it stays
    gathered."""
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    # By default FSDP2 leaves the root gathered, and arranges that in the first forward pass
    stays = is_root and state._auto_reshard_after_forward
    return [(group, None if stays else group.post_forward_mesh_info) for group in groups if group is not None]


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """Return the name of the attention function that a model with this configuration uses."""
    return config._attn_implementation


@contextmanager
def replaced_attention(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Have a model with this configuration use another registered attention function while open."""
    usual, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = usual


def has_replaceable_attention(model: nn.Module) -> bool:
    """Return whether the attention of a model goes through transformers' attention interface."""
    return bool(getattr(model, "_supports_attention_backend", False))


@contextmanager
def around_checkpointed_parts(model: nn.Module, around: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """
    Have the parts of a model that gradient checkpointing computes twice run within a context both times.

    A forward pass made while this is open keeps its context for its own backward pass, whenever that comes and
    whichever thread computes it.

    Args:
        model (`PreTrainedModel`):
            The model, without its adapter.
        around (`Callable`):
            Makes the context; called for each part and time.
    """
    usual = [(module, name, getattr(module, name)) for module, name in _checkpointing_functions(model)]
    for module, name, function in usual:
        setattr(module, name, functools.partial(_checkpoint_within, function, around))
    try:
        yield
    finally:
        for module, name, function in usual:
            setattr(module, name, function)


def _checkpoint_within(
    checkpoint: Callable[..., Any],
    around: Callable[[], AbstractContextManager[None]],
    part: Callable[..., Any],
    *args: object,
    **kwargs: object,
) -> Any:
    def within(*given: object, **options: object) -> Any:
        with around():
            return part(*given, **options)

    return checkpoint(within, *args, **kwargs)


def _checkpointing_functions(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield where the functions are that run a part of a model and compute it again in the backward pass:
    transformers' own, and those of torch's wrapper, which accelerate uses for FSDP2."""
    of_transformers, of_torch = CHECKPOINTING_FUNCTIONS
    for module in model.modules():
        if of_transformers in module.__dict__:
            yield module, of_transformers
        if isinstance(module, CheckpointWrapper):
            yield module, of_torch


def is_checkpointed(model: nn.Module) -> bool:
    """Return whether a part of a model is computed again in the backward pass."""
    return any(
        isinstance(module, CheckpointWrapper) or getattr(module, "gradient_checkpointing", False)
        for module in model.modules()
    )


def has_unknown_checkpointing(model: nn.Module) -> bool:
    """Return whether a part of a model says that it is computed again, but not by which function."""
    known = {id(module) for module, _ in _checkpointing_functions(model)}
    return any(getattr(m, "gradient_checkpointing", False) and id(m) not in known for m in model.modules())


def is_stateful(model: nn.Module) -> bool:
    """Return whether transformers says that a model keeps a state other than keys and values."""
    return bool(getattr(model, "_is_stateful", False))


def checkpoint_tensors(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Return a model's tensors with the names and in the form that `save_pretrained` gives them in a checkpoint.

    Args:
        model (`PreTrainedModel`):
            The model.
        state (`Mapping[str, Tensor]`):
            Its tensors by their names in the model, tied ones once.
    """
    ignored = model._keys_to_ignore_on_save or ()
    return revert_weight_conversion(model, {name: value for name, value in state.items() if name not in ignored})


def name_or_path(model: PreTrainedModel) -> str:
    """Return the name or folder that a model was loaded from; empty if there is none."""
    return str(getattr(model.config, "_name_or_path", "") or "")


def cast_text(text: str, kind: str) -> Any:
    """Return a text as a value of a type of JSON Schema, as transformers' parser does; the text if it is none."""
    return _coerce(text, (kind,))


def forward_without_autocast(model: nn.Module) -> Callable[..., Any] | None:
    """Return a model's own forward pass, if accelerate has put autocast around it; else `None`."""
    return vars(model).get("_original_forward")


@contextmanager
def profiler_reporting_within(guard: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """
    Have TRL's profiler, which sends each duration to trackers by itself, do so within a context manager, while open.

    Args:
        guard (`Callable`):
            Makes that context manager.
    """
    usual = ProfilingContext._log_metrics

    def guarded(context: ProfilingContext, duration: float) -> None:
        with guard():
            usual(context, duration)

    ProfilingContext._log_metrics = guarded  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        ProfilingContext._log_metrics = usual  # type: ignore[method-assign]


# What a release of TRL, transformers, PEFT or torch can change. tests/test_contract.py is made from these tables.


class Hook(NamedTuple):
    """
    A method of `GRPOTrainer`, its own or inherited, and what this package relies on in it.

    Args:
        parameters (`str`):
            Names of its parameters after `self`, separated by blanks; those after an ellipsis are not relied on.
        used_by (`str`):
            What of this package relies on them.
        holds (`Mapping[str, str]`):
            Expressions in its source, or in that of the method it overrides in transformers, each with what of this
            package relies on it.
        returns (`str`):
            Names that it returns last, as a tuple, separated by blanks; empty if nothing relies on them.
    """

    parameters: str
    used_by: str
    holds: Mapping[str, str] = MappingProxyType({})
    returns: str = ""


OVERRIDDEN = {
    "add_callback": Hook("callback", "monitoring.records.Records guards the callback that was added last"),
    "train": Hook("resume_from_checkpoint trial ignore_keys_for_eval", "checkpoints.resume.Checkpoints.begin"),
    "create_optimizer": Hook("model", "critic.critic.Critic.join_optimizer gives the value head a group of its own"),
    "_load_from_checkpoint": Hook(
        "resume_from_checkpoint model",
        "critic.critic.Critic.load reads the value head, and reference.sync.ReferencePolicy.load the reference",
    ),
    "_load_optimizer_and_scheduler": Hook(
        "checkpoint", "critic.critic.Critic.optimizer_without_head resumes a run that had no value head"
    ),
    "_run_epoch": Hook(
        "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval start_time "
        "resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
        "checkpoints.resume.Checkpoints.begin_epoch brings the order of the data to the epoch, and skips it where "
        "nothing is left to do",
        {
            "skip_first_batches(train_dataloader, steps_trained_in_current_epoch)": (
                "checkpoints.resume.Checkpoints leaves the position within an epoch to it"
            ),
            "self._load_rng_state(": "checkpoints.resume.Checkpoints leaves the random numbers to it",
        },
    ),
    "training_step": Hook(
        "model inputs num_items_in_batch",
        "critic.critic.Critic.before_backward and .after_backward",
        {"self._step += 1": "trl_hooks.Run.batch_number counts rollout batches by it"},
    ),
    "_prepare_inputs": Hook(
        "generation_batch",
        "update.policy_update.PolicyUpdate.split_anew splits what it has stored",
        {
            "if self._step % generate_every == 0 or self._buffered_inputs is None": (
                "trl_hooks.Run.batch_is_due repeats it"
            ),
            "split_tensor_dict(generation_batch, self.args.steps_per_generation)": (
                "update.policy_update.PolicyUpdate.split_anew splits as many rows anew"
            ),
            "self._buffered_inputs[self._step % self.args.steps_per_generation]": (
                "trl_hooks.Run.next_micro_batch repeats it"
            ),
        },
    ),
    "_generate_and_score_completions": Hook(
        "inputs",
        "update.policy_update.PolicyUpdate.on_rollouts sets the old log-probs in its result",
        {
            "gradient_accumulation_steps % generate_every": (
                "update.policy_update.PolicyUpdate.recorded_old_logprobs repeats it, to know when TRL's first scoring "
                "pass is the one to answer"
            ),
            "generate_every = self.args.steps_per_generation * self.num_iterations": (
                "config.batch_position.micro_batches_of repeats it"
            ),
            'output["sampling_per_token_logps"] = sampling_per_token_logps': (
                "reference.sync.ReferencePolicy.on_rollouts compares the reference with them"
            ),
            'output["tool_mask"] = tool_mask': "update.policy_update.PolicyUpdate.on_rollouts corrects it",
            '"num_items_in_batch": num_items_in_batch': ("update.policy_update.PolicyUpdate.count_tokens corrects it"),
            "for tool in self._standalone_tools + methods": (
                "rollout.rollouts.Rollouts.prepare empties `_standalone_tools`, since the executor calls the tools"
            ),
            "self._environment_pool[name]": (
                "rollout.tools_of_rollouts.RolloutTools.take_back takes lost environments out of the pool"
            ),
            "pool.append(self.environment_factories[name]())": (
                "tools.runtime.environments.on_own_thread wraps the factory, so that new environments get a thread"
            ),
            "observation = environment.reset(": (
                "tools.runtime.environments.on_own_thread runs `reset` on the environment's thread; "
                "chat.inert_prompts.with_observation finds what it said"
            ),
            '"content": content + observation}': (
                "chat.inert_prompts.with_observation finds what `reset` said at the end of the last message"
            ),
            'adapter_name="ref" if "ref" in model.peft_config else None': (
                "reference.adapter.AdapterReference is found by that name; reference.merged.MergedReference is scored "
                "with the adapter off"
            ),
            "self._batch_environments = ": "rollout.prompts.RolloutPrompts.tokenize swaps it for row numbers",
        },
    ),
    "_generate": Hook(
        "prompts",
        "rollout.rollouts.Rollouts.add_fields adds `trajectories` to its result",
        {
            "if self.tools:": "rollout.rollouts.Rollouts.first_turn relies on the tool loop being called with tools",
            "self._generate_single_turn(": "rollout.rollouts.Rollouts.first_turn is the rollout without tools",
            "self._tool_call_loop(": "rollout.rollouts.Rollouts.whole_rollouts is the rollout with tools",
            '["completions/clipped_ratio"].append(': "monitoring.records.Records.on_rollouts corrects the last value",
            '["completions/mean_terminated_length"].append(': (
                "monitoring.records.Records.on_rollouts corrects the last value"
            ),
            'self._metrics[mode]["num_tokens"] = [self.state.num_input_tokens_seen]': (
                "run_folder.writer.RunLog and run_folder.replay.Replay know that it is replaced"
            ),
        },
        "prompt_ids completion_ids tool_mask completions logprobs extra_fields images tool_images",
    ),
    "_tokenize_prompts": Hook(
        "prompts",
        "rollout.prompts.RolloutPrompts.tokenize renders each prompt with its own tools",
        {
            "self._env_tools[name]": "rollout.prompts.RolloutPrompts.tokenize swaps it for the tools of each row",
            "zip(prompts, self._batch_environments": (
                "rollout.prompts.RolloutPrompts.tokenize swaps it for row numbers"
            ),
        },
        "prompt_ids images multimodal_fields",
    ),
    "_generate_single_turn": Hook(
        "prompt_ids images multimodal_fields num_generations has_tool_images",
        "rollout.rollouts.Rollouts.first_turn replaces it",
        returns="completion_ids logprobs",
    ),
    "_tool_call_loop": Hook(
        "prompts prompt_ids completion_ids completions logprobs images multimodal_fields",
        "rollout.rollouts.Rollouts.whole_rollouts replaces it",
        returns="tool_mask completions completion_ids logprobs tool_call_count tool_failure_count tool_images",
    ),
    "_calculate_rewards": Hook(
        "inputs prompts completions completion_ids_list",
        "rollout.rollouts.Rollouts.keep_rewards takes the scores from it",
        {
            'reward_kwargs["log_extra"] = self._log_completion_extra': (
                "validation.rewards.checked gives reward functions its own in place of it"
            ),
            'reward_kwargs["log_metric"] = self._log_metric': (
                "validation.rewards.checked gives reward functions its own in place of it"
            ),
        },
    ),
    "_get_per_token_logps_and_entropies": Hook(
        "model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss ...",
        "update.policy_update.PolicyUpdate.score is given them, and trl_hooks.Run.trl_scores passes them by position",
    ),
    "_compute_loss": Hook(
        "model inputs",
        "update.policy_update.PolicyUpdate.loss_of gives it the inputs",
        {
            'old_per_token_logps = inputs.get("old_per_token_logps")': (
                "update.policy_update.PolicyUpdate.on_rollouts puts the recorded log-probs there"
            ),
            "self._get_per_token_logps_and_entropies(": (
                "update.policy_update.PolicyUpdate.score takes the policy's log-probs from this call"
            ),
            'self.use_vllm and self.vllm_importance_sampling_correction and self.loss_type != "vespo"': (
                "update.sampler_correction.SamplerCorrection.correct sets `use_vllm`, to have the loss multiplied by "
                "the importance sampling weight"
            ),
            'per_token_loss * inputs["importance_sampling_ratio"]': (
                "update.sampler_correction.SamplerCorrection.correct puts the weight there"
            ),
            'importance_sampling_ratio=inputs.get("importance_sampling_ratio")': (
                "update.sampler_correction.SamplerCorrection.correct puts the weight of VESPO there"
            ),
        },
    ),
    "log": Hook(
        "logs start_time",
        "monitoring.records.Records.before_log adds metrics",
        {
            "if self.accelerator.is_main_process and self.log_completions:": (
                "run_folder.writer.RunLog.of_log gives another `_logs` there"
            ),
            'f"completions_{self.state.global_step:05d}.parquet"': (
                "run_folder.writer.RunLog.of_log removes a torn one"
            ),
            'self._logs["prompt"]': "run_folder.writer.RunLog.of_log gives another `_logs`",
            'dict(self._logs["extra"])': "run_folder.writer.RunLog.of_log gives another `_logs`",
            "self.state.log_history.append(output)\n    self.control = self.callback_handler.on_log(": (
                "run_folder.writer.RunLog.of_log tells failures of callbacks from those of the table, and reads the "
                "last entry"
            ),
        },
    ),
    "evaluate": Hook(
        "eval_dataset ignore_keys metric_key_prefix",
        "monitoring.records.Records.of_evaluation gives the metrics of a data set its prefix",
    ),
    "_save_checkpoint": Hook(
        "model trial",
        "checkpoints.resume.Checkpoints.save publishes what it wrote, and trl_hooks.Run.save_checkpoint calls it",
        {"self._get_output_dir(trial=trial)": "checkpoints.resume.Checkpoints.save has it written elsewhere"},
    ),
    "_get_output_dir": Hook("trial", "checkpoints.resume.Checkpoints.save has checkpoints written elsewhere"),
    "save_model": Hook(
        "output_dir _internal_call",
        "critic.critic.Critic.save writes the value head as well",
        {"if self.args.push_to_hub and not _internal_call:": "hub.push.HubPublisher.save pushes by itself"},
    ),
    "_save": Hook(
        "output_dir state_dict",
        "critic.critic.Critic.without_head keeps the value head out of the policy",
        {"torch.save(self.args, ": "hub.push.HubPublisher.without_secrets keeps the Hub token out of them"},
    ),
    "_save_optimizer_and_scheduler": Hook(
        "output_dir",
        "checkpoints.resume.Checkpoints.save_optimizer_and_scheduler tolerates a full disk, and replaces it for FSDP",
        {
            expression: (
                "checkpoints.resume.Checkpoints.save_optimizer_and_scheduler makes these calls for FSDP and tolerates "
                "failures"
            )
            for expression in (
                "elif self.is_fsdp_enabled:",
                "self.accelerator.state.fsdp_plugin, self.accelerator, self.model, output_dir, "
                "**get_fsdp_ckpt_kwargs()",
                "self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir",
                "torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))",
            )
        },
    ),
    "_save_scaler": Hook("output_dir", "run_folder.storage_failures.tolerated keeps a full disk from ending the run"),
    "_save_rng_state": Hook(
        "output_dir", "run_folder.storage_failures.tolerated keeps a full disk from ending the run"
    ),
    "_push_from_checkpoint": Hook(
        "checkpoint_folder", "hub.push.HubPublisher.push_checkpoint replaces it once the checkpoint is published"
    ),
    "_load_best_model": Hook("", "critic.critic.Critic.load reads the value head"),
    "_finalize_training": Hook(
        "trial num_train_samples start_time",
        "trainer.ToolGRPOTrainer waits for uploads before checkpoints are removed, and "
        "run_folder.writer.RunLog.start_time gives it a start by the monotonic clock",
    ),
    "init_hf_repo": Hook("token private", "hub.push.HubPublisher.create_repository continues without the Hub"),
    "push_to_hub": Hook(
        "commit_message blocking token revision private kwargs",
        "hub.push.HubPublisher.push pushes a folder of its own",
        {
            expression: "hub.push.HubPublisher.push does the same with a folder of its own"
            for expression in (
                "self.callback_handler.on_push_begin(self.args, self.state, self.control)",
                "if self.hub_model_id is None:\n        self.init_hf_repo(",
                "revision = self.args.hub_revision",
                "return hf_api().upload_folder(",
            )
        },
    ),
    "create_model_card": Hook(
        "model_name dataset_name tags",
        "hub.model_card.RunCard.write adds to it",
        {
            'model_card.save(os.path.join(self.args.output_dir, "README.md"))': (
                "hub.model_card.RunCard.write reads it there"
            )
        },
    ),
}
"""Methods that [`ToolGRPOTrainer`] overrides."""

RELIED_ON = {
    "__init__": Hook(
        "...",
        "trainer.ToolGRPOTrainer passes on what it was given",
        {
            "if args.sync_ref_model:": "reference.sync.synced_by_us keeps TRL from it",
            "def get_reward(environments, _env_type=env_type, **kwargs)": (
                "tools.runtime.environments.scoring_without_failed knows it by its default, and passes another class"
            ),
            "type(e) is _env_type": "tools.runtime.environments.scoring_without_failed passes another class",
            "if self.use_vllm:": "rollout.vllm_rollouts.without_trls_vllm turns it off",
            "VLLMGeneration(": "rollout.vllm_rollouts.without_trls_vllm keeps it from being made",
        },
    ),
    "_inner_training_loop": Hook(
        "...",
        "trl_hooks.Run.take_up_unlogged_loss adds the loss not logged yet when an epoch begins",
        {
            expression: "trl_hooks.Run.take_up_unlogged_loss adds to what an epoch begins with"
            for expression in (
                "self._tr_loss = torch.tensor(0.0",
                "self._globalstep_last_logged = ",
                "self._run_epoch(",
                "epoch=epoch,",
                "train_dataloader=train_dataloader,",
                "epochs_trained=epochs_trained,",
            )
        },
    ),
    "_prepare_for_training": Hook(
        "...",
        "checkpoints.resume.Checkpoints.load is called within it",
        {
            "self._load_optimizer_and_scheduler(resume_from_checkpoint)": (
                "checkpoints.resume.Checkpoints.load takes place there"
            )
        },
    ),
    "_log_completion_extra": Hook(
        "column values",
        "run_folder.writer.RunLog.on_rewards aligns the columns",
        {"self._pending_extra_logs[column].extend(values)": "run_folder.writer.RunLog.on_rewards aligns them"},
    ),
    "_finish_current_push": Hook("", "hub.push.HubPublisher.push_checkpoint waits for the one before"),
    "set_initial_training_values": Hook("args dataloader", "validation.chat_templates.training_steps counts so"),
}
"""Methods that are called or copied, and not overridden."""

OTHER_ATTRIBUTES = {
    "_dist": "trl_hooks.Run.gathered_policy gathers parameters with it",
    "_tag_names": "trainer.ToolGRPOTrainer has its own",
    "num_iterations": "config.batch_position.micro_batches_of goes by it, by its name in the configuration",
    "vllm_importance_sampling_correction": (
        "update.sampler_correction.SamplerCorrection.correct relies on it being on unless it was turned off"
    ),
}
"""Attributes of TRL's trainer in addition to those of [`Run`], and what relies on them."""

RESPONSE_PARSER = {
    "_accumulate": "self events text",
    "_body": None,
    "_buffer": None,
    "_close_current": "self events",
    "_current": None,
    "_open_explicit": "self events field m",
    "_opened": None,
    "_output": None,
    "_reset_to_implicit": "self",
    "_scan": "self watch eos",
    "_spec": None,
    "finalize": "self",
}
"""Methods of transformers' `ResponseParser`, with their parameters, and its attributes, that `chat.parsing` overrides
or reads."""

FSDP = {
    "FSDPModule": ("_get_fsdp_state",),
    "FSDPState": ("_auto_reshard_after_forward", "_fsdp_param_group", "_fsdp_param_groups", "_is_root", "_lazy_init"),
    "FSDPParamGroup": ("post_forward_mesh_info",),
}
"""Names of torch's FSDP2, by class, that [`gathered_parameters`] goes by. A state has one group, or a list of them."""

MODEL_ATTRIBUTES = ("_is_stateful", "_keys_to_ignore_on_save", "_supports_attention_backend")
"""Attributes of `PreTrainedModel` that the functions here read."""

CONFIG_ATTRIBUTES = ("_attn_implementation", "_name_or_path")
"""Attributes of `PreTrainedConfig` that the functions here read."""

CHECKPOINTING_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")
"""Attributes of a module of transformers and of torch's `CheckpointWrapper` that hold the function which computes a
part of a model, and computes it again in the backward pass."""
