"""Random weights of a packed model, made in memory: what speed and memory are measured on, since
neither depends on the values."""

from __future__ import annotations

import math

import numpy as np

from nomatmul.engine.native import native
from nomatmul.engine.weights import Weights, allocate
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed.layout import Forms, Layout, layout_of


def random_weights(config: ModelConfig, packing: str, embedding: str, seed: int) -> Weights:
    """Random legal codes with scales that keep the activations near 1; a seed gives the same ones.

    Raises ValueError for an unknown packing or embedding form.
    """
    layout = layout_of(config, Forms.of(config, ternary=packing, embedding=embedding))
    weights = allocate(layout.tensors())
    _fill(weights, config, layout, seed)
    return weights


def _fill(weights: Weights, config: ModelConfig, layout: Layout, seed: int) -> None:
    core, rng = native(), np.random.default_rng(seed)
    matrices = layout.codes()
    for number, (name, array) in enumerate(weights.arrays.items()):
        part = (seed << 40) + (number << 32)  # a stretch of the generator for each tensor
        part &= (1 << 64) - 1
        if name.endswith(".packed"):
            columns, form = matrices[name]
            core.random_codes(form, array.reshape(-1, array.shape[-1]), columns, part)
        elif name == "embedding.weight" and array.dtype == np.int8:
            core.random_bytes(array.reshape(-1).view(np.uint8), part)
            np.maximum(array, -127, out=array)
        elif name == "embedding.weight" and array.dtype == np.uint16:
            values = rng.standard_normal(array.size, dtype=np.float32).view(np.uint32)
            array[...] = (values >> 16).astype(np.uint16).reshape(array.shape)
        elif name == "embedding.scale":
            array[...] = 1 / 64
        elif name.endswith(".scale"):
            columns, _ = matrices[name.removesuffix("scale") + "packed"]
            array[...] = 1 / math.sqrt(columns * 2 / 3)
            if len(array) == 2:  # of an FFF: its output sums the active rows, not D columns
                trees = architecture_of(config).trees()[name.removesuffix(".rows.scale")]
                array[1] = 1 / math.sqrt(trees.active_rows * 2 / 3)
        elif name.endswith(".lower_bound"):
            layer = int(name.split(".")[1])
            array[...] = layer / config.num_layers if config.use_lower_bound else 0.0
        else:
            array[...] = 1 + 0.1 * rng.standard_normal(array.size, dtype=np.float32)
