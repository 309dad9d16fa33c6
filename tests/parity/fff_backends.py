"""Random conditional layers, and every backend that can run them, behind one function.

Legend: N tokens, V rows, K = D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import parity_emulated
from numpy.typing import NDArray
from parity_backends import kernels_of

from nomatmul import _native
from nomatmul.engine.fff import pack_rows
from nomatmul.formats.packing import row_bytes, unpack_ternary
from nomatmul.reference.linear import expanded
from nomatmul.reference.trees import FloatTrees, Int8Trees, TernaryTrees, Trees

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class StoredTrees:
    """The arrays of one layer as `nomatmul.engine.fff.FFFLayer` documents them."""

    form: str
    rows: NDArray[Any]
    trees: int
    depth: int
    hidden: int
    activation: str = "gelu"
    scales: F32 | None = None
    bias: F32 | None = None
    norm_in: F32 | None = None
    norm_out: F32 | None = None
    eps: float = 1e-6

    @property
    def nodes(self) -> int:
        """Nodes of one tree."""
        return int(2 ** (self.depth + 1) - 1)


def oracle(layer: StoredTrees) -> Trees:
    """Return the numpy oracle of a layer."""
    sizes, rows = (layer.trees, layer.depth, layer.activation), layer.rows
    if layer.form == "ternary":
        rows = unpack_ternary(rows.reshape(-1, rows.shape[-1]), layer.hidden, "2bit")
        t_in, t_out = rows.reshape(len(layer.rows), 2, -1).swapaxes(0, 1)
        norms = (layer.norm_in, layer.norm_out)
        return TernaryTrees(*sizes, t_in, t_out, layer.scales, *norms, layer.eps)
    if layer.form == "int8":
        return Int8Trees(*sizes, rows[:, 0], rows[:, 1], layer.scales, layer.bias)
    rows = expanded(rows)
    return FloatTrees(*sizes, rows[:, 0], rows[:, 1], layer.bias)


def random_layer(form: str, hidden: int, trees: int, depth: int, activation: str) -> StoredTrees:
    """Return a layer of random weights, made in their stored form."""
    rng = np.random.default_rng([hidden, trees, depth])
    count = trees * (2 ** (depth + 1) - 1)
    sizes = (trees, depth, hidden, activation)
    if form == "ternary":
        rows = np.zeros((count, 2, row_bytes(hidden, "2bit")), np.uint8)
        random_codes(rows.reshape(2 * count, -1), hidden)
        norm_in = rng.uniform(0.5, 1.5, hidden).astype(np.float32)
        norm_out = rng.uniform(0.5, 1.5, count).astype(np.float32)
        scales = np.array([0.04, 0.03], np.float32)
        return StoredTrees(form, rows, *sizes, scales, None, norm_in, norm_out)
    bias = (0.3 * rng.standard_normal(count)).astype(np.float32)
    if form == "int8":
        q = rng.integers(-128, 128, (count, 2, hidden), np.int8)
        scales = rng.uniform(0.001, 0.02, (count, 2)).astype(np.float32)
        return StoredTrees(form, q, *sizes, scales, bias)
    values = rng.standard_normal((count, 2, hidden), np.float32)
    rows, _ = pack_rows(values[:, 0], values[:, 1], form)
    return StoredTrees(form, rows, *sizes, None, bias)


def sparse_layer(form: str, hidden: int, trees: int, depth: int) -> StoredTrees:
    """Return a layer of few ones and minus ones: many logits are exactly 0 (ties)."""
    rng = np.random.default_rng([hidden, trees, depth])
    count = trees * (2 ** (depth + 1) - 1)
    w_2VK = rng.integers(-1, 2, (2, count, hidden)).astype(np.float32)
    w_2VK *= rng.random(w_2VK.shape) < 2 / hidden
    rows, scales = pack_rows(w_2VK[0], w_2VK[1], form)
    norms = (np.ones(hidden, np.float32), np.ones(count, np.float32))
    ours = norms if form == "ternary" else (None, None)
    return StoredTrees(form, rows, trees, depth, hidden, "relu", scales, None, *ours)


def random_codes(rows: NDArray[np.uint8], hidden: int) -> None:
    """Fill packed rows with legal random codes."""
    _native.random_codes("2bit", rows, hidden, 7)


def random_tokens(layer: StoredTrees, tokens: int) -> F32:
    """Return x float32 [N, K]."""
    rng = np.random.default_rng([tokens, layer.hidden])
    return rng.standard_normal((tokens, layer.hidden)).astype(np.float32)


def native_fff() -> Any:
    """Return the module `nomatmul._native.fff`."""
    return _native.fff


def native_layer(layer: StoredTrees, isa: str | None = None, threads: int = 1) -> Any:
    """Return the native core's layer over the same arrays."""
    names = ("scales", "bias", "norm_in", "norm_out")
    arrays = {name: getattr(layer, name) for name in names}
    return native_fff().Layer(
        layer.form,
        layer.rows,
        layer.trees,
        layer.depth,
        layer.activation,
        **arrays,
        eps=layer.eps,
        threads=threads,
        isa=isa,
    )


def run(isa: str, layer: StoredTrees, x_NK: F32, threads: int = 1) -> tuple[NDArray[Any], ...]:
    """Return (y [N, K], logits [N, T, L], rows [N, T, L]); skips where the ISA is not at hand."""
    kernels = kernels_of(isa)
    if isinstance(kernels, parity_emulated.EmulatedKernels):
        return kernels.fff_forward(isa, layer, x_NK, threads)
    visits = (len(x_NK), layer.trees, layer.depth + 1)
    # NaN-filled: what is not written shows
    y_NK, logits = np.full_like(x_NK, np.nan), np.full(visits, np.nan, np.float32)
    rows = np.full(visits, -1, np.int32)
    native_layer(layer, isa, threads).forward(x_NK, y_NK, rows, logits)
    return y_NK, logits, rows
