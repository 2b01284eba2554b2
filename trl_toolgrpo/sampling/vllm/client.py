"""A served engine for the vLLM sampler: the client of `server.py`.

A turn that was being sampled when the server was lost is requested again once the server is back and has been sent the
weights. The client has the turns before it, so no rollout is lost and none is started twice.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import aiohttp
from transformers import PreTrainedConfig

from ...errors import ConfigError, RolloutServerError, SamplerError
from ...models.model_settings import model_setting
from ...types import JSONObject
from .engine import check_version, error_text
from .policy_weights import PolicyFile
from .sampler import TokenReply, TokenRequest
from .server_token import HOW_TO_SET, VARIABLE, header_of, server_token


logger = logging.getLogger(__name__)

PROTOCOL = 2
"""Version of the protocol between client and server."""
HEADER_BYTES = 8
"""Bytes of the number that precedes weights that are sent: the length of their description."""
UNREADABLE = 404
"""Status of the answer that a server cannot read the shared memory it was told of."""
WATCH_SECONDS = 20.0
"""Time between checks, during a long turn, that the server still answers: a lost machine sends no error."""
RETRY_SECONDS = 0.5
"""Time between attempts to reach a server."""
TRIES = 10
"""Attempts at a request during which the server is lost and comes back."""
LOST_POLICIES = 3
"""Times in a rollout batch that a server may have other weights than were sent, without having been restarted."""
Result = TypeVar("Result")


class _StatusError(Exception):
    """Something answered, but not with what was requested."""

    def __init__(self, status: int):
        super().__init__(f"status {status}")
        self.refused = status == 401
        self.passing = status >= 500  # as from a proxy in front of a server that is being restarted


_LOST = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, asyncio.TimeoutError, _StatusError)


def model_shape(config: PreTrainedConfig) -> JSONObject:
    """
    Return the parts of a model's configuration that distinguish it from another.

    Args:
        config (`PreTrainedConfig`):
            The model's configuration.
    """
    text = config.get_text_config()
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names = ("model_type", *sizes, "num_attention_heads", "num_key_value_heads")
    return {name: model_setting(text, name) for name in names}


class ServedEngine:
    """
    An engine on a server; see [`TokenEngine`].

    Args:
        url (`str`):
            Base URL of the server.
        timeout (`float`):
            How long, in seconds, a server may be unreachable before the run gives up.
        model (`str`):
            Name of the trained model, for messages.
        shape (`dict`):
            Its [`model_shape`].
        token (`str`, *optional*):
            The token that the server requires; by default that of the environment variable
            `TRL_TOOLGRPO_SERVER_TOKEN`.
    """

    max_length = 0

    def __init__(self, url: str, timeout: float, model: str, shape: JSONObject, token: str | None = None):
        token = token or server_token()
        if token is not None and urlsplit(url).username is not None:
            raise ConfigError(
                f"You passed a `vllm_server_base_url` with a user's name in it and {VARIABLE}, but a request can show "
                f"only one of them.",
                remedy="Leave one out.",
            )
        self._has_token = token is not None
        self.url, self.timeout, self.model, self.shape = url.rstrip("/"), timeout, model, shape
        self.retried = 0
        self._policy: PolicyFile | None = None
        self._boot = ""  # start of the server that the policy was sent to
        self._lost_policies = 0
        self._sending = asyncio.Lock()
        self._shares_memory = True  # as far as is known
        # No limit on a turn as a whole: `_watched` finds out that a server is gone
        limits = aiohttp.ClientTimeout(total=None, sock_connect=10)
        headers = header_of(token) if token is not None else None
        self._http = aiohttp.ClientSession(timeout=limits, connector=aiohttp.TCPConnector(limit=0), headers=headers)

    @classmethod
    async def start(
        cls, url: str, timeout: float, model: str, shape: JSONObject, token: str | None = None
    ) -> "ServedEngine":
        """
        Connect; arguments as for the class.

        Raises:
            RolloutServerError: if there is no server, it is not one for this run, or it refuses the run's token.
            ConfigError: if the version of its vLLM is not supported, or the token cannot be sent.
        """
        engine = cls(url, timeout, model, shape, token)
        try:
            await engine._connect()
        except BaseException:
            await engine.close()
            raise
        return engine

    async def load(self, policy: PolicyFile) -> None:
        """Send a policy, see [`TokenEngine.load`]."""
        self._policy, self._boot, self._lost_policies = policy, "", 0
        await self._with_recovery(self._send)

    async def generate(self, request: TokenRequest) -> TokenReply:
        """Sample a turn, see [`TokenEngine.generate`]; try again when the server is lost and comes back in time."""
        return await self._with_recovery(lambda: self._sampled_turn(request))

    async def wake(self) -> None:
        """Do nothing: a server is always awake."""

    async def rest(self) -> None:
        """Do nothing: a server keeps its memory."""

    async def close(self) -> None:
        """Close the connection; the server keeps running."""
        await self._http.close()

    # One turn

    async def _with_recovery(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Do work, and do it again if the server was lost meanwhile and has come back."""
        for _ in range(TRIES):
            try:
                return await work()
            except _LOST as error:
                self.retried += 1
                logger.warning("The rollout server at %s was lost (%s); trying again.", self.url, error_text(error))
                await self._connect()
        raise RolloutServerError(
            f"The rollout server at {self.url} was lost {TRIES} times over the same request.",
            remedy="Look at its log for what ends it, most often too little memory.",
        )

    async def _sampled_turn(self, request: TokenRequest) -> TokenReply:
        while True:
            if self._policy is None:
                raise SamplerError("A rollout server was asked to sample before it was sent a policy.")
            body = {**asdict(request), "policy": self._policy.key}
            status, reply = await self._watched(self._reply(self._http.post(f"{self.url}/rollouts", json=body)))
            if status == 200:
                return TokenReply(**reply)
            if status != 409:
                raise SamplerError(f"The rollout server at {self.url} failed: {reply.get('error', reply)}")
            await self._send()

    async def _reply(self, request: AbstractAsyncContextManager[aiohttp.ClientResponse]) -> tuple[int, JSONObject]:
        """Return the status and the content of a response, unless the server is lost or refuses the token."""
        async with request as response:
            if response.status >= 500 or response.status == 401:
                raise _StatusError(response.status)
            return response.status, await _content(response)

    async def _watched(self, work: Coroutine[object, object, Result]) -> Result:
        """Wait for a reply for as long as the server answers other requests."""
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=WATCH_SECONDS))[0]:
                await self._description()
            return task.result()
        finally:
            task.cancel()

    # The server

    async def _send(self) -> None:
        """Send the policy, unless the server has it."""
        async with self._sending:
            policy, about = self._policy, await self._description()
            if policy is None or about["policy"] == policy.key:
                self._boot = about["boot"]
                return
            if not policy.weights.is_file():  # written by a process on another machine, which sends it
                await asyncio.sleep(RETRY_SECONDS)
                return
            self._lost_policies += about["boot"] == self._boot
            if self._lost_policies > LOST_POLICIES:
                raise RolloutServerError(
                    f"The rollout server at {self.url} keeps getting weights that are not this run's: another run "
                    f"uses it.",
                    remedy="Start a server for each run, each on its own port (`vllm_server_port`).",
                )
            status, reply = await self._sent(policy)
            if status != 200:
                raise SamplerError(
                    f"The rollout server at {self.url} did not accept the policy: {reply.get('error', reply)}"
                )
            self._boot = about["boot"]

    async def _sent(self, policy: PolicyFile) -> tuple[int, JSONObject]:
        """Send a policy, or where it is in shared memory, and return the answer; what is sent, the server writes to a
        file."""
        shared = policy.shared_folder()
        if shared is not None and self._shares_memory:
            status, reply = await self._put(_packed(policy, shared))
            if status != UNREADABLE:
                return status, reply
            self._shares_memory = False
            logger.info(
                "The rollout server at %s gets the weights over HTTP and writes them to a file, since it cannot read "
                "the shared memory of this process: it runs on another machine, in another container or as another "
                "user.",
                self.url,
            )
        return await self._put(_packed(policy))

    async def _put(self, body: AsyncIterator[bytes]) -> tuple[int, JSONObject]:
        return await self._watched(self._reply(self._http.put(f"{self.url}/policy", data=body)))

    async def _description(self) -> JSONObject:
        """Return what the server says about itself."""
        limit = aiohttp.ClientTimeout(total=30)
        async with self._http.get(f"{self.url}/rollouts", timeout=limit) as response:
            if response.status != 200:
                raise _StatusError(response.status)
            return await _content(response)

    async def _connect(self) -> None:
        """Wait until the server answers, and check that it is one for this run."""
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                about = await self._description()
                break
            except _LOST as error:
                if isinstance(error, _StatusError) and error.refused:
                    what = "a different token from this run's" if self._has_token else "a token, and this run has none"
                    raise RolloutServerError(
                        f"The rollout server at {self.url} requires {what}.", remedy=f"{HOW_TO_SET}."
                    ) from error
                if isinstance(error, _StatusError) and not error.passing:
                    raise RolloutServerError(
                        f"What answers at {self.url} is not a rollout server ({error}). vLLM's own `vllm serve` and "
                        f"`trl vllm-serve` cannot say which weights wrote a turn.",
                        remedy=f"Start {self._command()}.",
                    ) from error
                if time.monotonic() > deadline:
                    raise RolloutServerError(
                        f"The rollout server at {self.url} was unreachable for {self.timeout:g} s "
                        f"(`vllm_server_timeout`): {error_text(error)}.",
                        remedy=f"Start {self._command()}, and point `vllm_server_base_url`, or `vllm_server_host` and "
                        f"`vllm_server_port`, at it.",
                    ) from error
                await asyncio.sleep(RETRY_SECONDS)
        self._check(about)
        self.max_length = about["max_length"]

    def _check(self, about: JSONObject) -> None:
        """Raise an error unless the server is one for this run."""
        if about.get("protocol") != PROTOCOL:
            raise RolloutServerError(
                f"The rollout server at {self.url} speaks version {about.get('protocol')} of the protocol, this run "
                f"version {PROTOCOL}.",
                remedy="Install the same version of trl_toolgrpo on both sides.",
            )
        check_version(about["vllm"], f"The rollout server at {self.url}")
        differ = [name for name, value in self.shape.items() if about["shape"].get(name) != value]
        if differ:
            there = ", ".join(f"{name}={about['shape'].get(name)}" for name in differ)
            here = ", ".join(f"{name}={self.shape[name]}" for name in differ)
            raise RolloutServerError(
                f"The rollout server at {self.url} has a different model: it serves {about['model']!r} ({there}), and "
                f"the run trains {self.model!r} ({here}).",
                remedy=f"Start {self._command()}.",
            )

    def _command(self) -> str:
        return f"one with `python -m trl_toolgrpo.serve --model {self.model}`"


async def _packed(policy: PolicyFile, shared: Path | None = None) -> AsyncIterator[bytes]:
    """Yield the body that sends a policy: a description with its length in front, then the file of tensors unless that
    is in shared memory."""
    about = {
        "key": policy.key,
        "version": policy.version,
        "adapter_config": policy.adapter_config(),
        "shared_folder": str(shared) if shared is not None else None,
    }
    header = json.dumps(about).encode()
    yield len(header).to_bytes(HEADER_BYTES, "little") + header
    if shared is not None:
        return
    with policy.weights.open("rb") as file:
        while chunk := await asyncio.to_thread(file.read, 2**22):
            yield chunk


async def _content(response: aiohttp.ClientResponse) -> JSONObject:
    """Return the JSON object of a response; if it is something else, its beginning as an error."""
    text = await response.text()
    try:
        found = json.loads(text)
    except ValueError:
        found = text[:200]
    return found if isinstance(found, dict) else {"error": found}
