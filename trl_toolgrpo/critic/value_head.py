"""The value head: a critic on the policy's final hidden state.

The value is computed inside the model's own forward pass, so that what wraps the model (DDP, FSDP2, ZeRO-3, gradient
checkpointing) sees it, and one pass gives log-probs and values.
"""

import functools
import re
import types
from dataclasses import make_dataclass
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..errors import ValueHeadError
from ..models.lm_head import base_model
from ..models.sharding import assign_all, whole_copies


HEAD_FILE = "value_head.safetensors"

_Value = TypeVar("_Value")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class ValueHead(nn.Module):
    """
    The value of a state, from the final hidden state of the policy at its last token.

    Two layers after a normalization without parameters; the last one starts at zero, and so does every value.

    Args:
        hidden_size (`int`):
            Width of the policy's hidden state.
        width (`int`, *optional*):
            Width of the first layer; the hidden size by default.
        detach (`bool`, *optional*, defaults to `True`):
            Whether the gradient of the value stops here and leaves the policy's trunk to the policy loss.
    """

    def __init__(self, hidden_size: int, width: int | None = None, detach: bool = True):
        super().__init__()
        self.detach = detach
        self.layer = nn.Linear(hidden_size, width or hidden_size)
        self.output = nn.Linear(width or hidden_size, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """
        Return the value at each position.

        Args:
            hidden (`Tensor`):
                Hidden states, any float dtype, shape (..., H).

        Returns:
            `Tensor`: values, in the dtype of the head's parameters, shape (...).
        """
        hidden = hidden.detach() if self.detach else hidden
        with torch.autocast(hidden.device.type, enabled=False):  # a value is a regression target, not a logit
            hidden = hidden.to(self.layer.weight.dtype)
            hidden = hidden * torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + 1e-6)
            return self.output(nn.functional.silu(self.layer(hidden)))[..., 0]

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `value_head.safetensors` into a folder, and return the file."""
        return save_value_head(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, detach: bool = True, revision: str | None = None) -> "ValueHead":
        """
        Read a head.

        Args:
            folder (`str` or `Path`):
                Folder with `value_head.safetensors`, or id of a repository on the Hub that holds it.
            detach (`bool`, *optional*, defaults to `True`):
                As in [`ValueHead`].
            revision (`str`, *optional*):
                Revision on the Hub.

        Raises:
            ValueHeadError: if the file is missing, cannot be downloaded or holds something else.
        """
        if not Path(folder).exists() and _HUB_ID.fullmatch(str(folder)):
            try:
                folder = Path(hf_hub_download(str(folder), HEAD_FILE, revision=revision)).parent
            except OSError as error:
                raise ValueHeadError(
                    f"There is no folder {folder}, and {HEAD_FILE} could not be downloaded from the Hub: {error}",
                    remedy="Check the repository and its revision, or pass a folder.",
                ) from error
        state = read_state(folder)
        width, hidden_size = state["layer.weight"].shape
        head = cls(hidden_size, width, detach)
        head.load_state_dict(state)
        return head


def attach_value_head(model: PreTrainedModel, head: ValueHead) -> None:
    """
    Give a causal language model a value head.

    Called with `with_values=True`, its output also holds `token_values`, the value at each position of the input,
    shape (B, T), and `value_inputs`, the hidden states that the head has read, detached, shape (B, T, H).

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The policy, not yet wrapped for training.
        head ([`ValueHead`]):
            The head; a submodule of the model from now on.
    """
    base = base_model(model)
    base.value_head = head.requires_grad_(True)
    original = base.forward

    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: object, with_values: bool = False, **kwargs: object) -> ModelOutput:
        if not with_values:
            return original(*args, **kwargs)
        hidden: list[Tensor] = []
        hook = self.base_model.register_forward_hook(lambda module, given, output: hidden.append(output[0]))
        try:
            output = original(*args, **kwargs)
        finally:
            hook.remove()
        kind: type[ModelOutput] = type(output)
        values = self.value_head(hidden[-1])  # type: ignore[operator]
        return _with_values(kind)(**output, token_values=values, value_inputs=hidden[-1].detach())

    base.forward = types.MethodType(forward, base)


@functools.cache
def _with_values(kind: type[ModelOutput]) -> type[ModelOutput]:
    """Return a kind of model output with two more fields: DDP takes an output apart by its fields and rebuilds it."""
    added = [("token_values", Tensor, None), ("value_inputs", Tensor, None)]
    return make_dataclass(kind.__name__, added, bases=(kind,))


def without_value_head(state: dict[str, _Value]) -> dict[str, _Value]:
    """Return a model's state without its value head, for what is saved or pushed as the policy."""
    return {name: value for name, value in state.items() if "value_head." not in name}


def save_value_head(head: ValueHead, folder: str | Path, write: bool = True) -> Path:
    """
    Write the head into a folder; every process has to call it, since sharded parameters are gathered.

    Args:
        head ([`ValueHead`]):
            The head.
        folder (`str` or `Path`):
            Where to write it.
        write (`bool`, *optional*, defaults to `True`):
            Whether this process writes.

    Returns:
        `Path`: the file.
    """
    state = {name: tensor.float() for name, tensor in whole_copies(head.named_parameters()).items()}
    file = Path(folder) / HEAD_FILE
    if write:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, file)
    return file


def load_value_head(head: ValueHead, folder: str | Path) -> None:
    """
    Read a head's parameters in place, sharded or not.

    Args:
        head ([`ValueHead`]):
            The head.
        folder (`str` or `Path`):
            Folder with `value_head.safetensors`.

    Raises:
        ValueHeadError: if the file is missing, or of a head of another size.
    """
    state = read_state(folder)
    for name, parameter in head.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # of the whole, where ZeRO-3 has partitioned it
        if state[name].shape != shape:
            raise ValueHeadError(
                f"{Path(folder) / HEAD_FILE} holds `{name}` of shape {tuple(state[name].shape)}, expected "
                f"{tuple(shape)}. It belongs to another model.",
                remedy="Pass a folder that this model's value head was saved in.",
            )
    assign_all(head.named_parameters(), state)


def read_state(folder: str | Path) -> dict[str, Tensor]:
    """
    Read the parameters in a folder's `value_head.safetensors`.

    Raises:
        ValueHeadError: if the file is missing or holds something else.
    """
    file = Path(folder) / HEAD_FILE
    if not file.is_file():
        raise ValueHeadError(
            f"There is no {file}, but `advantage_estimator` asks for a value head. The checkpoint was written without "
            f"one.",
            remedy="Pass a checkpoint that has it, or set `value_warmup_steps` above 0 to start a new head.",
        )
    state = load_file(file)
    expected = {"layer.weight", "layer.bias", "output.weight", "output.bias"}
    if set(state) != expected:
        message = f"{file} holds {sorted(state)}, expected {sorted(expected)}."
        raise ValueHeadError(message, remedy="Pass a file that `ValueHead.save_pretrained` or a checkpoint wrote.")
    return state
