"""Triton: cross-entropy of rows of logits, the gradient written over the logits.

Shape suffixes: N tokens, V vocabulary. References: the functions of the same names in
`nomatmul.ops.loss.naive`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nomatmul.ops.bitlinear.rows import on_device


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    target_ptr,
    loss_scale_ptr,
    z_scale_ptr,
    loss_ptr,
    z_ptr,
    vocabulary,
    ignored,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    counted = target != ignored
    base = logits_ptr + row * vocabulary
    v = tl.arange(0, BLOCK)
    top = float("-inf")
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + v
        x = tl.load(base + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new), axis=0)
        top = new
    lse = top + tl.log(total)
    legal = (target >= 0) & (target < vocabulary)
    picked = tl.load(base + tl.where(legal, target, 0)).to(tl.float32)
    # a target outside of the vocabulary must not pass for a loss
    tl.store(loss_ptr + row, tl.where(counted, tl.where(legal, lse - picked, float("nan")), 0.0))
    tl.store(z_ptr + row, tl.where(counted, lse * lse, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # every thread has read the target's logit before one is overwritten
        scale = tl.where(counted, tl.load(loss_scale_ptr), 0.0)
        both = scale + tl.where(counted, 2.0 * lse * tl.load(z_scale_ptr), 0.0)
        for start in range(0, vocabulary, BLOCK):
            at = start + v
            x = tl.load(base + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
            d = both * tl.exp(x - lse) - tl.where(at == target, scale, 0.0)
            tl.store(base + at, d.to(logits_ptr.dtype.element_ty), mask=at < vocabulary)


def cross_entropy_rows(
    logits_NV: Tensor,
    target_N: Tensor,
    ignored: int,
    loss_scale: Tensor,
    z_scale: Tensor,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `naive.cross_entropy_rows`; the gradient lies over the logits."""
    assert logits_NV.is_contiguous()
    rows, vocabulary = logits_NV.shape
    loss_N = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    z_N = torch.empty_like(loss_N)
    block = _block(vocabulary)
    with on_device(logits_NV):
        _cross_entropy_kernel[(rows,)](
            logits_NV,
            target_N.contiguous(),
            loss_scale,
            z_scale,
            loss_N,
            z_N,
            vocabulary,
            ignored,
            GRADIENT=gradient,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 8),
        )
    return loss_N, z_N, logits_NV


@triton.jit
def _mixed_kernel(
    logits_ptr,
    taught_ptr,
    target_ptr,
    loss_scale_ptr,
    z_scale_ptr,
    loss_ptr,
    z_ptr,
    divergence_ptr,
    vocabulary,
    taught_stride,
    ignored,
    share,
    temperature,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    counted = target != ignored
    base, taught = logits_ptr + row * vocabulary, taught_ptr + row * taught_stride
    v = tl.arange(0, BLOCK)
    cool = 1.0 / temperature
    top = float("-inf")
    top_t = float("-inf")
    total = 0.0
    total_p = 0.0
    total_t = 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + v
        x = tl.load(base + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        u = tl.load(taught + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        new, new_t = tl.maximum(top, tl.max(x, axis=0)), tl.maximum(top_t, tl.max(u, axis=0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new), axis=0)
        total_p = total_p * tl.exp((top - new) * cool) + tl.sum(tl.exp((x - new) * cool), axis=0)
        total_t = total_t * tl.exp((top_t - new_t) * cool)
        total_t += tl.sum(tl.exp((u - new_t) * cool), axis=0)
        top, top_t = new, new_t
    lse = top + tl.log(total)
    lse_p = top * cool + tl.log(total_p)
    lse_t = top_t * cool + tl.log(total_t)
    legal = (target >= 0) & (target < vocabulary)
    picked = tl.load(base + tl.where(legal, target, 0)).to(tl.float32)
    # a target outside of the vocabulary must not pass for a loss
    tl.store(loss_ptr + row, tl.where(counted, tl.where(legal, lse - picked, float("nan")), 0.0))
    tl.store(z_ptr + row, tl.where(counted, lse * lse, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # every thread has read the target's logit before one is overwritten
    scale = tl.where(counted, tl.load(loss_scale_ptr), 0.0)
    mix = scale * (1.0 - share)
    both = mix + tl.where(counted, 2.0 * lse * tl.load(z_scale_ptr), 0.0)
    divergence = 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + v
        x = tl.load(base + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        u = tl.load(taught + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        log_p, log_t = x * cool - lse_p, u * cool - lse_t
        t = tl.exp(log_t)
        divergence += tl.sum(tl.where(t > 0.0, t * (log_t - log_p), 0.0), axis=0)
        if GRADIENT:
            d = both * tl.exp(x - lse) - tl.where(at == target, mix, 0.0)
            d += scale * (share * temperature) * (tl.exp(log_p) - t)
            tl.store(base + at, d.to(logits_ptr.dtype.element_ty), mask=at < vocabulary)
    tl.store(divergence_ptr + row, tl.where(counted, divergence, 0.0))


def mixed_rows(
    logits_NV: Tensor,
    taught_NV: Tensor,
    target_N: Tensor,
    ignored: int,
    share: float,
    temperature: float,
    loss_scale: Tensor,
    z_scale: Tensor,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `naive.mixed_rows`; the gradient lies over the student's logits."""
    assert logits_NV.is_contiguous()
    rows, vocabulary = logits_NV.shape
    assert taught_NV.shape[0] == rows
    assert taught_NV.shape[1] >= vocabulary
    if taught_NV.stride(1) != 1:
        taught_NV = taught_NV.contiguous()
    loss_N = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    z_N, divergence_N = torch.empty_like(loss_N), torch.empty_like(loss_N)
    block = _block(vocabulary)
    with on_device(logits_NV):
        _mixed_kernel[(rows,)](
            logits_NV,
            taught_NV,
            target_N.contiguous(),
            loss_scale,
            z_scale,
            loss_N,
            z_N,
            divergence_N,
            vocabulary,
            taught_NV.stride(0),
            ignored,
            float(share),
            float(temperature),
            GRADIENT=gradient,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 8),
        )
    return loss_N, z_N, divergence_N, logits_NV


def _block(vocabulary: int) -> int:
    """How much of a row a program holds at once."""
    return min(max(triton.next_power_of_2(vocabulary), 32), 4096)
