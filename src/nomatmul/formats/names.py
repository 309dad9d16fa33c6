"""Names and shapes of a model's tensors, from its config alone.

Legend: V vocabulary, D hidden size, M intermediate size, L layers; of an fff: R rows (nodes of all
trees), F leaves of all trees, W width of a leaf.
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
        channel = config.channel_of(layer)
        if channel == "glu":
            shapes[f"layers.{layer}.channel.gate_proj"] = (2 * inner, size)
            shapes[f"layers.{layer}.channel.down_proj"] = (size, inner)
        elif channel == "ffn":
            shapes[f"layers.{layer}.channel.up_proj"] = (inner, size)
            shapes[f"layers.{layer}.channel.down_proj"] = (size, inner)
        elif channel == "fff" and config.fff_master_width:
            width = config.fff_master_width
            shapes[f"layers.{layer}.channel.master.up_proj"] = (width, size)
            shapes[f"layers.{layer}.channel.master.down_proj"] = (size, width)
    shapes["head"] = (config.vocab_size, size)
    return shapes


def tree_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return {tensor name: shape} of the trees of every fff layer, without their master leaf.

    Row t * n + j is node j of tree t (n nodes a tree); its children are 2j + 1 and 2j + 2.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(config.num_layers):
        if config.channel_of(layer) == "fff":
            prefix = f"layers.{layer}.channel."
            shapes.update({prefix + name: shape for name, shape in _tree(config).items()})
    return shapes


def _tree(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    size, rows, width = config.hidden_size, config.tree_rows, config.fff_leaf_width
    assert config.fff_trees is not None
    assert config.fff_depth is not None
    if width is None:
        shapes: dict[str, tuple[int, ...]] = {"w_in": (rows, size), "w_out": (rows, size)}
        if config.fff_gated:
            shapes["w_up"] = (rows, size)
        biases: dict[str, tuple[int, ...]] = {"bias": (rows,)}
        hidden = rows
    else:
        leaves = config.fff_trees << config.fff_depth
        shapes = {
            "nodes": (rows, size),
            "leaf_in": (leaves, width, size),
            "leaf_out": (leaves, size, width),
        }
        biases = {
            "node_bias": (rows,),
            "leaf_in_bias": (leaves, width),
            "leaf_out_bias": (leaves, size),
        }
        hidden = leaves * width
    if config.fff_bias:
        shapes |= biases
    if config.linear == "ternary":
        shapes |= {"norm_in.weight": (size,), "norm_out.weight": (hidden,)}
    return shapes


def norm_shapes(config: ModelConfig) -> dict[str, tuple[int]]:
    """Return {tensor name: (size,)} of the norms outside the linear layers, in order of use."""
    size = (config.hidden_size,)
    shapes: dict[str, tuple[int]] = {}

    def add(name: str) -> None:
        shapes[f"{name}.weight"] = size
        if config.norm == "layer":
            shapes[f"{name}.bias"] = size

    if config.embedding_norm:
        add("embedding_norm")
    for layer in range(config.num_layers):
        add(f"layers.{layer}.mixer_norm")
        if config.token_mixer == "mlgru":
            shapes[f"layers.{layer}.mixer.g_norm.weight"] = size
        if config.channel_mixer != "none":
            add(f"layers.{layer}.channel_norm")
    add("final_norm")
    return shapes


def has_lower_bounds(config: ModelConfig) -> bool:
    """Return whether the model owns the table `lower_bounds` [L, D]."""
    return config.token_mixer == "mlgru" and config.use_lower_bound


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return {tensor name: shape} of a training checkpoint: the torch state dict.

    A tied head has no "head.weight" of its own.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.weight": (config.vocab_size, config.hidden_size)
    }
    if config.positions == "sinusoidal":
        shapes["position_scale"] = (1,)
    if has_lower_bounds(config):
        shapes["lower_bounds"] = (config.num_layers, config.hidden_size)
    shapes.update(norm_shapes(config))
    for name, (rows, columns) in linear_shapes(config).items():
        if name != "head" or not config.tie_embeddings:
            shapes[f"{name}.weight"] = (rows, columns)
        if config.linear == "ternary":
            shapes[f"{name}.norm.weight"] = (columns,)
    shapes.update(tree_shapes(config))
    return shapes
