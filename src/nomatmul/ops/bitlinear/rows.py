"""Triton: one pass over a token's features that ends in int8 (or int8 * step, for gradients).

One program owns one token. Arithmetic is that of docs/numerics.md: squares summed in float64,
correctly rounded root and division, ties away from zero; multiply-adds are not fused, because
`v - trunc(v)` decides about ties. References of the same names: `nomatmul.ops.bitlinear.steps`.

Shape suffixes: N tokens, D features, M intermediate, G projections that read one input.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

INT8 = torch.int8
_NOTHING = contextlib.nullcontext()


@triton.jit
def root_of(v, size, eps):
    """sqrt(mean(v^2) + eps) of one row; masked elements are zero."""
    mean = (tl.sum((v * v).to(tl.float64), axis=0) / size).to(tl.float32)
    return tl.sqrt_rn(mean + eps)


@triton.jit
def divided(x, root):
    """x / root, correctly rounded, for one root a row (Markstein: remainder and one correction)."""
    inverse = tl.div_rn(1.0, root)
    near = x * inverse
    return tl.fma(tl.fma(-near, root, x), inverse, near)


@triton.jit
def quantized(y, root):
    """(whole numbers as int32, the value of one unit) of one row that was divided by `root`."""
    absmax = tl.maximum(tl.max(tl.abs(y), axis=0), 1e-5)
    v = y * tl.div_rn(127.0, absmax)
    # Half away from zero: add the largest float below 0.5 with v's sign, drop the fraction. At a
    # tie the sum itself rounds up, below it never does. |v| <= 127 (1 + 2^-22) needs no clipping.
    sign = v.to(tl.int32, bitcast=True) & -2147483648
    half = (sign | 0x3EFFFFFF).to(tl.float32, bitcast=True)
    # int8 cannot say NaN or infinity: a unit of NaN does
    return (v + half).to(tl.int32), tl.div_rn(absmax, 127.0) + (root - root)


@triton.jit
def sigmoid(x, EXACT: tl.constexpr = False):
    """1 / (1 + exp(-x)); EXACT: no further from it than torch's, a few units of the last place.

    The plain form may be |x| units further (x * log2(e) is rounded): nothing beside the rounding of
    16-bit inputs, but with float32 ones it would flip int8 values more often than it must.
    """
    if EXACT:
        y = tl.where(x > 88.0, 88.0, tl.where(x < -88.0, -88.0, x))  # NaN stays NaN
        # adding and taking away 1.5 * 2^23 leaves the nearest whole number
        whole = (y * -1.44269504088896341 + 12582912.0) - 12582912.0
        # ln(2) in two pieces, of which the first one times a whole number is exact
        rest = (-y - whole * 0.693359375) + whole * 2.12194440e-4
        rest = rest * 1.44269504088896341
        return tl.div_rn(1.0, 1.0 + tl.exp2(rest) * tl.exp2(whole))
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _put(out_ptr, step_ptr, row, size, k, inside, y, root, DEQUANTIZE: tl.constexpr):
    q, step = quantized(y, root)
    at = out_ptr + row * size + k
    if DEQUANTIZE:
        tl.store(at, (q.to(tl.float32) * step).to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(at, q.to(tl.int8), mask=inside)
    tl.store(step_ptr + row, step)


@triton.jit
def _norm_quantize_kernel(
    x_ptr,
    outer_ptr,
    norms_ptr,
    out_ptr,
    step_ptr,
    rows,
    size,
    outer_eps,
    eps,
    GROUPS: tl.constexpr,
    OUTER: tl.constexpr,
    DEQUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < size
    x = tl.load(x_ptr + row * size + k, mask=inside, other=0.0)
    v = x.to(tl.float32)
    if OUTER:
        outer = tl.load(outer_ptr + k, mask=inside, other=0.0).to(tl.float32)
        v = divided(v, root_of(v, size, outer_eps)) * outer
        v = v.to(x_ptr.dtype.element_ty).to(tl.float32)  # the norm's result has x's type
    root = root_of(v, size, eps)
    v = divided(v, root)
    for group in tl.static_range(GROUPS):
        norm = tl.load(norms_ptr + group * size + k, mask=inside, other=0.0).to(tl.float32)
        _put(out_ptr, step_ptr, group * rows + row, size, k, inside, v * norm, root, DEQUANTIZE)


@triton.jit
def _glu_quantize_kernel(
    gu_ptr,
    norm_ptr,
    out_ptr,
    step_ptr,
    size,
    eps,
    DEQUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < size
    at = gu_ptr + row * 2 * size + k
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + size, mask=inside, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + k, mask=inside, other=0.0).to(tl.float32)
    v = gate * sigmoid(gate, gu_ptr.dtype.element_ty == tl.float32) * up
    root = root_of(v, size, eps)
    _put(out_ptr, step_ptr, row, size, k, inside, divided(v, root) * norm, root, DEQUANTIZE)


@triton.jit
def _gate_quantize_kernel(
    g_ptr,
    h_ptr,
    gate_ptr,
    norm_ptr,
    out_ptr,
    step_ptr,
    size,
    gate_eps,
    eps,
    DEQUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < size
    g = tl.load(g_ptr + row * size + k, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + row * size + k, mask=inside, other=0.0)
    gate = tl.load(gate_ptr + k, mask=inside, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + k, mask=inside, other=0.0).to(tl.float32)
    active = h * sigmoid(h, g_ptr.dtype.element_ty == tl.float32)
    v = divided(g, root_of(g, size, gate_eps)) * gate * active
    root = root_of(v, size, eps)
    _put(out_ptr, step_ptr, row, size, k, inside, divided(v, root) * norm, root, DEQUANTIZE)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, as triton's launches need."""
    if not tensor.is_cuda or torch.cuda.current_device() == tensor.get_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)


def row_shape(size: int) -> dict[str, int]:
    """BLOCK and num_warps for rows of `size` elements: eight or sixteen elements a thread."""
    block = max(triton.next_power_of_2(size), 32)
    return {"BLOCK": block, "num_warps": min(max(block // (256 if block < 4096 else 512), 1), 16)}


def _results(groups: int, rows: int, size: int, dtype: torch.dtype, like: Tensor) -> tuple:
    out = torch.empty(groups, rows, size, dtype=dtype, device=like.device)
    return out, torch.empty(groups, rows, dtype=torch.float32, device=like.device)


def norm_quantize(
    x_ND: Tensor,
    outer_D: Tensor | None,
    norms_GD: Tensor,
    outer_eps: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See `steps.norm_quantize`."""
    x_ND, norms_GD = x_ND.contiguous(), norms_GD.contiguous()
    rows, size = x_ND.shape
    groups = norms_GD.shape[0]
    out, step = _results(groups, rows, size, dtype, x_ND)
    with on_device(x_ND):
        _norm_quantize_kernel[(rows,)](
            x_ND,
            x_ND if outer_D is None else outer_D,
            norms_GD,
            out,
            step,
            rows,
            size,
            outer_eps,
            eps,
            GROUPS=groups,
            OUTER=outer_D is not None,
            DEQUANTIZE=dtype != INT8,
            enable_fp_fusion=False,
            **row_shape(size),
        )
    return out, step


def glu_quantize(
    gu_N2M: Tensor, norm_M: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `steps.glu_quantize`."""
    gu_N2M = gu_N2M.contiguous()
    rows, size = gu_N2M.shape[0], gu_N2M.shape[1] // 2
    out, step = _results(1, rows, size, dtype, gu_N2M)
    with on_device(gu_N2M):
        _glu_quantize_kernel[(rows,)](
            gu_N2M,
            norm_M,
            out,
            step,
            size,
            eps,
            DEQUANTIZE=dtype != INT8,
            enable_fp_fusion=False,
            **row_shape(size),
        )
    return out, step


def gate_quantize(
    g_ND: Tensor,
    h_ND: Tensor,
    gate_D: Tensor,
    norm_D: Tensor,
    gate_eps: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See `steps.gate_quantize`."""
    g_ND, h_ND = g_ND.contiguous(), h_ND.contiguous()
    rows, size = g_ND.shape
    out, step = _results(1, rows, size, dtype, g_ND)
    with on_device(g_ND):
        _gate_quantize_kernel[(rows,)](
            g_ND,
            h_ND,
            gate_D,
            norm_D,
            out,
            step,
            size,
            gate_eps,
            eps,
            DEQUANTIZE=dtype != INT8,
            enable_fp_fusion=False,
            **row_shape(size),
        )
    return out, step
