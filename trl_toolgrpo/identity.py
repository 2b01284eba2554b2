"""What a run is: the model, adapter, data set and batch that a checkpoint goes with.

Owns the description that is kept in a checkpoint and its comparison with the run that resumes. Fed by `resume.py`.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.distributed.tensor import DTensor

from .batch_position import micro_batches_of
from .model_settings import model_setting
from .reference import ADAPTER


RUN = "run.json"
"""Where a checkpoint has the description."""

_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "vocab_size")
_ADAPTER = ("peft_type", "r", "lora_alpha", "use_dora", "use_rslora", "bias", "modules_to_save", "target_modules")
_BATCH = ("seed", "shuffle_dataset", "num_generations", "generation_batch_size", "num_iterations")
_WEIGHTS = "frozen weights"
_SAMPLED = 64  # rows of the data set, and values of each frozen weight, that stand for all


def describe_run(args: Any, model: Any, dataset: Any) -> dict[str, Any]:
    """
    What has to be the same for a checkpoint to be gone on from.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration.
        model (`PreTrainedModel` or `PeftModel`):
            The policy, unwrapped.
        dataset (`Dataset` or `IterableDataset`):
            What it is trained on.

    Returns:
        `dict[str, Any]`: plain values by section: `model`, `adapter`, `dataset`, `batch`, and `layout`, which may
        change between two rollout batches.
    """
    adapter = getattr(model, "active_adapter", None) if hasattr(model, "peft_config") else None
    return {
        "model": describe_model(model),
        "adapter": {} if adapter is None else describe_adapter(model.peft_config[adapter].to_dict()),
        "dataset": describe_dataset(dataset),
        "batch": {
            **{name: getattr(args, name) for name in _BATCH},
            "optimizer steps per rollout batch": micro_batches_of(args) / args.gradient_accumulation_steps,
        },
        "layout": {
            "processes": args.world_size,
            "steps_per_generation": args.steps_per_generation,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
        },
    }


def keep_batch_size(checkpoint: str | Path, args: Any) -> dict[str, int]:
    """
    How a run that resumes takes rollout batches of the size of its checkpoint's, and as many steps on each.

    With another number of processes the same configuration makes batches of another size, and what goes on from a
    checkpoint with other batches is another run, which is refused. The micro-batches of a process get no larger than
    they are.

    Args:
        checkpoint (`str` or `Path`):
            The checkpoint.
        args ([`ToolGRPOConfig`]):
            Configuration of the run that resumes.

    Returns:
        `dict[str, int]`: what to change `per_device_train_batch_size`, `gradient_accumulation_steps` and
        `steps_per_generation` to; empty if they are the same already, if there is no such division, or if the
        checkpoint does not say.
    """
    try:
        return division(json.loads((Path(checkpoint) / RUN).read_text(encoding="utf-8")), args)
    except (OSError, ValueError, KeyError, TypeError):  # of another trainer, or torn, which is said when it is resumed
        return {}


def division(stored: Mapping[str, Any], args: Any) -> dict[str, int]:
    """[`keep_batch_size`] for the description that a checkpoint has."""
    size, layout = stored["batch"]["generation_batch_size"], stored["layout"]
    same_steps = args.steps_per_generation * layout["gradient_accumulation_steps"] == (
        args.gradient_accumulation_steps * layout["steps_per_generation"]
    )
    if args.generation_batch_size == size and same_steps:
        return {}
    for micro_batch in range(args.per_device_train_batch_size, 0, -1):
        steps, rest = divmod(size, micro_batch * args.world_size)
        accumulated, part = divmod(steps * layout["gradient_accumulation_steps"], layout["steps_per_generation"])
        if rest == part == 0 and accumulated > 0:
            return {
                "per_device_train_batch_size": micro_batch,
                "gradient_accumulation_steps": accumulated,
                "steps_per_generation": steps,
            }
    return {}


def describe_model(model: Any) -> dict[str, Any]:
    """Shape of a policy, and a checksum of the weights that are not trained and so are in no checkpoint."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    shape = {name: model_setting(config, name) for name in _SHAPE}
    checksum = 0
    frozen = [(n, p) for n, p in base.named_parameters() if not p.requires_grad and f".{ADAPTER}." not in f"{n}."]
    for name, parameter in frozen:
        if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
            return {**shape, _WEIGHTS: None}  # sharded: not to be had by one process
        checksum = zlib.crc32(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode(), checksum)
        checksum = zlib.crc32(_sample(parameter), checksum)
    return {**shape, _WEIGHTS: checksum if frozen else None}


def describe_adapter(config: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same in an adapter's configuration, as plain values."""
    return {name: _plain(config.get(name)) for name in _ADAPTER}


def describe_dataset(dataset: Any) -> dict[str, Any]:
    """
    Return size, columns and a checksum of rows of a data set; of one that is streamed, its columns alone.

    The rows are those that are stored: a transform may give others each time, and images need not be decoded.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            The data set.
    """
    columns = sorted(getattr(dataset, "column_names", None) or ())
    if not isinstance(dataset, Dataset):
        return {"columns": columns}
    count = len(dataset)
    places = sorted({index * count // _SAMPLED for index in range(_SAMPLED)} | {count - 1}) if count else []
    stored = dataset.with_format("arrow")[places].to_pydict()
    rows = json.dumps(_portable(stored), sort_keys=True, default=str)
    return {"rows": count, "columns": columns, "content": zlib.crc32(rows.encode())}


def _portable(value: Any) -> Any:
    """Stored values as JSON has them; of a file that is only referred to, its name, which is the same elsewhere."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"} and value["bytes"] is None:
        return Path(value["path"] or "").name
    if isinstance(value, dict):
        return {key: _portable(inner) for key, inner in value.items()}
    if isinstance(value, bytes):
        return zlib.crc32(value)
    return [_portable(inner) for inner in value] if isinstance(value, list) else value


def differences(stored: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two sections of a description, in words; what one of them does not know is left out."""
    for name, ours in own.items():
        unknown = name not in stored or (name == _WEIGHTS and None in (stored[name], ours))
        if not unknown and stored[name] != ours:
            what = "checksum of content" if name in (_WEIGHTS, "content") else "value"
            yield f"{name} ({what}): {stored[name]} in the checkpoint, {ours} here"


def _sample(parameter: Tensor) -> bytes:
    flat = parameter.detach().reshape(-1)
    values = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].cpu().contiguous()
    return values.view(torch.uint8).numpy().tobytes()


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple, set)):
        return sorted(value)
    return getattr(value, "value", value)
