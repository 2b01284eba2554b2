"""The models of the recipes: a tiny Qwen3 that is built here, SmolLM2 from a package, or any folder or Hub id."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from trl import ModelConfig

from trl_toolgrpo import ConfigError, ToolGRPOConfig

from .smollm2 import convert_smollm2
from .tiny_qwen3 import TinyModel, build_tiny_model
from .warm_start import WarmStart


# The settings of the tiny model for each task
TINY: dict[str, Callable[..., TinyModel]] = {
    "workspace": TinyModel,
    "bfcl": TinyModel,
    "mcp": partial(TinyModel, task="mcp", warm_start=WarmStart(demonstrations=2000, steps=400, batch_size=8)),
}


def resolve_model(model: ModelConfig, training: ToolGRPOConfig, task: str = "workspace", trial: bool = False) -> str:
    """
    Return the folder or Hub id of the model, after building `tiny` or `smollm2` in the output folder if necessary.

    Args:
        model (`ModelConfig`):
            Its `model_name_or_path` is the model.
        training ([`ToolGRPOConfig`]):
            Output folder and seed.
        task (`str`, *optional*, defaults to `"workspace"`):
            Task that `tiny` is warm-started on.
        trial (`bool`, *optional*, defaults to `False`):
            Cut the warm start short.

    Returns:
        `str`: the folder or id that the trainer loads.

    Raises:
        ConfigError: if no model is named.
    """
    name = model.model_name_or_path
    if name is None:
        raise ConfigError(
            "No model was named.",
            remedy="Pass --model_name_or_path with a folder, a Hub id, `tiny` or `smollm2`, or set "
            "model_name_or_path in the YAML.",
        )
    if name not in ("tiny", "smollm2"):
        return name
    folder = Path(str(training.output_dir)) / name
    with training.main_process_first(desc=f"building the model `{name}`"):
        if name == "tiny":
            settings = TINY[task](seed=training.seed)
            if trial:
                untrained = replace(settings.warm_start, demonstrations=500, steps=1)
                settings = replace(settings, warm_start=untrained)
            return str(build_tiny_model(folder, settings))
        return str(convert_smollm2(folder))
