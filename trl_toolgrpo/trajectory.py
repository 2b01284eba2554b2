"""Rollout records: every token with its provenance and the log-prob recorded when it was sampled.

Owns `Turn` and `Trajectory`, their strict readers and the table they become for TRL. Fed by the rollout loop; read by
the trainer, reward functions and diagnostics.
"""

import difflib
import logging
import sys
from collections.abc import Sequence, Sized
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .errors import TrajectoryError
from .tools.types import ToolCall, ToolResult


logger = logging.getLogger(__name__)

STOP_REASONS = ("stop", "length", "tool_limit", "parse_errors", "tool_overflow", "environment")
"""Why a rollout ended. All but `"stop"` count as truncated."""
TURN_STOP_REASONS = ("stop", "length")
"""Why a turn ended: the policy wrote a stop token, or its token budget ran out."""

_ALIASES = {
    "old_log_probs": "logprobs",
    "old_logprobs": "logprobs",
    "old_per_token_logps": "logprobs",
    "sampling_per_token_logps": "logprobs",
    "log_probs": "logprobs",
    "env_mask": "tool_mask",
    "response_ids": "completion_ids",
}


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
        """The turn's own reward and those of its results."""
        return (self.reward or 0.0) + sum(result.reward or 0.0 for result in self.tool_results)

    @classmethod
    def from_dict(cls, record: dict[str, Any], rollout: Any = None) -> "Turn":
        """Read a turn strictly; raises [`TrajectoryError`] for a missing or unknown field."""
        _check_keys(record, cls, {"start", "end"}, rollout, "turns[]")
        values = dict(record)
        for name, kind in (("tool_calls", ToolCall), ("tool_results", ToolResult)):
            items = values.get(name, [])
            if not isinstance(items, (list, tuple)):
                continue  # for `Trajectory.validate` to report
            for item in items:
                if isinstance(item, dict):
                    required = {"id", "name"} if kind is ToolCall else {"content"}
                    _check_keys(item, kind, required, rollout, f"turns[].{name}[]")
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
            Value before each completion token, as the value head estimated it when the token was sampled, shape (C,);
            0.0 where the policy did not sample. `None` without a value head.

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
        """In a line: TRL logs all that a reward function was given of a rollout that none of them scored."""
        parts = self.prompt_ids, self.completion_ids, self.turns
        prompt, completion, turns = (len(part) if isinstance(part, Sized) else part for part in parts)
        return (
            f"Trajectory({prompt} prompt tokens, {completion} completion tokens, {turns} turns, "
            f"stop_reason={self.stop_reason!r})"
        )

    @property
    def trainable_mask(self) -> list[int]:
        """1 where the policy sampled the token, shape (C,)."""
        return [t * (1 - f) for t, f in zip(self.tool_mask, self.forced_mask, strict=True)]

    @property
    def truncated(self) -> bool:
        """Whether the rollout ended for any reason but the policy's own stop."""
        return self.stop_reason != "stop"

    def to_dict(self) -> dict[str, Any]:
        """The record as plain Python values; [`Trajectory.from_dict`] reads it back."""
        return asdict(self)

    def mask_out(self) -> None:
        """
        Leave nothing to train on: all tokens count as if somebody else had written them. Of a record that breaks its
        contract, what remains of it keeps the contract.
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
    def from_dict(cls, record: dict[str, Any], rollout: Any = None, strict: bool = True) -> "Trajectory":
        """
        Read a record: nothing is filled in, renamed or dropped.

        Args:
            record (`dict`):
                Fields of the trajectory.
            rollout (*optional*):
                Name of the rollout for error messages.
            strict (`bool`, *optional*, defaults to `True`):
                As `strict_trajectories` of [`ToolGRPOConfig`]: `False` logs what is wrong with a record, and gives a
                trajectory with the tokens it has, if they can be read, of which none is trained on.

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
        known: dict[str, Any] = {name: [] for name in ("prompt_ids", "completion_ids", "turns")}
        if isinstance(record, dict):
            known |= {name: record[name] for name in ("prompt_ids", "completion_ids") if name in record}
        reason = record.get("stop_reason") if isinstance(record, dict) else None
        trajectory = cls(**known, logprobs=[], tool_mask=[], forced_mask=[], stop_reason=reason or "length")
        trajectory.mask_out()
        return trajectory

    @classmethod
    def _read(cls, record: dict[str, Any], rollout: Any) -> "Trajectory":
        if not isinstance(record, dict):
            raise TrajectoryError(f"{_where(rollout)}: expected a dict of fields, got {type(record).__name__}.")
        _check_keys(record, cls, {f.name for f in fields(cls)} - {"values"}, rollout)
        values = dict(record)
        _check_list(values["turns"], "turns", _where(rollout))
        values["turns"] = [Turn.from_dict(t, rollout) if isinstance(t, dict) else t for t in values["turns"]]
        trajectory = cls(**values)
        trajectory.validate(rollout)
        return trajectory

    def validate(self, rollout: Any = None) -> None:
        """Check lengths, values and spans; raises [`TrajectoryError`] at the first fault."""
        where = _where(rollout)
        for name in ("prompt_ids", "completion_ids", "logprobs", "tool_mask", "forced_mask", "turns"):
            _check_list(getattr(self, name), name, where)
        expected = len(self.completion_ids)
        for name in ("logprobs", "tool_mask", "forced_mask"):
            got = len(getattr(self, name))
            if got != expected:
                raise TrajectoryError(
                    f"{where}: field `{name}` has {got} values, expected {expected}, one per completion token."
                )
        for name in ("prompt_ids", "completion_ids"):
            for position, token in enumerate(getattr(self, name)):
                if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                    raise TrajectoryError(
                        f"{where}: field `{name}` expected token ids, got {token!r} at position {position}."
                    )
        if self.values is not None:
            _check_list(self.values, "values", where)
            unusable = sum(not is_finite_number(value) for value in self.values)
            if len(self.values) != expected or unusable:
                raise TrajectoryError(
                    f"{where}: field `values` expected {expected} finite values, one per completion token, got "
                    f"{len(self.values)}, of which {unusable} are not finite."
                )
        _check_mask(self.tool_mask, "tool_mask", where)
        _check_mask(self.forced_mask, "forced_mask", where)
        _check_values(self.forced_mask, self.tool_mask, self.logprobs, where)
        if self.stop_reason not in STOP_REASONS:
            raise TrajectoryError(
                f"{where}: field `stop_reason` expected one of {STOP_REASONS}, got {self.stop_reason!r}."
            )
        _check_turns(self.turns, expected, where)


def field_meant_by(name: Any, known: Sequence[str]) -> str | None:
    """The field that a misnamed one stands for, as far as that can be told; `None` if it cannot."""
    close = _ALIASES.get(name) or next(iter(difflib.get_close_matches(str(name), known, n=1)), None)
    return close if close in known else None


def locate(trajectory: Trajectory, position: int) -> int:
    """Index of the turn that holds completion token `position` (the last turn that starts at or before it)."""
    turns = [index for index, turn in enumerate(trajectory.turns) if turn.start <= position]
    return turns[-1] if turns else 0


def _where(rollout: Any) -> str:
    return "Trajectory" if rollout is None else f"Rollout {rollout}"


def _check_keys(record: dict, kind: type, required: set[str], rollout: Any, path: str = "") -> None:
    known = [f.name for f in fields(kind)]
    prefix = f"{path}." if path else ""
    for name in record:
        if name not in known:
            close = field_meant_by(name, known)
            hint = f" Did you mean `{close}`?" if close else ""
            raise TrajectoryError(
                f"{_where(rollout)}: unknown field `{prefix}{name}`, expected {', '.join(known)}.{hint}"
            )
    for name in known:
        if name in required and name not in record:
            raise TrajectoryError(f"{_where(rollout)}: field `{prefix}{name}` is missing; got {', '.join(record)}.")


def _check_list(value: Any, name: str, where: str) -> None:
    if not isinstance(value, (list, tuple)):
        raise TrajectoryError(f"{where}: field `{name}` expected a list, got {type(value).__name__}.")


def is_finite_number(value: Any) -> bool:
    """Whether a value is a number, and neither NaN nor infinite."""
    # By comparison: `math.isfinite` overflows for huge integers
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _check_mask(mask: Sequence[int], name: str, where: str) -> None:
    for position, value in enumerate(mask):
        if type(value) is not int or value not in (0, 1):
            raise TrajectoryError(f"{where}: field `{name}` expected 0 or 1, got {value!r} at position {position}.")


def _check_values(forced_mask: Sequence[int], tool_mask: Sequence[int], logprobs: Sequence[float], where: str) -> None:
    for position, (forced, assistant) in enumerate(zip(forced_mask, tool_mask, strict=True)):
        if forced and not assistant:
            raise TrajectoryError(
                f"{where}: field `forced_mask` marks token {position}, which `tool_mask` says no assistant wrote."
            )
    for position, value in enumerate(logprobs):
        if not is_finite_number(value) or value > 0:
            raise TrajectoryError(
                f"{where}: field `logprobs` expected finite values of at most 0, got {value!r} at position {position}."
            )


def _check_turns(turns: Sequence[Turn], length: int, where: str) -> None:
    last = 0
    for index, turn in enumerate(turns):
        if not isinstance(turn, Turn):
            raise TrajectoryError(f"{where}: field `turns` expected Turn records, got {type(turn).__name__}.")
        _check_turn(turn, f"turns[{index}]", where)
        if not last <= turn.start <= turn.end <= length:
            raise TrajectoryError(
                f"{where}: field `turns` expected ordered spans within {length} completion tokens, got "
                f"[{turn.start}, {turn.end}) for turn {index}."
            )
        last = turn.end


def _check_turn(turn: Turn, name: str, where: str) -> None:
    """Check the type of every field of a turn."""
    for field_name in ("start", "end"):
        value = getattr(turn, field_name)
        if type(value) is not int:
            raise TrajectoryError(f"{where}: field `{name}.{field_name}` expected an index, got {value!r}.")
    if turn.stop_reason not in TURN_STOP_REASONS:
        raise TrajectoryError(
            f"{where}: field `{name}.stop_reason` expected one of {TURN_STOP_REASONS}, got {turn.stop_reason!r}."
        )
    for field_name, kind in (("tool_calls", ToolCall), ("tool_results", ToolResult)):
        items = getattr(turn, field_name)
        _check_list(items, f"{name}.{field_name}", where)
        for item in items:
            if not isinstance(item, kind):
                got = type(item).__name__
                raise TrajectoryError(
                    f"{where}: field `{name}.{field_name}` expected {kind.__name__} records, got {got}."
                )
    for field_name in ("sample_seconds", "tool_seconds"):
        value = getattr(turn, field_name)
        if not is_finite_number(value) or value < 0:
            raise TrajectoryError(f"{where}: field `{name}.{field_name}` expected seconds, got {value!r}.")
    version = turn.policy_version
    if version is not None and (type(version) is not int or version < 0):
        raise TrajectoryError(f"{where}: field `{name}.policy_version` expected optimizer steps, got {version!r}.")
    _check_rewards(turn, name, where)


def _check_rewards(turn: Turn, name: str, where: str) -> None:
    for reward in (turn.reward, *(result.reward for result in turn.tool_results)):
        if reward is not None and not is_finite_number(reward):
            raise TrajectoryError(f"{where}: a reward of `{name}` expected a finite number, got {reward!r}.")
