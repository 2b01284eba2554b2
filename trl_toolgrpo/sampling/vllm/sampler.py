"""The vLLM sampler: each turn of a rollout is its own request to an asynchronous engine, in-process or served.

On a thread with an event loop, every running row waits for its own reply, so that no row waits for another and tools
run while the rest is sampled. The engine keeps the history of a row in its prefix cache.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

from ...errors import SamplerError
from ..protocol import SampledTokens, TokenConstraint
from .policy_weights import PolicyFile


STEP_SECONDS = 0.01
"""Longest time a step waits for a turn to end, before the loop attends to tools."""
Result = TypeVar("Result")


@dataclass
class TokenRequest:
    """
    A turn to sample from the full softmax of `logits / temperature`.

    Args:
        prompt_ids (`list[int]`):
            Everything before the turn.
        max_new_tokens (`int`):
            Token budget.
        stop_ids (`list[int]`):
            Tokens that end the turn, and are part of it.
        temperature (`float`):
            Temperature of sampling and of the log-probs.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    stop_ids: list[int]
    temperature: float


@dataclass
class TokenReply:
    """
    A sampled turn.

    Args:
        token_ids (`list[int]`):
            Sampled tokens, the stop token included.
        logprobs (`list[float]`):
            Log-prob in nats of each.
        version (`int`):
            Version of the policy that wrote them.
    """

    token_ids: list[int]
    logprobs: list[float]
    version: int


class TokenEngine(Protocol):
    """An engine that samples turns outside the training model. Its methods run on one event loop."""

    max_length: int
    """Most tokens of a prompt and its turn together."""

    async def load(self, policy: PolicyFile) -> None:
        """Use this version of the policy from now on, and forget the previous one."""
        ...

    async def generate(self, request: TokenRequest) -> TokenReply:
        """Sample a turn with the policy loaded last; any number of turns at once."""
        ...

    async def wake(self) -> None:
        """Prepare for a rollout batch."""
        ...

    async def rest(self) -> None:
        """Release what is not needed after a rollout batch."""
        ...

    async def close(self) -> None:
        """Free everything."""
        ...


EngineStart: TypeAlias = Callable[[], Coroutine[object, object, TokenEngine]]
"""Makes an engine, on the event loop that it will run on."""


class VLLMSampler:
    """
    Samples with an engine outside the training model; see [`Sampler`].

    Args:
        start (`Callable`):
            Makes the engine, on the sampler's event loop.
        stop_ids (`Sequence[int]`):
            Tokens that end a turn.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of sampling and of the recorded log-probs.

    Raises:
        ToolGRPOError: raised by an engine that cannot start.
    """

    def __init__(self, start: EngineStart, stop_ids: Sequence[int], temperature: float = 1.0):
        self.stop_ids = list(stop_ids)
        self.temperature = temperature
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-sampler", daemon=True)
        self._thread.start()
        try:
            self.engine = self.run(start())
        except BaseException:
            self._stop()
            raise

    @property
    def max_sequence_length(self) -> int:
        """Most tokens of a rollout, its prompt included."""
        return self.engine.max_length

    def load(self, policy: PolicyFile) -> None:
        """Sample with this version of the policy from now on."""
        self.run(self.engine.wake())
        self.run(self.engine.load(policy))

    @contextmanager
    def open(self, prompts: Sequence[Sequence[int]], max_length: int) -> Iterator["VLLMSession"]:
        """Open a session, see [`Sampler.open`]."""
        self.run(self.engine.wake())
        session = VLLMSession(self, prompts)
        try:
            yield session
        finally:
            session.cancel()
            self.run(self.engine.rest())

    def submit(self, work: Coroutine[object, object, Result]) -> Future[Result]:
        """Start a coroutine on the sampler's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[object, object, Result]) -> Result:
        """Run a coroutine on the sampler's event loop and wait for its result."""
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Free the engine and end the thread; closing again does nothing."""
        if self._loop.is_closed():
            return
        try:
            self.run(self.engine.close())
        finally:
            self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class VLLMSession:
    """A running batch of a [`VLLMSampler`]; see [`SamplerSession`] for the protocol."""

    def __init__(self, sampler: VLLMSampler, prompts: Sequence[Sequence[int]]):
        self.sampler = sampler
        self.histories = [list(prompt) for prompt in prompts]
        self._running: dict[int, Future[TokenReply]] = {}
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    @property
    def busy(self) -> bool:
        """Whether there is work for [`VLLMSession.step`]."""
        return bool(self._running)

    def extend(
        self, row: int, token_ids: Sequence[int], max_new_tokens: int, constraint: TokenConstraint | None = None
    ) -> None:
        """Append known tokens to a row and sample more, see [`SamplerSession.extend`]."""
        if row in self._running:
            raise SamplerError(f"Row {row} was extended while it is still being sampled.")
        if constraint is not None:
            raise SamplerError("vLLM samples without constraints.", remedy="Use `force_level='call'` or 'name'.")
        history = self.histories[row]
        history += token_ids
        room = self.sampler.max_sequence_length - len(history)
        if room < 1:
            raise SamplerError(
                f"Rollout {row} has {len(history)} tokens to begin with, and vLLM is configured for "
                f"{self.sampler.max_sequence_length} in total.",
                remedy="Raise `vllm_max_model_length` (of a server: `--max-model-len`), or shorten the prompts.",
            )
        budget, sampler, ended = min(max_new_tokens, room), self.sampler, self._ended
        request = TokenRequest(list(history), budget, sampler.stop_ids, sampler.temperature)
        future = self._running[row] = sampler.submit(sampler.engine.generate(request))
        future.add_done_callback(lambda future: ended.put(row))

    def step(self) -> list[SampledTokens]:
        """Return the turns that have ended, after a short wait for one; see [`SamplerSession.step`]."""
        rows = []
        with suppress(queue.Empty):
            rows.append(self._ended.get(timeout=STEP_SECONDS))
            while True:
                rows.append(self._ended.get_nowait())
        return [self._read(row, self._running.pop(row).result()) for row in rows]

    def finish(self, row: int) -> None:
        """Forget a row, see [`SamplerSession.finish`]."""
        self.histories[row] = []

    def cancel(self) -> None:
        """Cancel what is still being sampled, and wait until it has ended."""
        for future in self._running.values():
            future.cancel()
        wait(self._running.values())

    def _read(self, row: int, reply: TokenReply) -> SampledTokens:
        if not reply.token_ids or len(reply.token_ids) != len(reply.logprobs):
            raise SamplerError(
                f"vLLM gave {len(reply.token_ids)} tokens and {len(reply.logprobs)} log-probs for rollout {row}, "
                f"expected at least one token, and a log-prob for each."
            )
        self.histories[row] += reply.token_ids
        stopped = reply.token_ids[-1] in self.sampler.stop_ids
        logprobs = [min(value, 0.0) for value in reply.logprobs]  # rounding alone can pass 0
        return SampledTokens(row, reply.token_ids, logprobs, stopped, policy_version=reply.version)
