"""Triton: backward passes of the row steps in `nomatmul.ops.bitlinear.rows`.

A program walks rows p, p + P, p + 2P ... and keeps its sums for the norm weights in registers;
the P partial sums are added afterwards in a fixed order, so gradients do not change from run to
run. Everything is float32. References of the same names: `nomatmul.ops.bitlinear.steps`.

Shape suffixes: N tokens, D features, M intermediate, G projections that read one input.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from nomatmul.ops.bitlinear.rows import on_device, row_shape, sigmoid

_INTERPRETED_PROGRAMS = 3  # without a GPU: enough to test the walk and the partial sums


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
def _glu_piece(gu_ptr, norm_ptr, d_ptr, row, size, k, w_scale, AGAIN: tl.constexpr):
    """gate, its sigmoid, up, silu(gate) * up, and the gradient times the norm, of a piece."""
    inside = k < size
    # two policies, or the compiler would keep the first sweep's values in registers
    keep: tl.constexpr = "evict_first" if AGAIN else "evict_last"
    twice = gu_ptr + row * 2 * size + k
    gate = tl.load(twice, mask=inside, other=0.0, eviction_policy=keep).to(tl.float32)
    up = tl.load(twice + size, mask=inside, other=0.0, eviction_policy=keep).to(tl.float32)
    d = tl.load(d_ptr + row * size + k, mask=inside, other=0.0, eviction_policy=keep)
    d = d.to(tl.float32) * w_scale
    norm = tl.load(norm_ptr + k, mask=inside, other=0.0, eviction_policy=keep).to(tl.float32)
    share = sigmoid(gate)
    return gate, share, up, gate * share * up, d, norm


@triton.jit
def _glu_gradients(
    gu_ptr, norm_ptr, d_ptr, dgu_ptr, y_ptr, row, size, k, w_scale, inverse, mean, step, scale
):
    """Write the gradients and the dequantised input of a piece; the norm's gradient of it."""
    inside = k < size
    gate, share, up, v, d, norm = _glu_piece(gu_ptr, norm_ptr, d_ptr, row, size, k, w_scale, True)
    hat = v * inverse
    y = hat * norm * scale
    y = (y + tl.where(y < 0.0, -0.49999997, 0.49999997)).to(tl.int32).to(tl.float32) * step
    tl.store(y_ptr + row * size + k, y.to(y_ptr.dtype.element_ty), mask=inside)
    grad = (d * norm - hat * mean) * inverse
    dgate = grad * up * share * (1.0 + gate * (1.0 - share))
    twice = dgu_ptr + row * 2 * size + k
    tl.store(twice, dgate.to(dgu_ptr.dtype.element_ty), mask=inside)
    tl.store(twice + size, (grad * gate * share).to(dgu_ptr.dtype.element_ty), mask=inside)
    return d * hat


@triton.jit
def _glu_backward_kernel(
    gu_ptr,
    norm_ptr,
    d_ptr,
    w_scale_ptr,
    dgu_ptr,
    y_ptr,
    partial_ptr,
    rows,
    size,
    eps,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Two sweeps over a row in up to three pieces: its sums, then its gradients."""
    program = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    w_scale = tl.load(w_scale_ptr)
    total0 = tl.zeros((BLOCK,), dtype=tl.float32)
    total1 = tl.zeros((BLOCK,), dtype=tl.float32)
    total2 = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(program, rows, tl.num_programs(0)):
        row = tl.cast(start, tl.int64)
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        dots = tl.zeros((BLOCK,), dtype=tl.float32)
        tops = tl.zeros((BLOCK,), dtype=tl.float32)
        for piece in tl.static_range(PIECES):
            _, _, _, v, d, norm = _glu_piece(
                gu_ptr, norm_ptr, d_ptr, row, size, k + piece * BLOCK, w_scale, False
            )
            squares += v * v
            dots += d * norm * v
            tops = tl.maximum(tops, tl.abs(v * norm))
        inverse = tl.rsqrt(tl.sum(squares, axis=0) / size + eps)
        mean = tl.sum(dots, axis=0) * inverse / size
        absmax = tl.maximum(tl.max(tops, axis=0) * inverse, 1e-5)
        step, scale = absmax / 127.0, 127.0 / absmax
        total0 += _glu_gradients(
            gu_ptr, norm_ptr, d_ptr, dgu_ptr, y_ptr, row, size, k, w_scale, inverse,
            mean, step, scale,
        )  # fmt: skip
        if PIECES > 1:
            total1 += _glu_gradients(
                gu_ptr, norm_ptr, d_ptr, dgu_ptr, y_ptr, row, size, k + BLOCK, w_scale, inverse,
                mean, step, scale,
            )  # fmt: skip
        if PIECES > 2:
            total2 += _glu_gradients(
                gu_ptr, norm_ptr, d_ptr, dgu_ptr, y_ptr, row, size, k + 2 * BLOCK, w_scale, inverse,
                mean, step, scale,
            )  # fmt: skip
    out = partial_ptr + program.to(tl.int64) * size + k
    tl.store(out, total0, mask=k < size)
    if PIECES > 1:
        tl.store(out + BLOCK, total1, mask=k + BLOCK < size)
    if PIECES > 2:
        tl.store(out + 2 * BLOCK, total2, mask=k + 2 * BLOCK < size)


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


@triton.jit
def _column_sums_kernel(
    partial_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    fourth_ptr,
    programs,
    size,
    parts,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    inside = column < size
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        at = (row * parts + part)[:, None] * size + column[None, :]
        live = (row < programs)[:, None] & inside[None, :]
        total += tl.load(partial_ptr + at, mask=live, other=0.0)
    sums = tl.sum(total, axis=0)
    if part == 0:
        tl.store(first_ptr + column, sums, mask=inside)
    if part == 1:
        tl.store(second_ptr + column, sums, mask=inside)
    if part == 2:
        tl.store(third_ptr + column, sums, mask=inside)
    if part == 3:
        tl.store(fourth_ptr + column, sums, mask=inside)


def column_sums(partial: Tensor) -> list[Tensor]:
    """Sums over the first axis of [P, parts, size], in a fixed order: `parts` tensors [size]."""
    programs, parts, size = partial.shape
    assert parts <= 4, parts
    out = [torch.empty(size, dtype=partial.dtype, device=partial.device) for _ in range(parts)]
    places = [out[min(index, parts - 1)] for index in range(4)]
    with on_device(partial):
        _column_sums_kernel[(triton.cdiv(size, 32), parts)](
            partial, *places, programs, size, parts, ROWS=64, COLUMNS=32, num_warps=4
        )
    return out


@functools.lru_cache(maxsize=16)
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _programs(x: Tensor, rows: int, resident: int) -> int:
    """Programs that walk the rows: as many as fit, `resident` a processor, so that none waits."""
    if not x.is_cuda:
        return min(rows, _INTERPRETED_PROGRAMS)
    return min(rows, max(1, resident) * _processors(x.get_device()))


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
    programs = _programs(x_ND, rows, (16 if groups == 3 else 20) // shape["num_warps"])
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


def glu_backward(
    gu_N2M: Tensor, norm_M: Tensor, d_NM: Tensor, w_scale_G: Tensor, eps: float,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `steps.glu_backward`; the second result lies over d, the first over gu if in_place."""
    rows, size = d_NM.shape
    assert gu_N2M.is_contiguous()
    assert d_NM.is_contiguous()
    dgu = gu_N2M if in_place else torch.empty_like(gu_N2M)
    block = max(triton.next_power_of_2(triton.cdiv(size, 3)), 32)
    warps = min(max(block // 128, 1), 8)  # 75 registers a thread up to 1024, 128 at 2048
    shape = {"BLOCK": block, "PIECES": triton.cdiv(size, block), "num_warps": warps}
    programs = _programs(d_NM, rows, (24 if block <= 1024 else 16) // warps)
    partial = torch.empty(programs, 1, size, dtype=torch.float32, device=d_NM.device)
    with on_device(d_NM):
        _glu_backward_kernel[(programs,)](
            gu_N2M, norm_M, d_NM, w_scale_G, dgu, d_NM, partial, rows, size, eps, **shape
        )
    return dgu, d_NM, column_sums(partial)[0]


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
    programs = _programs(g_ND, rows, 16 // shape["num_warps"])
    partial = torch.empty(programs, 2, size, dtype=torch.float32, device=g_ND.device)
    with on_device(g_ND):
        _gate_backward_kernel[(programs,)](
            g_ND, h_ND, gate_D, norm_D, d_ND, w_scale_G, dg, dh, d_ND, partial, rows, size,
            gate_eps, eps, **shape,
        )  # fmt: skip
    dgate_D, dnorm_D = column_sums(partial)
    return dg, dh, d_ND, dgate_D, dnorm_D
