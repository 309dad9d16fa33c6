"""Triton: the backward pass of GLU's row step, `glu_quantize` in `nomatmul.ops.bitlinear.rows`.

Programs walk the rows as `partial_sums.py` says. Everything is float32. Reference:
`nomatmul.ops.bitlinear.steps.glu_backward`.

Shape suffixes: N tokens, M intermediate, G projections that read one input.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nomatmul.ops.bitlinear.partial_sums import column_sums, programs_for
from nomatmul.ops.bitlinear.rows import on_device, sigmoid


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
    programs = programs_for(d_NM, rows, (24 if block <= 1024 else 16) // warps)
    partial = torch.empty(programs, 1, size, dtype=torch.float32, device=d_NM.device)
    with on_device(d_NM):
        _glu_backward_kernel[(programs,)](
            gu_N2M, norm_M, d_NM, w_scale_G, dgu, d_NM, partial, rows, size, eps, **shape
        )
    return dgu, d_NM, column_sums(partial)[0]
