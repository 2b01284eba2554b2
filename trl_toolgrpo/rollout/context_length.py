"""How many positions a model has."""

from typing import Any

from ..model_settings import model_setting


_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")


def context_length(config: Any) -> int | None:
    """
    Return the number of positions a model has, prompt and completion together.

    Args:
        config (`PretrainedConfig`):
            Configuration of the model.

    Returns:
        `int` or `None`: `None` for a model without a limit, such as a state-space model.
    """
    text_config = config.get_text_config()
    for name in _NAMES:
        value = model_setting(text_config, name)
        if isinstance(value, int) and value > 0:
            return value
    return None
