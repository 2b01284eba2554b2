"""The tiny Qwen3 of the CPU recipes, with a tokenizer of the task's own text, saved as an ordinary folder.

Its weights come from the warm start in `warm_start.py`.
"""

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import trl
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ..mcp_company import demonstrations as mcp_demonstrations
from ..mcp_company.task import make_row
from ..workspace import WorkspaceEnvironment, build_workspace
from ..workspace.demonstrations import demonstrate
from ..workspace.task import FIRST_NAMES, LAST_NAMES
from .warm_start import WarmStart, train_on_demonstrations


SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKUP_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]

# Text that every prompt repeats: the words of Qwen3's chat template about tools, and the skeleton of their JSON
# schemas. As in a large vocabulary, it takes few tokens here, since most of a step is spent on the prompt.
SKELETON = [
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n",
    '{"type": "function", "function": {"name": "',
    '", "description": "',
    '", "parameters": {"type": "object", "properties": {"',
    '": {"type": "string", "description": "',
    '": {"type": "integer", "description": "',
    '"}, "',
    '"}}, "required": ["',
    '"]}, "return": {"type": "object"}}}\n',
    "</tools>\n\nFor each function call, return a json object with function name and arguments within ",
    " XML tags:\n",
    '\n{"name": <function-name>, "arguments": <args-json-object>}\n',
]

# In order: the skeleton; runs of lower-case words; capitalized words without the space before them, so that a name has
# the same tokens after a space and after a quote; digits in pairs, so that a number is two or three tokens; the rest.
REST = r" ?[\p{Ll}_]+(?: [\p{Ll}_]+)*|\p{Lu}\p{Ll}*|\p{N}{1,2}|[.?]|[^\p{L}\p{N}]+"
WORDS = Regex("|".join([*map(re.escape, SKELETON), REST]))

# Scale of what a layer adds to the residual stream at the start: with less, attention forms sooner.
RESIDUAL_SCALE = 0.3


@dataclass(frozen=True)
class TinyModel:
    """
    The settings of the tiny model.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads, head_dim (`int`, *optional*):
            As in [`~transformers.Qwen3Config`].
        vocab_size (`int`, *optional*, defaults to `1200`):
            Largest size of the vocabulary.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights, the demonstrations and their order.
        warm_start ([`WarmStart`], *optional*):
            Supervised training before the model is saved.
        task (`str`, *optional*, defaults to `"workspace"`):
            Task that it is warm-started on, `"workspace"` or `"mcp"`.
    """

    hidden_size: int = 96
    num_hidden_layers: int = 3
    num_attention_heads: int = 3
    head_dim: int = 32
    vocab_size: int = 1200
    seed: int = 0
    warm_start: WarmStart = field(default_factory=WarmStart)
    task: str = "workspace"


def chat_template(name: str) -> str:
    """
    Return a chat template as TRL ships it, byte for byte, so that TRL recognizes it.

    Args:
        name (`str`):
            Stem of the file in `trl/chat_templates`.

    Returns:
        `str`: the Jinja source.
    """
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def build_tiny_model(folder: str | Path, settings: TinyModel | None = None) -> Path:
    """
    Build the model, warm-start it and save it, unless the folder was already built with the same settings.

    Args:
        folder (`str` or `Path`):
            Folder to write.
        settings ([`TinyModel`], *optional*):
            Settings of the model.

    Returns:
        `Path`: the folder.
    """
    folder, settings = Path(folder), settings or TinyModel()
    record = folder / "tiny_model.json"
    recipe = json.dumps(asdict(settings), indent=2)
    if record.is_file() and record.read_text() == recipe:
        return folder
    warm_start = settings.warm_start
    conversations, tools = lessons(settings)
    tokenizer = build_tokenizer(conversations[:500], tools, settings.vocab_size)
    model = build_model(settings, tokenizer)
    train_on_demonstrations(model, tokenizer, conversations, tools, warm_start, settings.seed)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record.write_text(recipe)
    return folder


def lessons(settings: TinyModel) -> tuple[list[list[dict]], list]:
    """Return the conversations that the model is warm-started on, and the tools described in them."""
    start, seed = settings.warm_start, settings.seed
    if settings.task == "mcp":
        questions = [make_row(f"train-{index}", seed) for index in range(start.demonstrations)]
        conversations = [mcp_demonstrations.demonstrate(row, start.slip_rate, seed) for row in questions]
        return conversations, mcp_demonstrations.demonstration_tools()
    rows = build_workspace(start.demonstrations, 0, seed).train
    return [demonstrate(row, start.slip_rate, start.mistype_rate, seed) for row in rows], workspace_tools()


def workspace_tools() -> list:
    """Return the workspace's tools in the order in which the trainer renders them."""
    environment = WorkspaceEnvironment()
    return [
        environment.find_employee,
        environment.get_manager,
        environment.get_salary,
        environment.send_slack_message,
    ]


def build_tokenizer(conversations: list[list[dict]], tools: list, vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer with Qwen3's control tokens and chat template.

    Args:
        conversations (`list[list[dict]]`):
            Conversations whose words it learns.
        tools (`list`):
            Tools to render.
        vocab_size (`int`):
            Largest size of the vocabulary.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: the tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template("qwen3"),
        padding_side="left",
    )
    tokenizer.train_from_iterator(
        _training_text(wrapped, conversations, tools),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[*SPECIAL_TOKENS, *MARKUP_TOKENS],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template("qwen3"),
        padding_side="left",
    )


def _training_text(tokenizer: PreTrainedTokenizerFast, conversations: list[list[dict]], tools: list) -> Iterable[str]:
    # Every name and every pair of digits, including those that only the held-out split contains
    parts = [*FIRST_NAMES, *LAST_NAMES, *(f"{pair:02}" for pair in range(100))]
    yield from [part for part in parts for _ in range(20)]
    control = re.compile("|".join(map(re.escape, [*SPECIAL_TOKENS, *MARKUP_TOKENS])))
    for messages in conversations:
        yield from control.split(str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)))


def build_model(settings: TinyModel, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """
    Build a randomly initialized Qwen3 for the tokenizer.

    Args:
        settings ([`TinyModel`]):
            Its size and seed.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Gives the size of the vocabulary and the control tokens.

    Returns:
        [`~transformers.Qwen3ForCausalLM`]: the model, float32.
    """
    torch.manual_seed(settings.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_attention_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        # 0.02 suits a width of thousands. At a width of 96, attention would take several times as long to form.
        initializer_range=0.08,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            # Attention starts as faint copying: it adds what it reads to the stream unchanged, and the tied head maps
            # that back to the same token. What remains to be learned is where to look.
            torch.nn.init.orthogonal_(layer.self_attn.v_proj.weight)
            layer.self_attn.o_proj.weight.copy_(0.3 * layer.self_attn.v_proj.weight.T)
            layer.mlp.down_proj.weight.mul_(0.3)
    return model
