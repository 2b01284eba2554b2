"""The model card of a run: what the trainer knows of it, without secrets.

Owns what is gathered and where the card is written, as a mixin of the trainer; the texts are those of `model_card.py`.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, get_token
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from . import model_card
from .checkpoint import tolerated
from .config import ToolGRPOConfig
from .tools.mcp import MCPTools
from .tools.redact import Redactor, secret_values
from .tools.toolset import ToolSet
from .value import ValueHead
from .version import __version__


_PACKAGES = {"PEFT": "peft", "Accelerate": "accelerate", "huggingface_hub": "huggingface_hub"}
_SECRET_VARIABLES = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL")
# Fields that are of this machine or account, not of the run
_UNTOLD = re.compile(r"(output_dir|logging_dir|run_name|push_to_hub|hub_.*|.*token|trackio_.*|project|disable_tqdm)$")


class RunCard(GRPOTrainer):
    """Part of [`ToolGRPOTrainer`]: the card that TRL writes, with what TRL does not know of."""

    args: ToolGRPOConfig
    model: Any
    hub_model_id: Any
    _toolset: ToolSet
    _mcp: MCPTools | None
    _value_head: ValueHead | None
    _home: str | None = None  # the output folder, while another one stands in for it

    def create_model_card(  # type: ignore[override]  # TRL's signature, not that of transformers
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        TRL's card, with what it does not know: how the model is loaded, its task, tools, rewards and curves, the
        configuration, and the command that reproduces it. Secrets are replaced.

        Args:
            model_name, dataset_name, tags:
                As in TRL.
        """
        with tolerated():
            super().create_model_card(model_name, dataset_name, tags)
            if self.is_world_process_zero():
                self._complete_card(model_name, dataset_name)

    def _complete_card(self, model_name: str | None, dataset_name: str | None) -> None:
        file = Path(str(self.args.output_dir)) / "README.md"
        card = ModelCard.load(file)
        if self._has_adapter:
            card.data.library_name = "peft"
        versions = {"trl_toolgrpo": __version__, **{shown: version(name) for shown, name in _PACKAGES.items()}}
        title, sections = self._title(model_name or self._name_of_run), self._sections(dataset_name)
        card.text = self._redacted(model_card.compose(card.text, title, sections, versions))
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
            f"# {name}\n\n{kind} {of}, trained to call tools with GRPO by trl_toolgrpo, on top of "
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
        repo = self.hub_model_id or self.args.hub_model_id or self._name_of_run
        return [
            model_card.usage(repo, self._base_model(), self._has_adapter, self._value_head is not None),
            model_card.task(dataset_name, rows, columns, environments),
            model_card.tools(self._toolset.known, self._toolset.decided_at_reset),
            model_card.rewards(rewards),
            model_card.curves(self.state.log_history),
            model_card.configuration(_set_fields(self.args)),
            model_card.command(self._launcher(), sys.argv),
        ]

    def _launcher(self) -> Sequence[str]:
        processes = str(self.args.world_size)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            kind = "--use_fsdp" if self.is_fsdp_enabled else "--use_deepspeed"
            return ["accelerate", "launch", "--num_processes", processes, kind]
        return ["python"] if processes == "1" else ["torchrun", "--nproc_per_node", processes]

    def _redacted(self, text: str) -> str:
        """A text without the secrets of this run: tokens, and what MCP servers were given in confidence."""
        own = {name: value for name, value in os.environ.items() if _SECRET_VARIABLES.search(name.upper())}
        own |= {"hub": self.args.hub_token or "", "stored": get_token() or ""}
        for server in self._mcp.servers.values() if self._mcp is not None else ():
            text = server.redactor.text(text)
        found = secret_values(own, {}, None)
        return Redactor([*found, *map(shlex.quote, found)]).text(text)


def _set_fields(args: Any) -> dict[str, Any]:
    """Fields of a configuration that differ from their defaults, as plain values."""
    found = {}
    for field in fields(args):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(args, field.name)
        value = value.value if isinstance(value, Enum) else value
        plain = isinstance(value, (str, int, float, bool, list, dict)) or value is None
        if field.init and plain and value != default and not _UNTOLD.match(field.name):
            found[field.name] = value
    return found
