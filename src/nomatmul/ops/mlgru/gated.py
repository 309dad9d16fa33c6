"""Triton: MLGRU's recurrence with its gates, from what the projections give to the states.

A thread owns a channel or two of one sequence, or of a segment of its time, and walks it step by
step: the recurrence itself is two operations, and the sigmoids, the lower bound and their
gradients are computed on the way, so that neither gates nor their gradients are ever stored in
float32. (A scan over tiles inside registers needs 2.4 times the instructions and was bound by
them.) References of the same names: `nomatmul.ops.mlgru.naive`.

Shape suffixes: B sequences, T steps, D channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nomatmul.ops.bitlinear.rows import on_device, sigmoid

STEPS = 8  # loaded together, so that their latency overlaps
CHANNELS = 64
_LAUNCH = {"STEPS": STEPS, "CHANNELS": CHANNELS, "num_warps": 1}
_ENOUGH = 2048
"""Programs that keep a large GPU's memory busy; with fewer, time is cut into segments."""


@triton.jit
def _rows(ptr, first, steps, channels, d, inside, COUNT: tl.constexpr):
    """COUNT rows of channels from time `first` on as a tuple; 0 outside of [0, steps)."""
    found = ()
    for j in tl.static_range(COUNT):
        t = first + j
        live = inside & (t >= 0) & (t < steps)
        x = tl.load(ptr + tl.cast(t, tl.int64) * channels + d, mask=live, other=0.0)
        # triton knows tuples' sums only, mypy none of its values
        found = found + (x.to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def _gated_scan_kernel(
    i_ptr,
    f_ptr,
    bound_ptr,
    decay_ptr,
    value_ptr,
    h_ptr,
    steps,
    channels,
    length,
    BOUND: tl.constexpr,
    SUMMARY: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    batch = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(2)
    inside = d < channels
    base = batch * steps * channels
    # ends of segments: [segments, batch, channels]
    end = batch * channels + d
    plane = tl.num_programs(1).to(tl.int64) * channels
    bound = tl.zeros((CHANNELS,), dtype=tl.float32)
    if BOUND:
        bound = tl.load(bound_ptr + d, mask=inside, other=0.0).to(tl.float32)
    state = tl.zeros((CHANNELS,), dtype=tl.float32)
    passed = tl.full((CHANNELS,), 1.0, dtype=tl.float32)
    exact: tl.constexpr = i_ptr.dtype.element_ty == tl.float32
    if not SUMMARY:
        for before in range(segment):
            decay = tl.load(decay_ptr + before * plane + end, mask=inside, other=0.0)
            state = (
                tl.load(value_ptr + before * plane + end, mask=inside, other=0.0) + decay * state
            )
    for start in range(segment * length, tl.minimum(segment * length + length, steps), STEPS):
        i_rows = _rows(i_ptr + base, start, steps, channels, d, inside, STEPS)
        f_rows = _rows(f_ptr + base, start, steps, channels, d, inside, STEPS)
        for j in tl.static_range(STEPS):
            i = i_rows[j]
            # past the end the state changes, but nobody reads it: only a last segment ends there
            forget = bound + (1.0 - bound) * sigmoid(f_rows[j], exact)
            state = forget * state + i * sigmoid(i, exact) * (1.0 - forget)
            if SUMMARY:
                passed *= forget
            else:
                at = base + tl.cast(start + j, tl.int64) * channels + d
                tl.store(h_ptr + at, state, mask=inside & (start + j < steps))
    if SUMMARY:
        tl.store(decay_ptr + segment * plane + end, passed, mask=inside)
        tl.store(value_ptr + segment * plane + end, state, mask=inside)


@triton.jit
def _gated_scan_backward_kernel(
    i_ptr,
    f_ptr,
    bound_ptr,
    h_ptr,
    dh_ptr,
    decay_ptr,
    value_ptr,
    di_ptr,
    df_ptr,
    dbound_ptr,
    steps,
    channels,
    length,
    segments,
    BOUND: tl.constexpr,
    SUMMARY: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    batch = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(2)
    if SUMMARY:
        segment += 1  # nobody asks what the first one hands on
    inside = d < channels
    base = batch * steps * channels
    end = batch * channels + d
    plane = tl.num_programs(1).to(tl.int64) * channels
    bound = tl.zeros((CHANNELS,), dtype=tl.float32)
    if BOUND:
        bound = tl.load(bound_ptr + d, mask=inside, other=0.0).to(tl.float32)
    keep = 1.0 - bound
    # carried = f_(t+1) s_(t+1), what the steps after t want of h_t; it enters a segment as
    # f_(t+1) times the s that the later segments make
    carried = tl.zeros((CHANNELS,), dtype=tl.float32)
    passed = tl.full((CHANNELS,), 1.0, dtype=tl.float32)
    dbound = tl.zeros((CHANNELS,), dtype=tl.float32)
    if not SUMMARY:
        for index in range(segments - 1 - segment):
            at = (segments - 1 - index) * plane + end
            decay = tl.load(decay_ptr + at, mask=inside, other=0.0)
            carried = tl.load(value_ptr + at, mask=inside, other=0.0) + decay * carried
    tiles = tl.cdiv(tl.minimum(length, steps - segment * length), STEPS)
    for tile in range(tiles):
        start = segment * length + (tiles - 1 - tile) * STEPS
        f_rows = _rows(f_ptr + base, start, steps, channels, d, inside, STEPS)
        dh_rows = _rows(dh_ptr + base, start, steps, channels, d, inside, STEPS)
        if not SUMMARY:
            i_rows = _rows(i_ptr + base, start, steps, channels, d, inside, STEPS)
            h_rows = _rows(h_ptr + base, start - 1, steps, channels, d, inside, STEPS)
        for j in tl.static_range(STEPS - 1, -1, -1):
            t = start + j
            real = t < steps
            opened = sigmoid(f_rows[j])
            forget = tl.where(real, bound + keep * opened, 1.0)
            s = dh_rows[j] + carried
            carried = forget * s
            if SUMMARY:
                passed *= forget
            else:
                i = i_rows[j]
                share = sigmoid(i)
                active = i * share
                di = s * keep * (1.0 - opened) * (share + active * (1.0 - share))
                dforget = s * (h_rows[j] - active)
                df = dforget * keep * opened * (1.0 - opened)
                if BOUND:
                    dbound += tl.where(real, dforget * (1.0 - opened), 0.0)
                at = base + tl.cast(t, tl.int64) * channels + d
                tl.store(di_ptr + at, di.to(di_ptr.dtype.element_ty), mask=inside & real)
                tl.store(df_ptr + at, df.to(df_ptr.dtype.element_ty), mask=inside & real)
    if SUMMARY:
        tl.store(decay_ptr + segment * plane + end, passed, mask=inside)
        tl.store(value_ptr + segment * plane + end, carried, mask=inside)
    elif BOUND:
        tl.store(dbound_ptr + segment * plane + end, dbound, mask=inside)


def _cut(x_BTD: Tensor) -> tuple[tuple[int, int], int, int]:
    """(grid over channels and sequences, segments of time, their length, a multiple of STEPS)."""
    batch, steps, channels = x_BTD.shape
    grid = (triton.cdiv(channels, CHANNELS), batch)
    wanted = max(1, _ENOUGH // (grid[0] * grid[1])) if x_BTD.is_cuda else 2
    tiles = triton.cdiv(steps, STEPS)
    length = triton.cdiv(tiles, min(wanted, 16, tiles))
    return grid, triton.cdiv(tiles, length), length * STEPS


def gated_scan(i_BTD: Tensor, f_BTD: Tensor, bound_D: Tensor | None) -> Tensor:
    """See `naive.gated_scan`; h is float32 [B, T, D].

    With few channels time is cut into segments: a first pass finds what each does to a state that
    enters it, the second one starts every segment from its true state.
    """
    i_BTD, f_BTD = i_BTD.contiguous(), f_BTD.contiguous()
    batch, steps, channels = i_BTD.shape
    h_BTD = torch.empty(i_BTD.shape, dtype=torch.float32, device=i_BTD.device)
    grid, segments, length = _cut(i_BTD)
    ends = torch.empty(2, segments, batch, channels, dtype=torch.float32, device=i_BTD.device)
    bound = h_BTD if bound_D is None else bound_D.contiguous()
    with on_device(i_BTD):
        for summary in (True, False) if segments > 1 else (False,):
            _gated_scan_kernel[(*grid, segments - 1 if summary else segments)](
                i_BTD,
                f_BTD,
                bound,
                ends[0],
                ends[1],
                h_BTD,
                steps,
                channels,
                length,
                BOUND=bound_D is not None,
                SUMMARY=summary,
                **_LAUNCH,
            )
    return h_BTD


def gated_scan_backward(
    i_BTD: Tensor,
    f_BTD: Tensor,
    bound_D: Tensor | None,
    h_BTD: Tensor,
    dh_BTD: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `naive.gated_scan_backward`; cut into segments like the forward pass."""
    i_BTD, f_BTD = i_BTD.contiguous(), f_BTD.contiguous()
    h_BTD, dh_BTD = h_BTD.contiguous(), dh_BTD.contiguous()
    batch, steps, channels = i_BTD.shape
    di_BTD, df_BTD = torch.empty_like(i_BTD), torch.empty_like(f_BTD)
    grid, segments, length = _cut(i_BTD)
    ends = torch.empty(3, segments, batch, channels, dtype=torch.float32, device=i_BTD.device)
    bound = h_BTD if bound_D is None else bound_D.contiguous()
    with on_device(i_BTD):
        for summary in (True, False) if segments > 1 else (False,):
            _gated_scan_backward_kernel[(*grid, segments - 1 if summary else segments)](
                i_BTD,
                f_BTD,
                bound,
                h_BTD,
                dh_BTD,
                ends[0],
                ends[1],
                di_BTD,
                df_BTD,
                ends[2],
                steps,
                channels,
                length,
                segments,
                BOUND=bound_D is not None,
                SUMMARY=summary,
                **_LAUNCH,
            )
    dbound_D = ends[2].sum((0, 1)) if bound_D is not None else ends.new_empty(0)
    return di_BTD, df_BTD, dbound_D
