"""Compiles every training kernel for real chips, without one: run by test_triton_kernels.

python triton_offline.py CAPABILITY: prints a line a kernel, fails on the first that does not.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from nomatmul.ops.bitlinear import glu_backward, partial_sums, rows, rows_backward
from nomatmul.ops.bitlinear import triton as products
from nomatmul.ops.loss import triton as losses
from nomatmul.ops.mlgru import gated

ROW = {"BLOCK": 1024, "num_warps": 4}
SCAN = gated._LAUNCH
_INTEGERS = {
    "rows", "size", "count", "tokens", "outputs", "inputs", "tiles_each", "tiles", "steps",
    "channels", "vocabulary", "ignored", "length", "segments", "programs", "parts",
    "taught_stride",
}  # fmt: skip
_FLOATS = {"eps", "outer_eps", "gate_eps", "share", "temperature"}
_BYTES = {"q_ptr", "t_ptr"}
_HALF = {
    "x_ptr", "gu_ptr", "g_ptr", "i_ptr", "f_ptr", "d_ptr", "y_ptr", "dx_ptr", "dgu_ptr", "dg_ptr",
    "di_ptr", "df_ptr", "residual_ptr", "logits_ptr",
}  # fmt: skip
_OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}


def _type(name: str, half: str, extra: dict[str, str]) -> str:
    if name in extra:
        return extra[name]
    if name in _INTEGERS:
        return "i32"
    if name in _FLOATS:
        return "fp32"
    if name in _BYTES:
        return "*i8"
    if name == "target_ptr":
        return "*i64"
    return f"*{half}" if name in _HALF else "*fp32"


def build(
    kernel: Any, capability: int, half: str, values: dict[str, Any], extra: dict[str, str]
) -> Any:
    """Compile one kernel; integers divisible by 16, as sizes of models are."""
    options = {k: v for k, v in values.items() if k in _OPTIONS}
    constants = {k: v for k, v in values.items() if k not in _OPTIONS}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else _type(n, half, extra) for n in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or signature[name] == "i32"
    }
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def jobs(capability: int) -> list[tuple[str, Any, dict[str, Any], dict[str, str]]]:
    """(name, kernel, constants and options, types that differ) of everything to compile."""
    exact = {**ROW, "enable_fp_fusion": False}
    half = "bf16" if capability >= 80 else "fp16"
    found: list[tuple[str, Any, dict[str, Any], dict[str, str]]] = []
    for quantised, kind in ((False, "*i8"), (True, f"*{half}")):
        constants = {**exact, "DEQUANTIZE": quantised}
        out = {"out_ptr": kind}
        norm = {**constants, "GROUPS": 3, "OUTER": True}
        found.append(("norm_quantize", rows._norm_quantize_kernel, norm, out))
        found.append(("glu_quantize", rows._glu_quantize_kernel, constants, out))
        found.append(("gate_quantize", rows._gate_quantize_kernel, constants, out))
    back = rows_backward
    for groups in (1, 3):
        norm = {**ROW, "GROUPS": groups, "OUTER": groups == 3, "RESIDUAL": True}
        found.append(("norm_backward", back._norm_backward_kernel, norm, {}))
    found.append(("glu_backward", glu_backward._glu_backward_kernel, {**ROW, "PIECES": 3}, {}))
    found.append(("gate_backward", back._gate_backward_kernel, ROW, {}))
    columns = {"ROWS": 64, "COLUMNS": 32, "num_warps": 4}
    found.append(("column_sums", partial_sums._column_sums_kernel, columns, {}))
    for summary in (True, False):
        scan = {**SCAN, "BOUND": True, "SUMMARY": summary}
        found.append(("gated_scan", gated._gated_scan_kernel, scan, {}))
        found.append(("gated_scan_backward", gated._gated_scan_backward_kernel, scan, {}))
    entropy = {"GRADIENT": True, "BLOCK": 4096, "num_warps": 8}
    found.append(("cross_entropy", losses._cross_entropy_kernel, entropy, {}))
    found.append(("mixed", losses._mixed_kernel, entropy, {"taught_ptr": f"*{half}"}))
    wide = {"partial_ptr": "*fp64"}
    sums = {"BLOCK": 2048, "num_warps": 8}
    found.append(("absolute_sums", products._absolute_sums_kernel, sums, wide))
    ternary = {"SUMMERS": 256, "BLOCK": 4096, "num_warps": 8}
    found.append(("ternarize", products._ternarize_kernel, ternary, wide))
    tile = products.tile_shape(capability // 10, 4096)
    common = {**tile, "BAND": 8, "FLATTEN": False, "HALVES": capability < 80}
    plain = {**common, "RAW": False, "RESIDUAL": True, "DESCRIPTORS": False, "EVEN": False}
    found.append(("product", products._product_kernel, plain, {"out_ptr": f"*{half}"}))
    if capability >= 90:
        deep, flat = tile["BLOCK_K"], {"DESCRIPTORS": True, "FLATTEN": True}
        boxes = {
            "q_ptr": f"tensordesc<i8[{tile['BLOCK_N']}, {deep}]>",
            "t_ptr": f"tensordesc<i8[{tile['BLOCK_M']}, {deep}]>",
            "out_ptr": f"*{half}",
        }
        found.append(("product, TMA", products._product_kernel, {**plain, **flat}, boxes))
    return found


def main(capability: int) -> None:
    half = "bf16" if capability >= 80 else "fp16"
    for name, kernel, values, extra in jobs(capability):
        built = build(kernel, capability, half, values, extra)
        print(f"sm_{capability} {name}: {built.metadata.shared} bytes of shared memory", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
