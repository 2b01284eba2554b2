"""Reading a model's configuration, whichever family it is of: settings that vary over layers, and what layers keep."""

from transformers import PretrainedConfig

from ..types import JSONValue


def model_setting(config: PretrainedConfig, name: str, default: JSONValue = None) -> JSONValue:
    """
    Return a setting of a model's configuration.

    `getattr` with a default does not do: where layers differ (the head sizes of Gemma 4), a configuration of
    transformers raises an error of its own for the value that all of them would share.

    Args:
        config (`PretrainedConfig`):
            Configuration of a model, or of its text model.
        name (`str`):
            The setting.
        default (`object`, *optional*):
            What to return if the configuration has no such setting.

    Returns:
        `object`: the value; a list with the value of each layer where they differ.
    """
    try:
        value = getattr(config, name, default)
    except RuntimeError:  # AmbiguousGlobalPerLayerAttributeError
        value = default
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else ()
    varies = any(getattr(layer, name, value) != value for layer in layers)
    return [getattr(layer, name, default) for layer in layers] if varies else value


def layer_settings(config: PretrainedConfig, name: str, default: JSONValue = None) -> list[JSONValue]:
    """Return [`model_setting`] for each layer of a text model, whether or not they differ."""
    value = model_setting(config, name, default)
    return list(value) if isinstance(value, (list, tuple)) else [value] * config.num_hidden_layers


def stored_values(config: PretrainedConfig) -> int:
    """
    Return how many numbers a cache of keys and values keeps for one token, over all layers.

    Layers that keep a state of fixed size, or use the keys and values of an earlier layer, keep none; one with a
    window counts as if it kept all tokens, which a shared cache does.

    Args:
        config (`PretrainedConfig`):
            Configuration of a text model.
    """
    heads = layer_settings(config, "num_attention_heads")
    stored = layer_settings(config, "num_key_value_heads")
    widths = layer_settings(config, "head_dim")
    total = 0
    for layer, (count, kept, width) in enumerate(zip(heads, stored, widths, strict=True)):
        if not _keeps_tokens(config, layer):
            continue
        latent = model_setting(config, "kv_lora_rank")
        if latent:  # latent attention keeps what all heads' keys and values are made of
            total += latent + model_setting(config, "qk_rope_head_dim", 0)
        else:
            total += 2 * (kept or count) * (width or config.hidden_size // count)
    return total


def _keeps_tokens(config: PretrainedConfig, layer: int) -> bool:
    """Return whether a layer keeps keys and values of its own."""
    kinds = model_setting(config, "layer_types") or model_setting(config, "layers_block_type")
    sharing = model_setting(config, "kv_sharing_modes")
    kind = str(kinds[layer]) if kinds else "attention"
    attends = ("attention" in kind or "hybrid" in kind) and "linear" not in kind
    return attends and not (sharing and sharing[layer] == "reuse")


_CONTEXT_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")


def context_length(config: PretrainedConfig) -> int | None:
    """
    Return the number of positions a model has, prompt and completion together.

    Args:
        config (`PretrainedConfig`):
            Configuration of the model.

    Returns:
        `int` or `None`: `None` for a model without a limit, such as a state-space model.
    """
    text_config = config.get_text_config()
    values = (model_setting(text_config, name) for name in _CONTEXT_LENGTHS)
    return next((value for value in values if isinstance(value, int) and value > 0), None)
