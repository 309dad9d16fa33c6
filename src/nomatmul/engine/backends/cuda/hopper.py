"""The int8 product of product.cu: tiles for a shape, operands as tensor maps.

Legend: C linears, T tokens, N rows, K columns.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from nomatmul.engine.backends.cuda.nvrtc import CompileError, Kernel, compile_cubin

# rows of a tile: stages of shared memory that fit
STAGES = {256: 4, 192: 5, 160: 6, 128: 7}
_TOKENS, _COLUMNS, _THREADS = 128, 128, 384
_UINT8, _SWIZZLE_128, _L2_256 = 0, 3, 3  # of CUtensorMapDataType, ..Swizzle, ..L2promotion


def defines(rows: int, glu: bool) -> dict[str, str]:
    """Macros of product.cu for tiles of so many rows."""
    count = rows // 2
    results = ", ".join(f"%{n}" for n in range(count))
    text = (
        f"{{ .reg .pred p; setp.ne.b32 p, %{count + 2}, 0; wgmma.mma_async.sync.aligned"
        f".m64n{rows}k32.s32.s8.s8 {{{results}}}, %{count}, %{count + 1}, p; }}"
    )
    return {
        "BN": str(rows),
        "STAGES": str(STAGES[rows]),
        "GLU": str(int(glu)),
        "WGMMA": f'"{text}"',
        "SUMS": ", ".join(f'"+r"(d[{n}])' for n in range(count)),
    }


def best_rows(linears: int, tokens: int, rows: int, processors: int) -> int:
    """Rows of a tile that keep the processors busiest: waves of tiles times their size."""
    down = -(-tokens // _TOKENS)

    def time(tile: int) -> tuple[float, int]:
        waves = -(-linears * down * -(-rows // tile) // processors)
        return waves * (tile + 16), -tile  # a tile's start and end cost as much as some rows

    return min(STAGES, key=time)


class Product:
    """Compiles and launches product.cu. Raises CompileError where it cannot run."""

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        if (properties.major, properties.minor) != (9, 0):
            raise CompileError("product.cu is for compute capability 9.0")
        self.processors = properties.multi_processor_count
        self.kernel = functools.cache(self._compiled)
        self._encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
        self.kernel(256, False)

    @staticmethod
    def _compiled(rows: int, glu: bool) -> Kernel:
        return Kernel(compile_cubin("product.cu", defines(rows, glu), (9, 0), "a"), "product")

    def launch(
        self,
        q_CTK: Tensor,
        t_NK: Tensor,
        out_CTN: Tensor,
        tile: int,
        scales: tuple[Any, float] | None,
    ) -> None:
        """t: the rows of all linears. int32 sums, or with (steps, w_scale) of a GLU float32."""
        linears, tokens, columns = q_CTK.shape
        rows = len(t_NK) // linears
        step, w_scale = scales if scales is not None else (out_CTN, 0.0)
        tiles = linears * -(-tokens // _TOKENS) * -(-rows // tile)
        numbers = (
            *(tokens, rows, out_CTN.shape[2], out_CTN.stride(0), out_CTN.stride(1)),
            *(columns, tiles),
        )
        arguments = [
            self._map(q_CTK.view(-1, columns), _TOKENS),
            self._map(t_NK, tile),
            ctypes.c_void_p(out_CTN.data_ptr()),
            ctypes.c_void_p(step.data_ptr()),
            ctypes.c_float(w_scale),
            *map(ctypes.c_int, numbers),
        ]
        stream = torch.cuda.current_stream().cuda_stream
        kernel = self.kernel(tile, scales is not None)
        kernel.launch((min(tiles, self.processors), 1), _THREADS, arguments, stream)

    def _map(self, matrix_NK: Tensor, rows: int) -> Any:
        """A CUtensorMap of boxes of so many rows and 128 columns; it lies at 64 bytes."""
        count, columns = matrix_NK.shape
        memory = (ctypes.c_char * 192)()
        place = (ctypes.addressof(memory) + 63) // 64 * 64
        found = (ctypes.c_char * 128).from_buffer(memory, place - ctypes.addressof(memory))
        status = self._encode(
            ctypes.c_void_p(place), _UINT8, 2, ctypes.c_void_p(matrix_NK.data_ptr()),
            (ctypes.c_uint64 * 2)(columns, count), (ctypes.c_uint64 * 1)(columns),
            (ctypes.c_uint32 * 2)(_COLUMNS, rows), (ctypes.c_uint32 * 2)(1, 1), 0, _SWIZZLE_128,
            _L2_256, 0,
        )  # fmt: skip
        if status:
            raise RuntimeError(f"cuTensorMapEncodeTiled: error {status}")
        return found
