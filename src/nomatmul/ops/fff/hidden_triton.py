"""Triton: activation, norm of the visited nodes and int8 in one pass over a token's visited nodes.

One program owns one token. Same functions, arguments and arithmetic as `hidden`, float32.

Shape suffixes: N tokens, T trees, L levels, V rows, A = T * L visited nodes of a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nomatmul.ops.bitlinear.rows import (
    divided,
    on_device,
    quantized,
    root_of,
    row_shape,
    sigmoid,
)
from nomatmul.ops.fff.surrogate import activate_backward

_ACTIVATIONS = {"gelu": 0, "silu": 1, "relu": 2}


@triton.jit
def _active(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == 0:
        return z * (0.5 * (1.0 + tl.erf(z * 0.70710678118654752)))
    if ACTIVATION == 1:
        return z * sigmoid(z, True)
    return tl.where(z > 0.0, z, z * 0.0)  # NaN stays NaN


@triton.jit
def _slope(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == 0:
        density = tl.exp(-0.5 * z * z) * 0.39894228040143268
        return 0.5 * (1.0 + tl.erf(z * 0.70710678118654752)) + z * density
    if ACTIVATION == 1:
        share = sigmoid(z)
        return share * (1.0 + z * (1.0 - share))
    return tl.where(z > 0.0, 1.0, 0.0)


@triton.jit
def _quantize_kernel(
    logits_ptr,
    rows_ptr,
    norm_ptr,
    q_ptr,
    step_ptr,
    size,
    eps,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    a = tl.arange(0, BLOCK)
    inside = a < size
    at = token * size + a
    z = tl.load(logits_ptr + at, mask=inside, other=0.0)
    row = tl.load(rows_ptr + at, mask=inside, other=0)
    norm = tl.load(norm_ptr + row, mask=inside, other=0.0).to(tl.float32)
    h = _active(z, ACTIVATION)
    root = root_of(h, size, eps)
    q, step = quantized(divided(h, root) * norm, root)
    tl.store(q_ptr + at, q.to(tl.float32), mask=inside)
    tl.store(step_ptr + token, step)


@triton.jit
def _backward_kernel(
    d_ptr,
    logits_ptr,
    rows_ptr,
    norm_ptr,
    step_ptr,
    out_ptr,
    dvisits_ptr,
    size,
    eps,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    a = tl.arange(0, BLOCK)
    inside = a < size
    at = token * size + a
    z = tl.load(logits_ptr + at, mask=inside, other=0.0)
    row = tl.load(rows_ptr + at, mask=inside, other=0)
    norm = tl.load(norm_ptr + row, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(d_ptr + at, mask=inside, other=0.0).to(tl.float32) / tl.load(step_ptr + token)
    h = _active(z, ACTIVATION)
    root = root_of(h, size, eps)
    hat = h / root
    dhat = d * norm
    dh = (dhat - hat * (tl.sum(dhat * hat, axis=0) / size)) / root
    if SLOPE:
        dh = dh * _slope(z, ACTIVATION)
    tl.store(out_ptr + at, dh, mask=inside)
    tl.store(dvisits_ptr + at, d * hat, mask=inside)


def hidden_quantize(
    logits_NTL: Tensor, rows_NTL: Tensor, norm_V: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor]:
    """See `hidden.hidden_quantize`."""
    logits, rows, norm = logits_NTL.contiguous(), rows_NTL.contiguous(), norm_V.contiguous()
    size = logits[0].numel()
    q = torch.empty_like(logits)
    step = torch.empty(len(logits), 1, dtype=torch.float32, device=logits.device)
    with on_device(logits):
        _quantize_kernel[(len(logits),)](
            logits,
            rows,
            norm,
            q,
            step,
            size,
            eps,
            ACTIVATION=_ACTIVATIONS[activation],
            enable_fp_fusion=False,
            **row_shape(size),
        )
    return q, step


def hidden_backward(
    d_NTL: Tensor,
    logits_NTL: Tensor,
    rows_NTL: Tensor,
    norm_V: Tensor,
    step_N1: Tensor,
    eps: float,
    activation: str,
    route_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """See `hidden.hidden_backward`."""
    logits, rows, norm = logits_NTL.contiguous(), rows_NTL.contiguous(), norm_V.contiguous()
    size = logits[0].numel()
    out, dvisits = torch.empty_like(logits), torch.empty_like(logits)
    with on_device(logits):
        _backward_kernel[(len(logits),)](
            d_NTL.contiguous(),
            logits,
            rows,
            norm,
            step_N1.contiguous(),
            out,
            dvisits,
            size,
            eps,
            ACTIVATION=_ACTIVATIONS[activation],
            SLOPE=not route_gradient,
            **row_shape(size),
        )
    if route_gradient:  # sums along paths: rare enough for plain PyTorch
        out = activate_backward(logits, out, activation, True)
    return out, dvisits
