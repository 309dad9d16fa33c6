"""Multiply-adds of a token, counted from a model's sizes: what a path needs, and what is run.

Weights of a product count once for each token; a ternary product counts like a dense one of its
size; norms, activations and gates are left out. Nothing here needs torch.
"""

from __future__ import annotations

from nomatmul.formats.config import ModelConfig

TRAINING = 6.0  # FLOPs of a training step for each multiply-add of the forward pass


def mixer_products(model: ModelConfig, length: int) -> float:
    """Multiply-adds of all token mixers for a token of a sequence of `length`."""
    size = model.hidden_size
    weights = 4.0 * size * size
    if model.token_mixer == "attention":  # scores and sums; a causal token sees half of them
        weights += 2.0 * size * length * (0.5 if model.causal else 1.0)
    return model.num_layers * weights


def channel_products(model: ModelConfig, *, masked: bool = False) -> float:
    """Multiply-adds of all channel mixers for a token. masked: of the form that runs every node."""
    size = model.hidden_size
    kind = model.channel_mixer
    if kind == "none":
        return 0.0
    if kind != "fff":
        return model.num_layers * (3.0 if kind == "glu" else 2.0) * size * model.mlp_size
    layers = model.fff_layers
    count = model.num_layers if layers is None else len(layers)
    others = (model.num_layers - count) * 2.0 * size * model.mlp_size
    return count * 2.0 * size * _tree_neurons(model, masked) + others


def _tree_neurons(model: ModelConfig, masked: bool) -> float:
    """Neurons (a product in and one out) of a layer with trees that a token meets."""
    trees, depth = model.fff_trees, model.fff_depth
    assert trees is not None
    assert depth is not None
    if model.fff_leaf_width is None:
        neurons = float(trees * ((2 ** (depth + 1) - 1) if masked else depth + 1))
        neurons *= 1.5 if model.fff_gated else 1.0
    else:  # hyperplanes have a product in only
        nodes, leaves = (2**depth - 1, 2**depth) if masked else (depth, 1)
        neurons = trees * (0.5 * nodes + leaves * model.fff_leaf_width)
    return neurons + model.fff_master_width


def training_flops(
    model: ModelConfig, length: int, *, predicted: float = 1.0, masked: bool = False
) -> float:
    """FLOPs of a training step for each token of its batch.

    predicted: share of the tokens that the head reads (1 for a causal model, the masking share
    for masked language modelling).
    """
    head = predicted * model.vocab_size * model.hidden_size
    body = mixer_products(model, length) + channel_products(model, masked=masked)
    return TRAINING * (body + head)
