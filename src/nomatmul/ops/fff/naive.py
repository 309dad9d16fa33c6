"""The conditional walk and sum in plain PyTorch, for any device: only visited rows are read.

Shape suffixes: N tokens, K inputs, D outputs, T trees, L levels, V rows of all trees, A = T * L.

Rows are gathered a level and a slice of tokens at a time, so nothing of N x V is ever made, nor of
N x T x K. 16 and 32 bit floats are computed in float32, float64 stays float64. The backward
functions take what the forward ones return; autograd is joined to them in the package. Same names
and arguments as `triton` and `native`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nomatmul.ops.activations import activate
from nomatmul.ops.bitlinear.steps import wide

_SLICE = 1 << 22
"""Elements gathered at once: 16 MiB of float32."""


def roots(trees: int, depth: int, device: torch.device) -> Tensor:
    """Row of every tree's root, int64 [T]."""
    return torch.arange(trees, device=device) * ((2 << depth) - 1)


def child_rows(rows_NT: Tensor, roots_T: Tensor, right_NT: Tensor) -> Tensor:
    """Row of the child of each node: 2j + 1 on the left, 2j + 2 on the right, j within the tree."""
    return 2 * rows_NT - roots_T + 1 + right_NT.to(rows_NT.dtype)


def _slices(tokens: int, elements: int) -> list[slice]:
    step = max(1, _SLICE // max(1, elements))
    return [slice(start, start + step) for start in range(0, tokens, step)]


def _dots(x_ND: Tensor, rows_NT: Tensor, table_VD: Tensor) -> Tensor:
    """x[n] . table[rows[n, t]], [N, T]."""
    parts = [
        torch.bmm(wide(table_VD[rows_NT[part]]), x_ND[part].unsqueeze(-1)).squeeze(-1)
        for part in _slices(len(x_ND), rows_NT.shape[1] * x_ND.shape[1])
    ]
    return torch.cat(parts) if parts else x_ND.new_zeros(rows_NT.shape)


def _weighted_rows(weights_NA: Tensor, rows_NA: Tensor, table_VD: Tensor) -> Tensor:
    """sum over a of weights[n, a] * table[rows[n, a]], [N, D]."""
    table = wide(table_VD)
    weights = weights_NA.to(table.dtype)
    return F.embedding_bag(rows_NA, table, per_sample_weights=weights, mode="sum")


def _outer_sums(weights_NA: Tensor, rows_NA: Tensor, x_ND: Tensor, like_VD: Tensor) -> Tensor:
    """[V, D]: to row rows[n, a] goes weights[n, a] * x[n], summed over n and a."""
    total_VD = x_ND.new_zeros(like_VD.shape)
    for part in _slices(len(x_ND), rows_NA.shape[1] * x_ND.shape[1]):
        products = weights_NA[part].unsqueeze(-1) * x_ND[part].unsqueeze(1)
        total_VD.index_add_(0, rows_NA[part].flatten(), products.flatten(0, 1))
    return total_VD.to(like_VD.dtype)


def walk(
    x_NK: Tensor, w_in_VK: Tensor, bias_V: Tensor | None, trees: int, depth: int
) -> tuple[Tensor, Tensor]:
    """The logits of the nodes that each token visits, and their rows.

    x: float [N, K]; w_in: float [V, K], V = trees * (2^(depth+1) - 1); bias: [V] or None.
    Returns (logits [N, T, L] float32 or float64, rows int32 [N, T, L]), L = depth + 1. Source: the
    layer of arXiv 2311.10770; right where logit > 0.
    """
    x = wide(x_NK)
    first_T = roots(trees, depth, x.device)
    rows_NT = first_T.expand(len(x), trees)
    logits: list[Tensor] = []
    rows: list[Tensor] = []
    for level in range(depth + 1):
        if level:
            rows_NT = child_rows(rows_NT, first_T, logits[-1] > 0)
        z_NT = _dots(x, rows_NT, w_in_VK)
        if bias_V is not None:
            z_NT = z_NT + wide(bias_V)[rows_NT]
        logits.append(z_NT)
        rows.append(rows_NT)
    return torch.stack(logits, -1), torch.stack(rows, -1).to(torch.int32)


def walk_backward(
    dlogits_NTL: Tensor, nodes_NTL: Tensor, x_NK: Tensor, w_in_VK: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [N, K], dw_in [V, K], dbias [V], empty without bias), in the types of x and w_in."""
    rows_NA = nodes_NTL.flatten(1).long()
    d_NA = dlogits_NTL.flatten(1)
    dx_NK = _weighted_rows(d_NA, rows_NA, w_in_VK)
    dw_VK = _outer_sums(d_NA, rows_NA, wide(x_NK), w_in_VK)
    dbias = d_NA.new_zeros(len(w_in_VK) if with_bias else 0)
    if with_bias:
        dbias.index_add_(0, rows_NA.flatten(), d_NA.flatten())
    return dx_NK.to(x_NK.dtype), dw_VK, dbias


def project(x_NK: Tensor, nodes_NTL: Tensor, w_VK: Tensor) -> Tensor:
    """x[n] . w[nodes[n, t, l]], [N, T, L] float32, or float64 with x."""
    x = wide(x_NK)
    parts = [_dots(x, rows_NT.long(), w_VK) for rows_NT in nodes_NTL.unbind(-1)]
    return torch.stack(parts, -1)


def combine(h_NTL: Tensor, nodes_NTL: Tensor, w_out_VD: Tensor) -> Tensor:
    """y [N, D] = sum over visited nodes of h * w_out[row]; float32, or float64 with w_out."""
    return _weighted_rows(h_NTL.flatten(1), nodes_NTL.flatten(1).long(), w_out_VD)


def combine_backward(
    dy_ND: Tensor, h_NTL: Tensor, nodes_NTL: Tensor, w_out_VD: Tensor
) -> tuple[Tensor, Tensor]:
    """(dh [N, T, L] in h's type, dw_out [V, D] in w_out's type)."""
    dy = wide(dy_ND)
    dh = project(dy, nodes_NTL, w_out_VD)
    h_NA, rows_NA = h_NTL.flatten(1).to(dy.dtype), nodes_NTL.flatten(1).long()
    return dh.to(h_NTL.dtype), _outer_sums(h_NA, rows_NA, dy, w_out_VD)


def fff(
    x_NK: Tensor,
    w_in_VK: Tensor,
    w_out_VD: Tensor,
    bias_V: Tensor | None,
    trees: int,
    depth: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole layer: (y [N, D], logits, rows)."""
    logits_NTL, rows_NTL = walk(x_NK, w_in_VK, bias_V, trees, depth)
    return combine(activate(logits_NTL, activation), rows_NTL, w_out_VD), logits_NTL, rows_NTL
