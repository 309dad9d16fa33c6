"""The oracle of encoders over a packed directory, in the forms that it stores.

Legend: N tokens, D hidden size, K inputs and M outputs of a linear.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.packed.encoder import EncoderReader
from nomatmul.formats.quantise import from_bfloat16, quantise_activation
from nomatmul.reference import fff
from nomatmul.reference.encoder import Float, ReferenceEncoder

_MERGED = ("q_proj", "k_proj", "v_proj")


class PackedReferenceEncoder(ReferenceEncoder):
    """`ReferenceEncoder` whose int8 matrices take int8 inputs and whose trees have their form.

    Raises FormatError for damaged tensors, ValueError where the result is not finite.
    """

    def __init__(self, reader: EncoderReader) -> None:
        super().__init__(reader.config, self._vector)
        self.stored = {name: reader.read(name) for name in reader.infos}
        names = [name.removesuffix(".rows") for name in reader.infos if name.endswith(".rows")]
        self._rows = {name: self._rows_of(name, reader.forms.rows) for name in names}

    def hidden(self, ids_N: NDArray[Any], seen_N: NDArray[Any] | None) -> tuple[Float, Any]:
        """(final-normed states [N, D], {layer: paths [N, A, L]}) of one sequence."""
        output = self.forward(ids_N[None], None if seen_N is None else seen_N[None])
        if not np.isfinite(output.hidden_BTD).all():
            raise ValueError("a value inside the model is not finite (NaN or infinity)")
        return output.hidden_BTD[0], output.paths

    def linear(self, x: Float, name: str) -> Float:
        """x W^T; an int8 matrix quantises x by token."""
        weight, scale = self.matrix(name)
        return product(x, weight, scale)

    def matrix(self, name: str) -> tuple[NDArray[Any], Float | None]:
        """The stored weight [M, K] and, of int8, its scales [M]."""
        base, _, last = name.rpartition(".")
        rows = slice(None)
        if last in _MERGED:  # one matrix holds q, k and v
            name, size = f"{base}.qkv_proj", self.config.hidden_size
            first = _MERGED.index(last) * size
            rows = slice(first, first + size)
        weight = self.stored[f"{name}.weight"][rows]
        return weight, self.stored[f"{name}.scale"][rows] if weight.dtype == np.int8 else None

    def embed(self, ids_BT: NDArray[np.int64]) -> Float:
        rows: NDArray[Any] = self.stored["embedding.weight"][ids_BT]
        if rows.dtype == np.int8:
            return rows.astype(np.float32) * self.stored["embedding.scale"][ids_BT, None]
        return expanded(rows)

    def trees(self, x_ND: Float, at: str) -> tuple[Float, NDArray[np.int32]]:
        y_ND, _, nodes_NAL = fff.forward(self._rows[at], x_ND)
        return y_ND, nodes_NAL

    def _vector(self, name: str) -> Float:
        return expanded(self.stored[name])

    def _rows_of(self, at: str, form: str) -> fff.FFFRows:
        config = self.config
        assert config.fff_trees is not None
        assert config.fff_depth is not None
        return fff.FFFRows(
            form=form,
            rows=self.stored[f"{at}.rows"],
            trees=config.fff_trees,
            depth=config.fff_depth,
            hidden=config.hidden_size,
            activation=config.activation,
            scales=self.stored.get(f"{at}.row_scale"),
            bias=self.stored.get(f"{at}.bias"),
        )


def product(x: Float, weight: NDArray[Any], scale: Float | None) -> Float:
    """x W^T of a stored matrix: float32, or of int8 with exact sums for x quantised by token."""
    if scale is None:
        result: Float = x @ expanded(weight).T
        return result
    q, step = quantise_activation(x)
    acc = q.astype(np.float64) @ weight.astype(np.float64).T
    return acc.astype(np.float32) * (scale * step)


def expanded(stored: NDArray[Any]) -> Float:
    """float32 of a stored float tensor (bfloat16 comes as uint16 bits)."""
    return from_bfloat16(stored) if stored.dtype == np.uint16 else stored
