"""What a run is: the model, adapter, data set and batch that must match for a checkpoint to be resumed."""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from trl import GRPOConfig

from ..config.batch_position import micro_batches_of
from ..models.lm_head import base_model
from ..models.model_settings import model_setting
from ..reference.adapter import ADAPTER, describe_adapter
from ..types import JSONObject, JSONValue


IDENTITY = "run_identity.json"
"""File of a checkpoint that describes the run it belongs to."""
_EARLIER_IDENTITY = "run.json"  # as checkpoints of version 0.1.0 call it

_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "vocab_size")
_BATCH = ("seed", "shuffle_dataset", "num_generations", "generation_batch_size", "num_iterations")
_WEIGHTS = "frozen weights"
_SAMPLED = 64  # rows of the data set, and values of each frozen weight, that stand for all


def identity_file(checkpoint: Path) -> Path:
    """Return the file of a checkpoint that describes its run, which may be absent."""
    earlier = checkpoint / _EARLIER_IDENTITY
    return earlier if earlier.is_file() else checkpoint / IDENTITY


def describe_run(args: GRPOConfig, model: nn.Module, dataset: object) -> JSONObject:
    """
    Describe what must match for a checkpoint to be resumed.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration.
        model (`PreTrainedModel` or `PeftModel`):
            The policy, unwrapped.
        dataset (`Dataset` or `IterableDataset`):
            What it is trained on.

    Returns:
        `dict`: plain values by section: `model`, `adapter`, `dataset`, `batch`, and `layout`, which may
        change between two rollout batches.
    """
    adapters, active = getattr(model, "peft_config", {}), getattr(model, "active_adapter", None)
    return {
        "model": describe_model(model),
        "adapter": describe_adapter(adapters[active].to_dict()) if active in adapters else {},
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


def keep_batch_size(checkpoint: str | Path, args: GRPOConfig) -> dict[str, int]:
    """
    Find batch sizes with which a run that resumes takes rollout batches of its checkpoint's size, and as many
    optimizer steps on each.

    With another number of processes the same configuration makes batches of another size, and a run with other
    batches than its checkpoint's is another run, which is refused. The micro-batches of a process do not get larger.

    Args:
        checkpoint (`str` or `Path`):
            The checkpoint.
        args ([`ToolGRPOConfig`]):
            Configuration of the run that resumes.

    Returns:
        `dict[str, int]`: what to change `per_device_train_batch_size`, `gradient_accumulation_steps` and
        `steps_per_generation` to; empty if they match already, if no sizes do, or if the
        checkpoint does not say.
    """
    try:
        return matching_batch_sizes(json.loads(identity_file(Path(checkpoint)).read_text(encoding="utf-8")), args)
    except (OSError, ValueError, KeyError, TypeError):  # of another trainer, or torn, which is said when it is resumed
        return {}


def matching_batch_sizes(stored: JSONObject, args: GRPOConfig) -> dict[str, int]:
    """Return [`keep_batch_size`] for the description that a checkpoint holds."""
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


def describe_model(model: nn.Module) -> JSONObject:
    """Return the shape of a policy, and a checksum of the weights that are not trained and so are in no checkpoint."""
    base = base_model(model)
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


def describe_dataset(dataset: object) -> JSONObject:
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


def differences(stored: JSONObject, own: JSONObject) -> Iterator[str]:
    """Yield a text for each difference of two sections of a description; what one does not know is left out."""
    for name, ours in own.items():
        unknown = name not in stored or (name == _WEIGHTS and None in (stored[name], ours))
        if not unknown and stored[name] != ours:
            what = "checksum of content" if name in (_WEIGHTS, "content") else "value"
            yield f"{name} ({what}): {stored[name]} in the checkpoint, {ours} here"


def _sample(parameter: Tensor) -> bytes:
    flat = parameter.detach().reshape(-1)
    values = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].cpu().contiguous()
    return values.view(torch.uint8).numpy().tobytes()


def _portable(value: JSONValue) -> JSONValue:
    """Return stored values as JSON has them; of a file that is only referred to, its name, as on other machines."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"} and value["bytes"] is None:
        return Path(value["path"] or "").name
    if isinstance(value, dict):
        return {key: _portable(inner) for key, inner in value.items()}
    if isinstance(value, bytes):
        return zlib.crc32(value)
    return [_portable(inner) for inner in value] if isinstance(value, list) else value
