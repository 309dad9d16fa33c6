"""Triton: sums over all rows, as the backward passes of the row steps need them.

A program walks rows p, p + P, p + 2P ... and keeps its sums for the norm weights in registers;
the P partial sums are added afterwards in a fixed order, so gradients do not change from run to
run.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from nomatmul.ops.bitlinear.rows import on_device

_INTERPRETED_PROGRAMS = 3  # without a GPU: enough to test the walk and the partial sums


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


def programs_for(x: Tensor, rows: int, resident: int) -> int:
    """Programs that walk the rows: as many as fit, `resident` a processor, so that none waits."""
    if not x.is_cuda:
        return min(rows, _INTERPRETED_PROGRAMS)
    return min(rows, max(1, resident) * _processors(x.get_device()))
