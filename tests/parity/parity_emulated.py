"""Builds the AVX512-VNNI and AMX kernels against software stand-ins for their instructions.

The library lands in build/emulate/ under a name made of the sources' hash: built once.
"""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from machine import need_simde
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    *("csrc/kernels/avx512vnni/ternary.cc", "csrc/kernels/avx512vnni/trees.cc"),
    *("csrc/kernels/avx512vnni/dense.cc", "csrc/kernels/amx/ternary.cc"),
    *("csrc/kernels/avx512vnni/attention.cc", "csrc/core/pages.cc"),
    *("csrc/kernels/avx512vnni/panels.cc", "csrc/kernels/amx/panels.cc"),
    *("csrc/tests/emulate/c_api.cc", "csrc/tests/emulate/dense_api.cc"),
    *("csrc/tests/emulate/panels_api.cc", "csrc/core/linears/panel_weights.cc"),
    *("csrc/core/channels/fff.cc", "csrc/core/channels/fff_batches.cc"),
    *("csrc/core/memory.cc", "csrc/core/thread_pool.cc"),
)
FLAGS: tuple[str, ...] = (
    *("-std=c++17", "-O1", "-fPIC", "-w", "-ffp-contract=off", f"-I{ROOT}/csrc"),
    "-fwrapv",  # vector sums wrap; SIMDe writes them as plain sums of signed integers
    *("-DNOMATMUL_EMULATE", "-DNOMATMUL_HAVE_AVX512VNNI", "-DNOMATMUL_HAVE_AMX"),
)
SANITIZE = os.environ.get("NOMATMUL_SANITIZE")  # e.g. "address,undefined", by tests/asan
if SANITIZE:
    FLAGS += (f"-fsanitize={SANITIZE}", "-g", "-fno-sanitize-recover=undefined")
TABLES = {"avx512vnni-emulated": 0, "amx-emulated": 1}
FORMS = {"2bit": 0, "1.6bit": 1}
KV = {"f16": 0, "int8": 1, "f32": 2}

Array = NDArray[Any]


def _pointer(array: Array | None) -> ctypes.c_void_p:
    if array is None:
        return ctypes.c_void_p(None)
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


class EmulatedKernels:
    """The functions of `nomatmul._native.kernels` over the emulated tables."""

    def __init__(self, library: Path) -> None:
        self._lib = ctypes.CDLL(str(library))
        self._lib.emulated_rms_norm_quantize.restype = ctypes.c_float
        self._lib.emulated_scale_quantize.restype = ctypes.c_float
        self._lib.emulated_codes_ok.restype = ctypes.c_bool
        self._lib.emulated_causal_attention.restype = ctypes.c_bool

    def isas(self) -> list[str]:
        """Return the emulated tables' names."""
        return list(TABLES)

    def best(self) -> str:
        """Emulated kernels are never chosen."""
        raise ValueError("emulated kernels are for tests only")

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
    ) -> None:
        """out[:, n0:n1] = q @ w.T, in place."""
        self._lib.emulated_product(
            TABLES[isa],
            FORMS[packing],
            _pointer(w),
            ctypes.c_size_t(w.shape[1]),
            n0,
            n1,
            _pointer(q),
            *q.shape,
            _pointer(token_scale),
            _pointer(out),
            ctypes.c_size_t(out.shape[1]),
        )

    def rms_norm_quantize(self, isa: str, x: Array, w: Array, eps: float) -> tuple[float, Array]:
        """Return (absmax / 127, q int8)."""
        q = np.zeros(len(x), np.int8)
        step = self._lib.emulated_rms_norm_quantize(
            TABLES[isa], _pointer(x), _pointer(w), ctypes.c_float(eps), len(x), _pointer(q)
        )
        return step, q

    def normalise(self, isa: str, x: Array, eps: float, y: Array) -> None:
        """y = x / rms(x), in place."""
        self._lib.emulated_normalise(
            TABLES[isa], _pointer(x), ctypes.c_float(eps), len(x), _pointer(y)
        )

    def scale_quantize(
        self, isa: str, y: Array, w: Array | None, rounding: str = "away"
    ) -> tuple[float, Array]:
        """Return (absmax / 127, q int8) of y * w."""
        q = np.zeros(len(y), np.int8)
        step = self._lib.emulated_scale_quantize(
            *(TABLES[isa], _pointer(y), _pointer(w)),
            *(("away", "even", "up").index(rounding), len(y), _pointer(q)),
        )
        return step, q

    def rms_norm(self, isa: str, x: Array, w: Array, eps: float, y: Array) -> None:
        """y = x / rms(x) * w, in place."""
        self._lib.emulated_rms_norm(
            TABLES[isa], _pointer(x), _pointer(w), ctypes.c_float(eps), len(x), _pointer(y)
        )

    def mlgru_step(
        self, isa: str, i: Array, f: Array, lb: Array | None, keep: float, h: Array
    ) -> None:
        """One step of the recurrence, h in place."""
        pointers = (_pointer(i), _pointer(f), _pointer(lb))
        self._lib.emulated_mlgru_step(
            TABLES[isa], *pointers, ctypes.c_float(keep), len(h), _pointer(h)
        )

    def gate_norm(self, isa: str, g: Array, h: Array, w: Array, eps: float, y: Array) -> None:
        """y = rms_norm(g) * w * silu(h), in place."""
        pointers = (_pointer(g), _pointer(h), _pointer(w))
        self._lib.emulated_gate_norm(
            TABLES[isa], *pointers, ctypes.c_float(eps), len(g), _pointer(y)
        )

    def gated(self, isa: str, kind: str, gate: Array, up: Array, y: Array) -> None:
        """y = activation(gate) * up, in place."""
        number = ("gelu", "silu", "relu", "relu2").index(kind)
        self._lib.emulated_gated(
            TABLES[isa], number, _pointer(gate), _pointer(up), len(y), _pointer(y)
        )

    def add(self, isa: str, x: Array, y: Array) -> None:
        """x += y."""
        self._lib.emulated_add(TABLES[isa], _pointer(x), _pointer(y), len(x))

    def fff_forward(self, isa: str, layer: Any, x_NK: Array, threads: int) -> tuple[Array, ...]:
        """Return (y, logits, rows) of `fff_backends.StoredTrees`; ValueError if not finite."""
        visits = (len(x_NK), layer.trees, layer.depth + 1)
        out = (np.empty_like(x_NK), np.empty(visits, np.float32), np.empty(visits, np.int32))
        sizes = (layer.hidden, layer.trees, layer.depth)
        arrays = (layer.rows, layer.scales, layer.bias, layer.norm_in, layer.norm_out)
        bad = self._lib.emulated_fff_forward(
            TABLES[isa],
            ("f32", "bf16", "int8", "ternary").index(layer.form),
            ("gelu", "silu", "relu").index(layer.activation),
            *sizes,
            *(_pointer(array) for array in arrays),
            ctypes.c_float(layer.eps),
            threads,
            _pointer(x_NK),
            len(x_NK),
            *(_pointer(array) for array in (out[0], out[2], out[1])),
        )
        if bad:
            raise ValueError("a logit is not finite (NaN or infinity)")
        return out

    def causal_attention(
        self, isa: str, q: Array, k: Array, v: Array, kv: str, rows: int, out: Array
    ) -> bool:
        """out = attention of q [T, heads, E], in place; whether keys and values are finite."""
        tokens, heads, size = q.shape
        positions, kv_heads, _ = k.shape
        return bool(
            self._lib.emulated_causal_attention(
                TABLES[isa], heads, kv_heads, size, tokens, positions, KV[kv], rows,
                *(_pointer(array) for array in (q, k, v, out)),
            )
        )  # fmt: skip

    def Panels(self, isa: str, form: str, rows: Array, scale: Array, k: int) -> EmulatedPanels:
        """A matrix in panels."""
        return EmulatedPanels(self._lib, TABLES[isa], form, rows, scale, k)

    def float_product(self, isa: str, x: Array, rows: Array) -> Array:
        """x [m, k] times float rows [n, k]."""
        out = np.empty((len(x), len(rows)), np.float32)
        form = (np.float32, np.uint16, np.float16).index(rows.dtype.type)
        self._lib.emulated_float_product(
            *(TABLES[isa], form, _pointer(rows), *rows.shape, _pointer(x), len(x), _pointer(out))
        )
        return out

    def codes_ok(self, isa: str, packing: str, w: Array) -> bool:
        """Whether each byte is a legal code."""
        return bool(
            self._lib.emulated_codes_ok(
                TABLES[isa], FORMS[packing], _pointer(w), ctypes.c_size_t(w.size)
            )
        )


@dataclasses.dataclass(frozen=True)
class EmulatedPanels:
    """`nomatmul._native.kernels.Panels` over an emulated table."""

    lib: Any
    table: int
    form: str
    rows: Array
    scale: Array
    k: int

    def product(self, q: Array, step: Array) -> Array:
        """Return [m, n] for q int8 [m, k] and its steps [m, groups]."""
        out = np.empty((len(q), len(self.rows)), np.float32)
        self.lib.emulated_panels(
            *(self.table, ("2bit", "1.6bit", "int8").index(self.form)),
            *(_pointer(self.rows), _pointer(self.scale), int(self.scale.dtype == np.float16)),
            *(len(self.rows), self.k, self.scale.shape[1]),
            *(_pointer(q), _pointer(step), len(q), _pointer(out)),
        )
        return out


def _source_hash() -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    headers = (path for path in (ROOT / "csrc").rglob("*.h"))
    for path in (*sorted(headers), *(ROOT / source for source in SOURCES)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        jobs, objects = [], []
        for source in SOURCES:
            objects.append(f"{folder}/{source.replace('/', '_')}.o")
            command = [compiler, *FLAGS, "-c", str(ROOT / source), "-o", objects[-1]]
            jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        for job in jobs:
            _, errors = job.communicate()
            if job.returncode != 0:
                raise RuntimeError(f"the emulated kernels do not compile:\n{errors[-2000:]}")
        made = f"{folder}/{library.name}"
        subprocess.run([compiler, *FLAGS, "-shared", "-o", made, *objects], check=True)
        os.replace(made, library)


def build() -> EmulatedKernels:
    """Return the emulated kernels; skips the test where the machine cannot compile them."""
    return EmulatedKernels(library())


@functools.cache
def library() -> Path:
    """Return the built library; skips the test where the machine cannot compile it.

    Raises RuntimeError where all tools are there and the kernels do not compile.
    """
    compiler = need_simde()
    folder = ROOT / "build" / "emulate"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"kernels-{_source_hash()}.so"
    with open(folder / "building", "w") as lock:  # the other process of the suite waits
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            _compile(compiler, made)
    return made
