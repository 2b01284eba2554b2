"""The model card of a run: what the trainer knows of it, without secrets.

Owns what is gathered and where the card is written, as a mixin of the trainer; the texts are those of `model_card.py`.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import get_int_from_env
from huggingface_hub import ModelCard
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from . import model_card
from .checkpoint import checkpoints, fault_of
from .config import ToolGRPOConfig, changed_fields
from .log_failures import LogFailures
from .redaction import masked
from .run_files import CARD, holds_other_page, other_page_aside, run_redactor
from .tools.mcp import MCPTools
from .tools.toolset import ToolSet
from .value import ValueHead
from .version import __version__


logger = logging.getLogger(__name__)

_PACKAGES = {"PEFT": "peft", "Accelerate": "accelerate", "huggingface_hub": "huggingface_hub"}
_POLICIES = {
    "transformer_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "size_based_auto_wrap_policy": "SIZE_BASED_WRAP",
}
# Fields that are of this machine or account, not of the run
_UNTOLD = re.compile(r"(output_dir|logging_dir|run_name|push_to_hub|hub_.*|.*token|trackio_.*|project|disable_tqdm)$")


class RunCard(GRPOTrainer):
    """Part of [`ToolGRPOTrainer`]: the card that TRL writes, with what TRL does not know of."""

    args: ToolGRPOConfig
    model: Any
    hub_model_id: Any
    chat_template_kwargs: dict[str, Any]
    _is_vlm: bool
    _toolset: ToolSet
    _log_failures: LogFailures
    _owns_folder: Callable[[], bool]  # of `run_log.py`
    _mcp: MCPTools | None
    _value_head: ValueHead | None
    _home: str | None = None  # the output folder, while another one stands in for it
    _stays = False  # the card that is being written is for a folder of this machine
    _trained = False  # a training has ended, and none is in progress

    def create_model_card(  # type: ignore[override]  # TRL's signature, not that of transformers
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        TRL's card, with what it does not know: how the model is loaded, its task, tools, rewards and curves, the
        configuration, and the command that reproduces it. Secrets are replaced. A page in its place that is no model
        card is left alone.

        Args:
            model_name, dataset_name, tags:
                As in TRL.
        """
        with self._log_failures.tolerated("The model card could not be written"):
            folder = Path(str(self.args.output_dir))
            if self.is_world_process_zero():
                folder.mkdir(parents=True, exist_ok=True)
            if self.is_world_process_zero() and holds_other_page(folder):
                sentence = f"No model card was written: {folder / CARD} is there, and is none"
                return self._log_failures.say_once(sentence, sentence)
            super().create_model_card(model_name, dataset_name, tags)
            if self.is_world_process_zero():
                self._complete_card(model_name, dataset_name)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's training, and the card of the run when it has ended."""
        self._trained = False
        result = super().train(*args, **kwargs)
        self._trained = True
        self._update_card()
        return result

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's evaluation; one that follows training is in the card of the run, too."""
        figures = super().evaluate(*args, **kwargs)
        if self._trained:
            self._update_card()
        return figures

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        TRL's save; after training with the card of the run, in place of the one that PEFT writes. A page in its place
        that is no card, which PEFT reads and adds to, stays as it is.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        with other_page_aside(folder) if self.args.should_save else nullcontext():
            super().save_model(output_dir, _internal_call)
        if self._trained and not _internal_call:
            self._update_card(output_dir)

    def _update_card(self, output_dir: str | None = None) -> None:
        """Write the card of a folder anew."""
        if not self.is_world_process_zero():
            return
        folder, usual, home = Path(output_dir or str(self.args.output_dir)), self.args.output_dir, self._home
        if not output_dir and not self._owns_folder():
            return
        self._home, self._stays = str(usual), True
        self.args.output_dir = str(folder)
        try:
            self.create_model_card(model_name=(self.args.hub_model_id or self._name_of_run).split("/")[-1])
        finally:
            self.args.output_dir, self._home, self._stays = usual, home, False

    def _complete_card(self, model_name: str | None, dataset_name: str | None) -> None:
        file = Path(str(self.args.output_dir)) / CARD
        card = ModelCard.load(file)
        if self._has_adapter:
            card.data.library_name = "peft"
        versions = {"trl_toolgrpo": __version__, **{shown: version(name) for shown, name in _PACKAGES.items()}}
        title, sections = self._title(model_name or self._name_of_run), self._sections(dataset_name)
        card.text = self._redacted(model_card.compose(card.text, title, sections, versions, self._method()))
        card.save(file)

    @property
    def _name_of_run(self) -> str:
        return Path(str(self._home or self.args.output_dir)).absolute().name

    @property
    def _has_adapter(self) -> bool:
        return hasattr(self.accelerator.unwrap_model(self.model), "peft_config")

    def _title(self, name: str) -> str:
        base = self._base_model()
        of = f"[{base}](https://huggingface.co/{base})" if base else "a model that is not on the Hub"
        kind = "An adapter for" if self._has_adapter else "A fine-tuned version of"
        return (
            f"# {name}\n\n{kind} {of}, trained to call tools with reinforcement learning by trl_toolgrpo, on top of "
            f"[TRL](https://github.com/huggingface/trl)."
        )

    def _base_model(self) -> str | None:
        """Id of the base model on the Hub."""
        name = get_config_model_id(self.model.config)
        return None if not name or Path(name).is_dir() else name

    def _sections(self, dataset_name: str | None) -> list[str]:
        dataset: Any = self.train_dataset
        rows = len(dataset) if hasattr(dataset, "__len__") else None
        columns = list(getattr(dataset, "column_names", None) or ())
        pools = getattr(self, "_environment_pool", None) or {}
        worlds = {type(pool[0]) for pool in pools.values() if pool}
        environments = {world.__name__: model_card.first_paragraph(world.__doc__) for world in worlds}
        functions = zip(self.reward_func_names, self.reward_weights.tolist(), self.reward_funcs, strict=True)
        rewards = [(name, weight, getattr(function, "__doc__", None)) for name, weight, function in functions]
        return [
            self._usage(),
            model_card.task(dataset_name, rows, columns, environments),
            model_card.tools(self._toolset.known, self._toolset.decided_at_reset),
            model_card.rewards(rewards),
            model_card.curves(self.state.log_history),
            model_card.configuration(
                {name: value for name, value in changed_fields(self.args).items() if not _UNTOLD.match(name)}
            ),
            model_card.command(self._launcher(), sys.argv, machines(self.args.world_size)),
        ]

    def _method(self) -> str:
        args = self.args
        level = getattr(args, "importance_sampling_level", "token")
        return model_card.method(args.advantage_estimator, args.loss_type, level, self._has_adapter)

    def _usage(self) -> str:
        """How the model is loaded from where it is: the Hub for a card that is pushed, else a folder."""
        pushed = self.args.push_to_hub or (self._home is not None and not self._stays)
        repo = str(self.hub_model_id or self.args.hub_model_id or self._name_of_run)
        given: Any = self.args.model_init_kwargs
        given = given if isinstance(given, dict) else {}
        options = {name: given[name] for name in ("revision", "trust_remote_code") if given.get(name)}
        options |= {"trust_remote_code": True} if self.args.trust_remote_code else {}
        saved = None if pushed else self._saved_in()
        return model_card.usage(
            repo if pushed else str(saved or self.args.output_dir),
            self._base_model(),
            [dict(self._toolset.shown(tool).schema) for tool in self._toolset.known],
            masked(json.loads(json.dumps(self.chat_template_kwargs, default=str))) if self._renders_chat else None,
            adapter=self._has_adapter,
            value_head=self._value_head is not None,
            multimodal=self._is_vlm,
            max_new_tokens=min(self.args.max_completion_length or 256, 256),
            base_options=options,
            saved=pushed or saved is not None,
        )

    def _saved_in(self) -> Path | None:
        """Where the model is: in the output folder, in the newest checkpoint there, or nowhere yet."""
        folder = Path(str(self.args.output_dir))
        if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            return folder
        return next((path for path in checkpoints(folder) if fault_of(path) is None), None)

    @property
    def _renders_chat(self) -> bool:
        """Whether prompts are messages that a chat template renders, and not plain texts."""
        if getattr(self.processing_class, "chat_template", None) is None:
            return False
        dataset: Any = self.train_dataset
        prompt = None
        if hasattr(dataset, "__getitem__") and "prompt" in (getattr(dataset, "column_names", None) or ()):
            prompt = dataset[0]["prompt"]
        return not isinstance(prompt, str)

    def _launcher(self) -> list[str]:
        """What started this run. What its own arguments shard is not for the launcher to shard."""
        state, processes = self.accelerator.state, self.args.world_size
        fsdp = state.fsdp_plugin if self.is_fsdp_enabled and not self.args.fsdp else None
        deepspeed = state.deepspeed_plugin if self.is_deepspeed_enabled and not self.args.deepspeed else None
        return launcher(processes, machines(processes), fsdp, deepspeed)

    def _redacted(self, text: str) -> str:
        """
        A text without the secrets of this run: those of its environment, its configuration and its command line, and
        what MCP servers were given in confidence.
        """
        servers = self._mcp.servers.values() if self._mcp is not None else ()
        return run_redactor(self.args, servers).text(text)


def machines(processes: int) -> int:
    """
    On how many machines a run is; launchers tell each process how many are on its own.

    Args:
        processes (`int`):
            All processes of the run.
    """
    here = get_int_from_env(["LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"], processes)
    return -(-processes // max(here, 1))


def launcher(processes: int, machines: int = 1, fsdp: Any = None, deepspeed: Any = None) -> list[str]:
    """
    What starts the script of a run, with what the launcher would otherwise do by its own defaults.

    Args:
        processes (`int`):
            All processes of the run.
        machines (`int`, *optional*, defaults to `1`):
            On how many machines they are.
        fsdp (`FullyShardedDataParallelPlugin`, *optional*):
            That of the accelerator, if accelerate's launcher is to shard.
        deepspeed (`DeepSpeedPlugin`, *optional*):
            As above.
    """
    several = machines > 1
    if fsdp is None and deepspeed is None:
        if processes == 1:
            return ["python"]
        nodes = ["--nnodes", str(machines), "--node_rank", model_card.RANK, "--master_addr", model_card.FIRST]
        return ["torchrun", *(nodes if several else []), "--nproc_per_node", str(processes // machines)]
    words = ["accelerate", "launch", "--num_processes", str(processes)]
    if several:
        words += ["--num_machines", str(machines), "--machine_rank", model_card.RANK]
        words += ["--main_process_ip", model_card.FIRST]
    if fsdp is not None:
        return [*words, "--use_fsdp", *_words_of(_fsdp_options(fsdp))]
    standard = ["--deepspeed_multinode_launcher", "standard"] if several else []
    return [*words, "--use_deepspeed", *standard, *_words_of(_deepspeed_options(deepspeed))]


def _words_of(options: dict[str, Any]) -> list[str]:
    """Options of a command line; those without a value are left out."""
    given = {name: str(value).lower() if value is True or value is False else value for name, value in options.items()}
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


def _fsdp_options(plugin: Any) -> dict[str, Any]:
    """Options of `accelerate launch` for a plugin; the defaults of the two versions differ."""
    policy = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)  # partial, once there is a model
    kind = _POLICIES.get(getattr(policy, "__name__", ""))
    layers = plugin.transformer_cls_names_to_wrap if kind == "TRANSFORMER_BASED_WRAP" else None
    reshard = plugin.reshard_after_forward if plugin.fsdp_version == 2 else None
    offload = type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy"  # of version 2
    return {
        "fsdp_version": plugin.fsdp_version,
        "fsdp_auto_wrap_policy": kind,
        "fsdp_transformer_layer_cls_to_wrap": ",".join(layers) if layers else None,
        "fsdp_min_num_params": plugin.min_num_params if kind == "SIZE_BASED_WRAP" else None,
        "fsdp_reshard_after_forward": reshard,
        "fsdp_state_dict_type": plugin.state_dict_type.name,
        "fsdp_offload_params": offload or None,
        "fsdp_activation_checkpointing": plugin.activation_checkpointing or None,
        "fsdp_cpu_ram_efficient_loading": None if plugin.cpu_ram_efficient_loading else False,
    }


def _deepspeed_options(plugin: Any) -> dict[str, Any]:
    """Options of `accelerate launch` for a plugin; a file of DeepSpeed's own says all by itself."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        return {"deepspeed_config_file": file}
    third = plugin.zero_stage == 3
    optimizer, parameters = plugin.offload_optimizer_device, plugin.offload_param_device
    return {
        "zero_stage": plugin.zero_stage,
        "offload_optimizer_device": None if optimizer == "none" else optimizer,
        "offload_param_device": None if parameters == "none" else parameters,
        "zero3_init_flag": plugin.zero3_init_flag if third else None,
        "zero3_save_16bit_model": plugin.zero3_save_16bit_model if third else None,
    }
