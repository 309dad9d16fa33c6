"""Long blocks of tokens: prompt.cu between the products, matrices unpacked once for all tokens.

Legend: T tokens, S sequences, C linears with one input, D hidden size, M inner size of the GLU,
N rows, K columns, RB bytes of a packed row.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from nomatmul.engine.backends.cuda import kernels
from nomatmul.engine.backends.cuda.hopper import Product, best_rows
from nomatmul.engine.backends.cuda.launch import _EXACT, Quantised, Stretches
from nomatmul.engine.backends.cuda.nvrtc import CompileError, Kernel, compile_cubin

if TYPE_CHECKING:
    from nomatmul.engine.backends.cuda.plan import Plan

_KERNELS = ("norm1", "norm3", "gate_norm", "scan", "unpack")
_CHANNELS = 8  # of a block of the scan, and its threads
_SCAN_THREADS = 288


def defines(plan: Plan) -> dict[str, str]:
    """Macros of prompt.cu. Raises CompileError for sizes that it does not serve."""
    if plan.size % 4 or plan.inner % 4:
        raise CompileError(f"sizes {plan.size} and {plan.inner} are not multiples of 4")
    threads = {"THREADS_D": row_threads(plan.size), "THREADS_M": row_threads(plan.inner)}
    return {**plan.macros(), **{name: str(count) for name, count in threads.items()}}


def row_threads(columns: int) -> int:
    """Threads that share a row: each has a few groups of four elements, as evenly as can be."""
    places = triton.cdiv(columns, 256) * 64
    groups = triton.cdiv(places, 512 if columns > 8192 else 320)
    return triton.cdiv(places, 32 * groups) * 32 if columns else 32


class Prompt:
    """Launches prompt.cu and the product of unpacked matrices. Raises CompileError."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.size = plan.size
        capability = torch.cuda.get_device_capability(device)
        cubin = compile_cubin("prompt.cu", defines(plan), capability)
        self.hopper = Product(device) if capability == (9, 0) else None
        names = _KERNELS + (("glu_norm",) if plan.glu is not None else ())
        self.kernels = {name: Kernel(cubin, name) for name in names}
        self.threads_d, self.threads_m = row_threads(self.size), row_threads(plan.inner)

    def _launch(self, name: str, grid: tuple[int, int], threads: int, *values: Any) -> None:
        arguments = [_argument(value) for value in values]
        stream = torch.cuda.current_stream().cuda_stream
        self.kernels[name].launch(grid, threads, arguments, stream)

    def norm(
        self, x_TD: Tensor, added: tuple[Tensor, Tensor, float] | None, norm_D: Tensor,
        norm_CD: Tensor, row_bytes: int, flag: Tensor
    ) -> Quantised:  # fmt: skip
        """launch.residual_norm of one or three linears."""
        tokens, linears = len(x_TD), len(norm_CD)
        out = Quantised(linears, tokens, row_bytes, x_TD.device)
        acc, step, w_scale = added if added is not None else (None, None, 0.0)
        self._launch(
            f"norm{linears}", (tokens, 1), self.threads_d, x_TD, acc, step, w_scale, norm_D,
            norm_CD, out.q_CTK, out.step_CT, flag, tokens,
        )  # fmt: skip
        return out

    def scan(
        self, acc_3TD: Tensor, step_3T: Tensor, w_scales: tuple[float, float, float],
        bound_D: Tensor, state_SD: Tensor, stretches: Stretches
    ) -> Tensor:  # fmt: skip
        """Gates and recurrence: float32 h [T, D], in the place of the accumulators of i."""
        tokens = acc_3TD.shape[1]
        grid = triton.cdiv(self.size, _CHANNELS), len(stretches.sequences)
        self._launch(
            "scan", grid, _SCAN_THREADS, acc_3TD[0], acc_3TD[1], step_3T, w_scales[0], w_scales[1],
            bound_D, state_SD, stretches.sequences, stretches.starts, state_SD.stride(0), tokens,
        )  # fmt: skip
        return acc_3TD[0].view(torch.float32)

    def gate_norm(
        self, acc_TD: Tensor, step_T: Tensor, w_scale: float, h_TD: Tensor, norm_D: Tensor,
        norm_CD: Tensor, row_bytes: int, flag: Tensor
    ) -> Quantised:  # fmt: skip
        """int8 of norm(g) * silu(h), of the accumulators of g."""
        tokens = len(h_TD)
        out = Quantised(1, tokens, row_bytes, h_TD.device)
        self._launch(
            "gate_norm", (tokens, 1), self.threads_d, acc_TD, step_T, w_scale, h_TD, norm_D,
            norm_CD, out.q_CTK, out.step_CT, flag, tokens,
        )  # fmt: skip
        return out

    def glu_norm(self, y_TM: Tensor, norm_CM: Tensor, row_bytes: int, flag: Tensor) -> Quantised:
        """int8 of silu(gate) * up."""
        tokens = len(y_TM)
        out = Quantised(1, tokens, row_bytes, y_TM.device)
        self._launch(
            "glu_norm", (tokens, 1), self.threads_m, y_TM, norm_CM, out.q_CTK, out.step_CT, flag,
            tokens,
        )  # fmt: skip
        return out

    def product(self, quantised: Quantised, w_CNR: Tensor, scratch: Tensor) -> Tensor:
        """Exact int32 accumulators [C, T, N] of as many linears; w [C, N, RB]."""
        q_CTK = quantised.q_CTK
        linears, tokens, _ = q_CTK.shape
        rows, row_bytes = w_CNR.shape[1:]
        acc_CTN = torch.empty((linears, tokens, rows), dtype=torch.int32, device=q_CTK.device)
        whole = max(1, len(scratch) // (4 * rows * row_bytes))  # matrices that fit at once
        pieces = triton.cdiv(rows, len(scratch) // (8 * row_bytes) * 2)
        some = triton.cdiv(rows, 2 * pieces) * 2
        for c in range(0, linears, whole):
            group = min(whole, linears - c)
            for at in range(0, rows, some):
                part = w_CNR[c : c + group, at : at + some]
                t_NK = self._unpack(part, part.numel() // row_bytes, scratch)
                tile = self._tile(group, tokens, part.shape[1])
                out_CTN = acc_CTN[c : c + group, :, at : at + some]
                self._matmul(q_CTK[c : c + group], t_NK, out_CTN, tile)
        return acc_CTN

    def glu(self, quantised: Quantised, w_NR: Tensor, w_scale: float, scratch: Tensor) -> Tensor:
        """float32 silu(gate) * up [T, M]; w [2 M, RB]: the rows of gate, then those of up."""
        q_CTK = quantised.q_CTK
        tokens, inner, row_bytes = q_CTK.shape[1], len(w_NR) // 2, w_NR.shape[1]
        y_TM = torch.empty((tokens, inner), dtype=torch.float32, device=q_CTK.device)
        most = len(scratch) // (8 * row_bytes) - 128  # rows of gate, the last tile's padding aside
        some = triton.cdiv(inner, triton.cdiv(inner, most))
        tile = self._tile(1, tokens, 2 * some)
        half = tile // 2
        some = triton.cdiv(some, half) * half
        for at in range(0, inner, some):
            out_TM = y_TM[:, at : at + some]
            rows = triton.cdiv(out_TM.shape[1], half) * tile
            t_NK = self._unpack(w_NR, rows, scratch, half, at)
            self._matmul(q_CTK, t_NK, out_TM[None], tile, (quantised.step_CT, w_scale))
        return y_TM

    def _unpack(
        self, w_NR: Tensor, rows: int, scratch: Tensor, half: int = 0, begin: int = 0
    ) -> Tensor:
        """Ternary int8 [rows, 4 RB] by planes; half: rows of gate and up take turns."""
        row_bytes = w_NR.shape[-1]
        t_NK = scratch[: 4 * rows * row_bytes].view(rows, 4 * row_bytes)
        pieces = rows * row_bytes // 16
        self._launch(
            "unpack", (triton.cdiv(pieces, 256), 1), 256, w_NR, t_NK, pieces, row_bytes // 16, half,
            begin, len(w_NR) // 2,
        )  # fmt: skip
        return t_NK

    def _tile(self, linears: int, tokens: int, rows: int) -> int:
        """Rows of a tile of the product."""
        if self.hopper is None:
            return 128
        return best_rows(linears, tokens, rows, self.hopper.processors)

    def _matmul(
        self, q_CTK: Tensor, t_NK: Tensor, out_CTN: Tensor, tile: int,
        scales: tuple[Any, float] | None = None
    ) -> None:  # fmt: skip
        """int32 accumulators, or with (steps, w_scale) of a GLU silu(gate) * up."""
        if self.hopper is not None and out_CTN.stride(1) % 2 == 0:  # it stores pairs
            self.hopper.launch(q_CTK, t_NK, out_CTN, tile, scales)
            return
        linears, tokens, columns = q_CTK.shape
        rows = len(t_NK) // linears
        step, w_scale = scales if scales is not None else (out_CTN, 0.0)
        grid = linears * triton.cdiv(rows, 128) * triton.cdiv(tokens, 128)
        kernels.matmul_kernel[(grid,)](
            q_CTK, t_NK, out_CTN, step, w_scale, tokens, rows, out_CTN.shape[2], out_CTN.stride(0),
            out_CTN.stride(1), K=columns, BT=128, BN=128, BK=64, GROUP=8, GLU=scales is not None,
            num_warps=8, num_stages=3, **_EXACT,
        )  # fmt: skip


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(0)
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int(value)
