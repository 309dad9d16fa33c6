"""Checkpoints of MLX (mlx-lm) whose weights are ternary, or signs: its affine quantisation.

A matrix X is three tensors: X.weight, uint32 [N, K * bits / 32], its codes' lowest bits first, and
X.scales and X.biases [N, K / group]. A weight is scale * code + bias. Ternary-Bonsai has 2 bits
with bias = -scale, Bonsai of one bit scale = -2 * bias; whatever else such codes say is refused.
Facts: mlx.core.quantize. Legend: N outputs, K inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import JsonObject
from nomatmul.formats.files.quantised import GROUPS, Quantised
from nomatmul.formats.files.source import TensorSource

_KEYS = ("quantization", "quantization_config")  # mlx-lm writes both, and reads the first
_BESIDE = ("scales", "biases")
_WORD = 32


def split_config(values: JsonObject) -> tuple[JsonObject, JsonObject | None]:
    """(a config.json without what MLX says of its quantisation, that, or None for nothing).

    Raises FormatError, by name, for bits, groups and modes that are not read.
    """
    given = values.get(_KEYS[0])
    if given is None:
        return values, None
    if not isinstance(given, dict) or (values.get(_KEYS[1]) or given) != given:
        raise FormatError(f"quantization {given!r} is not what quantization_config says")
    legal = {"bits": (1, 2), "group_size": GROUPS, "mode": ("affine",)}
    for key, value in {"bits": None, "group_size": None, **given}.items():
        if key not in legal:
            raise FormatError(f"quantization has {key!r} apart, which is not supported")
        if isinstance(value, bool) or value not in legal[key]:
            choices = " or ".join(map(repr, legal[key]))
            raise FormatError(
                f"quantization {key} {value!r} is not supported; it must be {choices}"
            )
    return {key: value for key, value in values.items() if key not in _KEYS}, given


class MlxSource(TensorSource):
    """The tensors of an MLX checkpoint, quantised matrices as one each."""

    def __init__(self, source: TensorSource, options: JsonObject) -> None:
        self._source, self.nested = source, source.nested
        self._bits, self._group = int(options["bits"]), int(options["group_size"])
        words = source.byte_shapes()
        self._packed = {
            name: _stem(name)
            for name, dtype in source.left_out.items()
            if dtype == "U32" and len(words.get(name, ())) == 2 and name.endswith(".weight")
        }
        self.left_out = {n: d for n, d in source.left_out.items() if n not in self._packed}
        self._held = {name: self._quantised(name) for name in self._packed}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        beside = {f"{stem}.{part}" for stem in self._packed.values() for part in _BESIDE}
        found = {n: s for n, s in self._source.shapes().items() if n not in beside}
        return {**found, **{name: held.shape for name, held in self._held.items()}}

    def read(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        held = self._held.get(name)
        return self._source.read(name, rows) if held is None else held.floats(rows)

    def quantised(self, name: str) -> Quantised | None:
        return self._held.get(name) or self._source.quantised(name)

    def byte_shapes(self) -> dict[str, tuple[int, ...]]:
        return {n: s for n, s in self._source.byte_shapes().items() if n in self.left_out}

    def read_bytes(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        return self._source.read_bytes(name, rows)

    def _quantised(self, name: str) -> Quantised:
        count, words = self._source.byte_shapes()[name]
        shape = count, words * _WORD // self._bits
        scale, bias = (self._beside(name, part, shape) for part in _BESIDE)
        if self._bits == 1:
            scale, bias = -bias, scale / np.float32(-2)  # a code of 1 is +scale, one of 0 is -scale
        if not np.array_equal(bias, -scale):
            raise FormatError(f"{name!r} is not ternary: its biases are not those of -1, 0 and 1")
        signs = np.sign(scale).astype(np.int8)

        def read(rows: slice) -> NDArray[np.int8]:
            stored = self._source.read_bytes(name, rows)
            values = self._values(name, stored).reshape(len(stored), -1, self._group)
            values *= signs[rows][:, :, None]
            return values.reshape(len(stored), -1)

        sizes = np.where(signs == 0, np.float32(1), np.abs(scale))
        return Quantised("ternary", shape, self._group, sizes, read).checked(name)

    def _values(self, name: str, words: NDArray[np.uint32]) -> NDArray[np.int8]:
        """-1, 0 and 1 of packed rows, int8 [n, K]."""
        flat = np.ascontiguousarray(words.astype("<u4", copy=False)).view(np.uint8)
        bits = np.unpackbits(flat, axis=1, bitorder="little").view(np.int8)
        if self._bits == 1:
            return bits * np.int8(2) - np.int8(1)
        codes = bits[:, ::2] + bits[:, 1::2] * np.int8(2) - np.int8(1)
        if codes.size and codes.max() > 1:
            raise FormatError(f"{name!r} is not ternary: it holds the code 3")
        return codes

    def _beside(self, name: str, part: str, shape: tuple[int, int]) -> NDArray[np.float32]:
        other, wanted = f"{_stem(name)}.{part}", (shape[0], shape[1] // self._group)
        found = self._source.shapes().get(other)
        if found != wanted:
            has = "lacks" if found is None else f"has shape {list(found)} of"
            raise FormatError(f"{has} the tensor {other!r}; {name!r} asks for {list(wanted)}")
        return self._source.read(other)


def _stem(name: str) -> str:
    return name.removesuffix(".weight")
