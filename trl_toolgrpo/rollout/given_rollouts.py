"""Rollouts that a `rollout_func` returns, checked like those that are sampled here."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from ..errors import TrajectoryError
from ..sampling.record_faults import field_meant_by
from ..types import Batch
from .trajectory import Trajectory


logger = logging.getLogger(__name__)

RolloutFunction: TypeAlias = Callable[..., Batch]
Lists: TypeAlias = dict[str, list[Any]]

_REQUIRED = ("prompt_ids", "completion_ids", "logprobs")
"""What TRL requires of a `rollout_func`. In addition it may return `env_mask`, the `tool_mask` of a [`Trajectory`]."""


def checked_rollouts(
    function: RolloutFunction, strict: bool, count_invalid: Callable[[int], None], pad_id: int
) -> RolloutFunction:
    """
    Return a `rollout_func` whose rollouts are checked.

    Args:
        function (`Callable`):
            The `rollout_func`.
        strict (`bool`):
            Raise for a rollout that breaks its contract; else mask it out by its `env_mask`.
        count_invalid (`Callable`):
            Called with the number of rollouts that were masked out.
        pad_id (`int`):
            Token that takes the place of a prompt or completion that cannot be read.

    Raises:
        TrajectoryError: when it is called, for missing or misnamed fields, and for lists of other lengths than there
            are prompts; if `strict`, also for a rollout with a short or non-finite field.
    """

    def checked(prompts: list[object], *args: object, **kwargs: object) -> Batch:
        output = dict(function(prompts, *args, **kwargs))
        fault = _fault_of_names(output)
        if fault is not None and (strict or not {"prompt_ids", "completion_ids"} <= set(output)):
            raise fault
        lists = {name: output[name] for name in (*_REQUIRED, "env_mask") if output.get(name) is not None}
        for name, rows in lists.items():
            if len(rows) != len(prompts):
                raise TrajectoryError(
                    f"The `rollout_func` returned {len(rows)} entries in `{name}` for {len(prompts)} prompts.",
                    remedy="Return one for each prompt, in order.",
                )
        # Lists in place of tensors and arrays
        plain = {n: [row.tolist() if hasattr(row, "tolist") else row for row in rows] for n, rows in lists.items()}
        if fault is not None:
            logger.warning("Masked out of the update, all of the batch: %s", fault)
            output.setdefault("logprobs", None)
        invalid = [row for row in range(len(prompts)) if fault is not None or _is_invalid(plain, row, strict)]
        if invalid:
            _mask_out(output, plain, invalid, pad_id)
            count_invalid(len(invalid))
        return output

    return checked


def _fault_of_names(output: Batch) -> TrajectoryError | None:
    """Return an error about fields that a `rollout_func` does not return or misnames; `None` if there are none."""
    missing = [name for name in _REQUIRED if name not in output]
    others = {name: field_meant_by(name, missing) for name in output if name not in _REQUIRED}
    hints = [f"Did you mean `{meant}` by `{name}`?" for name, meant in others.items() if meant]
    if missing:
        named = ", ".join(f"`{name}`" for name in missing)
        found = ", ".join(map(str, output))
        return TrajectoryError(f"The `rollout_func` returned no {named}; got {found}.", remedy=" ".join(hints))
    if "tool_mask" in output and "env_mask" not in output:
        return TrajectoryError(
            "The `rollout_func` returned `tool_mask`, which TRL does not read.", remedy="Did you mean `env_mask`?"
        )
    return None


def _is_invalid(lists: Lists, row: int, strict: bool) -> bool:
    try:
        record = {name: rows[row] for name, rows in lists.items()}
        ids = record["completion_ids"]
        count = len(ids) if isinstance(ids, (list, tuple)) else 0
        mask = record.get("env_mask", [1] * count)
        logprobs = record.get("logprobs", [0.0] * count)
        Trajectory(record["prompt_ids"], ids, logprobs, mask, [0] * count, [], "stop").validate(row)
    except TrajectoryError as error:
        if strict:
            raise TrajectoryError(f"{error.message} Your `rollout_func` returned it.", remedy=error.remedy) from error
        logger.warning("Masked out of the update: %s", error)
        return True
    return False


def _mask_out(output: Batch, lists: Lists, rows: Sequence[int], pad_id: int) -> None:
    """Leave nothing to train on of some rollouts."""
    for row in rows:
        given = Trajectory(lists["prompt_ids"][row], lists["completion_ids"][row], [], [], [], [], "stop")
        given.mask_out()
        lists["prompt_ids"][row] = given.prompt_ids or [pad_id]
        lists["completion_ids"][row] = given.completion_ids or [pad_id]
    lists.setdefault("env_mask", [[1] * len(ids) for ids in lists["completion_ids"]])
    for row in rows:
        ids = lists["completion_ids"][row]
        lists["env_mask"][row] = [0] * len(ids)
        if "logprobs" in lists:
            lists["logprobs"][row] = [0.0] * len(ids)
    output |= lists
