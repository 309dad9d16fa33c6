"""Launches of the ternary FFF's kernels.

Legend: T tokens, D hidden size, A active rows of a token, V rows, RB bytes of a packed row.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from nomatmul.engine.backends.cuda import fff_kernels
from nomatmul.engine.backends.cuda.launch import _EXACT, Quantised

_TILE = 1024  # packed bytes that a program of the walk reads at once
_PROGRAMS = 264  # that fill a GPU: two for each processor of the largest


def walk(quantised: Quantised, rows_V2R: Tensor, trees: int, depth: int) -> tuple[Tensor, Tensor]:
    """Return (visited rows, their accumulators), int32 [T, A] each."""
    q_TK = quantised.q_CTK[0]
    tokens, levels = len(q_TK), depth + 1
    found = torch.empty((2, tokens, trees * levels), dtype=torch.int32, device=q_TK.device)
    row_bytes = rows_V2R.shape[-1]
    block = triton.next_power_of_2(row_bytes)
    some = max(1, min(_TILE // block, triton.next_power_of_2(trees)))
    while some > 1 and tokens * triton.cdiv(trees, some) < _PROGRAMS:
        some //= 2
    fff_kernels.walk_kernel[(tokens, triton.cdiv(trees, some))](
        q_TK, rows_V2R, found[1], found[0], trees, NODES=2 ** (depth + 1) - 1, LEVELS=levels,
        RB=row_bytes, BLOCK=block, TREES=some, num_warps=max(1, min(8, some * block // 128)),
    )  # fmt: skip
    return found[0], found[1]


def hidden(
    acc_TA: Tensor,
    rows_TA: Tensor,
    step_T: Tensor,
    w_scale: float,
    norm_V: Tensor,
    eps: float,
    flag: Tensor,
) -> tuple[Tensor, Tensor]:
    """int8 [T, A] of the active neurons, and its steps [1, T]."""
    tokens, active = acc_TA.shape
    q_TA = torch.empty((tokens, active), dtype=torch.int8, device=acc_TA.device)
    step_1T = torch.empty((1, tokens), dtype=torch.float32, device=acc_TA.device)
    block = triton.next_power_of_2(active)
    fff_kernels.hidden_kernel[(tokens,)](
        acc_TA, rows_TA, step_T, w_scale, norm_V, eps, q_TA, step_1T, flag,
        A=active, BLOCK=block, num_warps=min(16, max(1, block // 256)), **_EXACT,
    )  # fmt: skip
    return q_TA, step_1T


def combine(q_TA: Tensor, rows_TA: Tensor, rows_V2R: Tensor, size: int) -> Tensor:
    """Exact int32 [T, D]: the sum over active rows of q times the row's output weights."""
    tokens, active = q_TA.shape
    row_bytes = rows_V2R.shape[-1]
    block = min(128, triton.next_power_of_2(row_bytes))
    across, at_once = triton.cdiv(row_bytes, block), min(16, triton.next_power_of_2(active))
    parts = min(triton.cdiv(_PROGRAMS, tokens * across), triton.cdiv(active, at_once))
    part = triton.cdiv(triton.cdiv(active, parts), at_once) * at_once
    parts = triton.cdiv(active, part)
    make = torch.zeros if parts > 1 else torch.empty
    acc_TD = make((tokens, size), dtype=torch.int32, device=q_TA.device)
    fff_kernels.combine_kernel[(tokens, across, parts)](
        q_TA, rows_TA, rows_V2R, acc_TD, A=active, D=size, RB=row_bytes, BLOCK=block,
        ROWS=at_once, PART=part, SHARED=parts > 1, num_warps=4,
    )  # fmt: skip
    return acc_TD
