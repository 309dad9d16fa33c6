"""Triton, FFF: weight gradients, as products within groups of tokens that share a stage of a tree.

A program owns one stage's nodes of one group (at most 127 rows) and a block of features, and sums
over the group's tokens in their order: no atomics, so the result is the same in every run. Where
groups are few (the first stage), tokens are cut into parts that are added afterwards, in order.

Shape suffixes: N tokens, T trees, L levels, V nodes of all trees, D features, P parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nomatmul.ops.bitlinear.rows import on_device
from nomatmul.ops.fff.triton_parts import Trees, column_rows, device_of, major_of, path_tile
from nomatmul.ops.fff.triton_sort import Order


@triton.jit(do_not_specialize=["tokens", "parts"])
def _weights_kernel(
    values_ptr,
    nodes_ptr,
    x_ptr,
    like_ptr,
    perm_ptr,
    starts_ptr,
    out_ptr,
    bias_ptr,
    tokens,
    features,
    trees,
    parts,
    LEVELS: tl.constexpr,
    LAST: tl.constexpr,
    FIRST: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    A: tl.constexpr,
    SORTED: tl.constexpr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    member = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    begin = tl.program_id(0) * 0
    end = begin + tokens
    tree = member * P
    group = member * 0
    if SORTED:
        tree = member // (1 << FIRST)
        group = member % (1 << FIRST)
        start = starts_ptr + tree.to(tl.int64) * ((1 << LAST) + 1)
        begin = tl.load(start + (group << (LAST - FIRST)))
        end = tl.load(start + ((group + 1) << (LAST - FIRST)))
    root = group + (1 << FIRST)
    span = tl.cdiv(tl.cdiv(end - begin, parts), BT) * BT
    begin += part * span
    end = tl.minimum(end, begin + span)
    acc = tl.zeros((P << G, BD), dtype=tl.float32)
    total = tl.zeros((P << G,), dtype=tl.float32)
    i = tl.arange(0, BT)
    for first in range(begin, end, BT):
        live = first + i < end
        n = tl.where(live, first + i, 0)
        if SORTED:
            n = tl.load(perm_ptr + tree.to(tl.int64) * tokens + n, mask=live, other=0)
        at = x_ptr + n.to(tl.int64)[:, None] * features + d[None, :]
        x = tl.load(at, mask=live[:, None] & (d < features)[None, :], other=0.0)
        v = path_tile(
            values_ptr, nodes_ptr, like_ptr, n, live, tree, trees, root, LEVELS, FIRST, G, P, A
        )
        acc = tl.dot(tl.trans(v), x.to(v.dtype), acc, input_precision="ieee")
        if BIAS:
            total += tl.sum(v.to(tl.float32), axis=0)
            if v.dtype != tl.float32 and tl.program_id(1) == 0:
                # Gradients of a bias cancel: 8 bits of each term would leave a sum without any.
                rest = path_tile(
                    values_ptr, nodes_ptr, like_ptr, n, live, tree, trees, root,
                    LEVELS, FIRST, G, P, A, True,
                )  # fmt: skip
                total += tl.sum(rest.to(tl.float32), axis=0)
    row, valid = column_rows(tree, trees, root, LEVELS, G, P)
    if PARTS:
        c = tl.arange(0, P << G)
        row = (part * (tl.num_programs(0) // parts) + member) * (P << G) + c
        valid = c >= 0
    at = out_ptr + row.to(tl.int64)[:, None] * features + d[None, :]
    mask = valid[:, None] & (d < features)[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=mask)
    if BIAS and tl.program_id(1) == 0:
        tl.store(bias_ptr + row, total, mask=valid)


def _launch(like: Tensor, shape: Trees) -> dict[str, int]:
    if major_of(like) < 8:
        return {"BT": 16, "BD": 32, "num_warps": 4, "num_stages": 1}
    if like.element_size() == 4:
        return {"BT": 32, "BD": 64, "num_warps": 4, "num_stages": 2}
    if len(shape.stages) == 1 and shape.trees > 1:
        return {"BT": 64, "BD": 256, "num_warps": 8, "num_stages": 2}
    return {"BT": 64, "BD": 128, "num_warps": 4, "num_stages": 2}


def weight_gradient(
    values_NTL: Tensor,
    nodes_NTL: Tensor,
    x_ND: Tensor,
    like_VD: Tensor,
    shape: Trees,
    order: Order | None,
    bias: bool = False,
) -> tuple[Tensor, Tensor]:
    """To row nodes[n, t, l] goes values[n, t, l] * x[n], summed over all n; [V, D] like `like`.

    values: float32; x: float; order: of the tokens, from the walk. The products take `like`'s type
    as operands and are summed in float32. Second result: float32 [V], the sums of values alone
    (empty without `bias`).
    """
    tokens, features = x_ND.shape
    dw = torch.empty_like(like_VD)
    dbias = torch.empty(len(like_VD) if bias else 0, dtype=torch.float32, device=x_ND.device)
    options = _launch(like_VD, shape)
    tile = options["BT"]
    block = options["BD"] = min(options["BD"], max(16, triton.next_power_of_2(features)))
    for stage, (first, levels) in enumerate(shape.stages):
        sorted_by = order if stage else None
        members = triton.cdiv(shape.trees, shape.together) << first
        blocks = triton.cdiv(features, block)
        parts = 1
        if not stage:
            enough = 2 * device_of(x_ND.get_device())[1] if x_ND.is_cuda else 2
            parts = max(1, min(enough // (members * blocks), triton.cdiv(tokens, 4 * tile)))
        columns = shape.together << levels
        out, sums = dw, dbias
        if parts > 1:
            out = torch.empty(
                parts, members * columns, features, dtype=torch.float32, device=dw.device
            )
            sums = torch.empty(parts, members * columns, dtype=torch.float32, device=dw.device)
        with on_device(x_ND):
            _weights_kernel[(members * parts, blocks)](
                values_NTL,
                nodes_NTL,
                x_ND,
                like_VD,
                order.perm_TN if sorted_by and order else x_ND,
                order.starts_TG if sorted_by and order else x_ND,
                out,
                sums if bias else out,
                tokens,
                features,
                shape.trees,
                parts,
                LEVELS=shape.levels,
                LAST=shape.stages[-1][0] if stage else 0,
                FIRST=first,
                G=levels,
                P=shape.together,
                A=shape.row,
                SORTED=sorted_by is not None,
                PARTS=parts > 1,
                BIAS=bias,
                **options,
            )
        if parts > 1:
            _keep(dw, out.sum(0), shape, levels)
            if bias:
                _keep(dbias, sums.sum(0), shape, levels)
    return dw, dbias


def _keep(target: Tensor, columns: Tensor, shape: Trees, levels: int) -> None:
    """Copy the first stage's columns, one in 2^levels of which is nobody's, to their rows."""
    rest = target.shape[1:]
    upper = columns.view(-1, 1 << levels, *rest)[: shape.trees, : (1 << levels) - 1]
    target.view(shape.trees, shape.per_tree, *rest)[:, : (1 << levels) - 1].copy_(upper)
