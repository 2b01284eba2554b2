"""The command that serves rollouts with vLLM, for a training run on another GPU or machine.

    python -m trl_toolgrpo.serve --model Qwen/Qwen3-0.6B --port 8000

The server itself is in `sampling/vllm/server.py`.
"""

import argparse
import json

from .sampling.vllm.client import model_shape
from .sampling.vllm.engine import VLLMEngine, check_installed, engine_options
from .sampling.vllm.server import check_address, serve
from .sampling.vllm.server_token import is_loopback, server_token


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """
    Parse the command line.

    Args:
        words (`list[str]`, *optional*):
            Arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m trl_toolgrpo.serve", description="Serve rollouts with vLLM.", allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="model folder or name; the one the run trains")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-lora-rank", type=int, default=64, help="largest rank of adapters; 0: none are sent")
    parser.add_argument("--dtype", default="auto", help="the dtype the run computes in")
    parser.add_argument("--max-model-len", type=int, help="most tokens of a rollout, its prompt included")
    parser.add_argument("--max-num-seqs", type=int, help="most rollouts at once")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--engine-args", type=json.loads, default={}, help="further AsyncEngineArgs, as JSON")
    return parser.parse_args(words)


def main() -> None:
    """Serve rollouts with vLLM, as the command line says."""
    args = vars(parse_arguments())
    if not is_loopback(args["host"]):
        check_address(args["host"], server_token())  # before a model is loaded for nothing
    check_installed()
    import vllm
    from transformers import AutoConfig

    host, port, rank, more = (args.pop(name) for name in ("host", "port", "max_lora_rank", "engine_args"))
    options = engine_options(args.pop("model"), rank or None, **args, **more)
    shape = model_shape(AutoConfig.from_pretrained(options["model"]))
    about = {"model": options["model"], "shape": shape, "vllm": vllm.__version__, "adapters": rank > 0}
    serve(lambda: VLLMEngine.start(options), about, host, port)


if __name__ == "__main__":
    main()
