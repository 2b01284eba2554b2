"""What this package knows of TRL, transformers and torch beyond their public interfaces, all of it in this file.

[`Run`] is a trainer as the parts of this package see it: TRL's private attributes have public names here, and the
place in the rollout batch is computed here alone.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_callback import CallbackHandler
from trl.extras.profiling import profiling_context
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
        return (self.micro_batches or [{}])[self.micro_batch_index]

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
