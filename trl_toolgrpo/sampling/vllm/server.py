"""A server of rollouts: an engine reachable over HTTP, for a training run on another GPU or machine.

Token ids come in, token ids and log-probs go out. The run sends its weights, an adapter or all of them, and each
request names the weights it must be answered with, so a server that was restarted, or that got the weights of another
run, can never answer with the wrong ones. A server on the run's machine reads all weights in shared memory; another
one writes what it is sent to a file. When its engine ends, the server ends. The client is in `client.py`.

Whoever reaches the port can send weights, so a server that listens to other machines requires a token of its clients;
see `server_token.py`. Nothing is encrypted: keep the traffic inside a network you trust. vLLM's own server does not
say which weights wrote a turn.
"""

import asyncio
import json
import os
import shutil
import signal
import tempfile
import uuid
from dataclasses import asdict
from functools import partial
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

from ...errors import ConfigError, EngineLostError, SamplerError
from ...types import JSONObject
from .client import HEADER_BYTES, PROTOCOL, UNREADABLE
from .policy_weights import ADAPTER_CONFIG, PolicyFile, claim_folder, is_shared_folder
from .sampler import EngineStart, TokenEngine, TokenRequest
from .server_token import HOW_TO_SET, is_loopback, is_shown, server_token


class RolloutServer:
    """
    Serves one engine.

    Args:
        engine ([`TokenEngine`]):
            The engine that samples.
        about (`dict`):
            What clients are told: `model`, `shape` (see [`model_shape`]) and `vllm`, its version.
        token (`str`, *optional*):
            The token that every request must show; `None` to answer all.
    """

    def __init__(self, engine: TokenEngine, about: JSONObject, token: str | None = None):
        self.engine = engine
        self._token = token
        self.about = {**about, "protocol": PROTOCOL, "boot": uuid.uuid4().hex, "max_length": engine.max_length}
        self.policy: PolicyFile | None = None
        self.lost = False  # the engine has ended
        self._folder, self._remove_folder = claim_folder(f"server-{self.about['boot']}")
        self._running = 0
        self._state = asyncio.Condition()
        self._loading = asyncio.Lock()

    def application(self) -> web.Application:
        """Return the web application with the server's routes."""
        app = web.Application(client_max_size=2**40, middlewares=[self._admit])
        app.add_routes(
            [web.get("/rollouts", self._status), web.post("/rollouts", self._generate), web.put("/policy", self._load)]
        )
        app.on_cleanup.append(self._close)
        return app

    @web.middleware
    async def _admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse a request without the token before any of its body is read."""
        if self._token is None or is_shown(self._token, request.headers.get("Authorization")):
            return await handler(request)
        reply = {"error": "This rollout server only answers requests that show its token."}
        return web.json_response(reply, status=401, headers={"WWW-Authenticate": "Bearer"})

    async def _status(self, request: web.Request) -> web.Response:
        """Answer with what the server is and which policy it has."""
        key, version = (self.policy.key, self.policy.version) if self.policy is not None else (None, None)
        return web.json_response({**self.about, "policy": key, "version": version, "running": self._running})

    async def _generate(self, request: web.Request) -> web.Response:
        """Answer with a turn, or with status 409 if the request means another policy."""
        wanted = await request.json()
        key = wanted.pop("policy")
        if self.policy is None or self.policy.key != key:
            return web.json_response({"boot": self.about["boot"]}, status=409)
        self._running += 1
        try:
            reply = await self.engine.generate(TokenRequest(**wanted))
        except EngineLostError as error:
            if not self.lost:
                signal.raise_signal(signal.SIGTERM)
            self.lost = True
            return web.json_response({"error": str(error)}, status=503)
        except SamplerError as error:
            return web.json_response({"error": str(error)}, status=400)
        finally:
            self._running -= 1
            async with self._state:
                self._state.notify_all()
        return web.json_response(asdict(reply))

    async def _load(self, request: web.Request) -> web.Response:
        """Receive a policy, or read it in shared memory, and use it."""
        size = int.from_bytes(await request.content.readexactly(HEADER_BYTES), "little")
        sent = json.loads(await request.content.readexactly(size))
        if sent["shared_folder"] is not None:
            policy = PolicyFile(sent["key"], sent["version"], Path(sent["shared_folder"]), adapter=False)
            if not is_shared_folder(policy.folder) or not os.access(policy.weights, os.R_OK):
                return web.json_response({}, status=UNREADABLE)
            async with self._loading:
                return await self._use(policy)
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        config = sent["adapter_config"]
        policy = PolicyFile(sent["key"], sent["version"], folder, adapter=config is not None)
        try:
            if config is not None:
                (folder / ADAPTER_CONFIG).write_text(json.dumps(config), encoding="utf-8")
            with policy.weights.open("wb") as file:
                async for chunk in request.content.iter_chunked(2**20):
                    file.write(chunk)
            async with self._loading:
                return await self._use(policy)
        finally:
            if self.policy is not policy:
                shutil.rmtree(folder, ignore_errors=True)

    async def _use(self, policy: PolicyFile) -> web.Response:
        """Give the engine a policy once no turn is running."""
        if self.policy is not None and self.policy.key == policy.key:
            return web.json_response({})  # another process of the run was faster
        before, self.policy = self.policy, None  # no turn begins with the previous weights
        async with self._state:
            await self._state.wait_for(lambda: self._running == 0)
        try:
            await self.engine.load(policy)
        except SamplerError as error:
            return web.json_response({"error": str(error)}, status=400)
        self.policy = policy
        if before is not None and before.folder.is_relative_to(self._folder):  # what is in shared memory is the run's
            before.remove()
        return web.json_response({})

    async def _close(self, app: web.Application) -> None:
        await self.engine.close()
        self._remove_folder()


def serve(start: EngineStart, about: JSONObject, host: str, port: int, token: str | None = None) -> None:
    """
    Serve until the process is told to stop.

    Args:
        start (`Callable`):
            Makes the engine, on the server's event loop.
        about (`dict`):
            As for [`RolloutServer`].
        host (`str`), port (`int`):
            Where to listen.
        token (`str`, *optional*):
            The token that every request must show; by default that of the environment variable
            `TRL_TOOLGRPO_SERVER_TOKEN`. An address that other machines can reach needs one.

    Raises:
        ConfigError: without a token on such an address.
    """
    token = token or server_token()
    check_address(host, token)
    servers = []

    async def application() -> web.Application:
        servers.append(RolloutServer(await start(), about, token))
        return servers[0].application()

    say = partial(print, flush=True)
    web.run_app(application(), host=host, port=port, handler_cancellation=True, shutdown_timeout=1, print=say)
    if any(server.lost for server in servers):
        raise SystemExit("The engine ended.")  # for whatever watches over the server to start it again


def check_address(host: str, token: str | None) -> None:
    """
    Check that a server does not answer strangers.

    Args:
        host (`str`):
            Where it listens.
        token (`str`, *optional*):
            The token that its clients must show.

    Raises:
        ConfigError: if other machines can reach it, and it has no token.
    """
    if token is not None:
        return
    if not is_loopback(host):
        raise ConfigError(
            f"You passed `--host {host}`, which other machines can reach, and no token: whoever reaches the port "
            f"could load weights of their own.",
            remedy=f"{HOW_TO_SET}, or listen on 127.0.0.1.",
        )
    print(f"No token is required: every user of this machine can load weights. {HOW_TO_SET}.", flush=True)
