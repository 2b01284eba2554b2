"""Cases of the benchmarks against TRL: batches of rollouts, shapes of models, and dtypes, defined once.

`rollout.py`, `step.py` and `gpu.py` use them, so that both sides of a comparison get the same.
"""

import argparse
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """
    Shape of a Qwen3 model, with the names of its configuration.

    Args:
        num_hidden_layers, hidden_size, num_attention_heads, head_dim, num_key_value_heads, intermediate_size,
        vocab_size (`int`):
            As in `Qwen3Config`.
    """

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    head_dim: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int

    def cache_bytes(self, tokens: int, element: int) -> int:
        """Return the bytes of the keys and values of some tokens, at `element` bytes a number."""
        return tokens * self.num_hidden_layers * 2 * self.num_key_value_heads * self.head_dim * element


SHAPES = {
    "tiny": Shape(2, 64, 4, 16, 2, 128, 1024),
    "small": Shape(12, 512, 8, 64, 4, 1536, 8192),
    # Of Qwen/Qwen3-0.6B, but for its LM head, which is the embedding there (see `markov.build_model`)
    "qwen3_0.6b": Shape(28, 1024, 16, 128, 8, 3072, 151_936),
}


@dataclass(frozen=True)
class Case:
    """
    A batch of rollouts.

    Args:
        name (`str`):
            Name in a table.
        prompts, samples (`int`):
            Number of prompts, and of rollouts of each.
        turns, turn_tokens (`int`):
            Turns of a rollout, and tokens the policy writes in each.
        prompt_tokens (`int`):
            Approximate tokens of a prompt.
        tool_ms (`float`):
            Milliseconds of a tool call.
        ragged (`bool`):
            Whether turns differ in number and length. `turns` is then the largest number; `turn_tokens` is not used.
        shape (`str`):
            Shape of the policy, a key of `SHAPES`.
        gradient_checkpointing (`bool`):
            Whether updates use it.
        real (`bool`):
            Whether the policy is SmolLM2-135M with its real weights, which writes one turn without tools. `shape` is
            then not used, and what the two sides sample differs.
    """

    name: str = "as given"
    prompts: int = 2
    samples: int = 8
    turns: int = 4
    turn_tokens: int = 20
    prompt_tokens: int = 600
    tool_ms: float = 0.0
    ragged: bool = False
    shape: str = "small"
    gradient_checkpointing: bool = False
    real: bool = False

    @property
    def rows(self) -> int:
        """Number of rollouts."""
        return self.prompts * self.samples

    @property
    def completion_limit(self) -> int:
        """`max_completion_length`, with room for what the tools return."""
        if self.real:
            return self.turn_tokens
        return self.turns * (256 if self.ragged else self.turn_tokens + 108)

    def training_options(self) -> dict[str, Any]:
        """Return options of either trainer for optimizer steps whose micro-batches each hold one group."""
        return {
            "per_device_train_batch_size": self.samples,
            "gradient_accumulation_steps": self.prompts,
            "num_generations": self.samples,
            "max_completion_length": self.completion_limit,
            "max_tool_calling_iterations": self.turns - 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "gradient_checkpointing": self.gradient_checkpointing,
        }

    def flags(self) -> list[str]:
        """Return the command line of this case, as `add_case_flags` defines it."""
        given = asdict(self)
        on = [f"--{field.name}" for field in fields(self) if field.type is bool and given[field.name]]
        return [f"--{name}={given[name]}" for name in SIZES if given[name] is not None] + on


CASES = {
    "600": Case("600-token prompts, 2 x 8, 4 turns"),
    "2000": Case("2,000-token prompts, 2 x 8, 4 turns", prompt_tokens=2000),
    "tools": Case("600-token prompts, 4 x 8, 4 turns, tools of 100 ms", prompts=4, tool_ms=100.0),
    "ragged": Case("ragged: 1 to 8 turns of 8 to 200 tokens, 2 x 8", turns=8, ragged=True),
    "smollm2": Case(
        "SmolLM2-135M, 594-token prompts, 2 x 8, 64 tokens", turns=1, turn_tokens=64, prompt_tokens=594, real=True
    ),
}
STEP = Case("600-token prompts, 2 x 8, 3 turns", turns=3)

_GPU = Case(prompts=8, turn_tokens=64, shape="qwen3_0.6b")
GPU_CASES = {
    "smoke": replace(_GPU, name="600-token prompts, 2 x 8, 2 turns of 64 tokens", prompts=2, turns=2),
    "600": replace(_GPU, name="600-token prompts, 8 x 8, 4 turns of 64 tokens"),
    "2000": replace(_GPU, name="2,000-token prompts, 8 x 8, 4 turns of 64 tokens", prompt_tokens=2000),
    "tools": replace(_GPU, name="600-token prompts, 8 x 8, 4 turns of 64 tokens, tools of 100 ms", tool_ms=100.0),
    "decode": replace(_GPU, name="600-token prompts, 8 x 8, one turn of 64 tokens", turns=1),
    "update": replace(_GPU, name="update on 8 x 8 rollouts of 4 turns of 64 tokens"),
    "update_checkpointing": replace(
        _GPU, name="the same update with gradient checkpointing", gradient_checkpointing=True
    ),
    "step": replace(_GPU, name="whole step, 8 x 8 rollouts of 4 turns of 64 tokens"),
}

DTYPES = {
    "float32": "float32 throughout",
    "bfloat16": "float32 weights under bfloat16 autocast, which is what TRL's `bf16=True` means",
    "bfloat16_weights": "bfloat16 weights, and autocast",
}

DTYPE_HELP = " ".join(f"{name}: {meaning}." for name, meaning in DTYPES.items())

SIZES = ("prompts", "samples", "turns", "turn_tokens", "prompt_tokens", "tool_ms", "shape")


def gpu_case(name: str, dry_run: bool) -> Case:
    """Return a case of `GPU_CASES`; for a dry run, one of the same kind that takes any machine a second at most."""
    case = GPU_CASES[name]
    if not dry_run:
        return case
    # The template and the tool alone take more than 500 tokens of a prompt
    sizes = {"prompts": 1, "samples": 2, "turns": min(case.turns, 2), "prompt_tokens": 540}
    sizes["turn_tokens"] = 64 if name == "decode" else 12  # lengths that differ enough to show in the time
    return replace(case, **sizes, tool_ms=10.0 if case.tool_ms else 0.0, shape="tiny")


def add_case_flags(parser: argparse.ArgumentParser, default: Case) -> None:
    """Add a flag for each size of a case to a command line."""
    for name in SIZES:
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=type(value), default=value, choices=SHAPES if name == "shape" else None)


def given_case(arguments: argparse.Namespace, **more: Any) -> Case:
    """Return the case of a command line."""
    return Case(**{name: getattr(arguments, name) for name in SIZES}, **more)


def dtype_options(dtype: str) -> dict[str, Any]:
    """Return options of either trainer for a dtype of `DTYPES`, on the accelerator, if any, or on the CPU."""
    import torch

    return {"use_cpu": not torch.accelerator.is_available(), "bf16": dtype != "float32"}


def in_dtype(model: Any, dtype: str) -> Any:
    """Return the model with its weights in a dtype of `DTYPES`."""
    import torch

    return model.to(torch.bfloat16 if dtype == "bfloat16_weights" else torch.float32)


def estimated_mib(case: Case, dtype: str, completion_tokens: float, method: str = "full") -> float:
    """
    Return the peak memory that this package estimates for steps of its trainer, in MiB, without that of Python and its
    libraries.

    Args:
        case (`Case`):
            The batch.
        dtype (`str`):
            Key of `DTYPES`.
        completion_tokens (`float`):
            Tokens of a completion, those of tool results included.
        method (`str`, *optional*, defaults to `"full"`):
            As in `estimate_memory`.
    """
    from trl_toolgrpo import ModelShape, estimate_memory

    estimate = estimate_memory(
        ModelShape(**asdict(SHAPES[case.shape])),
        method,
        micro_batch=case.samples,
        rollouts=case.rows,
        num_generations=case.samples,
        prompt_length=case.prompt_tokens,
        completion_length=round(completion_tokens),
        weight_bytes=2 if dtype == "bfloat16_weights" else 4,
        compute_bytes=4 if dtype == "float32" else 2,
        gradient_checkpointing=case.gradient_checkpointing,
        on_cpu=device() == "cpu",
    )
    return estimate.peak / 2**20


def autocast(dtype: str) -> Any:
    """Return the context in which both trainers run the model."""
    import torch

    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device(), dtype=torch.bfloat16)


def device() -> str:
    """Return where models run: the accelerator, or the CPU."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type
