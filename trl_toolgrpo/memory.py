"""An estimate of the memory that a run takes, from the model's shape and the sizes of the run.

`accelerate estimate-memory` knows weights and training, and not the rollouts. The table of recipes/GUIDE.md is made
with it:

    python -m trl_toolgrpo.memory
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PretrainedConfig

from .errors import ConfigError
from .models.model_settings import layer_settings, stored_values


METHODS = ("full", "lora", "qlora")
SHARDINGS = ("none", "gradients", "parameters")

_FLOAT = 4
_NF4 = 0.5 + _FLOAT / 64  # bytes for a weight: four bits, and a float32 scale for each block of 64
_TILE = (4096, 32768)  # tokens and entries of the vocabulary that are scored at a time, at most


@dataclass(frozen=True)
class ModelShape:
    """
    Shape of a decoder with gated feed-forward layers, which is what most current models are.

    Args:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
        vocab_size (`int`):
            As in the model's configuration. `num_key_value_heads` and `head_dim` may be a tuple with the value of each
            layer, where layers differ (Gemma 4).
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the output layer is the embedding.
        stored_values (`int`, *optional*):
            Numbers that a cache keeps for a token, where that is not all layers' keys and values.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | tuple[int, ...]
    head_dim: int | tuple[int, ...]
    vocab_size: int
    tie_word_embeddings: bool = False
    stored_values: int | None = None

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "ModelShape":
        """
        Read the shape from a configuration of transformers.

        Args:
            config (`PretrainedConfig`):
                Configuration of a text model.
        """
        heads = config.num_attention_heads
        kept, stored = layer_settings(config, "num_key_value_heads"), stored_values(config)
        shape = cls(
            config.hidden_size,
            max(layer_settings(config, "intermediate_size")),
            config.num_hidden_layers,
            heads,
            _one_if_equal([count or heads for count in kept]),
            _one_if_equal([width or config.hidden_size // heads for width in layer_settings(config, "head_dim")]),
            config.vocab_size,
            bool(config.tie_word_embeddings),
        )
        return shape if stored == shape.cached_values else replace(shape, stored_values=stored)

    @property
    def attention_widths(self) -> list[tuple[int, int]]:
        """Width of the queries and of the keys of each block."""
        sizes = (self.num_key_value_heads, self.head_dim)
        kept, widths = (np.broadcast_to(size, self.num_hidden_layers).tolist() for size in sizes)
        return [(self.num_attention_heads * width, count * width) for count, width in zip(kept, widths, strict=True)]

    @property
    def linear_layers(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the linear layers of all blocks."""
        size, found = self.hidden_size, []
        for query, key in self.attention_widths:
            found += [(size, query), *[(size, key)] * 2, (query, size)]
            found += [*[(size, self.intermediate_size)] * 2, (self.intermediate_size, size)]
        return found

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of all blocks, which is what is quantized."""
        return sum(inputs * outputs for inputs, outputs in self.linear_layers)

    @property
    def cached_values(self) -> int:
        """Numbers that a cache keeps for a token, over all blocks."""
        return sum(2 * key for _, key in self.attention_widths) if self.stored_values is None else self.stored_values

    @property
    def parameters(self) -> int:
        """All weights."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        return self.linear_parameters + embeddings + norms

    def lora_parameters(self, rank: int) -> int:
        """Return the number of weights in LoRA factors on all linear layers of the blocks."""
        return rank * sum(inputs + outputs for inputs, outputs in self.linear_layers)


def _one_if_equal(values: Sequence[int]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else tuple(values)


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Memory of one process in bytes, without what Python and its libraries take.

    Args:
        weights (`float`):
            Weights, or the share of them that the process keeps.
        gradients, optimizer (`float`):
            Of what is trained.
        activations (`float`):
            Of a micro-batch, the scoring of its tokens included.
        gathered (`float`):
            Weights that are whole during rollouts though they are sharded otherwise.
        cache (`float`):
            Keys and values of the rollouts, and their logits.
        packed (`float`, *optional*, defaults to `0.0`):
            Copies of the linear layers that a CPU samples with. They are freed before an update, but what is freed in
            pieces mostly stays with the allocator.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    gathered: float
    cache: float
    packed: float = 0.0

    @property
    def update(self) -> float:
        """What an update takes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.packed

    @property
    def rollout(self) -> float:
        """What sampling takes."""
        return self.weights + self.gathered + self.optimizer + self.cache + self.packed

    @property
    def peak(self) -> float:
        """The larger of the two."""
        return max(self.update, self.rollout)


def estimate_memory(
    shape: ModelShape,
    method: str = "lora",
    *,
    lora_rank: int = 16,
    micro_batch: int = 8,
    rollouts: int = 64,
    num_generations: int = 8,
    prompt_length: int = 512,
    completion_length: int = 1024,
    weight_bytes: int = 2,
    compute_bytes: int = 2,
    gradient_checkpointing: bool = True,
    sharding: str = "none",
    processes: int = 1,
    on_cpu: bool = False,
) -> MemoryEstimate:
    """
    Estimate the memory that a run takes in each process.

    Args:
        shape ([`ModelShape`]):
            The model.
        method (`str`, *optional*, defaults to `"lora"`):
            `"full"`, `"lora"` on all linear layers, or `"qlora"` on a base in NF4.
        lora_rank (`int`, *optional*, defaults to `16`):
            Rank of the adapter, whose weights are float32.
        micro_batch (`int`, *optional*, defaults to `8`):
            `per_device_train_batch_size`.
        rollouts (`int`, *optional*, defaults to `64`):
            Rollouts that a process samples at a time: `micro_batch` times `steps_per_generation`.
        num_generations (`int`, *optional*, defaults to `8`):
            Rollouts of a prompt, which share its keys and values.
        prompt_length, completion_length (`int`, *optional*, default to `512` and `1024`):
            Tokens, those of tool results included.
        weight_bytes, compute_bytes (`int`, *optional*, default to `2`):
            Bytes of a weight that is not quantized, and of an activation. Full training keeps gradients and both
            moments of Adam in the dtype of the weights; with float32 weights under autocast that is 4.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`):
            Whether the activations of a block are computed again in the backward pass.
        sharding (`str`, *optional*, defaults to `"none"`):
            `"none"` (one process or DDP), `"gradients"` (ZeRO-2: gradients and optimizer) or `"parameters"` (ZeRO-3,
            FSDP2: weights too, which are gathered for a rollout batch).
        processes (`int`, *optional*, defaults to `1`):
            Over how many it is sharded.
        on_cpu (`bool`, *optional*, defaults to `False`):
            Whether it runs on a CPU, which samples in float32 with packed linear layers.

    Returns:
        [`MemoryEstimate`]: the parts.

    Raises:
        ConfigError: for an unknown method or sharding.
    """
    if method not in METHODS or sharding not in SHARDINGS:
        message = f"You passed method={method!r} and sharding={sharding!r}, of which one is unknown."
        raise ConfigError(message, remedy=f"Choose from {', '.join(METHODS)}, and from {', '.join(SHARDINGS)}.")
    trained = shape.parameters if method == "full" else shape.lora_parameters(lora_rank)
    trained_bytes = weight_bytes if method == "full" else _FLOAT
    weights = float(shape.parameters * weight_bytes) + (0 if method == "full" else trained * trained_bytes)
    if method == "qlora":
        weights -= shape.linear_parameters * (weight_bytes - _NF4)
    gradients, optimizer = float(trained * trained_bytes), 2.0 * trained * trained_bytes
    gathered = 0.0
    if sharding != "none":
        gradients, optimizer = gradients / processes, optimizer / processes
    elif processes > 1:
        gradients *= 2  # DDP reduces them in buckets of its own
    if sharding == "parameters":
        weights, gathered = weights / processes, shape.parameters * float(min(weight_bytes, compute_bytes))
    activations = _activations(
        shape, micro_batch, prompt_length, completion_length, compute_bytes, gradient_checkpointing, method != "full"
    )
    tokens = rollouts * completion_length + -(-rollouts // num_generations) * prompt_length
    cache = float(tokens * shape.cached_values * compute_bytes) + _logits(shape, rollouts)
    packed = shape.linear_parameters * float(_FLOAT) if on_cpu and method != "qlora" else 0.0
    return MemoryEstimate(weights, gradients, optimizer, activations, gathered, cache, packed)


def _activations(
    shape: ModelShape, rows: int, prompt: int, completion: int, size: int, checkpointing: bool, adapters: bool
) -> float:
    """Activations of a micro-batch that are kept for the backward pass, and their gradients, in bytes."""
    tokens = rows * (prompt + completion)
    block, layers = _block(shape, tokens, size, adapters), shape.num_hidden_layers
    kept = layers * tokens * shape.hidden_size * size + block if checkpointing else layers * block
    kept += block  # the gradients of a block's activations, while the backward pass is there
    scored = min(rows * completion, _TILE[0]) * min(shape.vocab_size, _TILE[1]) * _FLOAT * 2
    return kept + scored


def sampling_memory(
    shape: ModelShape,
    rollouts: int,
    read: int,
    attended: int = 0,
    compute_bytes: int = 2,
    adapters: bool = False,
) -> float:
    """
    Return what sampling takes in addition to weights, keys and values, in bytes: the logits of a decoding step, and
    one block of a pass that reads prompts or tool results.

    Args:
        shape ([`ModelShape`]):
            The model.
        rollouts (`int`):
            Rollouts in progress.
        read (`int`):
            Tokens of such a pass.
        attended (`int`, *optional*, defaults to `0`):
            Tokens that each of them attends to, where scores of attention are held in memory.
        compute_bytes (`int`, *optional*, defaults to `2`):
            Bytes of an activation.
        adapters (`bool`, *optional*, defaults to `False`):
            Whether linear layers have adapters.
    """
    scores = 3.0 * read * shape.num_attention_heads * attended * _FLOAT  # as they are, masked, and their exponentials
    return _logits(shape, rollouts) + _block(shape, read, compute_bytes, adapters) + scores


def _block(shape: ModelShape, tokens: int, size: int, adapters: bool) -> float:
    """What a pass over some tokens makes in one block, in bytes."""
    query, key = map(max, zip(*shape.attention_widths, strict=True))
    # The stream and its normalized copies, queries, keys, values and the result of attention, the gate, the other
    # branch and what comes of them; adapters see the same inputs once more, in float32 at most
    made: float = tokens * size * (6 * shape.hidden_size + 3 * query + 3 * key + 4 * shape.intermediate_size)
    return made * 1.2 if adapters else made


def _logits(shape: ModelShape, rollouts: int) -> float:
    """Logits of a decoding step and copies that a token is drawn from, in bytes."""
    return 3.0 * rollouts * shape.vocab_size * _FLOAT


QWEN3 = {
    "0.6B": ModelShape(1024, 3072, 28, 16, 8, 128, 151936, True),
    "4B": ModelShape(2560, 9728, 36, 32, 8, 128, 151936, True),
    "8B": ModelShape(4096, 12288, 36, 32, 8, 128, 151936),
}
"""Shapes of the models in the table."""


def memory_table() -> str:
    """
    Return the GPU memory of Qwen3 in GiB by method and sharding, as a Markdown table. The sizes are the defaults of
    [`estimate_memory`], in bfloat16.
    """
    layouts = {
        "one GPU": ("none", 1),
        "8 GPUs, DDP": ("none", 8),
        "8 GPUs, ZeRO-2": ("gradients", 8),
        "8 GPUs, FSDP2 or ZeRO-3": ("parameters", 8),
    }
    lines = [f"| model | method | {' | '.join(layouts)} |", f"|---|---|{'---|' * len(layouts)}"]
    for name, shape in QWEN3.items():
        for method in METHODS:
            size = 4 if method == "full" else 2  # small steps vanish in bfloat16: trained weights are float32
            cells = []
            for sharding, processes in layouts.values():
                found = estimate_memory(shape, method, weight_bytes=size, sharding=sharding, processes=processes)
                cells.append("-" if (method, sharding) == ("qlora", "parameters") else f"{found.peak / 2**30:.0f}")
            lines.append(f"| Qwen3-{name} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(memory_table())
