"""The native core's conditional feed-forward layer in plain numpy, bit for bit.

Trees of neurons (arXiv 2311.10770, section 2): a token visits one node a level, from the root down,
turns right where the node's logit is above 0, and every visited node adds act(logit) * w_out.
The children of node j are 2j + 1 and 2j + 2; tree t's node j is row t * n + j, n = 2^L - 1.

Legend: N tokens, T trees, L levels (depth + 1), A visited rows of a token (T * L), V rows (T * n),
K = D hidden size (in and out are of equal size). Rows hold in and out side by side: [V, 2, K].

Here each float operation is rounded once, and every sum has one order, which csrc/kernels/trees.h
repeats: logits in 64 lanes folded by halves, outputs row by row in the order of the visits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.packing import unpack_ternary
from nomatmul.formats.quantise import from_bfloat16, quantise_activation
from nomatmul.reference.fff_activations import ACTIVATIONS
from nomatmul.reference.ops import Float, rms_norm, ternary_product

LANES = 64

Nodes = NDArray[np.int32]


@dataclass(frozen=True)
class FFFRows:
    """The weights of one layer.

    form: "f32" (rows float32 [V, 2, K]), "bf16" (uint16 bits [V, 2, K]), "int8" (int8 [V, 2, K]
    with scales float32 [V, 2]) or "ternary" (packed uint8 [V, 2, row_bytes(K, "2bit")] with scales
    float32 [2], norm_in [K], norm_out [V]). bias: float32 [V], added to the logits; not ternary.
    """

    form: str
    rows: NDArray[Any]
    trees: int
    depth: int
    hidden: int
    activation: str = "gelu"
    scales: Float | None = None
    bias: Float | None = None
    norm_in: Float | None = None
    norm_out: Float | None = None
    eps: float = 1e-6

    @property
    def nodes(self) -> int:
        """Nodes of one tree."""
        return int(2 ** (self.depth + 1) - 1)


def lane_sums(products: Float) -> Float:
    """Sum float32 [..., K] over the last axis: element k in lane k % 64, lanes folded by halves."""
    size = products.shape[-1]
    padding = [(0, 0)] * (products.ndim - 1) + [(0, -size % LANES)]
    blocks = np.pad(products, padding).reshape(*products.shape[:-1], -1, LANES)
    lanes: Float = np.zeros_like(blocks[..., 0, :])
    for block in range(blocks.shape[-2]):
        lanes = lanes + blocks[..., block, :]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def walk_by(logits_of: Callable[[Nodes], Float], tokens: int, trees: int, depth: int) -> Any:
    """Return (logits [N, T, L], rows int32 [N, T, L]) of one walk.

    logits_of takes the rows of one level, int32 [N, T], and returns their logits. Raises
    ValueError where a logit is not finite: then the walk means nothing.
    """
    levels = depth + 1
    logits = np.empty((tokens, trees, levels), np.float32)
    rows = np.empty((tokens, trees, levels), np.int32)
    root = np.arange(trees, dtype=np.int64) * (2**levels - 1)
    node = np.zeros((tokens, trees), np.int64)
    for level in range(levels):
        rows[..., level] = root + node
        logits[..., level] = logits_of(rows[..., level])
        node = 2 * node + 1 + (logits[..., level] > 0)
    if not np.isfinite(logits).all():
        token = int(np.argwhere(~np.isfinite(logits))[0, 0])
        raise ValueError(f"the logits of token {token} are not finite (NaN or infinity)")
    return logits, rows


def walk(x_NK: Float, w_in_VK: Float, bias_V: Float | None, trees: int, depth: int) -> Any:
    """Return (logits float32 [N, T, L], rows int32 [N, T, L]) of float32 weights."""

    def logits_of(rows: Nodes) -> Float:
        sums = lane_sums(x_NK[:, None] * w_in_VK[rows])
        return sums if bias_V is None else sums + bias_V[rows]

    return walk_by(logits_of, len(x_NK), trees, depth)


def combine(h_NA: Float, rows_NA: Nodes, w_out_VD: Float) -> Float:
    """Return y[n] = sum over visits a of h[n, a] * w_out[rows[n, a]], added in the order of a."""
    y_ND = np.zeros((len(h_NA), w_out_VD.shape[1]), np.float32)
    for a in range(h_NA.shape[1]):
        y_ND = y_ND + h_NA[:, a, None] * w_out_VD[rows_NA[:, a]]
    return y_ND


def gather_dot(g_ND: Float, rows_NA: Nodes, w_VD: Float) -> Float:
    """Return dot(g[n], w[rows[n, a]]), float32 [N, A]: the gradient of `combine` for h."""
    return lane_sums(g_ND[:, None] * w_VD[rows_NA])


def segment_sum(h_NA: Float, rows_NA: Nodes, a_ND: Float, count: int) -> Float:
    """Return out[v] = sum of h[n, a] * a[n] over all visits of row v, token by token: [count, D].

    The gradient of `combine` for w_out (with a = grad_y) and of `walk` for w_in (with a = x).
    """
    out_VD = np.zeros((count, a_ND.shape[1]), np.float32)
    for token, (h_A, rows_A) in enumerate(zip(h_NA, rows_NA, strict=True)):
        for h, row in zip(h_A, rows_A, strict=True):
            out_VD[row] = out_VD[row] + h * a_ND[token]
    return out_VD


def forward(layer: FFFRows, x_NK: Float) -> tuple[Float, Float, Nodes]:
    """Return (y float32 [N, K], logits float32 [N, T, L], rows int32 [N, T, L]).

    Raises ValueError where x, or a logit, is not finite.
    """
    if layer.form == "ternary":
        return _forward_ternary(layer, x_NK)
    if layer.form == "int8":
        logits, rows = _walk_int8(layer, x_NK)
    else:
        w_in, w_out = _float_rows(layer)
        logits, rows = walk(x_NK, w_in, layer.bias, layer.trees, layer.depth)
    flat = rows.reshape(len(x_NK), -1)
    h = ACTIVATIONS[layer.activation](logits).reshape(flat.shape)
    if layer.form == "int8":
        assert layer.scales is not None
        h = h * layer.scales[flat, 1]
        w_out = layer.rows[:, 1].astype(np.float32)
    return combine(h, flat, w_out), logits, rows


def _float_rows(layer: FFFRows) -> tuple[Float, Float]:
    rows = from_bfloat16(layer.rows) if layer.form == "bf16" else layer.rows
    return rows[:, 0], rows[:, 1]


def _walk_int8(layer: FFFRows, x_NK: Float) -> Any:
    """logit = float(q . w) * (scale * step) + bias, the dot product an exact integer."""
    assert layer.scales is not None
    scales = layer.scales
    q_NK, step_N1 = quantise_activation(x_NK)
    w_in = layer.rows[:, 0].astype(np.int32)

    def logits_of(rows: Nodes) -> Float:
        acc = np.einsum("nk,ntk->nt", q_NK.astype(np.int32), w_in[rows])
        logits = acc.astype(np.float32) * (scales[rows, 0] * step_N1)
        return logits if layer.bias is None else logits + layer.bias[rows]

    return walk_by(logits_of, len(x_NK), layer.trees, layer.depth)


def _forward_ternary(layer: FFFRows, x_NK: Float) -> tuple[Float, Float, Nodes]:
    """Both quantisers of BitLinear, the second over the A visited values (docs/numerics.md)."""
    assert layer.scales is not None
    assert layer.norm_in is not None
    assert layer.norm_out is not None
    scale_in, scale_out = layer.scales
    flat = layer.rows.reshape(-1, layer.rows.shape[-1])
    t_V2K = unpack_ternary(flat, layer.hidden, "2bit").reshape(len(layer.rows), 2, -1)
    q_NK, step_N1 = quantise_activation(rms_norm(x_NK, layer.norm_in, layer.eps))
    t_in = t_V2K[:, 0].astype(np.int32)

    def logits_of(rows: Nodes) -> Float:
        acc = np.einsum("nk,ntk->nt", q_NK.astype(np.int32), t_in[rows])
        return acc.astype(np.float32) * (scale_in * step_N1)

    logits, rows = walk_by(logits_of, len(x_NK), layer.trees, layer.depth)
    rows_NA = rows.reshape(len(x_NK), -1)
    h_NA = ACTIVATIONS[layer.activation](logits).reshape(rows_NA.shape)
    y_NK = np.empty_like(x_NK)
    for token, (h_A, rows_A) in enumerate(zip(h_NA, rows_NA, strict=True)):
        q_A, step = quantise_activation(rms_norm(h_A, layer.norm_out[rows_A], layer.eps))
        acc_K = ternary_product(q_A[None], np.ascontiguousarray(t_V2K[rows_A, 1].T))[0]
        y_NK[token] = acc_K.astype(np.float32) * (scale_out * step)
    return y_NK, logits, rows
