"""Triton: the conditional walk and sum on a GPU, forward and backward; nothing of N x V in memory.

Few tokens: one program walks one tree of one token (`triton_gather`). Many: tokens are grouped by
path, and each group's part of a tree is a tile on the matrix units (`triton_tiles`), weight
gradients too (`triton_weights`): no atomics, the same bits in every run.

Shallow trees (at most seven levels) are one tile each. From a few tokens on, the dense tile of a
whole shallow tree beats gathering its visited rows: rows of a token are read from cache at about
two operations a byte, a tile reads them once for 16 to 64 tokens and multiplies on matrix units
(docs/log has the measurement). Deep trees never multiply a node that none of a tile's tokens
could visit from the stage's root.

Operands: contiguous or not, 16 or 32 bit floats; products of 16 bit operands are summed in float32,
float32 ones are multiplied in float32 (no tf32), so whole numbers give exact logits and paths.
Where the gradient that comes in has another type than the weights, it takes the weights' type.

Names and arguments as `naive`. Shape suffixes: N tokens, K inputs, D outputs, T trees, L levels,
V rows of all trees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nomatmul.ops.fff import triton_gather as gather
from nomatmul.ops.fff import triton_tiles as tiles
from nomatmul.ops.fff.triton_combine import combine as combine_tiles
from nomatmul.ops.fff.triton_parts import ACTIVATIONS, Trees
from nomatmul.ops.fff.triton_weights import weight_gradient

DEEP_FROM = 3072
"""Tokens from which grouping by path beats one program a token, deep trees (H200)."""
SHALLOW_FROM = 3500
"""Rows to visit, of all tokens, from which tiles beat gathering them, shallow trees (H200)."""


def _shape_of(nodes_NTL: Tensor) -> Trees:
    return Trees(nodes_NTL.shape[1], nodes_NTL.shape[2] - 1)


def _by_tiles(tokens: int, shape: Trees) -> bool:
    if len(shape.stages) > 1:
        return tokens >= DEEP_FROM
    if shape.trees == 1:  # a small tree: its rows stay in the nearest cache
        return tokens >= DEEP_FROM
    return tokens * shape.trees * shape.levels >= SHALLOW_FROM


def _operands(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Contiguous, and of one type: the widest."""
    dtype = x.dtype
    for w in weights:
        dtype = torch.promote_types(dtype, w.dtype)
    return tuple(t.to(dtype).contiguous() for t in (x, *weights))


def walk(
    x_NK: Tensor, w_in_VK: Tensor, bias_V: Tensor | None, trees: int, depth: int
) -> tuple[Tensor, Tensor]:
    """As `naive.walk`: (logits float32 [N, T, L], rows int32 [N, T, L])."""
    shape = Trees(trees, depth)
    x, w = _operands(x_NK, w_in_VK)
    if not len(x):
        return _nothing(x, shape)
    bias = None if bias_V is None else bias_V.contiguous()
    if _by_tiles(len(x), shape):
        return tiles.walk(x, w, bias, shape, 0)[:2]
    return gather.walk(x, w, bias, shape, 0)[:2]


def _nothing(x: Tensor, shape: Trees) -> tuple[Tensor, Tensor]:
    size = (0, shape.trees, shape.levels)
    return x.new_empty(size, dtype=torch.float32), x.new_empty(size, dtype=torch.int32)


def walk_backward(
    dlogits_NTL: Tensor, nodes_NTL: Tensor, x_NK: Tensor, w_in_VK: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `naive.walk_backward`: (dx, dw_in, dbias float32)."""
    shape = _shape_of(nodes_NTL)
    d, nodes = dlogits_NTL.float().contiguous(), nodes_NTL.contiguous()
    x, w = x_NK.contiguous(), w_in_VK.contiguous()
    if not len(x):
        dbias = d.new_zeros(len(w) if with_bias else 0)
        return torch.zeros_like(x), torch.zeros_like(w), dbias
    order = tiles.order_of(nodes, shape, w)
    dw, dbias = weight_gradient(d, nodes, x, w, shape, order, with_bias)
    return combine_tiles(d, nodes, w, shape, order, x.dtype), dw, dbias


def combine(h_NTL: Tensor, nodes_NTL: Tensor, w_out_VD: Tensor) -> Tensor:
    """As `naive.combine`: y float32 [N, D]; 16 bit rows want h rounded to their type.

    h that holds whole numbers below 2^8 gives exact sums with rows of whole numbers, too.
    """
    shape = _shape_of(nodes_NTL)
    h, nodes, w = h_NTL.float().contiguous(), nodes_NTL.contiguous(), w_out_VD.contiguous()
    if not len(h):
        return w.new_zeros((0, w.shape[1]), dtype=torch.float32)
    if _by_tiles(len(h), shape):
        return combine_tiles(h, nodes, w, shape, tiles.order_of(nodes, shape, w), torch.float32)
    return gather.combine(h, nodes, w, torch.float32)


def combine_backward(
    dy_ND: Tensor, h_NTL: Tensor, nodes_NTL: Tensor, w_out_VD: Tensor
) -> tuple[Tensor, Tensor]:
    """As `naive.combine_backward`: (dh in h's type, dw_out)."""
    shape = _shape_of(nodes_NTL)
    dy, nodes, w = dy_ND.contiguous(), nodes_NTL.contiguous(), w_out_VD.contiguous()
    if not len(dy):
        return torch.zeros_like(h_NTL), torch.zeros_like(w)
    order = tiles.order_of(nodes, shape, w)
    dh = tiles.pick(dy, nodes, w, shape, order)
    h = h_NTL.float().contiguous()
    dw, _ = weight_gradient(h, nodes, dy, w, shape, order)
    return dh.to(h_NTL.dtype), dw


def fff(
    x_NK: Tensor,
    w_in_VK: Tensor,
    w_out_VD: Tensor,
    bias_V: Tensor | None,
    trees: int,
    depth: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole layer forward: (y [N, D] in the operands' type, logits, rows)."""
    shape, act = Trees(trees, depth), ACTIVATIONS[activation]
    x, w_in, w_out = _operands(x_NK, w_in_VK, w_out_VD)
    if not len(x):
        return x.new_zeros(0, w_out.shape[1]), *_nothing(x, shape)
    bias = None if bias_V is None else bias_V.contiguous()
    if _by_tiles(len(x), shape):
        logits, nodes, h, order = tiles.walk(x, w_in, bias, shape, act)
        return combine_tiles(h, nodes, w_out, shape, order, x.dtype), logits, nodes
    logits, nodes, h, y = gather.walk(x, w_in, bias, shape, act, w_out)
    if y is None:
        y = gather.combine(h, nodes, w_out, x.dtype)
    return y, logits, nodes
