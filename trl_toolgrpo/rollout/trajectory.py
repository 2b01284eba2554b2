"""Rollout records: every token with its provenance and the log-prob recorded when it was sampled.

The rollout loop fills them in; the trainer, reward functions and diagnostics read them. What they hold is checked
strictly: nothing is filled in, renamed or dropped.
"""

import logging
from collections.abc import Callable, Iterator, Sized
from dataclasses import MISSING, asdict, dataclass, field, fields

from ..errors import TrajectoryError
from ..sampling.record_faults import (
    field_meant_by,
    figure_faults,
    is_count,
    is_duration,
    is_finite_number,
    is_flag,
    item_faults,
    length_faults,
    list_faults,
)
from ..tools.tool import ToolCall, ToolResult
from ..types import JSONObject


logger = logging.getLogger(__name__)

STOP_REASONS = ("stop", "length", "tool_limit", "parse_errors", "tool_overflow", "environment")
"""Why a rollout ended. All but `"stop"` count as truncated."""
TURN_STOP_REASONS = ("stop", "length")
"""Why a turn ended: the policy wrote a stop token, or its token budget ran out."""


@dataclass
class Turn:
    """
    One assistant turn and the tool results that answered it.

    Args:
        start (`int`):
            Index into `completion_ids` of the first token of the turn.
        end (`int`):
            Index after the last token of the turn; tool-result tokens follow it.
        stop_reason (`str`, *optional*, defaults to `"stop"`):
            `"stop"` if the policy ended the turn, `"length"` if the token budget did.
        tool_calls (`list[ToolCall]`, *optional*):
            Calls in the order the policy wrote them, malformed ones included.
        tool_results (`list[ToolResult]`, *optional*):
            Results in call order; empty if the calls were not answered.
        sample_seconds (`float`, *optional*, defaults to `0.0`):
            Wall-clock time from queueing the turn to its last token, in seconds.
        tool_seconds (`float`, *optional*, defaults to `0.0`):
            Wall-clock time from the first call to the last result, in seconds.
        reward (`float`, *optional*):
            The environment's `turn_reward` after the turn; rewards of single results are their own.
        policy_version (`int`, *optional*):
            Optimizer steps the policy that wrote the turn had taken, where a copy of it did (vLLM).
    """

    start: int
    end: int
    stop_reason: str = "stop"
    tool_calls: list[ToolCall] = field(default_factory=list)
    tool_results: list[ToolResult] = field(default_factory=list)
    sample_seconds: float = 0.0
    tool_seconds: float = 0.0
    reward: float | None = None
    policy_version: int | None = None

    @property
    def total_reward(self) -> float:
        """The reward of the turn plus those of its results."""
        return (self.reward or 0.0) + sum(result.reward or 0.0 for result in self.tool_results)

    @classmethod
    def from_dict(cls, record: JSONObject, rollout: object = None) -> "Turn":
        """Read a turn strictly; a missing or unknown field raises [`TrajectoryError`]."""
        _check_keys(record, cls, rollout, "turns[]")
        values = dict(record)
        for name, kind in (("tool_calls", ToolCall), ("tool_results", ToolResult)):
            items = values.get(name, [])
            if not isinstance(items, (list, tuple)):
                continue  # for `Trajectory.validate` to report
            for item in items:
                if isinstance(item, dict):
                    _check_keys(item, kind, rollout, f"turns[].{name}[]")
            values[name] = [kind(**item) if isinstance(item, dict) else item for item in items]
        return cls(**values)


@dataclass(repr=False)
class Trajectory:
    """
    One rollout, token by token.

    Args:
        prompt_ids (`list[int]`):
            Prompt tokens, shape (P,).
        completion_ids (`list[int]`):
            Everything after the prompt, tool results included, shape (C,).
        logprobs (`list[float]`):
            Log-prob in nats of each completion token under `logits / temperature` when it was sampled, shape (C,);
            0.0 where the policy did not write the token.
        tool_mask (`list[int]`):
            1 for assistant tokens, 0 for tool results and template text between turns, shape (C,).
        forced_mask (`list[int]`):
            1 for assistant tokens that were forced rather than sampled, shape (C,).
        turns (`list[Turn]`):
            Assistant turns in order.
        stop_reason (`str`):
            One of `STOP_REASONS`.
        values (`list[float]`, *optional*):
            V(s_t) before each completion token, estimated by the value head when the token was sampled, shape (C,);
            0.0 where the policy did not sample the token. `None` without a value head.

    Raises:
        TrajectoryError: from [`Trajectory.validate`] and [`Trajectory.from_dict`].
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    tool_mask: list[int]
    forced_mask: list[int]
    turns: list[Turn]
    stop_reason: str
    values: list[float] | None = None

    def __repr__(self) -> str:
        """Return one line, since TRL logs every argument of the reward functions for a rollout that none scored."""
        parts = self.prompt_ids, self.completion_ids, self.turns
        prompt, completion, turns = (len(part) if isinstance(part, Sized) else part for part in parts)
        return (
            f"Trajectory({prompt} prompt tokens, {completion} completion tokens, {turns} turns, "
            f"stop_reason={self.stop_reason!r})"
        )

    @property
    def trainable_mask(self) -> list[int]:
        """1 where the policy sampled the token, which alone trains, shape (C,)."""
        return [t * (1 - f) for t, f in zip(self.tool_mask, self.forced_mask, strict=True)]

    @property
    def truncated(self) -> bool:
        """Whether the rollout ended for any reason but the policy's own stop."""
        return self.stop_reason != "stop"

    def to_dict(self) -> JSONObject:
        """Return the record as plain Python values; [`Trajectory.from_dict`] reads it back."""
        return asdict(self)

    def mask_out(self) -> None:
        """
        Leave nothing to train on: mark all tokens as not written by the policy. What is left of a broken record is
        valid.
        """
        for name in ("prompt_ids", "completion_ids"):
            ids = getattr(self, name)
            sound = isinstance(ids, (list, tuple)) and all(type(token) is int and token >= 0 for token in ids)
            setattr(self, name, list(ids) if sound else [])
        count = len(self.completion_ids)
        self.logprobs, self.tool_mask, self.forced_mask, self.values = [0.0] * count, [0] * count, [0] * count, None
        self.stop_reason = self.stop_reason if self.stop_reason in STOP_REASONS else "length"
        try:
            self.validate()
        except TrajectoryError:
            self.turns = []

    @classmethod
    def from_dict(cls, record: JSONObject, rollout: object = None, strict: bool = True) -> "Trajectory":
        """
        Read a record: nothing is filled in, renamed or dropped.

        Args:
            record (`dict`):
                Fields of the trajectory.
            rollout (`object`, *optional*):
                Name of the rollout for error messages.
            strict (`bool`, *optional*, defaults to `True`):
                As `strict_trajectories` of [`ToolGRPOConfig`]: `False` logs what is wrong with a record and returns a
                trajectory with its tokens, if they can be read, none of which is trained on.

        Raises:
            TrajectoryError: for an unknown, missing, short, non-finite or positive-log-prob field; the message names
                the rollout, the field, what was expected and what was got.
        """
        try:
            return cls._read(record, rollout)
        except TrajectoryError as error:
            if strict:
                raise
            logger.warning("Masked out: %s", error)
        kept = record if isinstance(record, dict) else {}
        prompt, completion = (kept.get(name, []) for name in ("prompt_ids", "completion_ids"))
        trajectory = cls(prompt, completion, [], [], [], [], kept.get("stop_reason") or "length")
        trajectory.mask_out()
        return trajectory

    @classmethod
    def _read(cls, record: JSONObject, rollout: object) -> "Trajectory":
        if not isinstance(record, dict):
            raise TrajectoryError(f"{_where(rollout)}: expected a dict of fields, got {type(record).__name__}.")
        _check_keys(record, cls, rollout)
        values = dict(record)
        _raise_first(list_faults("`turns`", values["turns"]), rollout)
        values["turns"] = [Turn.from_dict(t, rollout) if isinstance(t, dict) else t for t in values["turns"]]
        trajectory = cls(**values)
        trajectory.validate(rollout)
        return trajectory

    def validate(self, rollout: object = None) -> None:
        """Check lengths, values and spans; the first fault raises [`TrajectoryError`]."""
        _raise_first(self._faults(), rollout)

    def _faults(self) -> Iterator[str]:
        """Yield what is wrong with the record; later checks rely on the earlier ones having found nothing."""
        for name in ("prompt_ids", "completion_ids", "logprobs", "tool_mask", "forced_mask", "turns"):
            yield from list_faults(f"`{name}`", getattr(self, name))
        count, per = len(self.completion_ids), "completion token"
        for name in ("prompt_ids", "completion_ids"):
            yield from item_faults(f"`{name}`", getattr(self, name), "token ids", is_count)
        for name in ("tool_mask", "forced_mask"):
            yield from length_faults(f"`{name}`", getattr(self, name), count, per)
            yield from item_faults(f"`{name}`", getattr(self, name), "0 or 1", is_flag)
        for position, (forced, assistant) in enumerate(zip(self.forced_mask, self.tool_mask, strict=True)):
            if forced and not assistant:
                yield f"field `forced_mask` marks token {position}, which `tool_mask` says no assistant wrote."
        yield from figure_faults("`logprobs`", self.logprobs, count, per, most=0)
        if self.values is not None:
            yield from figure_faults("`values`", self.values, count, per)
        if self.stop_reason not in STOP_REASONS:
            yield f"field `stop_reason` expected one of {STOP_REASONS}, got {self.stop_reason!r}."
        last = 0
        for index, turn in enumerate(self.turns):
            yield from _turn_faults(turn, f"turns[{index}]")
            if not last <= turn.start <= turn.end <= count:
                span = f"[{turn.start}, {turn.end})"
                yield (
                    f"field `turns` expected ordered spans within {count} completion tokens, got {span} for turn "
                    f"{index}."
                )
            last = turn.end


def locate(trajectory: Trajectory, position: int) -> int:
    """Return the index of the turn that holds completion token `position`: the last that starts at or before it."""
    turns = [index for index, turn in enumerate(trajectory.turns) if turn.start <= position]
    return turns[-1] if turns else 0


_TURN_FIELDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "start": ("an index", lambda value: type(value) is int),
    "end": ("an index", lambda value: type(value) is int),
    "stop_reason": (f"one of {TURN_STOP_REASONS}", TURN_STOP_REASONS.__contains__),
    "sample_seconds": ("seconds", is_duration),
    "tool_seconds": ("seconds", is_duration),
    "policy_version": ("optimizer steps", lambda value: value is None or is_count(value)),
}
"""What each field of a turn must hold, and how that is checked."""


def _turn_faults(turn: Turn, name: str) -> Iterator[str]:
    """Yield what is wrong with the fields of a turn."""
    if not isinstance(turn, Turn):
        yield f"field `turns` expected Turn records, got {type(turn).__name__}."
    for field_name, (expected, is_sound) in _TURN_FIELDS.items():
        value = getattr(turn, field_name)
        if not is_sound(value):
            yield f"field `{name}.{field_name}` expected {expected}, got {value!r}."
    for field_name, kind in (("tool_calls", ToolCall), ("tool_results", ToolResult)):
        items = getattr(turn, field_name)
        yield from list_faults(f"`{name}.{field_name}`", items)
        others = (type(item).__name__ for item in items if not isinstance(item, kind))
        yield from (f"field `{name}.{field_name}` expected {kind.__name__} records, got {got}." for got in others)
    for reward in (turn.reward, *(result.reward for result in turn.tool_results)):
        if reward is not None and not is_finite_number(reward):
            yield f"a reward of `{name}` expected a finite number, got {reward!r}."


def _raise_first(faults: Iterator[str], rollout: object) -> None:
    """Raise [`TrajectoryError`] for the first fault, if there is one."""
    fault = next(faults, None)
    if fault is not None:
        raise TrajectoryError(f"{_where(rollout)}: {fault}")


def _where(rollout: object) -> str:
    return "Trajectory" if rollout is None else f"Rollout {rollout}"


def _check_keys(record: JSONObject, kind: type, rollout: object, path: str = "") -> None:
    """Raise [`TrajectoryError`] for a key that `kind` does not have, or a missing one that has no default."""
    known = {f.name: f.default is f.default_factory is MISSING for f in fields(kind)}
    prefix = f"{path}." if path else ""
    for name in record:
        if name not in known:
            close = field_meant_by(name, list(known))
            raise TrajectoryError(
                f"{_where(rollout)}: unknown field `{prefix}{name}`, expected {', '.join(known)}.",
                remedy=f"Did you mean `{close}`?" if close else "",
            )
    for name, required in known.items():
        if required and name not in record:
            raise TrajectoryError(f"{_where(rollout)}: field `{prefix}{name}` is missing; got {', '.join(record)}.")
