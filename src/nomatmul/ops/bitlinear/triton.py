"""Triton: ternarising weights, and the int8 x ternary product with its scales in the epilogue.

Shape suffixes: N tokens, M outputs, K inputs, G products of one shape in one launch.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from nomatmul.ops.bitlinear.rows import on_device

try:  # tensor descriptors on the host side came with triton 3.4
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # pragma: no cover
    TensorDescriptor = None

_SUMMERS = 256
_BLOCK = 4096
_WIDE = 3000
"""Outputs from which programs that stay and walk many tiles beat one program a tile (H200)."""


@triton.jit
def _pick(first_ptr, second_ptr, third_ptr, which):
    w_ptr = first_ptr
    if which == 1:
        w_ptr = second_ptr
    if which == 2:
        w_ptr = third_ptr
    return w_ptr


@triton.jit
def _absolute_sums_kernel(
    first_ptr, second_ptr, third_ptr, partial_ptr, count, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    which = tl.program_id(1)
    w_ptr = _pick(first_ptr, second_ptr, third_ptr, which)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(program * BLOCK, count, tl.num_programs(0) * BLOCK):
        at = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + at, mask=at < count, other=0.0).to(tl.float32)
        total += tl.abs(w).to(tl.float64)
    tl.store(partial_ptr + which * tl.num_programs(0) + program, tl.sum(total, axis=0))


@triton.jit
def _ternarize_kernel(
    first_ptr,
    second_ptr,
    third_ptr,
    partial_ptr,
    t_ptr,
    w_scale_ptr,
    count,
    SUMMERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    which = tl.program_id(1)
    w_ptr = _pick(first_ptr, second_ptr, third_ptr, which)
    total = tl.sum(tl.load(partial_ptr + which * SUMMERS + tl.arange(0, SUMMERS)), axis=0)
    w_scale = tl.maximum((total / count).to(tl.float32), 1e-5)
    inverse = tl.div_rn(1.0, w_scale)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(w_ptr + at, mask=at < count, other=0.0).to(tl.float32) * inverse
    # half to even, then clipped: both ties at 0.5 go to zero
    t = (v > 0.5).to(tl.int8) - (v < -0.5).to(tl.int8)
    tl.store(t_ptr + tl.cast(which, tl.int64) * count + at, t, mask=at < count)
    if tl.program_id(0) == 0:
        tl.store(w_scale_ptr + which, w_scale)


def ternarize(*weights: Tensor) -> tuple[Tensor, Tensor]:
    """See `steps.ternarize`; one to three weights."""
    first, groups = weights[0], len(weights)
    assert groups <= 3, groups
    count = first.numel()
    t_GMK = torch.empty(groups, *first.shape, dtype=torch.int8, device=first.device)
    w_scale_G = torch.empty(groups, dtype=torch.float32, device=first.device)
    partial = torch.empty(groups, _SUMMERS, dtype=torch.float64, device=first.device)
    sources = [weight.detach().contiguous() for weight in weights]
    sources += sources[-1:] * (3 - groups)
    with on_device(first):
        _absolute_sums_kernel[(_SUMMERS, groups)](*sources, partial, count, BLOCK=2048, num_warps=8)
        _ternarize_kernel[(triton.cdiv(count, _BLOCK), groups)](
            *sources, partial, t_GMK, w_scale_G, count, SUMMERS=_SUMMERS, BLOCK=_BLOCK, num_warps=8
        )
    return t_GMK, w_scale_G


@triton.jit
def _product_kernel(
    q_ptr,
    t_ptr,
    step_ptr,
    w_scale_ptr,
    residual_ptr,
    out_ptr,
    tokens,
    outputs,
    inputs,
    tiles_each,
    tiles,
    RAW: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    FLATTEN: tl.constexpr,
    HALVES: tl.constexpr,
):
    # whole numbers below 2^24 are exact in float32 too: chips without int8 units for Triton
    kind: tl.constexpr = tl.float32 if HALVES else tl.int32
    tiles_n = tl.cdiv(tokens, BLOCK_N)
    tiles_m = tl.cdiv(outputs, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        group = tile // tiles_each
        inner = tile % tiles_each
        # bands of BAND token tiles walk the weights together, so that both stay in the L2 cache
        band = inner // (BAND * tiles_m)
        high = min(tiles_n - band * BAND, BAND)
        n0 = (band * BAND + (inner % (BAND * tiles_m)) % high) * BLOCK_N
        m0 = ((inner % (BAND * tiles_m)) // high) * BLOCK_M
        n = n0 + tl.arange(0, BLOCK_N)
        m = m0 + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=kind)
        if DESCRIPTORS:
            for k0 in range(0, inputs, BLOCK_K):
                q = q_ptr.load([group * tokens + n0, k0])
                t = t_ptr.load([group * outputs + m0, k0])
                acc = tl.dot(q, t.T, acc, out_dtype=tl.int32)
        else:
            k = tl.arange(0, BLOCK_K)
            row_n = tl.minimum(n, tokens - 1).to(tl.int64) + tl.cast(group, tl.int64) * tokens
            row_m = tl.minimum(m, outputs - 1).to(tl.int64) + tl.cast(group, tl.int64) * outputs
            q_at = q_ptr + row_n[:, None] * inputs + k[None, :]
            t_at = t_ptr + row_m[None, :] * inputs + k[:, None]
            for k0 in range(0, inputs, BLOCK_K):
                if EVEN:
                    q = tl.load(q_at)
                    t = tl.load(t_at)
                else:
                    q = tl.load(q_at, mask=(k0 + k < inputs)[None, :], other=0)
                    t = tl.load(t_at, mask=(k0 + k < inputs)[:, None], other=0)
                if HALVES:
                    acc = tl.dot(q.to(tl.float16), t.to(tl.float16), acc)
                else:
                    acc = tl.dot(q, t, acc, out_dtype=tl.int32)
                q_at += BLOCK_K
                t_at += BLOCK_K
        live = (n < tokens)[:, None] & (m < outputs)[None, :]
        row = tl.cast(group, tl.int64) * tokens + n
        at = row[:, None] * outputs + m[None, :]
        if RAW:
            tl.store(out_ptr + at, acc.to(tl.int32), mask=live)
        else:
            step = tl.load(step_ptr + row, mask=n < tokens, other=0.0)
            scale = step * tl.load(w_scale_ptr + group)
            out = acc.to(tl.float32) * scale[:, None]
            if RESIDUAL:
                out += tl.load(residual_ptr + at, mask=live, other=0.0).to(tl.float32)
            tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=live)


@functools.lru_cache(maxsize=16)
def _device(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major, properties.multi_processor_count


def tile_shape(major: int, outputs: int, wide_results: bool = False) -> dict[str, int]:
    """Tile sizes and launch options by compute capability, measured on an H200.

    wide_results: four bytes each, which double the tile of results in shared memory.
    """
    if major < 8:
        return {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
    if major == 8 or major > 10:  # these share a third or less of Hopper's shared memory
        return {"BLOCK_N": 64, "BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    if wide_results:
        return {"BLOCK_N": 128, "BLOCK_M": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}
    stages = 4 if outputs >= _WIDE else 3
    return {"BLOCK_N": 128, "BLOCK_M": 256, "BLOCK_K": 128, "num_warps": 8, "num_stages": stages}


def product(
    q_GNK: Tensor,
    t_GMK: Tensor,
    step_GN: Tensor | None,
    w_scale_G: Tensor | None,
    dtype: torch.dtype,
    residual_NM: Tensor | None = None,
    *,
    tiling: dict[str, int] | None = None,
    descriptors: bool | None = None,
    persistent: bool | None = None,
) -> Tensor:
    """See `steps.product`; int32 gives the bare accumulators. The last three are for tuning."""
    q_GNK, t_GMK = q_GNK.contiguous(), t_GMK.contiguous()
    groups, tokens, inputs = q_GNK.shape
    outputs = t_GMK.shape[1]
    major, processors = _device(q_GNK.get_device()) if q_GNK.is_cuda else (0, 1)
    tiling = dict(tiling or tile_shape(major, groups * outputs, dtype.itemsize > 2))
    wide = major == 9 and groups * outputs >= _WIDE
    if descriptors is None:
        descriptors = wide and TensorDescriptor is not None
    descriptors = descriptors and inputs % 16 == 0  # bulk copies want rows at 16 bytes
    if persistent is None:
        persistent = descriptors
    out = torch.empty(groups, tokens, outputs, dtype=dtype, device=q_GNK.device)
    each = triton.cdiv(tokens, tiling["BLOCK_N"]) * triton.cdiv(outputs, tiling["BLOCK_M"])
    q, t = q_GNK, t_GMK
    if descriptors:
        depth = tiling["BLOCK_K"]
        q = TensorDescriptor.from_tensor(q.view(-1, inputs), [tiling["BLOCK_N"], depth])
        t = TensorDescriptor.from_tensor(t.view(-1, inputs), [tiling["BLOCK_M"], depth])
    raw = dtype == torch.int32
    with on_device(q_GNK):
        _product_kernel[(min(groups * each, processors) if persistent else groups * each,)](
            q,
            t,
            out if raw else step_GN,
            out if raw else w_scale_G,
            out if residual_NM is None else residual_NM.contiguous(),
            out,
            tokens,
            outputs,
            inputs,
            each,
            groups * each,
            RAW=raw,
            RESIDUAL=residual_NM is not None,
            DESCRIPTORS=descriptors,
            EVEN=inputs % tiling["BLOCK_K"] == 0,
            BAND=8,
            FLATTEN=persistent and descriptors,
            HALVES=0 < major < 8,
            **tiling,
        )
    return out
