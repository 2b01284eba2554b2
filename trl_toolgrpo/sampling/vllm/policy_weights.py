"""The policy for an engine outside the training process: the adapter alone, or all the weights.

An engine of this process opens all the weights in memory (`shared_weights.py`). What a server gets, and an adapter, is
a checkpoint. That of all weights is in shared memory (`/dev/shm`), where there is room.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...trl_hooks import checkpoint_tensors
from ...types import JSONObject
from .shared_weights import SharingError


ADAPTER_WEIGHTS, ADAPTER_CONFIG, WEIGHTS = "adapter_model.safetensors", "adapter_config.json", "model.safetensors"
SHARED_MEMORY = Path("/dev/shm")
"""Where Linux keeps files in memory, for all processes of a machine."""
_CLAIMED = "trl_toolgrpo-policy-"


@dataclass(frozen=True)
class PolicyFile:
    """
    A version of the policy as a checkpoint.

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

    def shared_folder(self) -> Path | None:
        """Return the folder in shared memory that holds it; `None` if it is on disk."""
        folder = self.folder.resolve()
        return folder if is_shared_folder(folder) else None

    def remove(self) -> None:
        """Remove it."""
        shutil.rmtree(self.folder.resolve(), ignore_errors=True)
        if self.folder.is_symlink():
            self.folder.unlink()


@dataclass(frozen=True)
class SharedPolicy:
    """
    All weights of a version of the policy, in memory.

    Args:
        key (`str`), version (`int`):
            As for [`PolicyFile`].
        handles (`bytes`):
            From [`shared_tensors`].
    """

    key: str
    version: int
    handles: bytes


def policy_tensors(policy: PreTrainedModel) -> dict[str, Tensor]:
    """
    Return all the weights of a policy without a value head, named and shaped as in a checkpoint.

    On a GPU they are the policy's own memory.

    Args:
        policy (`PreTrainedModel`):
            The unwrapped policy, its parameters gathered.

    Raises:
        SharingError: if that needs copies on the GPU, as for experts that transformers keeps in one tensor.
    """
    state = _state(policy)
    if any(value.is_cuda for value in state.values()) and is_converted(policy, state):
        raise SharingError(f"the weights of {type(policy).__name__} have another form in a checkpoint")
    return checkpoint_tensors(policy, state)


def is_converted(policy: PreTrainedModel, state: Mapping[str, Tensor]) -> bool:
    """
    Return whether the tensors of a checkpoint are others than those of the model, such as parts of them.

    Args:
        policy (`PreTrainedModel`):
            The model.
        state (`Mapping[str, Tensor]`):
            Its tensors by name; only their shapes are used.
    """
    shapes = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    return any(shapes.get(name) is not value for name, value in checkpoint_tensors(policy, shapes).items())


def _state(policy: nn.Module) -> dict[str, Tensor]:
    # Not its `state_dict()`: FSDP2 would shard the gathered parameters again to make one
    return {name: value.detach() for name, value in _saved_tensors(policy) if "value_head." not in name}


def write_checkpoint(policy: PreTrainedModel, folder: Path) -> str | None:
    """
    Write a policy to a new folder. All weights go to shared memory, with a link to them at the folder's path, as long
    as there is room for two versions of them.

    Args:
        policy (`PreTrainedModel` or `PeftModel`):
            The unwrapped policy, its parameters gathered.
        folder (`Path`):
            A folder that does not exist, in one of [`claim_folder`].

    Returns:
        `str` or `None`: why all weights are on disk and not in shared memory.
    """
    problem = None
    if not isinstance(policy, PeftModel):
        size = sum(value.nbytes for value in _state(policy).values())
        shared = SHARED_MEMORY / folder.parent.name / folder.name
        problem = _problem_of_shared_memory(size)
        if problem is None:
            try:
                shared.parent.mkdir(mode=0o700, exist_ok=True)
                shared.mkdir()
                write_policy(policy, shared)
                folder.symlink_to(shared)
                return None
            except (OSError, SafetensorError) as error:
                shutil.rmtree(shared, ignore_errors=True)
                problem = f"shared memory ({SHARED_MEMORY}) cannot hold them ({error})"
    folder.mkdir()
    write_policy(policy, folder)
    return problem


def _problem_of_shared_memory(size: int) -> str | None:
    """Return why this many bytes do not fit twice into shared memory."""
    if not SHARED_MEMORY.is_dir():
        return f"there is no shared memory at {SHARED_MEMORY}"
    room = min(shutil.disk_usage(SHARED_MEMORY).free, psutil.virtual_memory().available)
    if 2 * size <= room:
        return None
    return (
        f"shared memory ({SHARED_MEMORY}) has room for {room / 2**30:.1f} GiB, and two versions of the weights take "
        f"{2 * size / 2**30:.1f} GiB"
    )


def write_policy(policy: PreTrainedModel, folder: Path) -> None:
    """
    Write the policy's active adapter if it has one, else its weights without a value head, as a checkpoint.

    Args:
        policy (`PreTrainedModel` or `PeftModel`):
            The unwrapped policy, its parameters gathered.
        folder (`Path`):
            An empty folder.
    """
    state = _state(policy)
    if isinstance(policy, PeftModel):
        adapter = policy.active_adapter
        state = get_peft_model_state_dict(policy, state, adapter, save_embedding_layers=False)
        save_file({name: value.contiguous().cpu() for name, value in state.items()}, folder / ADAPTER_WEIGHTS)
        policy.peft_config[adapter].save_pretrained(str(folder))
    else:
        if is_converted(policy, state):  # on the host, since a GPU may have no room for another copy
            state = {name: value.cpu() for name, value in state.items()}
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
            shutil.rmtree(SHARED_MEMORY / lock.stem, ignore_errors=True)
            lock.unlink()
    folder = policy_folder(name)
    lock = folder.with_name(f"{folder.name}.lock")
    held = lock.open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    folder.mkdir(mode=0o700)

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(SHARED_MEMORY / folder.name, ignore_errors=True)
        lock.unlink(missing_ok=True)
        held.close()

    return folder, remove


def policy_folder(name: str) -> Path:
    """Return the path of a folder of [`claim_folder`], for other processes of the machine."""
    return Path(tempfile.gettempdir()) / f"{_CLAIMED}{name}"


def is_shared_folder(folder: Path) -> bool:
    """Return whether a path is that of a policy in shared memory."""
    memory = SHARED_MEMORY.resolve()
    parts = folder.relative_to(memory).parts if folder.is_relative_to(memory) else ()
    return len(parts) == 2 and parts[0].startswith(_CLAIMED) and ".." not in parts


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
