"""Triton, FFF: tokens sorted by the node at which they enter the last stage of a tree.

A counting sort in two launches, stable and without atomics, so that every sum over a group of
tokens has one order. More than 128 groups (trees of more than 14 levels) use PyTorch's stable sort.

Shape suffixes: N tokens, T trees, G groups.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from nomatmul.ops.fff.triton_parts import Trees

_BLOCK = 128
_BLOCKS = 128
_MOST_KEYS = 128


@dataclasses.dataclass(frozen=True)
class Order:
    """Sorted tokens. All int32.

    perm_TN: tokens, group after group, in each group in their old order.
    starts_TG: [T, groups + 1], where each group begins in perm.
    table: [T, tiles, 3], (group, first, end) of tiles of `tile` tokens inside one group; group -1:
    nothing.
    """

    perm_TN: Tensor
    starts_TG: Tensor
    table: Tensor
    tile: int


@triton.jit
def _one_hot(
    rows_ptr,
    first,
    tokens,
    stride_n,
    stride_t,
    tree,
    offset,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = first + tl.arange(0, BLOCK)
    live = n < tokens
    at = n.to(tl.int64) * stride_n + tree.to(tl.int64) * stride_t
    key = tl.load(rows_ptr + at, mask=live, other=0) - offset
    hot = (key[:, None] == tl.arange(0, KEYS)[None, :]) & live[:, None]
    return n, live, hot.to(tl.int32)


@triton.jit(do_not_specialize=["tokens", "each"])
def _count_kernel(
    rows_ptr,
    counts_ptr,
    tokens,
    each,
    stride_n,
    stride_t,
    per_tree,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    tree = tl.program_id(1)
    offset = tree * per_tree + KEYS - 1
    total = tl.zeros((KEYS,), dtype=tl.int32)
    for first in range(block * each, tl.minimum(block * each + each, tokens), BLOCK):
        _n, _live, hot = _one_hot(
            rows_ptr, first, tokens, stride_n, stride_t, tree, offset, KEYS, BLOCK
        )
        total += tl.sum(hot, axis=0)
    at = (tree * tl.num_programs(0) + block) * KEYS + tl.arange(0, KEYS)
    tl.store(counts_ptr + at, total)


@triton.jit(do_not_specialize=["tokens", "each", "tiles"])
def _scatter_kernel(
    rows_ptr,
    counts_ptr,
    perm_ptr,
    starts_ptr,
    table_ptr,
    tokens,
    each,
    stride_n,
    stride_t,
    per_tree,
    tiles,
    TILE: tl.constexpr,
    SHARE: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    tree = tl.program_id(1)
    offset = tree * per_tree + KEYS - 1
    key = tl.arange(0, KEYS)
    other = tl.arange(0, BLOCKS)
    blocks = tl.num_programs(0)
    at = (tree * blocks + other)[:, None] * KEYS + key[None, :]
    counts = tl.load(counts_ptr + at, mask=(other < blocks)[:, None], other=0)
    total = tl.sum(counts, axis=0)
    starts = tl.cumsum(total, axis=0) - total
    free = starts + tl.sum(tl.where((other < block)[:, None], counts, 0), axis=0)
    for first in range(block * each, tl.minimum(block * each + each, tokens), BLOCK):
        n, live, hot = _one_hot(
            rows_ptr, first, tokens, stride_n, stride_t, tree, offset, KEYS, BLOCK
        )
        place = tl.sum(hot * (tl.cumsum(hot, axis=0) - 1 + free[None, :]), axis=1)
        tl.store(perm_ptr + tree.to(tl.int64) * tokens + place, n, mask=live)
        free += tl.sum(hot, axis=0)
    if block == 0:
        tl.store(starts_ptr + tree * (KEYS + 1) + key, starts)
        tl.store(starts_ptr + tree * (KEYS + 1) + KEYS, tokens)
    # each program writes its share of the table of tiles
    needed = (total + TILE - 1) // TILE
    ends = tl.cumsum(needed, axis=0)
    i = block * SHARE + tl.arange(0, SHARE)
    group = tl.sum((ends[None, :] <= i[:, None]).to(tl.int32), axis=1)
    mine = (group[:, None] == key[None, :]).to(tl.int32)
    start = tl.sum(mine * starts[None, :], axis=1)
    first = start + (i - tl.sum(mine * (ends - needed)[None, :], axis=1)) * TILE
    end = start + tl.sum(mine * total[None, :], axis=1)
    real = group < KEYS
    entry = table_ptr + (tree.to(tl.int64) * tiles + i) * 3
    tl.store(entry, tl.where(real, group, -1), mask=i < tiles)
    tl.store(entry + 1, tl.where(real, first, 0), mask=i < tiles)
    tl.store(entry + 2, tl.where(real, end, 0), mask=i < tiles)


def _counting_sort(rows_NT: Tensor, shape: Trees, tile: int) -> Order:
    tokens, trees, keys = rows_NT.shape[0], shape.trees, shape.keys
    each = triton.cdiv(triton.cdiv(tokens, _BLOCKS), _BLOCK) * _BLOCK
    blocks = triton.cdiv(tokens, each)
    tiles = triton.cdiv(tokens, tile) + min(keys, tokens)

    def integers(*sizes: int) -> Tensor:
        return torch.empty(*sizes, dtype=torch.int32, device=rows_NT.device)

    counts = integers(trees, blocks, keys)
    perm_TN, starts_TG = integers(trees, tokens), integers(trees, keys + 1)
    table = integers(trees, tiles, 3)
    common = (tokens, each, rows_NT.stride(0), rows_NT.stride(1), shape.per_tree)
    grid = (blocks, trees)
    _count_kernel[grid](rows_NT, counts, *common, KEYS=keys, BLOCK=_BLOCK, num_warps=4)
    _scatter_kernel[grid](
        rows_NT,
        counts,
        perm_TN,
        starts_TG,
        table,
        *common,
        tiles,
        TILE=tile,
        SHARE=triton.next_power_of_2(triton.cdiv(tiles, blocks)),
        KEYS=keys,
        BLOCKS=triton.next_power_of_2(blocks),
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return Order(perm_TN, starts_TG, table, tile)


def _library_sort(rows_NT: Tensor, shape: Trees, tile: int, keys: int) -> Order:
    tokens, trees = rows_NT.shape
    device = rows_NT.device
    offset_T = torch.arange(trees, device=device) * shape.per_tree + keys - 1
    key_TN, perm_TN = torch.sort((rows_NT - offset_T).T.contiguous(), dim=1, stable=True)
    bounds = torch.arange(keys + 1, device=device).expand(trees, -1).contiguous()
    starts_TG = torch.searchsorted(key_TN, bounds)
    total = starts_TG[:, 1:] - starts_TG[:, :-1]
    needed = (total + tile - 1) // tile
    ends = needed.cumsum(1)
    tiles = triton.cdiv(tokens, tile) + min(keys, tokens)
    i = torch.arange(tiles, device=device).expand(trees, -1).contiguous()
    group = torch.searchsorted(ends, i, right=True)
    real = group < keys
    safe = group.clamp(max=keys - 1)
    first = starts_TG.gather(1, safe) + (i - (ends - needed).gather(1, safe)) * tile
    end = starts_TG.gather(1, safe + 1)
    zero = torch.zeros_like(i)
    table = torch.stack([group.where(real, zero - 1), first.where(real, zero)], dim=-1)
    table = torch.cat([table, end.where(real, zero).unsqueeze(-1)], dim=-1)
    return Order(perm_TN.int(), starts_TG.int(), table.int().contiguous(), tile)


def sort_tokens(rows_NT: Tensor, shape: Trees, level: int, tile: int) -> Order:
    """Tokens of every tree sorted by the node of `level` they stand at.

    rows_NT: int32 [N, T], row indices of those nodes (any strides); N >= 1.
    """
    keys = 1 << level
    if keys <= _MOST_KEYS and level == shape.stages[-1][0]:
        return _counting_sort(rows_NT, shape, tile)
    return _library_sort(rows_NT, shape, tile, keys)
