"""Triton, FFF: few tokens, each program walks one tree of one token.

The latency of memory is the whole cost, so G levels are loaded at once (the 2^G - 1 nodes that can
follow, of which G will be visited), and the outgoing rows of a step are on their way while the next
step's nodes are.

Shape suffixes: N tokens, T trees, L levels, V nodes of all trees, K inputs, D outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nomatmul.ops.bitlinear.rows import on_device
from nomatmul.ops.fff.triton_parts import Trees, activate, level_of


@triton.jit
def _gather_kernel(
    x_ptr,
    w_in_ptr,
    bias_ptr,
    w_out_ptr,
    logits_ptr,
    nodes_ptr,
    h_ptr,
    y_ptr,
    inputs,
    outputs,
    trees,
    LEVELS: tl.constexpr,
    G: tl.constexpr,
    ACT: tl.constexpr,
    BIAS: tl.constexpr,
    OUT: tl.constexpr,
    H: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    pair = tl.program_id(0)
    n = (pair // trees).to(tl.int64)
    tree = pair % trees
    k = tl.arange(0, BK)
    x = tl.load(x_ptr + n * inputs + k, mask=k < inputs, other=0.0).to(tl.float32)
    j = tl.arange(0, 1 << G)
    level = level_of(j, G)
    base = pair.to(tl.int64) * LEVELS
    d = tl.arange(0, BD)
    y = tl.zeros((1 << G, BD), dtype=tl.float32)
    share = tl.zeros((1 << G,), dtype=tl.float32)
    out = tl.zeros((1 << G, BD), dtype=tl.float32)
    heap = tree * 0 + 1  # of the step's first node, counted from one
    for first in tl.static_range(0, LEVELS, G):
        real = (j < (1 << G) - 1) & (first + level < LEVELS)
        of = ((heap + j * 0) << level) + j + 1 - ((j * 0 + 1) << level)
        row = tree * ((1 << LEVELS) - 1) + of - 1
        at = w_in_ptr + row.to(tl.int64)[:, None] * inputs + k[None, :]
        w = tl.load(at, mask=real[:, None] & (k < inputs)[None, :], other=0.0)
        if OUT and first > 0:
            y += share[:, None] * out.to(tl.float32)
        logit = tl.sum(w.to(tl.float32) * x[None, :], axis=1)
        if BIAS:
            logit += tl.load(bias_ptr + row, mask=real, other=0.0).to(tl.float32)
        # the decisions of all nodes as one number: the path needs no further look at the tile
        right = tl.sum(tl.where((logit > 0.0) & real, (j * 0 + 1) << j, 0), axis=0)
        node = heap * 0 + 1
        for _ in tl.static_range(G):
            node = 2 * node + ((right >> (node - 1)) & 1)
        on = real & (((node + j * 0) >> (G - level)) == j + 1)
        share = tl.where(on, activate(logit, ACT), 0.0)
        if OUT:
            at = w_out_ptr + row.to(tl.int64)[:, None] * outputs + d[None, :]
            out = tl.load(at, mask=on[:, None] & (d < outputs)[None, :], other=0.0)
        tl.store(logits_ptr + base + first + level, logit, mask=on)
        tl.store(nodes_ptr + base + first + level, row, mask=on)
        if H:
            tl.store(h_ptr + base + first + level, share, mask=on)
        heap = (heap << G) + node - (1 << G)
    if OUT:
        y += share[:, None] * out.to(tl.float32)
        total = tl.sum(y, axis=0).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + n * outputs + d, total, mask=d < outputs)


@triton.jit
def _sum_rows_kernel(
    h_ptr,
    nodes_ptr,
    w_ptr,
    y_ptr,
    active,
    outputs,
    BA: tl.constexpr,
    BD: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    a = tl.arange(0, BA)
    acc = tl.zeros((BA, BD), dtype=tl.float32)
    for first in range(0, active, BA):
        live = first + a < active
        h = tl.load(h_ptr + n * active + first + a, mask=live, other=0.0).to(tl.float32)
        row = tl.load(nodes_ptr + n * active + first + a, mask=live, other=0).to(tl.int64)
        at = w_ptr + row[:, None] * outputs + d[None, :]
        w = tl.load(at, mask=live[:, None] & (d < outputs)[None, :], other=0.0)
        acc += h[:, None] * w.to(tl.float32)
    total = tl.sum(acc, axis=0).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + n * outputs + d, total, mask=d < outputs)


def _steps(pairs: int) -> tuple[int, int]:
    """Levels at once and warps, as measured on an H200 from 1 to 4096 tokens (docs/log)."""
    return 2, 4 if pairs <= 256 else 2


def walk(
    x_NK: Tensor,
    w_in_VK: Tensor,
    bias_V: Tensor | None,
    shape: Trees,
    act: int,
    w_out_VD: Tensor | None = None,
    *,
    steps: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(logits float32 [N, T, L], rows int32, activations or logits, y [N, D] or None).

    act: a number of ACTIVATIONS; 0: no activations are made. y, in w_out's type, is made if w_out
    is given and there is one tree. steps: (levels at once, warps), for tuning. Operands are
    contiguous and of one type; N >= 1.
    """
    tokens, inputs = x_NK.shape
    size = (tokens, shape.trees, shape.levels)
    logits = torch.empty(size, dtype=torch.float32, device=x_NK.device)
    nodes = torch.empty(size, dtype=torch.int32, device=x_NK.device)
    whole = w_out_VD is not None and shape.trees == 1
    h = torch.empty_like(logits) if act and not whole else logits
    outputs = w_out_VD.shape[1] if w_out_VD is not None and whole else 1
    y = x_NK.new_empty(tokens, outputs) if whole else None
    levels, warps = steps or _steps(tokens * shape.trees)
    levels = min(levels, shape.levels)
    with on_device(x_NK):
        _gather_kernel[(tokens * shape.trees,)](
            x_NK,
            w_in_VK,
            x_NK if bias_V is None else bias_V,
            w_out_VD if whole else x_NK,
            logits,
            nodes,
            h,
            x_NK if y is None else y,
            inputs,
            outputs,
            shape.trees,
            LEVELS=shape.levels,
            G=levels,
            ACT=act,
            BIAS=bias_V is not None,
            OUT=whole,
            H=bool(act) and not whole,
            BK=max(16, triton.next_power_of_2(inputs)),
            BD=max(16, triton.next_power_of_2(outputs)),
            num_warps=warps,
        )
    return logits, nodes, h, y


def combine(h_NTL: Tensor, nodes_NTL: Tensor, w_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over visited nodes of h * w[row], [N, D] in `dtype`; one program a token and block."""
    tokens, outputs = len(h_NTL), w_VD.shape[1]
    active = h_NTL.shape[1] * h_NTL.shape[2]
    y = torch.empty(tokens, outputs, dtype=dtype, device=w_VD.device)
    block = min(32 if tokens < 16 else 128, max(16, triton.next_power_of_2(outputs)))
    rows = min(8192 // block, triton.next_power_of_2(active))
    with on_device(w_VD):
        _sum_rows_kernel[(tokens, triton.cdiv(outputs, block))](
            h_NTL, nodes_NTL, w_VD, y, active, outputs, BA=rows, BD=block, num_warps=8
        )
    return y
