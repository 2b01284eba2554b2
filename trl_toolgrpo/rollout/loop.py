"""The rollout loop: one state machine per rollout, all driven together.

A turn is sampled, its calls run off the decode path, their results are appended as tokens, and the next turn is
sampled. Rows that wait for a tool never hold up rows that can be decoded.
"""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..chat.tool_chat import ToolChat, tool_message
from ..errors import EnvironmentTimeoutError, ToolRuntimeError, TrajectoryError
from ..redaction import Redactor
from ..sampling.protocol import SampledTokens, SamplerSession, turn_fault
from ..tools.results import plain_reward, result_text, without_secrets
from ..tools.runtime.executor import ToolExecutor
from ..tools.tool import Tool, ToolCall, ToolResult
from ..types import Message
from .forcing import ForcedStart, Forcing
from .trajectory import Trajectory, Turn


GATHER_SECONDS = 0.05
"""Longest time to wait for more tools when one has answered and nothing is decoded."""
TOOL_STEPS = 8
"""Decoding steps that a row's tools may take before a loop that keeps order waits for them."""


@dataclass
class RolloutLimits:
    """
    When a rollout ends.

    Args:
        max_completion_length (`int`):
            Most tokens after the prompt, tool results included.
        max_tool_calling_iterations (`int`):
            Most turns whose calls are answered.
        max_tool_output_tokens (`int`):
            Most tokens of one tool result.
        parse_error_budget (`int`):
            Malformed calls that are answered before the rollout stops.
        max_sequence_length (`float`, *optional*):
            Positions of the model, prompt included; a tool result that reaches the last one does not fit, and a prompt
            that reaches it ends the rollout before it begins, with stop reason `"length"`.
    """

    max_completion_length: int
    max_tool_calling_iterations: int
    max_tool_output_tokens: int
    parse_error_budget: int
    max_sequence_length: float = math.inf

    def has_room(self, prompt_ids: Sequence[int]) -> bool:
        """Return whether a prompt leaves the model a position to write to."""
        return len(prompt_ids) < self.max_sequence_length


@dataclass
class RolloutRequest:
    """
    What a rollout starts from.

    Args:
        prompt_ids (`list[int]`):
            Prompt tokens.
        tools (`dict[str, Tool]`, *optional*):
            Tools of this rollout, by name; a rollout without tools is one turn.
        environment (`object`, *optional*):
            The environment that some of the tools belong to. What they leave in its attribute `turn_reward` is the
            reward of the turn.
        owned (`frozenset[str]`, *optional*):
            Names of the tools that belong to the environment: their calls run in order, on the environment's own
            thread.
        failed (`bool`, *optional*, defaults to `False`):
            Whether its environment has failed: it ends before it begins, with stop reason `"environment"`.
    """

    prompt_ids: list[int]
    tools: dict[str, Tool] = field(default_factory=dict)
    environment: object | None = None
    owned: frozenset[str] = frozenset()
    failed: bool = False


@dataclass
class Rollout:
    """
    A finished rollout.

    Args:
        trajectory (`Trajectory`):
            Every token with its provenance.
        messages (`list[dict]`):
            Assistant and tool messages, as reward functions get them; empty without tools.
        entropies (`list[float]`, *optional*):
            Entropy in nats of what each completion token was drawn from, 0.0 where none was drawn; `None` if the
            sampler records none.
        fault (`str`, *optional*):
            What was wrong with a turn that the sampler returned, and for which the rollout was given up.
    """

    trajectory: Trajectory
    messages: list[Message]
    entropies: list[float] | None = None
    fault: str | None = None


@dataclass
class RolloutStats:
    """Seconds that a batch took in total, and waiting for tools with nothing to decode; number of abandoned calls."""

    seconds: float = 0.0
    tool_wait_seconds: float = 0.0
    abandoned: int = 0


class _State:
    """A rollout in progress."""

    def __init__(self, request: RolloutRequest, opening: Callable[[], str]):
        self.request = request
        self.schemas = [tool.schema for tool in request.tools.values()]
        self.trajectory = Trajectory(request.prompt_ids, [], [], [], [], [], "stop")
        self.messages: list[Message] = []
        self.entropies: list[float] | None = []
        self.opening = opening
        self.futures: list[Future[ToolResult]] = []
        self.called = 0
        self.start = ForcedStart([])
        self.budget = 0  # most tokens of the turn that is being sampled
        self.since = time.perf_counter()
        self.fault: str | None = None

    def ensure_message(self) -> None:
        """Give a rollout with tools an assistant message, which reward functions get even if none was written."""
        if self.request.tools and not self.messages:
            self.messages = [{"role": "assistant", "content": ""}]


@dataclass(eq=False)
class RolloutLoop:
    """
    Drives a batch of rollouts to their end.

    Args:
        session (`SamplerSession`):
            Open session; row `i` holds the prompt of `requests[i]`.
        requests (`Sequence[RolloutRequest]`):
            One for each rollout.
        limits (`RolloutLimits`):
            When a rollout ends.
        chat (`ToolChat`, *optional*):
            Needed if any request has tools.
        executor (`ToolExecutor`, *optional*):
            Needed if any request has tools.
        forcing ([`Forcing`], *optional*):
            Makes turns begin with a tool call.
        in_order (`bool`, *optional*, defaults to `False`):
            Continue a row a fixed number of steps after its calls, or when nothing is left to decode, and wait for its
            tools until then, so that it does not depend on a tool's time which rows are decoded together.
        redactor ([`Redactor`], *optional*):
            Knows the secrets that no tool result may repeat.
    """

    session: SamplerSession
    requests: Sequence[RolloutRequest]
    limits: RolloutLimits
    chat: ToolChat | None = None
    executor: ToolExecutor | None = None
    forcing: Forcing | None = None
    in_order: bool = False
    redactor: Redactor = field(default_factory=Redactor)

    def __post_init__(self) -> None:
        self.steps = 0
        self._step_seconds = 0.0  # that the latest step took
        self.awaited: set[int] = set()  # rows that the sampler has yet to return
        self.stats = RolloutStats()
        decoded: dict[tuple[int, ...], str] = {}
        # Not through `self`: a cycle would keep the session, and with it the keys and values, into the backward pass
        self.states = [_State(r, partial(_decoded, self.chat, r.prompt_ids, decoded)) for r in self.requests]

    def run(self) -> list[Rollout]:
        """Sample and call tools until every rollout has ended; return rollouts in the order of the requests."""
        started = time.perf_counter()
        for row, state in enumerate(self.states):
            if self.limits.has_room(state.request.prompt_ids) and not state.request.failed:
                left = self.limits.max_sequence_length - len(state.request.prompt_ids)
                self._begin_turn(row, [], int(min(self.limits.max_completion_length, left)))
            else:
                state.ensure_message()
                self._finish(row, "environment" if state.request.failed else "length")
        while True:
            if not self.awaited:
                self._gather()
            for row in self._answered():
                self._continue(row)
            if self.session.busy:
                self.steps += 1
                began = time.perf_counter()
                turns = self.session.step()
                self._step_seconds = time.perf_counter() - began
                for sampled in turns:
                    if self._is_sound(sampled):
                        self._end_turn(sampled)
            elif not self._wait():
                break
        self.stats.seconds = time.perf_counter() - started
        return [Rollout(state.trajectory, state.messages, state.entropies, state.fault) for state in self.states]

    # Waiting

    def _answered(self) -> list[int]:
        """Return the rows to continue, in order."""
        waiting = [row for row, state in enumerate(self.states) if state.futures]
        if not self.in_order or not waiting:
            return [row for row in waiting if all(future.done() for future in self.states[row].futures)]
        first = min(self.states[row].called for row in waiting)
        due = self.steps - TOOL_STEPS if self.session.busy else first
        rows = [row for row in waiting if self.states[row].called <= due]
        started = time.perf_counter()
        futures = [future for row in rows for future in self.states[row].futures]
        while wait(futures, timeout=1.0).not_done:
            pass
        self.stats.tool_wait_seconds += time.perf_counter() - started
        return rows

    def _gather(self) -> None:
        """Wait for tools that are about to answer while nothing is decoded: rows that begin together are decoded
        together, and one that comes later costs steps of its own. It may cost as much time as one of these."""
        futures = [future for state in self.states for future in state.futures]
        if self.in_order or not futures:
            return
        started = time.perf_counter()
        wait(futures, timeout=1.0, return_when=FIRST_COMPLETED)
        wait(futures, timeout=min(self._step_seconds, GATHER_SECONDS))
        self.stats.tool_wait_seconds += time.perf_counter() - started

    def _wait(self) -> bool:
        """Wait for any tool; return whether there was one to wait for."""
        futures = [future for state in self.states for future in state.futures if not future.done()]
        if not futures:
            return any(state.futures for state in self.states)
        started = time.perf_counter()
        wait(futures, timeout=1.0, return_when=FIRST_COMPLETED)
        self.stats.tool_wait_seconds += time.perf_counter() - started
        return True

    # One rollout

    def _is_sound(self, sampled: SampledTokens) -> bool:
        """Return whether a turn can be recorded; if not, its rollout is given up without it."""
        row = getattr(sampled, "row", None)
        if row not in self.awaited:
            raise TrajectoryError(
                f"A sampler returned a turn of row {row!r}, expected one of the rows it was asked to extend and has "
                f"not returned yet: {', '.join(map(str, sorted(self.awaited))) or 'none'}."
            )
        self.awaited.remove(row)
        state = self.states[row]
        state.fault = turn_fault(sampled, state.start.constraint is not None, state.budget)
        if state.fault is not None:
            state.ensure_message()
            self._finish(row, "length")
        return state.fault is None

    def _end_turn(self, sampled: SampledTokens) -> None:
        """Record a turn, and submit its calls or end the rollout."""
        state = self.states[sampled.row]
        trajectory = state.trajectory
        now = time.perf_counter()
        start = len(trajectory.completion_ids)
        given = state.start.token_ids
        count = len(given) + len(sampled.token_ids)
        forced = len(given) if state.start.constraint is None else count  # not drawn from what the trainer scores
        trajectory.completion_ids += [*given, *sampled.token_ids]
        trajectory.logprobs += _turn_figures(given, sampled.logprobs, count, forced)
        if sampled.entropies is None:
            state.entropies = None
        elif state.entropies is not None:
            state.entropies += [0.0] * (start - len(state.entropies))
            state.entropies += _turn_figures(given, sampled.entropies, count, forced)
        if sampled.values is None:
            trajectory.values = None  # the trainer computes those of the whole rollout
        elif trajectory.values is not None or not trajectory.turns:
            trajectory.values = [*(trajectory.values or ()), *_turn_figures(given, sampled.values, count, forced)]
        trajectory.tool_mask += [1] * count
        trajectory.forced_mask += [1] * forced + [0] * (count - forced)
        turn = Turn(start, start + count, "stop" if sampled.stopped else "length", sample_seconds=now - state.since)
        turn.policy_version = sampled.policy_version
        trajectory.turns.append(turn)
        if not state.request.tools or count == 0:
            state.ensure_message()
            return self._finish(sampled.row, turn.stop_reason)
        number = len(trajectory.turns) - 1
        parsed = self._chat().parse(trajectory.completion_ids[start:], state.opening(), state.schemas, number)
        state.messages.append(parsed.message)
        turn.tool_calls = parsed.calls
        if not sampled.stopped:
            return self._finish(sampled.row, "length")
        malformed = sum(call.error is not None for turn in trajectory.turns for call in turn.tool_calls)
        if not parsed.calls:
            self._finish(sampled.row, "stop")
        elif malformed > self.limits.parse_error_budget:
            self._finish(sampled.row, "parse_errors")
        elif number >= self.limits.max_tool_calling_iterations:
            self._finish(sampled.row, "tool_limit")
        else:
            state.since = now
            state.called = self.steps
            state.futures = [self._submit(state, call) for call in parsed.calls]

    def _submit(self, state: _State, call: ToolCall) -> Future[ToolResult]:
        if self.executor is None:
            raise RuntimeError("A rollout with tools needs a ToolExecutor.")
        request = state.request
        owner = request.environment if call.name in request.owned else None
        return self.executor.submit(call, request.tools.get(call.name), owner=owner, available=list(request.tools))

    def _continue(self, row: int) -> None:
        """Append the results of a turn's calls and queue the next turn."""
        state = self.states[row]
        trajectory, turn = state.trajectory, state.trajectory.turns[-1]
        turn.tool_results = [without_secrets(future.result(), self.redactor) for future in state.futures]
        state.futures = []
        now = time.perf_counter()
        turn.tool_seconds, state.since = now - state.since, now
        try:
            turn.reward = _take_turn_reward(state.request.environment)
        except EnvironmentTimeoutError:
            return self._finish(row, "environment")
        done = list(zip(turn.tool_calls, turn.tool_results, strict=True))
        if any(not result.is_error and state.request.tools[call.name].ends_rollout for call, result in done):
            return self._finish(row, "stop")
        chat = self._chat()
        messages = []
        for call, result in done:
            text, result.truncated = chat.truncate(result_text(result), self.limits.max_tool_output_tokens)
            messages.append(tool_message(call, text))
        suffix, opening = chat.tool_suffix(trajectory.completion_ids[-1], messages)
        room = self.limits.max_completion_length - len(trajectory.completion_ids) - len(suffix)
        total = len(state.request.prompt_ids) + len(trajectory.completion_ids) + len(suffix)
        if room < 0 or total >= self.limits.max_sequence_length:
            return self._finish(row, "tool_overflow")
        trajectory.completion_ids += suffix
        trajectory.logprobs += [0.0] * len(suffix)
        if trajectory.values is not None:
            trajectory.values += [0.0] * len(suffix)
        trajectory.tool_mask += [0] * len(suffix)
        trajectory.forced_mask += [0] * len(suffix)
        state.messages += messages
        if room == 0:  # the results fit, and leave the policy no token to answer with
            return self._finish(row, "length")
        state.opening = lambda: opening
        self._begin_turn(row, suffix, int(min(room, self.limits.max_sequence_length - total)))

    def _begin_turn(self, row: int, known: list[int], room: int) -> None:
        """Queue a turn after known tokens, with a forced beginning if one is drawn and leaves room for a token."""
        state = self.states[row]
        state.start = ForcedStart([])
        if self.forcing is not None:
            start = self.forcing.begin_turn(state.trajectory, state.request.tools, row)
            state.start = start if len(start.token_ids) < room else ForcedStart([])
        given = state.start.token_ids
        state.budget = room - len(given)
        self.awaited.add(row)
        self.session.extend(row, [*known, *given], state.budget, state.start.constraint)

    def _finish(self, row: int, reason: str) -> None:
        self.states[row].trajectory.stop_reason = reason
        self.session.finish(row)

    def _chat(self) -> ToolChat:
        if self.chat is None:
            raise RuntimeError("A rollout with tools needs a ToolChat.")
        return self.chat


def _turn_figures(given: list[int], figures: list[float], count: int, forced: int) -> list[float]:
    """Return the figures of a turn's tokens, 0.0 for those that were forced."""
    return [0.0] * len(given) + list(figures) if forced < count else [0.0] * count


def _take_turn_reward(environment: Any) -> float | None:
    """Return what the tools of an environment left in its `turn_reward` during a turn, and reset it to None."""
    reward = getattr(environment, "turn_reward", None)
    if reward is None or callable(reward):
        return None
    environment.turn_reward = None
    try:
        return plain_reward(reward, f"`turn_reward` of the environment {type(environment).__name__}")
    except ValueError as error:
        raise ToolRuntimeError(str(error), remedy="Give a float, or None for no reward.") from None


def _decoded(chat: ToolChat | None, ids: list[int], known: dict[tuple[int, ...], str]) -> str:
    """Return the text of a prompt, which rollouts of a group share."""
    key = tuple(ids)
    if key not in known:
        known[key] = chat.tokenizer.decode(ids) if chat is not None else ""
    return known[key]
