"""vLLM's asynchronous engine, set up for training: in the training process, or in that of `server.py`.

New weights are loaded as an adapter under a new name, or all of them from a checkpoint or from the memory of this
process. vLLM is imported where it is used.
"""

import importlib.metadata
import importlib.util
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from ...errors import ConfigError, EngineLostError, SamplerError
from ...types import JSONObject
from .policy_weights import PolicyFile, SharedPolicy
from .sampler import TokenReply, TokenRequest
from .worker import PolicyWorker


if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM


LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""LoRA ranks that vLLM can be configured for."""
_MIX = 0x9E3779B1  # odd, so that versions have seeds of their own, far from those of other processes


def supported_versions() -> SpecifierSet:
    """Return the versions of vLLM that TRL supports."""
    found = [Requirement(line) for line in importlib.metadata.requires("trl") or ()]
    return next((requirement.specifier for requirement in found if requirement.name == "vllm"), SpecifierSet())


def check_version(version: str, where: str) -> None:
    """
    Check that a version of vLLM is supported.

    Args:
        version (`str`):
            As vLLM gives it.
        where (`str`):
            Where it was found, for the message.

    Raises:
        ConfigError: if TRL does not support it.
    """
    supported = supported_versions()
    if not supported.contains(Version(version).base_version, prereleases=True):
        raise ConfigError(
            f"{where} has vLLM {version}, which TRL {importlib.metadata.version('trl')} does not support.",
            remedy=f"Install one of its versions there: `pip install 'vllm{supported}'`.",
        )


def check_installed() -> None:
    """
    Check that vLLM can be imported and its version is supported.

    Raises:
        ConfigError: if not.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "vLLM samples the rollouts (`rollout_backend='vllm'` or `use_vllm=True`), but it is not installed here.",
            remedy="Install it with `pip install 'trl_toolgrpo[vllm]'`, sample on another machine with "
            "`vllm_mode='server'`, or use `rollout_backend='transformers'`.",
        )
    import vllm

    check_version(vllm.__version__, "This environment")


def engine_options(model: str, max_lora_rank: int | None, **options: object) -> JSONObject:
    """
    Return the arguments that vLLM's engine needs for training: log-probs of sampled tokens, a prefix cache.

    Args:
        model (`str`):
            Model folder or name.
        max_lora_rank (`int`, *optional*):
            Largest rank of the adapters that are sent; `None` if all weights are.
        options:
            Further arguments of `AsyncEngineArgs`; those that are `None` are left to vLLM.

    Raises:
        ConfigError: for a rank above all of these.
    """
    found = {
        "model": model,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # the sampling settings that many chat models have are not the trainer's
        "disable_log_stats": True,
        "worker_extension_cls": f"{PolicyWorker.__module__}.{PolicyWorker.__name__}",
        **{name: value for name, value in options.items() if value is not None},
    }
    if max_lora_rank is not None:
        room = next((rank for rank in LORA_RANKS if rank >= max_lora_rank), None)
        if room is None:
            raise ConfigError(
                f"The adapter has rank {max_lora_rank}, and vLLM supports at most {LORA_RANKS[-1]}.",
                remedy="Lower `r` of the `LoraConfig`, or use `rollout_backend='transformers'`.",
            )
        found.update(enable_lora=True, max_lora_rank=room, max_loras=1)
    return found


class VLLMEngine:
    """
    vLLM's `AsyncLLM`; see [`TokenEngine`].

    Args:
        llm (`vllm.v1.engine.async_llm.AsyncLLM`):
            The engine.
        sleeps (`bool`, *optional*, defaults to `False`):
            Whether its memory is released between rollout batches.
        seed (`int`, *optional*, defaults to `0`):
            Seeds the noise it draws with, together with the version of its policy.
    """

    def __init__(self, llm: "AsyncLLM", sleeps: bool = False, seed: int = 0):
        self.llm = llm
        self.max_length = int(llm.model_config.max_model_len)
        self._sleeps, self._seed = sleeps, seed
        self._asleep = False
        self._policy: PolicyFile | SharedPolicy | None = None
        self._adapters = itertools.count(1)
        self._requests = itertools.count()
        self._adapter: LoRARequest | None = None  # the adapter in use

    @classmethod
    async def start(cls, options: JSONObject) -> "VLLMEngine":
        """
        Start the engine.

        Args:
            options (`dict`):
                From [`engine_options`].

        Raises:
            ConfigError: for a version of vLLM that is not supported.
            SamplerError: if it does not start.
        """
        check_installed()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))
        except Exception as error:
            raise SamplerError(
                f"vLLM's engine did not start for the model {options['model']!r}: {error_text(error)}",
                remedy="Look for its own log above; a lower `vllm_gpu_memory_utilization` (on a CPU: environment "
                "variable VLLM_CPU_KVCACHE_SPACE) or `vllm_max_model_length` needs less memory.",
            ) from error
        return cls(llm, bool(options.get("enable_sleep_mode")), options.get("seed") or 0)

    async def load(self, policy: PolicyFile) -> None:
        """Load a policy, see [`TokenEngine.load`]. An adapter replaces the previous one under a new name and id;
        nothing is merged."""
        async with self._replacing(policy, "adapter" if policy.adapter else "weights"):
            if policy.adapter:
                await self._swap(policy)
            else:
                await self.llm.collective_rpc("reload_policy", args=(str(policy.folder),))

    async def load_shared(self, policy: SharedPolicy) -> str | None:
        """
        Load all weights from memory, which the workers have read when this returns.

        Args:
            policy ([`SharedPolicy`]):
                The policy.

        Returns:
            `str` or `None`: why a worker cannot read them. The engine has no policy then, until all of its workers
            load one from a checkpoint.

        Raises:
            SamplerError: if loading failed. The engine then has no policy.
        """
        async with self._replacing(policy, "weights"):
            problems = await self.llm.collective_rpc("reload_shared_policy", args=(policy.handles,))
        problem = next((problem for problem in problems if problem is not None), None)
        if problem is not None:
            self._policy = None
        return problem

    @asynccontextmanager
    async def _replacing(self, policy: PolicyFile | SharedPolicy, what: str) -> AsyncIterator[None]:
        """Have no policy while the weights are replaced, since a failure can leave some of both."""
        self._policy = None
        try:
            yield
            if what == "weights":
                await self.llm.reset_prefix_cache()  # of the previous weights
            # An engine that is started for a resumed run must not draw what it drew when the run began
            mixed = (self._seed + _MIX * policy.version) % 2**32
            await self.llm.collective_rpc("reseed", args=(mixed,))
        except Exception as error:
            said = error_text(error)
            raise SamplerError(f"vLLM did not accept the {what} of version {policy.version}: {said}") from error
        self._policy = policy

    async def _swap(self, policy: PolicyFile) -> None:
        """Replace the adapter."""
        from vllm.lora.request import LoRARequest

        old, new = self._adapter, LoRARequest(policy.key, next(self._adapters), str(policy.folder))
        self._adapter = None
        if old is not None:
            await self.llm.remove_lora(old.lora_int_id)
        await self.llm.add_lora(new)
        self._adapter = new

    async def generate(self, request: TokenRequest) -> TokenReply:
        """Sample a turn, see [`TokenEngine.generate`]."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self._policy is None:
            raise SamplerError("vLLM was asked to sample before it was given a policy.")
        version, name = self._policy.version, f"{self._policy.key}-{next(self._requests)}"
        params = SamplingParams(
            temperature=request.temperature,
            max_tokens=request.max_new_tokens,
            stop_token_ids=request.stop_ids,
            ignore_eos=True,  # the stop tokens are those of the trainer, and no others
            logprobs=0,  # that of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt: Any = {"prompt_token_ids": request.prompt_ids}
        found = None
        try:
            async for output in self.llm.generate(prompt, params, name, lora_request=self._adapter):
                found = output.outputs[0]
        except Exception as error:
            size = len(request.prompt_ids)
            if self.llm.errored:
                said = f"vLLM's engine ended: {error_text(error)}"
                raise EngineLostError(said, remedy="Look for its own log above.") from error
            raise SamplerError(f"vLLM failed on a turn after {size} tokens: {error_text(error)}") from error
        if found is None or found.logprobs is None:
            raise SamplerError("vLLM ended a turn without tokens or without their log-probs.")
        tokens = list(found.token_ids)
        logprobs = [float(entry[token].logprob) for token, entry in zip(tokens, found.logprobs, strict=True)]
        return TokenReply(tokens, logprobs, version)

    async def wake(self) -> None:
        """Take the memory back, see [`TokenEngine.wake`]."""
        if self._asleep:
            await self.llm.wake_up()
            self._asleep = False

    async def rest(self) -> None:
        """Release memory, see [`TokenEngine.rest`]: with sleep mode the weights move to the CPU and the cache is
        dropped."""
        if self._sleeps and not self._asleep:
            await self.llm.sleep(level=1)
            self._asleep = True

    async def close(self) -> None:
        """Shut the engine down."""
        self.llm.shutdown()


def error_text(error: BaseException) -> str:
    """Return an error in one line, with its cause."""
    cause = error.__cause__
    text = f"{type(error).__name__}: {str(error).strip() or '(no message)'}"
    return text if cause is None else f"{text} ({type(cause).__name__}: {str(cause).strip()})"
