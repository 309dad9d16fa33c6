"""Kernel launches: tile sizes, grids, and which product serves how many tokens.

Legend: T tokens, C linears with one input, N rows, K columns (K4: padded to four planes of RB).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from nomatmul.engine.backends.cuda import kernels
from nomatmul.engine.backends.cuda.device import INTERPRETED

# The contract with float_ops.h: no fused multiply-adds. The interpreter has none to begin with.
_EXACT: dict[str, Any] = {} if INTERPRETED else {"enable_fp_fusion": False}
# From so many tokens on, prompt.py's kernels unpack a matrix once for all tiles of tokens and scan,
# if a sequence has at least SCAN_TOKENS of them.
UNPACK_TOKENS, SCAN_TOKENS = 96, 16


class Quantised:
    """int8 activations by planes q [C, T, 4 RB] and their steps [C, T]."""

    def __init__(self, linears: int, tokens: int, row_bytes: int, device: torch.device) -> None:
        self.q_CTK = torch.empty((linears, tokens, 4 * row_bytes), dtype=torch.int8, device=device)
        self.step_CT = torch.empty((linears, tokens), dtype=torch.float32, device=device)


def _block(columns: int, row_bytes: int) -> tuple[int, int]:
    """(elements of a row kernel's program, its warps)."""
    block = triton.next_power_of_2(max(columns, 4 * row_bytes))
    return block, min(16, max(1, block // 512))


def residual_norm(
    x_TD: Tensor, added: tuple[Tensor, Tensor, float] | None, norm_D: Tensor, eps: float,
    norm_CD: Tensor, eps2: float, row_bytes: int, flag: Tensor
) -> Quantised:  # fmt: skip
    """x += acc * (w_scale * step) where given (acc, step, w_scale); its int8 for C linears."""
    tokens, size = x_TD.shape
    out = Quantised(norm_CD.shape[0], tokens, row_bytes, x_TD.device)
    acc, step, w_scale = added if added is not None else (x_TD, x_TD, 0.0)
    block, warps = _block(size, row_bytes)
    kernels.residual_norm_kernel[(tokens,)](
        x_TD, acc, step, w_scale, norm_D, eps, norm_CD, eps2, out.q_CTK, out.step_CT, flag, tokens,
        C=norm_CD.shape[0], D=size, RB=row_bytes, BLOCK=block, ADD=added is not None,
        num_warps=warps, **_EXACT,
    )  # fmt: skip
    return out


def gate_norm(
    g_TD: Tensor, h_TD: Tensor, norm_D: Tensor, eps: float, norm_CD: Tensor, eps2: float,
    row_bytes: int, flag: Tensor
) -> Quantised:  # fmt: skip
    """int8 of norm(g) * silu(h)."""
    tokens, size = g_TD.shape
    out = Quantised(1, tokens, row_bytes, g_TD.device)
    block, warps = _block(size, row_bytes)
    kernels.gate_norm_kernel[(tokens,)](
        g_TD, h_TD, norm_D, eps, norm_CD, eps2, out.q_CTK, out.step_CT, flag, tokens,
        D=size, RB=row_bytes, BLOCK=block, num_warps=warps, **_EXACT,
    )  # fmt: skip
    return out


def glu(
    acc_TM: Tensor,
    step_T: Tensor,
    w_scale: float,
    norm_CM: Tensor,
    eps: float,
    row_bytes: int,
    flag: Tensor,
) -> Quantised:
    """int8 of silu(gate) * up of accumulators [T, 2 M]."""
    tokens, size = acc_TM.shape[0], acc_TM.shape[1] // 2
    out = Quantised(1, tokens, row_bytes, acc_TM.device)
    block, warps = _block(size, row_bytes)
    kernels.glu_kernel[(tokens,)](
        acc_TM, step_T, w_scale, norm_CM, eps, out.q_CTK, out.step_CT, flag, tokens,
        D=size, RB=row_bytes, BLOCK=block, num_warps=warps, **_EXACT,
    )  # fmt: skip
    return out


def gates(
    acc_3TD: Tensor, step_3T: Tensor, w_scales: tuple[float, float, float], bound_D: Tensor
) -> Tensor:
    """Turn accumulators of i, f, g into float32 input, forget gate and g, in place."""
    _, tokens, size = acc_3TD.shape
    out = acc_3TD.view(torch.float32)
    block = min(1024, triton.next_power_of_2(size))
    kernels.gates_kernel[(tokens, triton.cdiv(size, block))](
        acc_3TD, out, step_3T, *w_scales, bound_D, tokens,
        D=size, BLOCK=block, num_warps=4, **_EXACT,
    )  # fmt: skip
    return out


class Stretches:
    """Which tokens of a block belong to which sequence.

    sequences int32 [N]: rows of the states. starts int32 [N + 1]: where each one's tokens begin,
    and where the last one's end. longest: tokens of the longest one.
    """

    def __init__(self, sequences: Tensor, starts: Tensor, longest: int) -> None:
        self.sequences, self.starts, self.longest = sequences, starts, longest


def scan(i_TD: Tensor, f_TD: Tensor, states_SLD: Tensor, layer: int, stretches: Stretches) -> None:
    """h_t = f_t * h_(t-1) + i_t over each stretch; h replaces i."""
    sequences = stretches.sequences
    _, layers, size = states_SLD.shape
    grid = (triton.cdiv(size, 32), len(sequences))
    kernels.scan_kernel[grid](
        i_TD, f_TD, i_TD, states_SLD[:, layer], sequences, stretches.starts, layers * size,
        D=size, ROWS=16 if stretches.longest > 1 else 1, CHANNELS=32,
        num_warps=1, **_EXACT,
    )  # fmt: skip


def product(quantised: Quantised, w_CNR: Tensor) -> Tensor:
    """Exact int32 accumulators [C, T, N]; w [C, N, RB]."""
    q_CTK = quantised.q_CTK
    linears, tokens, _ = q_CTK.shape
    rows, row_bytes = w_CNR.shape[1:]
    acc_CTN = torch.empty((linears, tokens, rows), dtype=torch.int32, device=q_CTK.device)
    if tokens <= 16:
        bt, bn, warps, stages = 16, 16 if rows * linears < 16384 else 32, 2, 5
    elif tokens <= 64:
        bt, bn, warps, stages = triton.next_power_of_2(tokens), 32, 4, 4
    else:
        bt, bn, warps, stages = 64, 128, 4, 3
    grid = (triton.cdiv(rows, bn), triton.cdiv(tokens, bt), linears)
    kernels.product_kernel[grid](
        q_CTK, w_CNR, acc_CTN, tokens, rows, RB=row_bytes, BT=bt, BN=bn, BK=64,
        HALF=_half(q_CTK.device), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return acc_CTN


def _half(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
