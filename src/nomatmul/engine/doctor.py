"""The self-test of `nomatmul doctor` on a CPU: every kernel of every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np

from nomatmul.engine.fff import FORMS, FFFLayer, pack_rows
from nomatmul.engine.native import native


def self_test(seed: int = 0) -> list[dict[str, Any]]:
    """Run every kernel of every instruction set here against the scalar one.

    Returns [{"isa", "operation", "ok"}, ...]. Products are exact integers and float steps have
    the same bits everywhere, so equality is asked for, not closeness.
    """
    kernels = native().kernels
    names = list(kernels.isas())
    expected = _all_operations(kernels, "scalar", seed)
    results = []
    for isa in names:
        found = expected if isa == "scalar" else _all_operations(kernels, isa, seed)
        for operation, arrays in found.items():
            same = all(
                a.tobytes() == b.tobytes() for a, b in zip(arrays, expected[operation], strict=True)
            )
            results.append({"isa": isa, "operation": operation, "ok": same})
    return results


def _all_operations(kernels: Any, isa: str, seed: int) -> dict[str, list[np.ndarray]]:
    """Results of every kernel on random inputs of awkward sizes, by operation."""
    rng = np.random.default_rng(seed)
    results: dict[str, list[np.ndarray]] = {}
    for packing in ("2bit", "1.6bit"):
        for m, n, k in ((1, 67, 515), (3, 16, 1), (5, 33, 160), (37, 50, 1029)):
            rows = native().random_codes
            row_bytes = -(-k // (128 if packing == "2bit" else 160)) * 32
            w = np.zeros((n, row_bytes), np.uint8)
            rows(packing, w, k, seed + k)
            q = rng.integers(-128, 128, (m, k)).astype(np.int8)
            out = np.zeros((m, n), np.int32)
            kernels.product(isa, packing, w, q, None, out, 0, n)
            results.setdefault(f"product {packing}", []).append(out)
            legal = kernels.codes_ok(isa, packing, w.reshape(-1))
            w[n // 2, 0] = 255
            found = [legal, kernels.codes_ok(isa, packing, w.reshape(-1))]
            results.setdefault(f"codes {packing}", []).append(np.array(found))
    for d in (1, 15, 16, 129, 2560):
        a, b, c, weight = rng.standard_normal((4, d), dtype=np.float32) * 3
        y = np.zeros(d, np.float32)
        kernels.rms_norm(isa, a, weight, 1e-6, y)
        results.setdefault("rms_norm", []).append(y)
        step, q = kernels.rms_norm_quantize(isa, a, weight, 1e-6)
        results.setdefault("rms_norm_quantize", []).extend([np.array(step), np.array(q)])
        h = c.copy()
        kernels.mlgru_step(isa, a, b, np.abs(weight) / 20, 1.0, h)
        results.setdefault("mlgru_step", []).append(h)
        y = np.zeros(d, np.float32)
        kernels.gate_norm(isa, a, b, weight, 1e-5, y)
        results.setdefault("gate_norm", []).append(y)
        y = np.zeros(d, np.float32)
        kernels.gated(isa, "silu", a, b, y)
        results.setdefault("gated", []).append(y)
        x = a.copy()
        kernels.add(isa, x, b)
        results.setdefault("add", []).append(x)
    return {**results, **_trees(isa, seed)}


def _trees(isa: str, seed: int) -> dict[str, list[np.ndarray]]:
    """Outputs, paths and logits of FFF layers in every form of their rows."""
    rng = np.random.default_rng(seed)
    results: dict[str, list[np.ndarray]] = {}
    for trees, depth, size in ((1, 5, 131), (9, 2, 64)):
        count = trees * (2 ** (depth + 1) - 1)
        w_in, w_out = rng.standard_normal((2, count, size), dtype=np.float32)
        norms = [1 + rng.random(n, dtype=np.float32) for n in (size, count)]
        x_ND = rng.standard_normal((5, size), dtype=np.float32)
        for form in FORMS:
            rows, scales = pack_rows(w_in, w_out, form)
            norm_in, norm_out = norms if form == "ternary" else (None, None)
            layer = FFFLayer(
                form, rows, trees, depth, "silu",
                scales=scales, norm_in=norm_in, norm_out=norm_out, isa=isa,
            )  # fmt: skip
            y_ND, paths = layer.with_paths(x_ND)
            results.setdefault(f"trees {form}", []).extend([y_ND, paths.rows, paths.logits])
    return results
