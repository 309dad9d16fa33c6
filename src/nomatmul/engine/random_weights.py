"""A model of any size with random weights, made in memory: what speed and memory are measured
on, since neither depends on the values."""

from __future__ import annotations

import math

import numpy as np

from nomatmul.engine.backend import NativeBackend
from nomatmul.engine.language_model import LanguageModel
from nomatmul.engine.loading import checked_threads, cuda_part
from nomatmul.engine.native import native
from nomatmul.engine.weights import Weights, allocate
from nomatmul.formats import capability
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed.layout import (
    active_rows,
    check_packable,
    packed_matrices,
    packed_tensors,
)


def random_model(
    config: ModelConfig,
    packing: str = "2bit",
    embedding: str = "int8",
    seed: int = 0,
    *,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> LanguageModel:
    """Return a model of `config` whose weights are random legal codes; no file is involved.

    Scales keep the activations near 1. The same seed gives the same model (on one device: a GPU
    draws other numbers). Raises ValueError for a config that the engine does not run, an unknown
    packing or embedding form, or a device that cannot be used (see `load`).
    """
    if not config.causal:
        raise ValueError("random weights are drawn for causal models only, this one is an encoder")
    capability.check(config, "native" if device == "cpu" else "cuda")
    if device != "cpu":
        return _random_on_device(config, packing, embedding, seed, device, threads, isa)
    threads = checked_threads(threads)
    weights = allocate(packed_tensors(config, packing, embedding))
    _fill(weights, config, packing, seed)
    backend = NativeBackend(config, packing, embedding, weights, threads=threads, isa=isa)
    return LanguageModel(
        backend,
        config,
        fingerprint=f"random-{seed}-{packing}-{embedding}-{config}",
        packing=packing,
        embedding_form=embedding,
    )


def _random_on_device(
    config: ModelConfig,
    packing: str,
    embedding: str,
    seed: int,
    device: str,
    threads: int | None,
    isa: str | None,
) -> LanguageModel:
    check_packable(config, packing, embedding)
    opening, found = cuda_part(device, threads=threads, isa=isa)
    return LanguageModel(
        opening.open_random(config, embedding, seed, found),
        config,
        fingerprint=f"random-{seed}-{packing}-{embedding}-{device}-{config}",
        packing=packing,
        embedding_form=embedding,
    )


def _fill(weights: Weights, config: ModelConfig, packing: str, seed: int) -> None:
    core, rng = native(), np.random.default_rng(seed)
    matrices = packed_matrices(config, packing)
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
                array[1] = 1 / math.sqrt(active_rows(config) * 2 / 3)
        elif name.endswith(".lower_bound"):
            layer = int(name.split(".")[1])
            array[...] = layer / config.num_layers if config.use_lower_bound else 0.0
        else:
            array[...] = 1 + 0.1 * rng.standard_normal(array.size, dtype=np.float32)
