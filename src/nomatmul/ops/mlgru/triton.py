"""The recurrence h_t = f_t * h_(t-1) + i_t on a GPU, in Triton.

One program owns one sequence and a block of channels and walks time in tiles: a tile of CHUNK
steps is loaded at once (coalesced along channels), scanned inside registers with the pair
(decay, value), and joined to the state carried from the tile before. Everything is float32, the
gate is linear. The backward pass is the same walk from the end:
s_t = dh_t + f_(t+1) * s_(t+1); di = s; df = s * h_(t-1); dh0 = f_0 * s_0.

Importing this module needs triton; `nomatmul.ops.mlgru` decides whether it is used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nomatmul.ops.bitlinear.rows import on_device

CHUNK = 32
CHANNELS = 32


@triton.jit
def _combine(decay_a, value_a, decay_b, value_b):
    return decay_a * decay_b, decay_b * value_a + value_b


@triton.jit
def _forward_kernel(
    i_ptr, f_ptr, h0_ptr, h_ptr, steps, channels, CHUNK: tl.constexpr, CHANNELS: tl.constexpr
):
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    batch = tl.program_id(1).to(tl.int64)
    inside = d < channels
    row = tl.arange(0, CHUNK)
    base = batch * steps * channels
    state = tl.load(h0_ptr + batch * channels + d, mask=inside, other=0.0)
    for start in range(0, steps, CHUNK):
        t = start + row
        at = base + t[:, None].to(tl.int64) * channels + d[None, :]
        live = (t < steps)[:, None] & inside[None, :]
        # f = 1, i = 0 past the end leaves the state alone
        f = tl.load(f_ptr + at, mask=live, other=1.0)
        i = tl.load(i_ptr + at, mask=live, other=0.0)
        decay, value = tl.associative_scan((f, i), 0, _combine)
        h = value + decay * state[None, :]
        tl.store(h_ptr + at, h, mask=live)
        state = tl.sum(tl.where((row == CHUNK - 1)[:, None], h, 0.0), axis=0)


@triton.jit
def _backward_kernel(
    dh_ptr,
    f_ptr,
    h_ptr,
    h0_ptr,
    di_ptr,
    df_ptr,
    dh0_ptr,
    steps,
    channels,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    batch = tl.program_id(1).to(tl.int64)
    inside = d < channels
    row = tl.arange(0, CHUNK)
    base = batch * steps * channels
    h0 = tl.load(h0_ptr + batch * channels + d, mask=inside, other=0.0)
    state = tl.zeros((CHANNELS,), dtype=tl.float32)
    tiles = tl.cdiv(steps, CHUNK)
    for tile in range(tiles):
        t = (tiles - 1 - tile) * CHUNK + row
        at = base + t[:, None].to(tl.int64) * channels + d[None, :]
        live = (t < steps)[:, None] & inside[None, :]
        followed = (t + 1 < steps)[:, None] & inside[None, :]
        preceded = (t > 0)[:, None] & live
        dh = tl.load(dh_ptr + at, mask=live, other=0.0)
        gate = tl.load(f_ptr + at + channels, mask=followed, other=1.0)
        before = tl.load(h_ptr + at - channels, mask=preceded, other=0.0)
        before = tl.where((t == 0)[:, None], h0[None, :], before)
        decay, value = tl.associative_scan((gate, dh), 0, _combine, reverse=True)
        s = value + decay * state[None, :]
        tl.store(di_ptr + at, s, mask=live)
        tl.store(df_ptr + at, s * before, mask=live)
        state = tl.sum(tl.where((row == 0)[:, None], s, 0.0), axis=0)
    first = tl.load(f_ptr + base + d, mask=inside, other=0.0)
    tl.store(dh0_ptr + batch * channels + d, first * state, mask=inside)


def _grid(batch: int, channels: int) -> tuple[int, int]:
    return triton.cdiv(channels, CHANNELS), batch


def blocked_scan(i_BTD: Tensor, f_BTD: Tensor, h0_BD: Tensor) -> Tensor:
    """All states h [B, T, D] float32, contiguous; inputs float32 on one device."""
    i_BTD, f_BTD, h0_BD = i_BTD.contiguous(), f_BTD.contiguous(), h0_BD.contiguous()
    batch, steps, channels = i_BTD.shape
    h_BTD = torch.empty_like(i_BTD)
    with on_device(i_BTD):
        _forward_kernel[_grid(batch, channels)](
            i_BTD, f_BTD, h0_BD, h_BTD, steps, channels, CHUNK, CHANNELS, num_warps=2
        )
    return h_BTD


def blocked_scan_backward(
    dh_BTD: Tensor, f_BTD: Tensor, h_BTD: Tensor, h0_BD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (di, df, dh0), float32, for dh = the gradient of every state."""
    dh_BTD, f_BTD = dh_BTD.contiguous(), f_BTD.contiguous()
    h_BTD, h0_BD = h_BTD.contiguous(), h0_BD.contiguous()
    batch, steps, channels = f_BTD.shape
    di_BTD, df_BTD = torch.empty_like(f_BTD), torch.empty_like(f_BTD)
    dh0_BD = torch.empty_like(h0_BD)
    with on_device(f_BTD):
        _backward_kernel[_grid(batch, channels)](
            dh_BTD,
            f_BTD,
            h_BTD,
            h0_BD,
            di_BTD,
            df_BTD,
            dh0_BD,
            steps,
            channels,
            CHUNK,
            CHANNELS,
            num_warps=2,
        )
    return di_BTD, df_BTD, dh0_BD
