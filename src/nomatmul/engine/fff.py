"""The conditional feed-forward layer of the native core, over numpy arrays.

Legend: N tokens, T trees, L levels (depth + 1), V rows (T * (2^L - 1)), D hidden size. Row v of
`rows` holds a node's input weights and, beside them, its output weights, because a visit reads
both. docs/numerics.md says what each form computes; `nomatmul.reference.trees` gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.native import native
from nomatmul.formats.packing import pack_ternary
from nomatmul.formats.quantise import quantise_rows, quantise_weight, to_bfloat16

FORMS = ("f32", "bf16", "int8", "ternary")

Float = NDArray[np.float32]


@dataclass(frozen=True)
class Paths:
    """Where each token went: rows int32 and logits float32, both [N, T, L]."""

    rows: NDArray[np.int32]
    logits: Float


class FFFLayer:
    """One layer: `layer(x)` is float32 [N, D] for float32 [N, D].

    form: "f32" (rows float32 [V, 2, D]), "bf16" (uint16 bits), "int8" (int8, with scales float32
    [V, 2]) or "ternary" (packed uint8 [V, 2, row_bytes(D, "2bit")], scales float32 [2],
    norm_in [D], norm_out [V]). bias: float32 [V] on the logits; not ternary. eps: of the norms.
    isa: an instruction set by name, or None for the best. The arrays are read in place.
    Raises ValueError, with value and limit, for anything that does not fit together.
    """

    def __init__(
        self,
        form: str,
        rows: NDArray[Any],
        trees: int,
        depth: int,
        activation: str = "gelu",
        *,
        scales: Float | None = None,
        bias: Float | None = None,
        norm_in: Float | None = None,
        norm_out: Float | None = None,
        eps: float = 1e-6,
        threads: int = 1,
        isa: str | None = None,
    ) -> None:
        for name, value in (("trees", trees), ("depth", depth)):
            if not -(2**31) <= value < 2**31:
                raise ValueError(f"{name} is {value}, which no 32-bit index can name")
        self.form, self.trees, self.depth = form, trees, depth
        options = {"scales": scales, "bias": bias, "norm_in": norm_in, "norm_out": norm_out}
        ranks = {"scales": 2 if form == "int8" else 1}
        arrays = {
            k: None if v is None else _as_float(k, v, ranks.get(k, 1)) for k, v in options.items()
        }
        self._layer = native().fff.Layer(
            form,
            _three_dimensional(rows),
            trees,
            depth,
            activation,
            **arrays,
            eps=eps,
            threads=threads,
            isa=isa,
        )

    @property
    def isa(self) -> str:
        """Name of the instruction set in use."""
        return str(self._layer.isa)

    def __call__(self, x_ND: Float) -> Float:
        """Return y [N, D]. Raises ValueError where x, or a logit, is not finite."""
        x_ND = _as_float("x", x_ND, 2)
        y_ND = np.empty_like(x_ND)
        self._layer.forward(x_ND, y_ND)
        return y_ND

    def with_paths(self, x_ND: Float) -> tuple[Float, Paths]:
        """Return (y, paths) of x."""
        x_ND = _as_float("x", x_ND, 2)
        y_ND = np.empty_like(x_ND)
        shape = (len(x_ND), self.trees, self.depth + 1)
        paths = Paths(np.empty(shape, np.int32), np.empty(shape, np.float32))
        self._layer.forward(x_ND, y_ND, paths.rows, paths.logits)
        return y_ND, paths


def pack_rows(w_in_VD: Float, w_out_VD: Float, form: str) -> tuple[NDArray[Any], Float | None]:
    """Return (rows, scales) of float32 weights in one of FORMS.

    int8 has one scale a row and side, ternary one absmean scale a matrix; float forms have none.
    Raises ValueError for an unknown form or matrices of different shape.
    """
    if w_in_VD.shape != w_out_VD.shape:
        raise ValueError(f"w_in {w_in_VD.shape} and w_out {w_out_VD.shape} differ in shape")
    both = np.ascontiguousarray(np.stack([w_in_VD, w_out_VD], axis=1), dtype=np.float32)
    count, _, size = both.shape
    if form == "f32":
        return both, None
    if form == "bf16":
        return to_bfloat16(both), None
    if form == "int8":
        q, scales = quantise_rows(both.reshape(2 * count, size))
        return q.reshape(both.shape), scales.reshape(count, 2)
    if form == "ternary":
        sides = [quantise_weight(both[:, side]) for side in (0, 1)]
        packed = [pack_ternary(t_VD, "2bit") for t_VD, _ in sides]
        return np.stack(packed, axis=1), np.array([scale for _, scale in sides], np.float32)
    raise ValueError(f"form {form!r} is unknown; legal values are {', '.join(FORMS)}")


def _as_float(name: str, values: NDArray[Any], dimensions: int) -> Float:
    array = np.asarray(values, dtype=np.float32)
    if array.ndim != dimensions:
        raise ValueError(f"{name} has shape {list(array.shape)}, expected {dimensions} dimensions")
    return np.ascontiguousarray(array)


def _three_dimensional(rows: NDArray[Any]) -> NDArray[Any]:
    if rows.ndim != 3:
        raise ValueError(f"rows must be [V, 2, columns], got shape {list(rows.shape)}")
    return np.ascontiguousarray(rows)
