"""The tensors of a rollout batch in its log: each to the bit, and none twice."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..types import JSONObject


# Tensors of a batch whose values a column may hold already, and the side they are padded on
_IN_COLUMNS = {
    "prompt_ids": ("prompt_ids", "left"),
    "completion_ids": ("completion_ids", "right"),
    "old_per_token_logps": ("logprobs", "right"),
    "sampling_per_token_logps": ("logprobs", "right"),
    "advantages": ("advantages", "right"),
    "old_values": ("values", "right"),
}


def keep(name: str, tensor: Tensor, columns: Mapping[str, list], rows: list[list[JSONObject]]) -> JSONObject:
    """
    Put a tensor into the rows, unless a column holds it to the bit.

    Args:
        name (`str`):
            Its name.
        tensor (`Tensor`):
            A scalar, or of any shape (N, ...), on the CPU.
        columns (`Mapping[str, list]`):
            Columns of the log, each a list of N values.
        rows (`list[list[dict]]`):
            For each of the N rows what is kept of tensors; the tensor is added.

    Returns:
        `dict`: how [`restore`] finds the tensor again.
    """
    record: JSONObject = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    if tensor.ndim == 0:
        return {**record, "data": _bytes(tensor).hex()}
    column, side = _IN_COLUMNS.get(name, (None, ""))
    if column is not None and tensor.ndim == 2:
        fill = _fill(tensor, columns[column], side)
        padded = _padded(columns[column], record, fill, side)
        if padded is not None and _bytes(padded) == _bytes(tensor):  # and so are NaN and the sign of zero
            return {**record, "column": column, "side": side, "fill": fill}
    for row, values in zip(rows, tensor, strict=True):
        row.append({"name": name, "data": _bytes(values)})
    return record


def restore(
    records: Mapping[str, JSONObject], columns: Mapping[str, Sequence], rows: Sequence[Sequence[JSONObject]]
) -> dict[str, Tensor]:
    """
    Return the tensors that [`keep`] has put away.

    Args:
        records (`Mapping[str, dict]`):
            What it returned, by name.
        columns, rows:
            As it was given and left them.

    Returns:
        `dict[str, Tensor]`: each as it was, to the bit.

    Raises:
        ValueError: if columns or rows are not those of the records.
    """
    stored: dict[str, list[bytes]] = {}
    for row in rows:
        for entry in row:
            stored.setdefault(entry["name"], []).append(entry["data"])
    found = {}
    for name, record in records.items():
        if "column" in record:
            tensor = _padded(columns[record["column"]], record, record["fill"], record["side"])
            if tensor is None:
                raise ValueError(f"the rollouts do not fit the shape {record['shape']} of `{name}`")
            found[name] = tensor
        else:
            data = bytes.fromhex(record["data"]) if "data" in record else b"".join(stored.get(name, []))
            raw = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
            found[name] = raw.view(getattr(torch, record["dtype"])).reshape(record["shape"])
    return found


def _fill(tensor: Tensor, lists: list, side: str) -> float:
    """Return what the tensor is padded with; 0 if it is not."""
    for row, values in zip(tensor, lists, strict=True):
        if values is not None and len(values) < len(row):
            return row[0 if side == "left" else -1].item()
    return 0


def _padded(lists: Sequence, record: JSONObject, fill: float, side: str) -> Tensor | None:
    """Return lists as a padded tensor; `None` where they do not fit the shape."""
    rows, width = record["shape"]
    if any(values is None or len(values) > width for values in lists) or len(lists) != rows:
        return None
    padded = torch.full((rows, width), fill, dtype=getattr(torch, record["dtype"]))
    for row, values in zip(padded, lists, strict=True):
        span = slice(width - len(values), width) if side == "left" else slice(0, len(values))
        row[span] = torch.as_tensor(np.array(values)).to(padded.dtype)
    return padded


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
