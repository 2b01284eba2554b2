"""The policy on disk, as an engine outside the training process loads it: the adapter alone, or all the weights.

Owns how it is written, where to, and what of an adapter such an engine can take. Fed by the trainer with the unwrapped
policy.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn


ADAPTER_WEIGHTS, ADAPTER_CONFIG, WEIGHTS = "adapter_model.safetensors", "adapter_config.json", "model.safetensors"
_CLAIMED = "trl_toolgrpo-policy-"


@dataclass(frozen=True)
class PolicyFile:
    """
    A version of the policy on disk.

    Args:
        key (`str`):
            Names these weights among all that any run ever sends.
        version (`int`):
            Optimizer steps the policy had taken.
        folder (`Path`):
            Where the files are.
        adapter (`bool`):
            Whether they are an adapter, to be used on the base weights the engine has; else all weights.
    """

    key: str
    version: int
    folder: Path
    adapter: bool

    @property
    def weights(self) -> Path:
        """The file with the tensors."""
        return self.folder / (ADAPTER_WEIGHTS if self.adapter else WEIGHTS)

    def adapter_config(self) -> dict[str, Any] | None:
        """The adapter's configuration; `None` without one."""
        return json.loads((self.folder / ADAPTER_CONFIG).read_text(encoding="utf-8")) if self.adapter else None


def write_policy(policy: Any, folder: Path) -> None:
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
    if hasattr(policy, "peft_config"):
        adapter = policy.active_adapter
        state = get_peft_model_state_dict(policy, state, adapter, save_embedding_layers=False)
        save_file({name: value.contiguous().cpu() for name, value in state.items()}, folder / ADAPTER_WEIGHTS)
        policy.peft_config[adapter].save_pretrained(str(folder))
    else:
        policy.save_pretrained(folder, state_dict=state, max_shard_size="100TB")


def claim_folder(name: str) -> tuple[Path, Callable[[], None]]:
    """
    A folder for policies among the temporary files. Those of processes that were killed are removed: each holds a lock
    for as long as it lives.

    Args:
        name (`str`):
            What tells it from all others.

    Returns:
        `tuple[Path, Callable]`: the folder, and what removes it.
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
    """Where a folder of [`claim_folder`] is, for other processes of the machine."""
    return Path(tempfile.gettempdir()) / f"{_CLAIMED}{name}"


def _saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that belong in a checkpoint; those that are tied once."""
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, value in module.named_buffers(prefix, recurse=False):
            if name.rsplit(".", 1)[-1] not in module._non_persistent_buffers_set:
                yield name, value


def adapter_problem(config: Any) -> str | None:
    """
    Why vLLM cannot use an adapter as it is, or would silently use another one; `None` if it can.

    Args:
        config (`PeftConfig`):
            The adapter's configuration.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return f"it is of type {kind}, and vLLM takes LoRA alone"
    for name in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices"):
        if getattr(config, name, None):
            return f"it has `{name}={getattr(config, name)!r}`, which vLLM does not know"
    targets = config.target_modules if isinstance(config.target_modules, (set, list)) else ()
    if any(target.rsplit(".", 1)[-1] == "lm_head" for target in targets):
        return "it is on the LM head, where vLLM takes no adapter"
    if config.bias != "none":
        return f"it has `bias={config.bias!r}`, and vLLM takes no trained biases"
    return None
