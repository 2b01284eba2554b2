"""Rollouts on vLLM: which engine a run gets, and when it is sent the policy.

The engine is in-process or served, by `vllm_mode`; it gets the adapter of a LoRA run, or all weights, before the first
rollout batch after each optimizer step. TRL's own vLLM engine cannot say which weights wrote a turn.

An adapter is a file. All weights go through memory:

| engine | where it reads them | held in addition to the policy and the engine's own weights |
|---|---|---|
| of this process, on a CPU | shared memory of this process | a copy on the host, until they are loaded |
| of this process, on a GPU, with `gpu_paths="weights"` | where the policy has them on the GPU (CUDA IPC) | nothing |
| of this process, on a GPU, otherwise | a checkpoint in `/dev/shm` | a copy on the host, until they are loaded |
| a server on this machine | a checkpoint in `/dev/shm` | a copy on the host, until the next ones are loaded |
| a server elsewhere | a file that it writes | a copy in `/dev/shm` here, and on the server's disk |

Where one of these does not work a file is used, and a message says why. On the engine's device, loading takes the room
of one more layer.
"""

import logging
import os
import uuid
import weakref
from contextlib import AbstractContextManager

import torch
from accelerate.utils import broadcast_object_list, gather_object, patch_environment
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from ..config.checks import gpu_paths_of, refuse_unrecorded
from ..config.fields import ToolGRPOConfig
from ..errors import ConfigError
from ..models.rounding import compute_dtype
from ..models.temporary_attribute import temporary_attribute
from ..sampling.vllm.client import ServedEngine, model_shape
from ..sampling.vllm.engine import VLLMEngine, check_installed, engine_options
from ..sampling.vllm.policy_weights import (
    PolicyFile,
    SharedPolicy,
    adapter_problem,
    claim_folder,
    policy_folder,
    policy_tensors,
    write_checkpoint,
)
from ..sampling.vllm.sampler import EngineStart, TokenEngine, VLLMSampler
from ..sampling.vllm.shared_weights import SharingError, shared_tensors
from ..trl_hooks import Run, name_or_path


logger = logging.getLogger(__name__)


def without_trls_vllm(args: ToolGRPOConfig, recording: bool) -> AbstractContextManager[None]:
    """Keep TRL's constructor from making its own vLLM engine, as `use_vllm` has it do, for rollouts that are ours."""
    return temporary_attribute(args, "use_vllm", args.use_vllm and not recording)


def refuse_multimodal(args: ToolGRPOConfig) -> None:
    """Raise an error for a multimodal model with our vLLM: its rollouts are TRL's, and so must be its vLLM."""
    if args.rollout_backend == "vllm":
        raise ConfigError(
            "You passed a multimodal model with vLLM (`rollout_backend='vllm'` or `use_vllm=True`), whose rollouts "
            "are TRL's own.",
            remedy="For TRL's vLLM set `record_sample_logprobs=False` and `use_vllm=True`.",
        )
    refuse_unrecorded(args, "a multimodal model")


class VLLMRollouts:
    """
    The vLLM engine of a run, and the policy it is sent; see `rollout_backend` of [`ToolGRPOConfig`] and TRL's `vllm_*`
    options.

    Args:
        run ([`Run`]):
            The run, its model made.

    Raises:
        ConfigError: for an adapter, a model or a configuration that vLLM cannot sample with.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        policy = run.bare_model
        config = policy.active_peft_config if isinstance(policy, PeftModel) else None
        problem = adapter_problem(config) if config is not None else None
        if problem is not None:
            raise ConfigError(
                f"vLLM cannot sample with the adapter of this run as it is: {problem}.",
                remedy="Use a `LoraConfig` without it, or `rollout_backend='transformers'`.",
            )
        start = self._served() if run.args.vllm_mode == "server" else self._in_process(policy, config)
        self.sampler = VLLMSampler(start, run.eos_token_ids, run.args.temperature)
        weakref.finalize(self, self.sampler.close)
        # All processes of a machine read what one of them writes
        self._key = broadcast_object_list([uuid.uuid4().hex])[0]
        self.folder = policy_folder(self._key)  # where versions of the policy are written, one at a time
        if run.accelerator.is_local_main_process:
            weakref.finalize(self, claim_folder(self._key)[1])
        self.policy_file: PolicyFile | None = None  # the checkpoint that the engine has, while it can be needed again
        device = run.accelerator.device.type
        on_gpu = device == "cuda" and "weights" in gpu_paths_of(run.args.gpu_paths)
        # Whether an engine of this process reads all weights in the policy's memory
        self.shares = config is None and (device == "cpu" or on_gpu)
        self._said: set[str] = set()
        self._sent = 0
        self.sent_at: int | None = None  # optimizer step at which; `None` if the policy has changed otherwise

    def _served(self) -> EngineStart:
        """Return what connects to the engine of a server."""
        args, model = self._run.args, self._run.model
        url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        base, shape = name_or_path(model), model_shape(model.config)
        return lambda: ServedEngine.start(url, args.vllm_server_timeout, base, shape)

    def _in_process(self, policy: PreTrainedModel, adapter: PeftConfig | None) -> EngineStart:
        """Return what starts an engine in this process."""
        check_installed()
        args = self._run.args
        if args.vllm_tensor_parallel_size > 1:
            raise ConfigError(
                f"You passed `vllm_tensor_parallel_size={args.vllm_tensor_parallel_size}` with "
                f"`vllm_mode='colocate'`: the engine in a training process has that process's GPU.",
                remedy=f"Start `python -m trl_toolgrpo.serve --tensor-parallel-size {args.vllm_tensor_parallel_size}` "
                f"and set `vllm_mode='server'`.",
            )
        if not name_or_path(policy):
            raise ConfigError(
                "vLLM loads the model by itself, and the one you passed was not loaded from anywhere.",
                remedy="Save it with `save_pretrained`, with its tokenizer, and pass the folder.",
            )
        options = engine_options(
            name_or_path(policy),
            getattr(adapter, "r", None),
            dtype=str(compute_dtype(args, policy)).removeprefix("torch."),
            quantization="bitsandbytes" if getattr(policy, "is_loaded_in_4bit", False) else None,
            max_model_len=args.vllm_max_model_length,
            max_num_seqs=args.per_device_train_batch_size * (args.steps_per_generation or 1),
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            model_impl=args.vllm_model_impl,
            enable_sleep_mode=args.vllm_enable_sleep_mode or None,
            trust_remote_code=args.trust_remote_code or None,
            seed=args.seed + self._run.accelerator.process_index,
        )
        device = self._run.accelerator.device

        async def start() -> TokenEngine:
            with patch_environment(**_visible_devices(device)):
                return await VLLMEngine.start(options)

        return start

    def send(self, policy: PreTrainedModel) -> None:
        """Send the policy, unless the engine has that of this optimizer step; every process has to call this."""
        version = self._run.state.global_step
        if self.sent_at == version:
            return
        self._sent += 1
        key = f"{self._key}-{self._sent}"
        if not self._was_shared(policy, key, version):
            self._send_checkpoint(policy, key, version)
        self.sent_at = version

    def _was_shared(self, policy: PreTrainedModel, key: str, version: int) -> bool:
        """Have the engine of each process read the policy in its memory, and return whether all of them could. If not,
        none does from then on."""
        engine = self.sampler.engine
        if not self.shares or not isinstance(engine, VLLMEngine):
            return False
        try:
            with shared_tensors(policy_tensors(policy)) as handles:
                self.sampler.run(engine.wake())
                problem = self.sampler.run(engine.load_shared(SharedPolicy(key, version, handles)))
        except SharingError as error:
            problem = str(error)
        problem = next((found for found in gather_object([problem]) if found is not None), None)
        self.shares = problem is None
        if problem is not None:
            self._say("vLLM reads the weights of the policy from a checkpoint, and not in its memory", problem)
        return self.shares

    def _send_checkpoint(self, policy: PreTrainedModel, key: str, version: int) -> None:
        """Write the policy, once on each machine, and have the engine load it."""
        run, before = self._run, self.policy_file
        file = PolicyFile(key, version, self.folder / str(self._sent), isinstance(policy, PeftModel))
        if run.accelerator.is_local_main_process:
            problem = write_checkpoint(policy, file.folder)
            if problem is not None:
                self._say("The weights of the policy for vLLM are written to files on disk", problem)
        run.accelerator.wait_for_everyone()
        sends = run.args.vllm_mode != "server" or run.accelerator.is_main_process
        if sends:
            self.sampler.load(file)
        run.accelerator.wait_for_everyone()
        if not sends:  # the server has it by now
            self.sampler.load(file)
        self.policy_file = file
        run.accelerator.wait_for_everyone()
        if run.accelerator.is_local_main_process:
            if before is not None:
                before.remove()
            # A server that is lost needs it again, and an adapter can be read again; other weights are in the engine
            if run.args.vllm_mode != "server" and not file.adapter:
                file.remove()

    def _say(self, what: str, why: str) -> None:
        """Say once how the weights are sent, and why in that way."""
        if what not in self._said and self._run.accelerator.is_local_main_process:
            logger.warning("%s: %s.", what, why)
        self._said.add(what)

    def policy_was_replaced(self) -> None:
        """Have the policy sent again, since it has changed without an optimizer step."""
        self.sent_at = None


def _visible_devices(device: torch.device) -> dict[str, str]:
    """Return the environment in which an engine's own process sees only this process's GPU."""
    if device.type != "cuda":
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[device.index or 0]}
