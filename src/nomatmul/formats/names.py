"""Names and shapes of a model's tensors, from its config alone.

Legend: V vocabulary, D hidden size, M intermediate size, L layers.
"""

from __future__ import annotations

from nomatmul.formats.config import ModelConfig


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return {name of a linear layer: (out_features, in_features)} in the order of use.

    The names carry no ".weight": "layers.0.mixer.i_proj", ..., "head".
    """
    size, inner = config.hidden_size, config.mlp_size
    mixer = "ifgo" if config.token_mixer == "mlgru" else "qkvo"
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(config.num_layers):
        for letter in mixer:
            shapes[f"layers.{layer}.mixer.{letter}_proj"] = (size, size)
        if config.channel_mixer == "glu":
            shapes[f"layers.{layer}.channel.gate_proj"] = (2 * inner, size)
            shapes[f"layers.{layer}.channel.down_proj"] = (size, inner)
        elif config.channel_mixer == "ffn":
            shapes[f"layers.{layer}.channel.up_proj"] = (inner, size)
            shapes[f"layers.{layer}.channel.down_proj"] = (size, inner)
    shapes["head"] = (config.vocab_size, size)
    return shapes


def norm_shapes(config: ModelConfig) -> dict[str, tuple[int]]:
    """Return {tensor name: (size,)} of the norms outside the linear layers, in order of use."""
    size = (config.hidden_size,)
    shapes: dict[str, tuple[int]] = {}
    for layer in range(config.num_layers):
        shapes[f"layers.{layer}.mixer_norm.weight"] = size
        if config.token_mixer == "mlgru":
            shapes[f"layers.{layer}.mixer.g_norm.weight"] = size
        if config.channel_mixer != "none":
            shapes[f"layers.{layer}.channel_norm.weight"] = size
    shapes["final_norm.weight"] = size
    return shapes


def has_lower_bounds(config: ModelConfig) -> bool:
    """Return whether the model owns the table `lower_bounds` [L, D]."""
    return config.token_mixer == "mlgru" and config.use_lower_bound


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return {tensor name: shape} of a training checkpoint: the torch state dict.

    A tied head has no "head.weight" of its own. Raises ValueError for channel_mixer "fff",
    which this version does not build.
    """
    if config.channel_mixer == "fff":
        raise ValueError('channel_mixer "fff" is not built in this version')
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.weight": (config.vocab_size, config.hidden_size)
    }
    if has_lower_bounds(config):
        shapes["lower_bounds"] = (config.num_layers, config.hidden_size)
    shapes.update(norm_shapes(config))
    for name, (rows, columns) in linear_shapes(config).items():
        if name != "head" or not config.tie_embeddings:
            shapes[f"{name}.weight"] = (rows, columns)
        if config.linear == "ternary":
            shapes[f"{name}.norm.weight"] = (columns,)
    return shapes
