"""The policy on disk, for an engine outside the training process: the adapter alone, or all the weights."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...types import JSONObject


ADAPTER_WEIGHTS, ADAPTER_CONFIG, WEIGHTS = "adapter_model.safetensors", "adapter_config.json", "model.safetensors"
_CLAIMED = "trl_toolgrpo-policy-"


@dataclass(frozen=True)
class PolicyFile:
    """
    A version of the policy on disk.

    Args:
        key (`str`):
            Identifies these weights among all that any run ever sends.
        version (`int`):
            Optimizer steps that the policy had taken.
        folder (`Path`):
            Where the files are.
        adapter (`bool`):
            Whether they are an adapter, for the base weights that the engine has, or all weights.
    """

    key: str
    version: int
    folder: Path
    adapter: bool

    @property
    def weights(self) -> Path:
        """The file with the tensors."""
        return self.folder / (ADAPTER_WEIGHTS if self.adapter else WEIGHTS)

    def adapter_config(self) -> JSONObject | None:
        """Read the adapter's configuration; `None` without an adapter."""
        return json.loads((self.folder / ADAPTER_CONFIG).read_text(encoding="utf-8")) if self.adapter else None


def write_policy(policy: PreTrainedModel, folder: Path) -> None:
    """
    Write the policy's active adapter if it has one, else its weights without a value head, as a checkpoint.

    Args:
        policy (`PreTrainedModel` or `PeftModel`):
            The unwrapped policy, its parameters gathered.
        folder (`Path`):
            An empty folder.
    """
    # Not its `state_dict()`: FSDP2 would shard the gathered parameters again to make one
    state = {name: value.detach() for name, value in _saved_tensors(policy) if "value_head." not in name}
    if isinstance(policy, PeftModel):
        adapter = policy.active_adapter
        state = get_peft_model_state_dict(policy, state, adapter, save_embedding_layers=False)
        save_file({name: value.contiguous().cpu() for name, value in state.items()}, folder / ADAPTER_WEIGHTS)
        policy.peft_config[adapter].save_pretrained(str(folder))
    else:
        policy.save_pretrained(folder, state_dict=state, max_shard_size="100TB")


def claim_folder(name: str) -> tuple[Path, Callable[[], None]]:
    """
    Make a folder for policies among the temporary files, and remove those of processes that were killed: a process
    holds a lock for as long as it lives.

    Args:
        name (`str`):
            A name that no other folder has.

    Returns:
        `tuple[Path, Callable]`: the folder, and a function that removes it.
    """
    import fcntl

    for lock in Path(tempfile.gettempdir()).glob(f"{_CLAIMED}*.lock"):
        with suppress(OSError), lock.open() as held:  # of a process that lives, or of another user
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()
    folder = policy_folder(name)
    lock = folder.with_name(f"{folder.name}.lock")
    held = lock.open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    folder.mkdir(mode=0o700)

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        lock.unlink(missing_ok=True)
        held.close()

    return folder, remove


def policy_folder(name: str) -> Path:
    """Return the path of a folder of [`claim_folder`], for other processes of the machine."""
    return Path(tempfile.gettempdir()) / f"{_CLAIMED}{name}"


def _saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters, and the buffers that belong in a checkpoint; tied ones once."""
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, value in module.named_buffers(prefix, recurse=False):
            if name.rsplit(".", 1)[-1] not in module._non_persistent_buffers_set:
                yield name, value


def adapter_problem(config: PeftConfig) -> str | None:
    """
    Return why vLLM cannot use an adapter, or would silently use another one; `None` if it can.

    Args:
        config (`PeftConfig`):
            The adapter's configuration.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return f"it is of type {kind}, and vLLM supports only LoRA"
    for name in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices"):
        if getattr(config, name, None):
            return f"it has `{name}={getattr(config, name)!r}`, which vLLM does not support"
    targets = getattr(config, "target_modules", None)
    targets = targets if isinstance(targets, (set, list)) else ()
    if any(target.rsplit(".", 1)[-1] == "lm_head" for target in targets):
        return "it is on the LM head, where vLLM supports no adapter"
    bias = getattr(config, "bias", "none")
    if bias != "none":
        return f"it has `bias={bias!r}`, and vLLM supports no trained biases"
    return None
