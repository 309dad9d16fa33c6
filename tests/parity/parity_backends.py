"""Every kernel table that this machine can run, real or emulated, behind one interface.

Legend: m tokens, k inputs, n output rows; q int8 [m, k], packed uint8 [n, row_bytes].
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import parity_emulated
import pytest
from numpy.typing import NDArray

from nomatmul import _native

ISAS = (
    "scalar",
    "avx2",
    "avx512vnni",
    "amx",
    "neon",
    "avx512vnni-emulated",
    "amx-emulated",
)
PACKINGS = ("2bit", "1.6bit")

Array = NDArray[Any]


class Kernels(Protocol):
    """The functions of `nomatmul._native.kernels`; outputs are written in place."""

    def isas(self) -> list[str]: ...

    def best(self) -> str: ...

    def product(
        self,
        isa: str,
        packing: str,
        w: Array,
        q: Array,
        token_scale: Array | None,
        out: Array,
        n0: int,
        n1: int,
    ) -> None: ...

    def rms_norm_quantize(
        self, isa: str, x: Array, w: Array, eps: float
    ) -> tuple[float, Array]: ...

    def normalise(self, isa: str, x: Array, eps: float, y: Array) -> None: ...

    def scale_quantize(
        self, isa: str, y: Array, w: Array | None, rounding: str = "away"
    ) -> tuple[float, Array]: ...

    def rms_norm(self, isa: str, x: Array, w: Array, eps: float, y: Array) -> None: ...

    def mlgru_step(
        self, isa: str, i: Array, f: Array, lb: Array | None, keep: float, h: Array
    ) -> None: ...

    def gate_norm(self, isa: str, g: Array, h: Array, w: Array, eps: float, y: Array) -> None: ...

    def gated(self, isa: str, kind: str, gate: Array, up: Array, y: Array) -> None: ...

    def add(self, isa: str, x: Array, y: Array) -> None: ...

    def causal_attention(
        self, isa: str, q: Array, k: Array, v: Array, kv: str, rows: int, out: Array
    ) -> bool: ...

    def codes_ok(self, isa: str, packing: str, w: Array) -> bool: ...

    def Panels(self, isa: str, form: str, rows: Array, scale: Array, k: int) -> Any: ...

    def float_product(self, isa: str, x: Array, rows: Array) -> Array: ...


def native() -> Kernels:
    """Return the compiled extension's kernels."""
    return _native.kernels


def kernels_of(isa: str) -> Kernels:
    """Return the module that holds `isa`; skips the test, with the reason, where none does."""
    if isa.endswith("-emulated"):
        return parity_emulated.build()
    module = native()
    names = module.isas()
    if isa not in names:
        pytest.skip(f"{isa}: this machine or build has only {', '.join(names)}")
    return module


def pack(t_NK: NDArray[np.int8], form: str) -> NDArray[np.uint8]:
    """Pack ternary values as formats.packing does."""
    from nomatmul.formats.packing import pack_ternary

    return pack_ternary(t_NK, form)
