"""Triton: backward passes of the row steps in `nomatmul.ops.bitlinear.rows`.

Programs walk the rows as `partial_sums.py` says. Everything is float32. References of the same
names: `nomatmul.ops.bitlinear.steps`. GLU's is in `glu_backward.py`.

Shape suffixes: N tokens, D features, G projections that read one input.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nomatmul.ops.bitlinear.partial_sums import column_sums, programs_for
from nomatmul.ops.bitlinear.rows import on_device, row_shape, sigmoid


@triton.jit
def _inverse_root(v, size, eps):
    return tl.rsqrt(tl.sum(v * v, axis=0) / size + eps)


@triton.jit
def _norm_backward_kernel(
    x_ptr,
    outer_ptr,
    norms_ptr,
    d_ptr,
    w_scale_ptr,
    residual_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    size,
    outer_eps,
    eps,
    GROUPS: tl.constexpr,
    OUTER: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    inside = k < size
    outer = tl.load(outer_ptr + k, mask=inside, other=0.0).to(tl.float32)
    norm0 = tl.load(norms_ptr + k, mask=inside, other=0.0).to(tl.float32)
    w_scale0 = tl.load(w_scale_ptr)
    if GROUPS == 3:
        norm1 = tl.load(norms_ptr + size + k, mask=inside, other=0.0).to(tl.float32)
        norm2 = tl.load(norms_ptr + 2 * size + k, mask=inside, other=0.0).to(tl.float32)
        w_scale1 = tl.load(w_scale_ptr + 1)
        w_scale2 = tl.load(w_scale_ptr + 2)
    sum_outer = tl.zeros((BLOCK,), dtype=tl.float32)
    sum0 = tl.zeros((BLOCK,), dtype=tl.float32)
    sum1 = tl.zeros((BLOCK,), dtype=tl.float32)
    sum2 = tl.zeros((BLOCK,), dtype=tl.float32)
    plane = tl.cast(rows, tl.int64) * size
    for start in range(program, rows, tl.num_programs(0)):
        at = tl.cast(start, tl.int64) * size + k
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        u = x
        if OUTER:
            outer_inverse = _inverse_root(x, size, outer_eps)
            u = (x * outer_inverse * outer).to(x_ptr.dtype.element_ty).to(tl.float32)
        inverse = _inverse_root(u, size, eps)
        hat = u * inverse
        d = tl.load(d_ptr + at, mask=inside, other=0.0).to(tl.float32) * w_scale0
        sum0 += d * hat
        dy = d * norm0
        if GROUPS == 3:
            d = tl.load(d_ptr + plane + at, mask=inside, other=0.0).to(tl.float32) * w_scale1
            sum1 += d * hat
            dy += d * norm1
            d = tl.load(d_ptr + 2 * plane + at, mask=inside, other=0.0).to(tl.float32) * w_scale2
            sum2 += d * hat
            dy += d * norm2
        mean = tl.sum(dy * hat, axis=0) / size
        dx = (dy - hat * mean) * inverse
        if OUTER:
            outer_hat = x * outer_inverse
            weighted = outer_hat * outer
            # sum(dx * weighted), in the same round of sums as the mean above
            shared = tl.sum(dy * weighted, axis=0) - mean * tl.sum(hat * weighted, axis=0)
            sum_outer += dx * outer_hat
            dx = (dx * outer - outer_hat * (shared * inverse / size)) * outer_inverse
        if RESIDUAL:
            dx += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    out = partial_ptr + program.to(tl.int64) * (GROUPS + 1) * size + k
    tl.store(out, sum_outer, mask=inside)
    tl.store(out + size, sum0, mask=inside)
    if GROUPS == 3:
        tl.store(out + 2 * size, sum1, mask=inside)
        tl.store(out + 3 * size, sum2, mask=inside)


@triton.jit
def _gate_backward_kernel(
    g_ptr,
    h_ptr,
    gate_ptr,
    norm_ptr,
    d_ptr,
    w_scale_ptr,
    dg_ptr,
    dh_ptr,
    y_ptr,
    partial_ptr,
    rows,
    size,
    gate_eps,
    eps,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    inside = k < size
    gate = tl.load(gate_ptr + k, mask=inside, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + k, mask=inside, other=0.0).to(tl.float32)
    w_scale = tl.load(w_scale_ptr)
    sum_gate = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_norm = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(program, rows, tl.num_programs(0)):
        at = tl.cast(start, tl.int64) * size + k
        g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + at, mask=inside, other=0.0)
        d = tl.load(d_ptr + at, mask=inside, other=0.0).to(tl.float32) * w_scale
        share = sigmoid(h)
        active = h * share
        raw = g * gate * active  # the row before both norms: one round of sums serves both
        dy = d * norm
        dot = tl.sum(dy * raw, axis=0)
        square = tl.sum(raw * raw, axis=0)
        gate_inverse = tl.rsqrt(tl.sum(g * g, axis=0) / size + gate_eps)
        both = gate_inverse * tl.rsqrt(square * gate_inverse * gate_inverse / size + eps)
        absmax = tl.maximum(tl.max(tl.abs(raw * norm), axis=0) * both, 1e-5)
        inverse = both / gate_inverse
        hat = raw * both
        y = hat * norm * (127.0 / absmax)
        y = (y + tl.where(y < 0.0, -0.49999997, 0.49999997)).to(tl.int32).to(tl.float32)
        y = y * (absmax / 127.0)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
        sum_norm += d * hat
        mean = dot * both / size
        dv = (dy - hat * mean) * inverse
        g_hat = g * gate_inverse
        dh = dv * g_hat * gate * share * (1.0 + h * (1.0 - share))
        tl.store(dh_ptr + at, dh.to(dh_ptr.dtype.element_ty), mask=inside)
        dg = dv * active
        sum_gate += dg * g_hat
        # sum(dv * active * gate * g_hat), from the sums above
        gate_mean = (dot - mean * both * square) * inverse * gate_inverse / size
        dg = (dg * gate - g_hat * gate_mean) * gate_inverse
        tl.store(dg_ptr + at, dg.to(dg_ptr.dtype.element_ty), mask=inside)
    out = partial_ptr + program.to(tl.int64) * 2 * size + k
    tl.store(out, sum_gate, mask=inside)
    tl.store(out + size, sum_norm, mask=inside)


def norm_backward(
    x_ND: Tensor,
    outer_D: Tensor | None,
    norms_GD: Tensor,
    d_GND: Tensor,
    w_scale_G: Tensor,
    residual_ND: Tensor | None,
    outer_eps: float,
    eps: float,
) -> tuple[Tensor, ...]:
    """See `steps.norm_backward`; one or three projections."""
    rows, size = x_ND.shape
    groups = norms_GD.shape[0]
    assert groups in (1, 3), groups
    x_ND, norms_GD, d_GND = x_ND.contiguous(), norms_GD.contiguous(), d_GND.contiguous()
    residual = x_ND if residual_ND is None else residual_ND.contiguous()
    dx_ND = torch.empty_like(x_ND)
    shape = row_shape(size)  # 128 registers a thread with three projections, 95 with one
    programs = programs_for(x_ND, rows, (16 if groups == 3 else 20) // shape["num_warps"])
    partial = torch.empty(programs, groups + 1, size, dtype=torch.float32, device=x_ND.device)
    with on_device(x_ND):
        _norm_backward_kernel[(programs,)](
            x_ND,
            norms_GD if outer_D is None else outer_D,
            norms_GD,
            d_GND,
            w_scale_G,
            residual,
            dx_ND,
            partial,
            rows,
            size,
            outer_eps,
            eps,
            GROUPS=groups,
            OUTER=outer_D is not None,
            RESIDUAL=residual_ND is not None,
            **shape,
        )
    douter_D, *dnorms = column_sums(partial)
    return dx_ND, douter_D if outer_D is not None else douter_D.new_empty(0), *dnorms


def gate_backward(
    g_ND: Tensor,
    h_ND: Tensor,
    gate_D: Tensor,
    norm_D: Tensor,
    d_ND: Tensor,
    w_scale_G: Tensor,
    gate_eps: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `steps.gate_backward`; the third result lies over d."""
    rows, size = g_ND.shape
    g_ND, h_ND = g_ND.contiguous(), h_ND.contiguous()
    assert d_ND.is_contiguous()
    dg, dh = torch.empty_like(g_ND), torch.empty_like(g_ND)
    shape = row_shape(size)
    programs = programs_for(g_ND, rows, 16 // shape["num_warps"])
    partial = torch.empty(programs, 2, size, dtype=torch.float32, device=g_ND.device)
    with on_device(g_ND):
        _gate_backward_kernel[(programs,)](
            g_ND, h_ND, gate_D, norm_D, d_ND, w_scale_G, dg, dh, d_ND, partial, rows, size,
            gate_eps, eps, **shape,
        )  # fmt: skip
    dgate_D, dnorm_D = column_sums(partial)
    return dg, dh, d_ND, dgate_D, dnorm_D
