"""Triton, FFF: products of a tile of tokens with the nodes of one stage of a tree, kept on chip.

Two uses of one product: the walk of a stage (all logits of a tile, the path read off them), and
the gradient of what visited nodes added (picked along a known path). The only memory written is
that of visited nodes; the arithmetic is that of one stage, at most 127 nodes a token.

A shallow tree (at most seven levels) is one stage, so here it costs what its dense tile costs.

Shape suffixes: N tokens, T trees, L levels, V nodes of all trees, K inputs, D outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nomatmul.ops.bitlinear.rows import on_device
from nomatmul.ops.fff.triton_parts import (
    DEEPEST,
    Trees,
    activate,
    column_rows,
    major_of,
    tile_rows,
    tile_tokens,
)
from nomatmul.ops.fff.triton_sort import Order, sort_tokens


@triton.jit
def _product(
    x_ptr, w_ptr, n, row, features, EVEN: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """float32 [BT, C] = x[n] . w[row]."""
    k = tl.arange(0, BK)
    x_at = x_ptr + n.to(tl.int64)[:, None] * features + k[None, :]
    w_at = w_ptr + row.to(tl.int64)[None, :] * features + k[:, None]
    acc = tl.zeros((BT, C), dtype=tl.float32)
    for k0 in range(0, features, BK):
        if EVEN:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            x = tl.load(x_at, mask=(k0 + k < features)[None, :], other=0.0)
            w = tl.load(w_at, mask=(k0 + k < features)[:, None], other=0.0)
        acc = tl.dot(x.to(w_ptr.dtype.element_ty), w, acc, input_precision="ieee")
        x_at += BK
        w_at += BK
    return acc


@triton.jit(do_not_specialize=["tokens", "tiles"])
def _walk_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    logits_ptr,
    nodes_ptr,
    h_ptr,
    next_ptr,
    perm_ptr,
    table_ptr,
    tokens,
    features,
    trees,
    tiles,
    LEVELS: tl.constexpr,
    FIRST: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    SORTED: tl.constexpr,
    BIAS: tl.constexpr,
    ACT: tl.constexpr,
    NEXT: tl.constexpr,
    EVEN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    tree = tl.program_id(0) * P
    n, live, group = tile_tokens(
        perm_ptr, table_ptr, tl.program_id(1), tree, tiles, tokens, SORTED, BT
    )
    if group < 0:
        return
    root = group + (1 << FIRST)
    row, valid = column_rows(tree, trees, root, LEVELS, G, P)
    acc = _product(x_ptr, w_ptr, n, row, features, EVEN, BT, P << G, BK)
    if BIAS:
        acc += tl.load(bias_ptr + row, mask=valid, other=0.0).to(tl.float32)[None, :]
    acc = tl.reshape(acc, (BT * P, 1 << G))
    n_R, tree_R, live_R = tile_rows(n, live, tree, trees, P, BT)
    j = tl.arange(0, 1 << G)
    at = (n_R.to(tl.int64) * trees + tree_R) * LEVELS + FIRST
    node = n_R * 0  # local number
    for level in tl.static_range(G):
        logit = tl.sum(tl.where(j[None, :] == node[:, None], acc, 0.0), axis=1)
        heap = (root << level) + node + 1 - (1 << level)
        tl.store(logits_ptr + at + level, logit, mask=live_R)
        tl.store(nodes_ptr + at + level, tree_R * ((1 << LEVELS) - 1) + heap - 1, mask=live_R)
        if ACT > 0:
            tl.store(h_ptr + at + level, activate(logit, ACT), mask=live_R)
        node = 2 * node + 1 + (logit > 0.0).to(tl.int32)
    if NEXT:
        heap = (root << G) + node + 1 - (1 << G)
        to = tree_R.to(tl.int64) * tokens + n_R
        tl.store(next_ptr + to, tree_R * ((1 << LEVELS) - 1) + heap - 1, mask=live_R)


@triton.jit(do_not_specialize=["tokens", "tiles"])
def _pick_kernel(
    x_ptr,
    w_ptr,
    nodes_ptr,
    out_ptr,
    perm_ptr,
    table_ptr,
    tokens,
    features,
    trees,
    tiles,
    LEVELS: tl.constexpr,
    LAST: tl.constexpr,
    FIRST: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    SORTED: tl.constexpr,
    EVEN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    tree = tl.program_id(0) * P
    n, live, group = tile_tokens(
        perm_ptr, table_ptr, tl.program_id(1), tree, tiles, tokens, SORTED, BT
    )
    if group < 0:
        return
    root = (group + (1 << LAST)) >> (LAST - FIRST)
    row, _valid = column_rows(tree, trees, root, LEVELS, G, P)
    acc = _product(x_ptr, w_ptr, n, row, features, EVEN, BT, P << G, BK)
    acc = tl.reshape(acc, (BT * P, 1 << G))
    n_R, tree_R, live_R = tile_rows(n, live, tree, trees, P, BT)
    j = tl.arange(0, 1 << G)
    at = (n_R.to(tl.int64) * trees + tree_R) * LEVELS
    last = tl.load(nodes_ptr + at + (LEVELS - 1), mask=live_R, other=0)
    last = last - tree_R * ((1 << LEVELS) - 1) + 1
    for level in tl.static_range(G):
        node = (last >> (LEVELS - 1 - FIRST - level)) - (root << level) + (1 << level) - 1
        value = tl.sum(tl.where(j[None, :] == node[:, None], acc, 0.0), axis=1)
        tl.store(out_ptr + at + FIRST + level, value, mask=live_R)


def tile_size(like: Tensor, tokens: int, groups: int) -> int:
    """Tokens of a tile: as many as a group has on average, 16 to 64 (32 for float32)."""
    if major_of(like) < 8:  # the interpreter, and chips whose matrix units Triton does not use
        return 16
    most = 64 if like.element_size() == 2 else 32
    return max(16, min(most, triton.next_power_of_2(max(1, tokens // groups))))


def launch_options(like: Tensor, wide: bool = False) -> dict[str, int]:
    """Block of the inner dimension, warps and stages of the products; wide: tiles of 128 x 128."""
    major = major_of(like)
    if wide:
        return {"BK": 64, "num_warps": 8, "num_stages": 3}
    if like.element_size() == 4 or major < 8:
        return {"BK": 32, "num_warps": 4, "num_stages": 2}
    return {"BK": 64, "num_warps": 4, "num_stages": 4 if major == 9 else 3}


class Grid:
    """What the launches over tiles of tokens have in common."""

    def __init__(
        self,
        like: Tensor,
        tokens: int,
        shape: Trees,
        order: Order | None,
        tile: int | None = None,
    ) -> None:
        self.tile = order.tile if order else tile or tile_size(like, tokens, 1)
        self.tiles = order.table.shape[1] if order else triton.cdiv(tokens, self.tile)
        self.pointers = (order.perm_TN, order.table) if order else (like, like)
        self.sizes = (tokens, like.shape[1], shape.trees, self.tiles)
        self.grid = (triton.cdiv(shape.trees, shape.together), self.tiles)


def walk(
    x_NK: Tensor, w_VK: Tensor, bias_V: Tensor | None, shape: Trees, act: int
) -> tuple[Tensor, Tensor, Tensor, Order | None]:
    """(logits float32 [N, T, L], rows int32, activations float32 or logits, order of tokens).

    act: a number of ACTIVATIONS; 0: no activations are made. order: by the last stage, None if
    there is only one. x and w: contiguous, one type; N >= 1.
    """
    tokens = len(x_NK)
    size = (tokens, shape.trees, shape.levels)
    logits = torch.empty(size, dtype=torch.float32, device=x_NK.device)
    nodes = torch.empty(size, dtype=torch.int32, device=x_NK.device)
    h = torch.empty_like(logits) if act else logits
    order = None
    # whole trees of 127 nodes and many tokens: 142 us in place of 163 (16x6, 16384 tokens, H200)
    wide = shape.stages == ((0, DEEPEST),) and tokens >= 4096
    wide = wide and w_VK.element_size() == 2 and major_of(w_VK) == 9
    options = launch_options(w_VK, wide)
    with on_device(x_NK):
        after = nodes
        for first, levels in shape.stages:
            if first:
                order = sort_tokens(after.t(), shape, first, tile_size(w_VK, tokens, 1 << first))
            more = first + levels < shape.levels
            after = nodes.new_empty(shape.trees, tokens) if more else nodes
            plan = Grid(w_VK, tokens, shape, order, 128 if wide else None)
            _walk_kernel[plan.grid](
                x_NK,
                w_VK,
                x_NK if bias_V is None else bias_V,
                logits,
                nodes,
                h,
                after,
                *plan.pointers,
                *plan.sizes,
                LEVELS=shape.levels,
                FIRST=first,
                G=levels,
                P=shape.together,
                SORTED=order is not None,
                BIAS=bias_V is not None,
                ACT=act,
                NEXT=more,
                EVEN=x_NK.shape[1] % options["BK"] == 0,
                BT=plan.tile,
                **options,
            )
    return logits, nodes, h, order


def order_of(nodes_NTL: Tensor, shape: Trees, like: Tensor) -> Order | None:
    """The order of tokens that `walk` ended with, from the rows it found."""
    if len(shape.stages) == 1:
        return None
    first = shape.stages[-1][0]
    tile = tile_size(like, len(nodes_NTL), 1 << first)
    with on_device(like):
        return sort_tokens(nodes_NTL[:, :, first], shape, first, tile)


def pick(
    x_ND: Tensor, nodes_NTL: Tensor, w_VD: Tensor, shape: Trees, order: Order | None
) -> Tensor:
    """x[n] . w[nodes[n, t, l]] as float32 [N, T, L]: gradients of what visited nodes added."""
    out = torch.empty(nodes_NTL.shape, dtype=torch.float32, device=x_ND.device)
    options = launch_options(w_VD)
    with on_device(x_ND):
        for stage, (first, levels) in enumerate(shape.stages):
            # a middle stage takes the last one's groups, finer than it needs: its own cost a sort
            sorted_by = order if stage else None
            plan = Grid(w_VD, len(x_ND), shape, sorted_by)
            _pick_kernel[plan.grid](
                x_ND,
                w_VD,
                nodes_NTL,
                out,
                *plan.pointers,
                *plan.sizes,
                LEVELS=shape.levels,
                LAST=shape.stages[-1][0] if stage else 0,
                FIRST=first,
                G=levels,
                P=shape.together,
                SORTED=sorted_by is not None,
                EVEN=x_ND.shape[1] % options["BK"] == 0,
                BT=plan.tile,
                **options,
            )
    return out
