"""Triton: MLGRU's recurrence with its gates, from what the projections give to the states.

As in `nomatmul.ops.mlgru.triton` a program owns one sequence and a block of channels and walks
time in tiles, scanned in registers; the sigmoids, the lower bound and their gradients are computed
on the way, so that neither gates nor their gradients are ever stored in float32. References of the
same names: `nomatmul.ops.mlgru.naive`.

Shape suffixes: B sequences, T steps, D channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nomatmul.ops.bitlinear.rows import on_device, sigmoid

FORWARD = {"CHUNK": 32, "CHANNELS": 32, "num_warps": 2, "num_stages": 3}
BACKWARD = {"CHUNK": 32, "CHANNELS": 32, "num_warps": 2, "num_stages": 3}


@triton.jit
def _combine(decay_a, value_a, decay_b, value_b):
    return decay_a * decay_b, decay_b * value_a + value_b


@triton.jit
def _gated_scan_kernel(
    i_ptr,
    f_ptr,
    bound_ptr,
    h0_ptr,
    h_ptr,
    steps,
    channels,
    BOUND: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    batch = tl.program_id(1).to(tl.int64)
    inside = d < channels
    row = tl.arange(0, CHUNK)
    base = batch * steps * channels
    bound = tl.zeros((CHANNELS,), dtype=tl.float32)
    if BOUND:
        bound = tl.load(bound_ptr + d, mask=inside, other=0.0).to(tl.float32)
    state = tl.zeros((CHANNELS,), dtype=tl.float32)
    if STATE:
        state = tl.load(h0_ptr + batch * channels + d, mask=inside, other=0.0).to(tl.float32)
    for start in tl.range(0, steps, CHUNK):
        t = start + row
        at = base + t[:, None].to(tl.int64) * channels + d[None, :]
        live = (t < steps)[:, None] & inside[None, :]
        i = tl.load(i_ptr + at, mask=live, other=0.0).to(tl.float32)
        f = tl.load(f_ptr + at, mask=live, other=0.0).to(tl.float32)
        forget = sigmoid(f)
        if BOUND:
            forget = bound[None, :] + (1.0 - bound[None, :]) * forget
        i = i * sigmoid(i) * (1.0 - forget)
        decay, value = tl.associative_scan((forget, i), 0, _combine)
        h = value + decay * state[None, :]
        tl.store(h_ptr + at, h, mask=live)
        state = tl.sum(tl.where((row == CHUNK - 1)[:, None], h, 0.0), axis=0)


@triton.jit
def _gated_scan_backward_kernel(
    i_ptr,
    f_ptr,
    bound_ptr,
    h0_ptr,
    h_ptr,
    dh_ptr,
    dlast_ptr,
    di_ptr,
    df_ptr,
    dbound_ptr,
    dh0_ptr,
    steps,
    channels,
    BOUND: tl.constexpr,
    STATE: tl.constexpr,
    LAST: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    batch = tl.program_id(1).to(tl.int64)
    inside = d < channels
    row = tl.arange(0, CHUNK)
    base = batch * steps * channels
    bound = tl.zeros((CHANNELS,), dtype=tl.float32)
    if BOUND:
        bound = tl.load(bound_ptr + d, mask=inside, other=0.0).to(tl.float32)
    keep = 1.0 - bound[None, :]
    h0 = tl.zeros((CHANNELS,), dtype=tl.float32)
    if STATE:
        h0 = tl.load(h0_ptr + batch * channels + d, mask=inside, other=0.0).to(tl.float32)
    state = tl.zeros((CHANNELS,), dtype=tl.float32)
    if LAST:
        state = tl.load(dlast_ptr + batch * channels + d, mask=inside, other=0.0).to(tl.float32)
    dbound = tl.zeros((CHANNELS,), dtype=tl.float32)
    tiles = tl.cdiv(steps, CHUNK)
    for tile in tl.range(0, tiles):
        t = (tiles - 1 - tile) * CHUNK + row
        at = base + t[:, None].to(tl.int64) * channels + d[None, :]
        live = (t < steps)[:, None] & inside[None, :]
        followed = (t + 1 < steps)[:, None] & inside[None, :]
        i = tl.load(i_ptr + at, mask=live, other=0.0).to(tl.float32)
        f = tl.load(f_ptr + at, mask=live, other=0.0).to(tl.float32)
        after = tl.load(f_ptr + at + channels, mask=followed, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + at, mask=live, other=0.0)
        before = tl.load(h_ptr + at - channels, mask=(t > 0)[:, None] & live, other=0.0)
        before = tl.where((t == 0)[:, None], h0[None, :], before)
        # past the end a gate of 1 hands the last state's own gradient to step T-1
        gate = tl.where(followed, bound[None, :] + keep * sigmoid(after), 1.0)
        decay, value = tl.associative_scan((gate, dh), 0, _combine, reverse=True)
        s = value + decay * state[None, :]
        state = tl.sum(tl.where((row == 0)[:, None], s, 0.0), axis=0)
        share = sigmoid(i)
        active = i * share
        opened = sigmoid(f)
        shut = keep * (1.0 - opened)  # 1 - forget
        di = s * shut * (share + active * (1.0 - share))
        dforget = s * (before - active)
        df = dforget * keep * opened * (1.0 - opened)
        if BOUND:
            dbound += tl.sum(tl.where(live, dforget * (1.0 - opened), 0.0), axis=0)
        tl.store(di_ptr + at, di.to(di_ptr.dtype.element_ty), mask=live)
        tl.store(df_ptr + at, df.to(df_ptr.dtype.element_ty), mask=live)
    if BOUND:
        tl.store(dbound_ptr + batch * channels + d, dbound, mask=inside)
    first = tl.load(f_ptr + base + d, mask=inside, other=0.0).to(tl.float32)
    forget = bound + (1.0 - bound) * sigmoid(first)
    tl.store(dh0_ptr + batch * channels + d, forget * state, mask=inside)


def gated_scan(
    i_BTD: Tensor,
    f_BTD: Tensor,
    bound_D: Tensor | None,
    h0_BD: Tensor | None,
    *,
    launch: dict[str, int] | None = None,
) -> Tensor:
    """See `naive.gated_scan`; h is float32 [B, T, D]."""
    i_BTD, f_BTD = i_BTD.contiguous(), f_BTD.contiguous()
    batch, steps, channels = i_BTD.shape
    h_BTD = torch.empty(i_BTD.shape, dtype=torch.float32, device=i_BTD.device)
    launch = launch or FORWARD
    with on_device(i_BTD):
        _gated_scan_kernel[(triton.cdiv(channels, launch["CHANNELS"]), batch)](
            i_BTD,
            f_BTD,
            h_BTD if bound_D is None else bound_D.contiguous(),
            h_BTD if h0_BD is None else h0_BD.contiguous(),
            h_BTD,
            steps,
            channels,
            BOUND=bound_D is not None,
            STATE=h0_BD is not None,
            **launch,
        )
    return h_BTD


def gated_scan_backward(
    i_BTD: Tensor,
    f_BTD: Tensor,
    bound_D: Tensor | None,
    h0_BD: Tensor | None,
    h_BTD: Tensor,
    dh_BTD: Tensor,
    dlast_BD: Tensor | None = None,
    *,
    launch: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `naive.gated_scan_backward`."""
    i_BTD, f_BTD = i_BTD.contiguous(), f_BTD.contiguous()
    h_BTD, dh_BTD = h_BTD.contiguous(), dh_BTD.contiguous()
    batch, steps, channels = i_BTD.shape
    di_BTD, df_BTD = torch.empty_like(i_BTD), torch.empty_like(f_BTD)
    dbound_BD = torch.empty(batch, channels, dtype=torch.float32, device=i_BTD.device)
    dh0_BD = torch.empty_like(dbound_BD)
    launch = launch or BACKWARD
    with on_device(i_BTD):
        _gated_scan_backward_kernel[(triton.cdiv(channels, launch["CHANNELS"]), batch)](
            i_BTD,
            f_BTD,
            h_BTD if bound_D is None else bound_D.contiguous(),
            h_BTD if h0_BD is None else h0_BD.contiguous(),
            h_BTD,
            dh_BTD,
            h_BTD if dlast_BD is None else dlast_BD.contiguous(),
            di_BTD,
            df_BTD,
            dbound_BD,
            dh0_BD,
            steps,
            channels,
            BOUND=bound_D is not None,
            STATE=h0_BD is not None,
            LAST=dlast_BD is not None,
            **launch,
        )
    dbound_D = dbound_BD.sum(0) if bound_D is not None else dbound_BD.new_empty(0)
    return di_BTD, df_BTD, dbound_D, dh0_BD
