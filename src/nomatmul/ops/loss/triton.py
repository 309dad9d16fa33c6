"""Triton: cross-entropy of rows of logits, the gradient written over the logits.

Shape suffixes: N tokens, V vocabulary. Reference: `nomatmul.ops.loss.naive.cross_entropy_rows`.
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
    block = min(max(triton.next_power_of_2(vocabulary), 32), 4096)
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
