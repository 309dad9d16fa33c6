"""Triton, FFF: how trees are cut into stages, and the small functions that all kernels share.

A tree of L levels is walked in stages of at most seven levels, so that the nodes below one node at
which a token enters a stage (at most 127) are one tile. Inside a stage nodes have local numbers
j = 0, 1, 2, ... like a small tree; `root` is the number of the stage's first node in its tree,
counted from one, so that the ancestor of node h (counted from one) s levels up is h >> s.

Shape suffixes: N tokens, T trees, L levels, V nodes of all trees, K inputs, D outputs.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = {"none": 0, "gelu": 1, "silu": 2, "relu": 3}
DEEPEST = 7
"""Levels of one stage at most: 127 nodes, a tile of 128."""
COLUMNS = 128


@dataclasses.dataclass(frozen=True)
class Trees:
    """`trees` trees of `depth` decisions. Raises ValueError if a row index would not fit int32."""

    trees: int
    depth: int

    def __post_init__(self) -> None:
        if self.trees < 1 or self.depth < 0:
            raise ValueError(f"trees={self.trees} must be >= 1 and depth={self.depth} >= 0")
        if self.trees * self.per_tree >= 2**31:
            raise ValueError(
                f"trees={self.trees} of depth={self.depth} have more nodes than int32 counts"
            )

    @property
    def levels(self) -> int:
        return self.depth + 1

    @property
    def per_tree(self) -> int:
        return 2 ** (self.depth + 1) - 1

    @property
    def nodes(self) -> int:
        return self.trees * self.per_tree

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """(first level, levels) of each stage, as even as can be, the longer ones first."""
        count = -(-self.levels // DEEPEST)
        least, more = divmod(self.levels, count)
        found, first = [], 0
        for stage in range(count):
            size = least + (stage < more)
            found.append((first, size))
            first += size
        return tuple(found)

    @property
    def together(self) -> int:
        """Trees in one tile: several if they are shallow."""
        first_size = self.stages[0][1]
        if len(self.stages) > 1:
            return 1
        wanted = triton.next_power_of_2(self.trees) << first_size
        return max(16, min(COLUMNS, wanted)) >> first_size

    @property
    def row(self) -> int:
        """Levels of a stage as a power of two, so that the trees of a tile fill 16 columns."""
        size = triton.next_power_of_2(self.stages[0][1])
        return max(size, 16 // self.together)

    @property
    def keys(self) -> int:
        """Nodes at which the last stage can be entered: what tokens are sorted by."""
        return 1 << self.stages[-1][0]


@functools.lru_cache(maxsize=16)
def device_of(index: int) -> tuple[int, int]:
    """(compute capability's major number, multiprocessors) of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    return properties.major, properties.multi_processor_count


def major_of(x: Tensor) -> int:
    """Compute capability's major number; 0 in the interpreter."""
    return device_of(x.get_device())[0] if x.is_cuda else 0


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activation with this number in ACTIVATIONS, of float32; gelu is the exact erf form."""
    if ACT == 1:
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACT == 2:
        x = x / (1.0 + tl.exp(-x))
    elif ACT == 3:
        x = tl.where(x < 0.0, 0.0, x)  # NaN stays NaN
    return x


@triton.jit
def slope(x, ACT: tl.constexpr):
    """Derivative of `activate`."""
    if ACT == 1:
        bell = tl.exp(-0.5 * x * x) * 0.3989422804014327
        x = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * bell
    elif ACT == 2:
        share = 1.0 / (1.0 + tl.exp(-x))
        x = share * (1.0 + x * (1.0 - share))
    elif ACT == 3:
        x = tl.where(x > 0.0, 1.0, 0.0)
    else:
        x = x * 0.0 + 1.0
    return x


@triton.jit
def level_of(j, G: tl.constexpr):
    """Level of local node j in a stage of G levels (the one number too many counts as the last)."""
    level = j * 0
    for i in tl.static_range(1, G):
        level += tl.where(j + 1 >= (1 << i), 1, 0)
    return level


@triton.jit
def column_rows(tree, trees, root, LEVELS: tl.constexpr, G: tl.constexpr, P: tl.constexpr):
    """(row of the weights, is it one) of each column of a tile of P trees from `tree` on."""
    c = tl.arange(0, P << G)
    j = c % (1 << G)
    of = tree + c // (1 << G)
    level = level_of(j, G)
    heap = ((root + j * 0) << level) + j + 1 - ((j * 0 + 1) << level)
    valid = (j < (1 << G) - 1) & (of < trees)
    row = of * ((1 << LEVELS) - 1) + heap - 1
    return tl.where(valid, row, 0), valid


@triton.jit
def tile_rows(n, live, tree, trees, P: tl.constexpr, BT: tl.constexpr):
    """(token, tree, does it exist) of each pair of a token and one of P trees: BT * P of them."""
    if P == 1:
        of = n * 0 + tree
        return n, of, live
    else:
        p = tl.arange(0, P)
        n_R = tl.reshape(tl.broadcast_to(n[:, None], (BT, P)), (BT * P,))
        of = tl.reshape(tl.broadcast_to((tree + p)[None, :], (BT, P)), (BT * P,))
        alive = tl.broadcast_to(live[:, None].to(tl.int32), (BT, P))
        return n_R, of, (tl.reshape(alive, (BT * P,)) > 0) & (of < trees)


@triton.jit
def tile_tokens(
    perm_ptr, table_ptr, tile, tree, tiles, tokens, SORTED: tl.constexpr, BT: tl.constexpr
):
    """(tokens of a tile, which exist, their group): sorted ones of one tree, or just the next."""
    i = tl.arange(0, BT)
    if SORTED:
        of = tile.to(tl.int64) * 0 + tree  # a number that is 1 may come as a constant
        entry = table_ptr + (of * tiles + tile) * 3
        group = tl.load(entry)
        at = tl.load(entry + 1) + i
        live = at < tl.load(entry + 2)
        n = tl.load(perm_ptr + of * tokens + at, mask=live, other=0)
        return n, live, group
    else:
        at = tile * BT + i
        live = at < tokens
        return tl.where(live, at, 0), live, tile * 0


@triton.jit
def path_tile(
    values_ptr,
    nodes_ptr,
    like_ptr,
    n,
    live,
    tree,
    trees,
    root,
    LEVELS: tl.constexpr,
    FIRST: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    A: tl.constexpr,
    REST: tl.constexpr = False,
):
    """[BT, P * 2^G]: values [N, T, L] at the columns of visited nodes, zero elsewhere.

    A: levels of a tree, as a power of two, at least 16 for all P trees together. A token's values
    and its nodes' local numbers (below 2^7, exact in 16 bits) are copied to the columns of their
    level by a product with ones and zeros; a column keeps its value where the number is its own.
    The type is that of like_ptr's elements. REST: in place of the values, what rounding them to
    that type takes away.
    """
    kind: tl.constexpr = like_ptr.dtype.element_ty
    a = tl.arange(0, P * A)
    level = a % A
    of = tree + a // A
    real = live[:, None] & ((level < G) & (of < trees))[None, :]
    at = (n.to(tl.int64) * trees)[:, None] + of[None, :]
    at = at * LEVELS + (FIRST + level)[None, :]
    value = tl.load(values_ptr + at, mask=real, other=0.0)
    if REST:
        value -= value.to(kind).to(tl.float32)
    node = tl.load(nodes_ptr + at, mask=real, other=0) - (of * ((1 << LEVELS) - 1))[None, :]
    level = tl.where(level < G, level, 0)
    node = node + (((a * 0 + 1) << level) - ((root + a * 0) << level))[None, :]
    node = tl.where(real, node, -1)
    c = tl.arange(0, P << G)
    j = c % (1 << G)
    same = (a // A)[:, None] == (c // (1 << G))[None, :]
    to = (same & ((a % A)[:, None] == level_of(j, G)[None, :])).to(kind)
    spread = tl.dot(value.to(kind), to, input_precision="ieee")
    number = tl.dot(node.to(kind), to, input_precision="ieee")
    return tl.where(number == j.to(tl.float32)[None, :], spread, 0.0).to(kind)
