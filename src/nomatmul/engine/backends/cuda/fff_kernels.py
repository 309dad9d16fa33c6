"""Triton kernels of the ternary FFF: the walk of a token through its trees, the sum of its rows.

Legend: T tokens, D hidden size, L levels of a tree, A active rows of a token (trees * L), RB bytes
of a packed row in device memory. Rows lie as [V, 2, RB]: a node's input weights, then its output
weights; four weights a byte, element e in byte e // 4 (kernels.py tells how activations lie).

Accumulators are integers, so whatever the order they are summed in, they and the paths that they
decide are those of every other backend.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nomatmul.engine.backends.cuda.kernels import _divided, _root, _silu, _to_int8


@triton.jit
def _planes(at, mask):
    """Weights int32 -1, 0, 1 of packed bytes, one tile for each of the four places in a byte."""
    w = tl.load(at, mask=mask, other=0x55).to(tl.int32)
    return (w & 3) - 1, ((w >> 2) & 3) - 1, ((w >> 4) & 3) - 1, (w >> 6) - 1


@triton.jit
def walk_kernel(
    q_ptr, rows_ptr, acc_ptr, row_ptr, trees, NODES: tl.constexpr, LEVELS: tl.constexpr,
    RB: tl.constexpr, BLOCK: tl.constexpr, TREES: tl.constexpr,
):  # fmt: skip
    """Walk TREES trees for one token: visited rows and their accumulators, int32 [T, trees * L].

    An accumulator above 0 leads to the right child 2j + 2, all else to the left one, 2j + 1.
    """
    t = tl.program_id(0).to(tl.int64)
    tree = tl.program_id(1) * TREES + tl.arange(0, TREES)
    live = tree < trees
    k = tl.arange(0, BLOCK)
    inside = k < RB
    q_at = q_ptr + t * (4 * RB) + k
    q0 = tl.load(q_at, mask=inside, other=0).to(tl.int32)[None, :]
    q1 = tl.load(q_at + RB, mask=inside, other=0).to(tl.int32)[None, :]
    q2 = tl.load(q_at + 2 * RB, mask=inside, other=0).to(tl.int32)[None, :]
    q3 = tl.load(q_at + 3 * RB, mask=inside, other=0).to(tl.int32)[None, :]
    mask = live[:, None] & inside[None, :]
    node = tl.zeros((TREES,), tl.int32)
    out = (t * trees + tree) * LEVELS
    for level in range(LEVELS):
        row = tree * NODES + node
        at = rows_ptr + row.to(tl.int64)[:, None] * (2 * RB) + k[None, :]
        w0, w1, w2, w3 = _planes(at, mask)
        acc = tl.sum(w0 * q0 + w1 * q1 + w2 * q2 + w3 * q3, axis=1)
        tl.store(row_ptr + out + level, row, mask=live)
        tl.store(acc_ptr + out + level, acc, mask=live)
        node = 2 * node + tl.where(acc > 0, 2, 1)


@triton.jit
def hidden_kernel(
    acc_ptr, row_ptr, acc_step_ptr, w_scale, norm_ptr, eps, q_ptr, step_ptr, flag_ptr,
    A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """int8 of silu(acc * (w_scale * step)) of the A active rows, normed over them; plain [T, A]."""
    t = tl.program_id(0)
    a = tl.arange(0, BLOCK)
    inside = a < A
    at = t.to(tl.int64) * A + a
    row = tl.load(row_ptr + at, mask=inside, other=0)
    acc = tl.load(acc_ptr + at, mask=inside, other=0).to(tl.float32)
    h = _silu(acc * (w_scale * tl.load(acc_step_ptr + t)))
    z = _divided(h, _root(h, eps, A)) * tl.load(norm_ptr + row, mask=inside, other=0.0)
    whole, step, bad = _to_int8(z)
    tl.store(q_ptr + at, whole, mask=inside)
    tl.store(step_ptr + t, step)
    tl.store(flag_ptr, 1, mask=bad != 0.0)


@triton.jit
def combine_kernel(
    q_ptr, row_ptr, rows_ptr, acc_ptr, A: tl.constexpr, D: tl.constexpr, RB: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """acc[t, d] = sum over active rows of q * t_out[row, d], int32, for 4 * BLOCK elements d.

    A program adds PART rows, ROWS at a time. SHARED: several programs add to one sum, which starts
    at zero; integers may arrive in any order.
    """
    t = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(2) * PART
    one = tl.arange(0, ROWS)
    sum0 = tl.zeros((BLOCK,), tl.int32)
    sum1 = tl.zeros((BLOCK,), tl.int32)
    sum2 = tl.zeros((BLOCK,), tl.int32)
    sum3 = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, PART, ROWS):
        a = first + start + one
        live = (a < A) & (start + one < PART)
        q = tl.load(q_ptr + t * A + a, mask=live, other=0).to(tl.int32)[:, None]
        row = tl.load(row_ptr + t * A + a, mask=live, other=0).to(tl.int64)
        at = rows_ptr + row[:, None] * (2 * RB) + RB + k[None, :]
        w0, w1, w2, w3 = _planes(at, live[:, None] & (k < RB)[None, :])
        sum0 += tl.sum(w0 * q, axis=0)
        sum1 += tl.sum(w1 * q, axis=0)
        sum2 += tl.sum(w2 * q, axis=0)
        sum3 += tl.sum(w3 * q, axis=0)
    at = acc_ptr + t * D + 4 * k
    if SHARED:
        tl.atomic_add(at, sum0, mask=4 * k < D, sem="relaxed")
        tl.atomic_add(at + 1, sum1, mask=4 * k + 1 < D, sem="relaxed")
        tl.atomic_add(at + 2, sum2, mask=4 * k + 2 < D, sem="relaxed")
        tl.atomic_add(at + 3, sum3, mask=4 * k + 3 < D, sem="relaxed")
    else:
        tl.store(at, sum0, mask=4 * k < D)
        tl.store(at + 1, sum1, mask=4 * k + 1 < D)
        tl.store(at + 2, sum2, mask=4 * k + 2 < D)
        tl.store(at + 3, sum3, mask=4 * k + 3 < D)
