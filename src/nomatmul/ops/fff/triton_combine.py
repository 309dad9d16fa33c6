"""Triton, FFF: sums of visited rows: a tile that is zero beside the paths, times a stage's rows.

Shape suffixes: N tokens, T trees, L levels, V nodes of all trees, D features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nomatmul.ops.bitlinear.rows import on_device
from nomatmul.ops.fff.triton_parts import (
    Trees,
    column_rows,
    device_of,
    major_of,
    path_tile,
    tile_tokens,
)
from nomatmul.ops.fff.triton_sort import Order
from nomatmul.ops.fff.triton_tiles import Grid


@triton.jit
def _rows_of(w_ptr, row, valid, d, features, EVEN: tl.constexpr):
    at = w_ptr + row.to(tl.int64)[:, None] * features + d[None, :]
    if EVEN:
        return tl.load(at, mask=valid[:, None], other=0.0)
    return tl.load(at, mask=valid[:, None] & (d < features)[None, :], other=0.0)


@triton.jit(do_not_specialize=["tokens", "each"])
def _combine_shallow_kernel(
    h_ptr,
    nodes_ptr,
    w_ptr,
    y_ptr,
    tokens,
    features,
    trees,
    each,
    G: tl.constexpr,
    P: tl.constexpr,
    A: tl.constexpr,
    EVEN: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    part = tl.program_id(2)
    n, live, _group = tile_tokens(h_ptr, nodes_ptr, tl.program_id(1), 0, 0, tokens, False, BT)
    acc = tl.zeros((BT, BD), dtype=tl.float32)
    for tree in range(part * each, tl.minimum(part * each + each, trees), P):
        h = path_tile(h_ptr, nodes_ptr, w_ptr, n, live, tree, trees, 1, G, 0, G, P, A)
        row, valid = column_rows(tree, trees, 1, G, G, P)
        acc = tl.dot(h, _rows_of(w_ptr, row, valid, d, features, EVEN), acc, input_precision="ieee")
    at = y_ptr + (part.to(tl.int64) * tokens + n)[:, None] * features + d[None, :]
    tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=live[:, None] & (d < features)[None, :])


@triton.jit
def _stage_tile(
    h_ptr, nodes_ptr, w_ptr, n, live, tree, trees, group, LEVELS: tl.constexpr,
    LAST: tl.constexpr, FIRST: tl.constexpr, G: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    # the stage's root is the ancestor of the last stage's root, by which the tokens are sorted
    root = (group + (1 << LAST)) >> (LAST - FIRST)
    h = path_tile(h_ptr, nodes_ptr, w_ptr, n, live, tree, trees, root, LEVELS, FIRST, G, 1, A)
    row, valid = column_rows(tree, trees, root, LEVELS, G, 1)
    return h, row, valid


@triton.jit(do_not_specialize=["tokens", "tiles", "tree"])
def _combine_deep_kernel(
    h_ptr,
    nodes_ptr,
    w_ptr,
    y_ptr,
    perm_ptr,
    table_ptr,
    tokens,
    features,
    trees,
    tiles,
    tree,
    each,
    LEVELS: tl.constexpr,
    STAGES: tl.constexpr,
    FIRSTS: tl.constexpr,
    SIZES: tl.constexpr,
    A: tl.constexpr,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    n, live, group = tile_tokens(
        perm_ptr, table_ptr, tl.program_id(1), tree, tiles, tokens, True, BT
    )
    if group < 0:
        return
    LAST: tl.constexpr = (FIRSTS >> (8 * (STAGES - 1))) & 255
    hs = ()
    rows = ()
    valids = ()
    for s in tl.static_range(STAGES):
        h, row, valid = _stage_tile(
            h_ptr, nodes_ptr, w_ptr, n, live, tree, trees, group, LEVELS, LAST,
            (FIRSTS >> (8 * s)) & 255, (SIZES >> (8 * s)) & 255, A,
        )  # fmt: skip
        # triton knows tuples' sums only, mypy none of its values
        hs = hs + (h,)  # type: ignore[assignment]  # noqa: RUF005
        rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005
        valids = valids + (valid,)  # type: ignore[assignment]  # noqa: RUF005
    begin = tl.program_id(0) * each
    for d0 in range(begin, tl.minimum(begin + each, features), BD):
        d = d0 + tl.arange(0, BD)
        acc = tl.zeros((BT, BD), dtype=tl.float32)
        for s in tl.static_range(STAGES):
            w = _rows_of(w_ptr, rows[s], valids[s], d, features, EVEN)
            acc = tl.dot(hs[s], w, acc, input_precision="ieee")
        at = y_ptr + n.to(tl.int64)[:, None] * features + d[None, :]
        mask = live[:, None] & (d < features)[None, :]
        if ADD:
            acc += tl.load(at, mask=mask, other=0.0)
        tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["parts"])
def _sum_parts_kernel(parts_ptr, y_ptr, size, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS)
    mask = (part < parts)[:, None] & (at < size)[None, :]
    rows = tl.load(parts_ptr + part[:, None] * size + at[None, :], mask=mask, other=0.0)
    tl.store(y_ptr + at, tl.sum(rows, axis=0).to(y_ptr.dtype.element_ty), mask=at < size)


_MOST_PARTS = 16
_PROGRAMS = 3
"""Programs a multiprocessor that few tokens are spread over."""


def _shallow_launch(like: Tensor, tokens: int, shape: Trees) -> dict[str, int]:
    if major_of(like) < 8:
        return {"BD": 32, "num_warps": 4, "num_stages": 1}
    if like.element_size() == 2 and shape.together == 1 and tokens >= 4096:
        return {"BD": 256, "num_warps": 8, "num_stages": 2}
    return {"BD": 128, "num_warps": 4, "num_stages": 2}


def _deep_launch(like: Tensor) -> dict[str, int]:
    major = major_of(like)
    if major < 8:
        return {"BD": 32, "num_warps": 4, "num_stages": 1, "SHARES": 1}
    stages = 3 if major == 9 and like.element_size() == 2 else 2
    return {"BD": 64, "num_warps": 4, "num_stages": stages, "SHARES": 3}


def combine(
    h_NTL: Tensor,
    nodes_NTL: Tensor,
    w_VD: Tensor,
    shape: Trees,
    order: Order | None,
    dtype: torch.dtype,
) -> Tensor:
    """Sum over visited nodes of h * w[row], [N, D] in `dtype`; sums in float32.

    h: float32, contiguous; order: as `order_of`. 16 bit rows want h rounded to their type.
    """
    with on_device(w_VD):
        if order is None:
            return _combine_shallow(h_NTL, nodes_NTL, w_VD, shape, dtype)
        return _combine_deep(h_NTL, nodes_NTL, w_VD, shape, order, dtype)


def _block(options: dict[str, int], features: int) -> int:
    return min(options["BD"], max(16, triton.next_power_of_2(features)))


def _combine_shallow(
    h_NTL: Tensor, nodes_NTL: Tensor, w_VD: Tensor, shape: Trees, dtype: torch.dtype
) -> Tensor:
    """Every tree is one tile; few tokens: trees are shared out, the parts added in order."""
    tokens, features = len(h_NTL), w_VD.shape[1]
    options = _shallow_launch(w_VD, tokens, shape)
    options["BD"] = _block(options, features)
    plan = Grid(w_VD, tokens, shape, None)
    grid = (triton.cdiv(features, options["BD"]), plan.tiles)
    tree_tiles = triton.cdiv(shape.trees, shape.together)
    programs = _PROGRAMS * device_of(w_VD.get_device())[1] if w_VD.is_cuda else 8
    room = min(programs // (grid[0] * grid[1]), tree_tiles, _MOST_PARTS)
    each = triton.cdiv(tree_tiles, max(1, room)) * shape.together
    parts = triton.cdiv(shape.trees, each)
    y = torch.empty(tokens, features, dtype=dtype, device=w_VD.device)
    out = y if parts == 1 else y.new_empty(parts, tokens, features, dtype=torch.float32)
    _combine_shallow_kernel[(*grid, parts)](
        h_NTL,
        nodes_NTL,
        w_VD,
        out,
        tokens,
        features,
        shape.trees,
        each,
        G=shape.levels,
        P=shape.together,
        A=shape.row,
        EVEN=features % options["BD"] == 0,
        BT=plan.tile,
        **options,
    )
    if parts > 1:
        size, block = y.numel(), 256
        _sum_parts_kernel[(triton.cdiv(size, block),)](
            out, y, size, parts, PARTS=_MOST_PARTS, BLOCK=block, num_warps=4
        )
    return y


def _combine_deep(
    h_NTL: Tensor, nodes_NTL: Tensor, w_VD: Tensor, shape: Trees, order: Order, dtype: torch.dtype
) -> Tensor:
    """Tokens of one group share every stage's nodes; trees are added one after the other."""
    tokens, features = len(h_NTL), w_VD.shape[1]
    options = _deep_launch(w_VD)
    shares = options.pop("SHARES")
    block = options["BD"] = _block(options, features)
    each = triton.cdiv(triton.cdiv(features, block), shares) * block
    plan = Grid(w_VD, tokens, shape, order)
    wide = torch.float32 if shape.trees > 1 else dtype
    y = torch.empty(tokens, features, dtype=wide, device=w_VD.device)
    for tree in range(shape.trees):
        _combine_deep_kernel[(triton.cdiv(features, each), plan.tiles)](
            h_NTL,
            nodes_NTL,
            w_VD,
            y,
            *plan.pointers,
            *plan.sizes,
            tree,
            each,
            LEVELS=shape.levels,
            STAGES=len(shape.stages),
            FIRSTS=sum(first << (8 * s) for s, (first, _) in enumerate(shape.stages)),
            SIZES=sum(size << (8 * s) for s, (_, size) in enumerate(shape.stages)),
            A=shape.row,
            ADD=tree > 0,
            EVEN=features % block == 0,
            BT=plan.tile,
            **options,
        )
    return y.to(dtype)
