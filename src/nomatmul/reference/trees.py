"""Trees of neurons (arXiv 2311.10770, section 2): one walk and one combine for every form of rows.

A token visits one node a level, from the root down, turns right where the node's logit is above 0,
and every visited node adds act(logit) * w_out. The children of node j are 2j + 1 and 2j + 2; tree
t's node j is row t * n + j, n = 2^L - 1.

Legend: N tokens, T trees, L levels (depth + 1), A visited rows of a token (T * L), V rows (T * n),
D hidden size (inputs and outputs).

Each float operation is rounded once, and every sum has one order, which csrc/kernels/trees.h
repeats: logits in 64 lanes folded by halves, outputs row by row in the order of the visits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.quantise import quantise_activation
from nomatmul.reference.activations import ACTIVATIONS, Float
from nomatmul.reference.ops import rms_norm

LANES = 64
_GATHERED = 1 << 22  # weights gathered at once: many trees take little memory, and stay in caches

Rows = NDArray[np.int32]
Number = TypeVar("Number", bound="np.number[Any]")


def walk(
    values_of: Callable[[Rows], NDArray[Number]], tokens: int, trees: int, depth: int
) -> tuple[NDArray[Number], Rows]:
    """Return (values [N, T, L], rows int32 [N, T, L]) of the nodes that each token visits.

    values_of takes the rows of one level, int32 [N, T], and returns what decides there: logits, or
    integer sums. A value above 0 goes to child 2j + 2, else (0 and -0 too) to 2j + 1. Raises
    ValueError where a value is not finite: then the walk means nothing.
    """
    root_T = np.arange(trees, dtype=np.int64) * (2 ** (depth + 1) - 1)
    node_NT = np.zeros((tokens, trees), np.int64)
    values, rows = [], []
    for _ in range(depth + 1):
        rows.append((root_T + node_NT).astype(np.int32))
        values.append(values_of(rows[-1]))
        node_NT = 2 * node_NT + 1 + (values[-1] > 0)
    values_NTL = np.stack(values, axis=-1)
    if not np.isfinite(values_NTL).all():
        token = int(np.argwhere(~np.isfinite(values_NTL))[0, 0])
        raise ValueError(f"the logits of token {token} are not finite (NaN or infinity)")
    return values_NTL, np.stack(rows, axis=-1)


def combine(h_NA: NDArray[Number], rows_NA: Rows, w_VD: NDArray[Any]) -> NDArray[Number]:
    """Return y[n] = sum over visits a of h[n, a] * w[rows[n, a]], added in the order of a.

    In the type of h: float32, or int32 for exact sums of int8 rows.
    """
    y_ND = np.zeros((len(h_NA), w_VD.shape[1]), h_NA.dtype)
    for a in range(h_NA.shape[1]):
        y_ND = y_ND + h_NA[:, a, None] * w_VD[rows_NA[:, a]]
    return y_ND


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
    sums: Float = lanes[..., 0]
    return sums


def gather_dot(x_ND: Float, rows_NA: Rows, w_VD: Float) -> Float:
    """Return dot(x[n], w[rows[n, a]]), float32 [N, A]: logits, and the gradient of `combine` for
    h."""
    return lane_sums(x_ND[:, None] * w_VD[rows_NA])


def gather_exact(
    q_ND: NDArray[np.int8], rows_NA: Rows, w_VD: NDArray[np.int8]
) -> NDArray[np.int32]:
    """Return dot(q[n], w[rows[n, a]]), int32 [N, A], exact (as `ops.exact_product`)."""
    w_NAD = w_VD[rows_NA].astype(np.float64)
    return (w_NAD @ q_ND[:, :, None].astype(np.float64))[..., 0].astype(np.int32)


def segment_sum(h_NA: Float, rows_NA: Rows, a_ND: Float, count: int) -> Float:
    """Return out[v] = sum of h[n, a] * a[n] over all visits of row v, token by token: [count, D].

    The gradient of `combine` for w_out (with a = grad_y) and of a walk for w_in (with a = x).
    """
    out_VD = np.zeros((count, a_ND.shape[1]), np.float32)
    for token, (h_A, rows_A) in enumerate(zip(h_NA, rows_NA, strict=True)):
        for h, row in zip(h_A, rows_A, strict=True):
            out_VD[row] = out_VD[row] + h * a_ND[token]
    return out_VD


@dataclass(frozen=True)
class Trees(ABC):
    """The trees of a layer: w_in and w_out [V, D] as they are stored; forms differ in the scales,
    norms and quantisers around them."""

    trees: int
    depth: int
    activation: str
    w_in_VD: NDArray[Any]
    w_out_VD: NDArray[Any]

    def __call__(self, x_ND: Float) -> tuple[Float, Float, Rows]:
        """Return (y float32 [N, D], logits float32 [N, T, L], rows int32 [N, T, L]).

        Raises ValueError where x, or a logit, is not finite.
        """
        step = max(1, _GATHERED // (self.trees * x_ND.shape[1]))
        groups = [self._run(x_ND[at : at + step]) for at in range(0, len(x_ND), step)]
        y_ND, logits_NTL, rows_NTL = (np.concatenate(part) for part in zip(*groups, strict=True))
        return y_ND, logits_NTL, rows_NTL

    def _run(self, x_ND: Float) -> tuple[Float, Float, Rows]:
        logits_NTL, rows_NTL = self.walk(x_ND)
        rows_NA = rows_NTL.reshape(len(x_ND), -1)
        h_NA = ACTIVATIONS[self.activation](logits_NTL).reshape(rows_NA.shape)
        return self.combine(h_NA, rows_NA), logits_NTL, rows_NTL

    @abstractmethod
    def walk(self, x_ND: Float) -> tuple[Float, Rows]:
        """Return (logits, rows), both [N, T, L]."""

    @abstractmethod
    def combine(self, h_NA: Float, rows_NA: Rows) -> Float:
        """Return y [N, D] of the visited neurons' activations."""


@dataclass(frozen=True)
class FloatTrees(Trees):
    """float32 rows; a bias [V] on the logits."""

    bias_V: Float | None = None

    def walk(self, x_ND: Float) -> tuple[Float, Rows]:
        def logits_of(rows_NT: Rows) -> Float:
            return _biased(gather_dot(x_ND, rows_NT, self.w_in_VD), self.bias_V, rows_NT)

        return walk(logits_of, len(x_ND), self.trees, self.depth)

    def combine(self, h_NA: Float, rows_NA: Rows) -> Float:
        return combine(h_NA, rows_NA, self.w_out_VD)


@dataclass(frozen=True)
class Int8Trees(Trees):
    """int8 rows with float32 scales [V, 2] of input and output weights; a bias [V] on the logits.

    logit = float(q . w) * (scale * step) + bias, the sum an exact integer.
    """

    scales_V2: Float
    bias_V: Float | None = None

    def walk(self, x_ND: Float) -> tuple[Float, Rows]:
        q_ND, step_N1 = quantise_activation(x_ND)

        def logits_of(rows_NT: Rows) -> Float:
            acc_NT = gather_exact(q_ND, rows_NT, self.w_in_VD)
            logits_NT = acc_NT.astype(np.float32) * (self.scales_V2[rows_NT, 0] * step_N1)
            return _biased(logits_NT, self.bias_V, rows_NT)

        return walk(logits_of, len(x_ND), self.trees, self.depth)

    def combine(self, h_NA: Float, rows_NA: Rows) -> Float:
        c_NA: Float = h_NA * self.scales_V2[rows_NA, 1]
        return combine(c_NA, rows_NA, self.w_out_VD)


@dataclass(frozen=True)
class TernaryTrees(Trees):
    """int8 rows of -1, 0, 1 between two quantisers, the second over the A visited values.

    scales float32 [2] of input and output weights, norm_in [D], norm_out [V]. Decisions are taken
    on the integers.
    """

    scales: Float
    norm_in_D: Float
    norm_out_V: Float
    eps: float

    def quantised_input(self, x_ND: Float) -> tuple[NDArray[np.int8], Float]:
        """Return (q int8 [N, D], step float32 [N, 1]) of the normalised input."""
        return quantise_activation(rms_norm(x_ND, self.norm_in_D, self.eps))

    def visits(self, q_ND: NDArray[np.int8]) -> tuple[NDArray[np.int32], Rows]:
        """Return (accumulators, rows), both int32 [N, T, L]."""
        return walk(
            lambda rows_NT: gather_exact(q_ND, rows_NT, self.w_in_VD),
            *(len(q_ND), self.trees, self.depth),
        )

    def walk(self, x_ND: Float) -> tuple[Float, Rows]:
        q_ND, step_N1 = self.quantised_input(x_ND)
        acc_NTL, rows_NTL = self.visits(q_ND)
        return acc_NTL.astype(np.float32) * (self.scales[0] * step_N1[..., None]), rows_NTL

    def combine(self, h_NA: Float, rows_NA: Rows) -> Float:
        q_NA, step_N1 = quantise_activation(rms_norm(h_NA, self.norm_out_V[rows_NA], self.eps))
        acc_ND = combine(q_NA.astype(np.int32), rows_NA, self.w_out_VD)
        y_ND: Float = acc_ND.astype(np.float32) * (self.scales[1] * step_N1)
        return y_ND


def _biased(logits_NT: Float, bias_V: Float | None, rows_NT: Rows) -> Float:
    return logits_NT if bias_V is None else logits_NT + bias_V[rows_NT]
