"""Random weights of a packed model, made in memory: what speed and memory are measured on, since
neither depends on the values."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.native import native
from nomatmul.engine.weights import DTYPES, Joined, Weights, allocate
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed.layout import Forms, Layout, layout_of


def random_weights(
    config: ModelConfig, forms: Forms, seed: int, rearranged: Collection[str] = ()
) -> Weights:
    """Random legal codes with scales that keep the activations near 1; a seed gives the same ones.

    rearranged: tensors that are made each time that they are asked for, since whoever takes them
    copies them.
    """
    layout = layout_of(config, forms)
    tensors = layout.tensors()
    kept = allocate({name: tensors[name] for name in tensors if name not in rearranged})
    numbers = {name: number for number, name in enumerate(tensors)}
    draw = _Draw(config, layout, seed)
    for name, array in kept.arrays.items():
        draw(name, array, numbers[name])
    if not rearranged:
        return kept
    later = _Later(draw, {name: (*tensors[name], numbers[name]) for name in sorted(rearranged)})
    sizes = kept.sizes | {name: later.nbytes(name) for name in later}
    return Weights(Joined(kept.arrays, later), kept.arena, sizes)


class _Later(Mapping[str, NDArray[Any]]):
    """Tensors that are drawn each time that they are asked for."""

    def __init__(self, draw: _Draw, tensors: dict[str, tuple[str, tuple[int, ...], int]]) -> None:
        self._draw, self._tensors = draw, tensors

    def nbytes(self, name: str) -> int:
        """Of a tensor, as it is asked for."""
        dtype, shape, _ = self._tensors[name]
        return math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize

    def __getitem__(self, name: str) -> NDArray[Any]:
        dtype, shape, number = self._tensors[name]
        array = np.zeros(shape, DTYPES[dtype])
        self._draw(name, array, number)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Draw:
    """Draws a tensor in place; number: its place in the layout. Floats come from one generator, in
    the order of the calls; those of int8 rows and of scales of groups do not."""

    def __init__(self, config: ModelConfig, layout: Layout, seed: int) -> None:
        self._config, self._seed = config, seed
        self._codes = layout.codes()
        self._by_scale = {m.scale: m for m in layout.matrices if m.scale is not None}
        self._rng = np.random.default_rng(seed)

    def __call__(self, name: str, array: NDArray[Any], number: int) -> None:
        core, rng = native(), self._rng
        part = (self._seed << 40) + (number << 32)  # a stretch of the generator for each tensor
        part &= (1 << 64) - 1
        if name in self._codes:
            columns, form = self._codes[name]
            core.random_codes(form, array.reshape(-1, array.shape[-1]), columns, part)
        elif array.dtype == np.int8:
            core.random_bytes(array.reshape(-1).view(np.uint8), part)
            np.maximum(array, -127, out=array)
        elif name in self._by_scale:
            self._scales(name, array)
            if array.ndim == 2:  # of groups: each its own
                spread = np.random.default_rng([self._seed, number])
                array *= spread.uniform(0.5, 1.5, array.shape).astype(array.dtype)
        elif array.dtype == np.uint16:
            values = self._floats(name, array.size).view(np.uint32)
            array[...] = (values >> 16).astype(np.uint16).reshape(array.shape)
        elif name.endswith(".weight") and array.ndim == 2:
            array[...] = self._floats(name, array.size).reshape(array.shape)
        elif name.endswith(".lower_bound"):
            layer, config = int(name.split(".")[1]), self._config
            array[...] = layer / config.num_layers if config.use_lower_bound else 0.0
        else:
            array[...] = 1 + 0.1 * rng.standard_normal(array.size, dtype=np.float32)

    def _floats(self, name: str, count: int) -> NDArray[np.float32]:
        """Near 1 in an embedding, and so that sums are near 1 in a linear."""
        values = self._rng.standard_normal(count, dtype=np.float32)
        if not name.startswith("embedding."):
            values *= np.float32(1 / 64)
        return values

    def _scales(self, name: str, array: NDArray[Any]) -> None:
        matrix = self._by_scale[name]
        if matrix.name == "embedding.weight":
            array[...] = 1 / 64
        elif not matrix.packed:  # int8 values are near 73 in size
            array[...] = 1 / (73 * math.sqrt(matrix.shape[-1]))
        else:
            array[...] = 1 / math.sqrt(matrix.shape[-1] * 2 / 3)
            trees = architecture_of(self._config).trees().get(name.removesuffix(".rows.scale"))
            if trees is not None:  # its output sums the active rows, not D columns
                array[1] = 1 / math.sqrt(trees.active_rows * 2 / 3)
