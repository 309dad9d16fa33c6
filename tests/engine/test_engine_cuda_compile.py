"""Every triton kernel of the GPU engine compiles for real chips, on a machine without one."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest
from machine import need_triton

need_triton()

PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nomatmul.engine.backends.cuda import fff_kernels, kernels

kernels.FUSED = triton.language.constexpr(False)  # its two fused steps are meant; no others may be
ROW = {"D": 2560, "RB": 640, "BLOCK": 4096}
TYPES = {"row_ptr": "*i32", "rows_ptr": "*u8", "trees": "i32", "acc_ptr": "*i32",
         "flag_ptr": "*i32", "q_ptr": "*i8", "w_ptr": "*u8", "tokens": "i32",
         "N": "i32", "width": "i32", "part": "i32", "sequence_ptr": "*i32", "start_ptr": "*i32",
         "state_stride": "i32", "stride": "i32",
         "eps": "fp32", "eps1": "fp32", "eps2": "fp32", "w_scale": "fp32",
         "w_scale_i": "fp32", "w_scale_f": "fp32", "w_scale_g": "fp32"}
TILE, WARPS = {"BT": 128, "BN": 128, "GROUP": 8}, {"num_warps": 8, "num_stages": 3}
CASES = [
    ("residual_norm_kernel", {**ROW, "C": 3, "ADD": True}, {}),
    ("residual_norm_kernel", {**ROW, "C": 1, "ADD": False}, {}),
    ("gate_norm_kernel", ROW, {}),
    ("glu_kernel", {"D": 6912, "RB": 1728, "BLOCK": 8192}, {}),
    ("gates_kernel", {"D": 2560, "BLOCK": 1024}, {}),
    ("scan_kernel", {"D": 2560, "ROWS": 16, "CHANNELS": 32}, {"num_warps": 1}),
    ("product_kernel", {"RB": 640, "BT": 16, "BN": 16, "BK": 64, "HALF": False}, {"num_warps": 2}),
    ("product_kernel", {"RB": 640, "BT": 64, "BN": 128, "BK": 64, "HALF": False}, {"num_warps": 4}),
    ("matmul_kernel", {"K": 2560, "BK": 64, **TILE, "GLU": False}, WARPS),
    ("matmul_kernel", {"K": 2560, "BK": 64, **TILE, "GLU": True}, WARPS),
    ("walk_kernel", {"NODES": 31, "LEVELS": 5, "RB": 640, "BLOCK": 1024, "TREES": 1}, {}),
    ("walk_kernel", {"NODES": 31, "LEVELS": 5, "RB": 192, "BLOCK": 256, "TREES": 4}, {}),
    ("hidden_kernel", {"A": 320, "BLOCK": 512}, {}),
    ("combine_kernel", {"A": 320, "D": 2560, "RB": 640, "BLOCK": 128, "ROWS": 16, "PART": 320,
                        "SHARED": False}, {}),
    ("combine_kernel", {"A": 15, "D": 42, "RB": 64, "BLOCK": 64, "ROWS": 16, "PART": 16,
                        "SHARED": True}, {}),
]
for name, constants, options in CASES:
    kernel = getattr(kernels, name, None) or getattr(fff_kernels, name)
    for capability in map(int, sys.argv[1:]):
        types = TYPES
        products = name in ("product_kernel", "matmul_kernel")
        if capability == 80 and not products:
            continue  # the others have nothing of a chip in them: the oldest and the newest do
        if name == "matmul_kernel":
            if capability < 80:
                print(name, "is not used there")
                continue
            out = "*fp32" if constants["GLU"] else "*i32"
            types = {**TYPES, "w_ptr": "*i8", "out_ptr": out}
        signature = {
            arg: "constexpr" if arg in constants else types.get(arg, "*fp32")
            for arg in kernel.arg_names
        }
        if "HALF" in constants:
            constants["HALF"] = capability < 80
        source = ASTSource(kernel, signature, constants)
        done = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                              options={"enable_fp_fusion": False, **options})
        ptx = done.asm["ptx"]
        fused = [line for line in ptx.splitlines() if "fma.rn.f" in line]
        exact = name != "product_kernel"  # sums of integers
        assert not (exact and fused), (name, capability, fused[0])
        assert "div.full.f32" not in ptx, (name, capability)
        print(name, capability, done.metadata.shared)
"""


@pytest.mark.parametrize(("capability", "kernels"), [("75", 15), ("80", 4), ("90", 15)])
def test_kernels_compile_and_round_every_step(
    warm_python: str, capability: str, kernels: int
) -> None:
    done = subprocess.run(
        [warm_python, "-c", PROGRAM, capability], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == kernels


@pytest.fixture
def _nvrtc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVRTC with an empty cache, or a skipped test."""
    from nomatmul.engine.backends.cuda.nvrtc import CompileError, _library

    try:
        _library()
    except CompileError as error:
        pytest.skip(f"NVRTC is not on this machine: {error}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("_nvrtc")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("mixer", ["glu", "none"])
def test_persistent_kernel_compiles(capability: tuple[int, int], mixer: str) -> None:
    from nomatmul.engine.backends.cuda.decoder import best_blocks, defines
    from nomatmul.engine.backends.cuda.nvrtc import CompileError, compile_cubin
    from nomatmul.engine.backends.cuda.plan import Plan
    from nomatmul.formats.config import ModelConfig

    plan = Plan.of(ModelConfig(vocab_size=67, hidden_size=42, num_layers=2, channel_mixer=mixer))
    macros = defines(plan, 0, best_blocks(plan, 132))
    cubin = compile_cubin("decode.cu", macros, capability)
    assert cubin[:4] == b"\x7fELF"
    assert compile_cubin("decode.cu", macros, capability) == cubin  # now out of the cache
    with pytest.raises(CompileError, match=r"NVRTC cannot compile decode\.cu: .*error"):
        compile_cubin("decode.cu", {**macros, "THREADS": "none"}, capability)


@pytest.mark.usefixtures("_nvrtc")
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
@pytest.mark.parametrize("mixer", ["glu", "none"])
def test_kernels_of_long_prompts_compile(capability: tuple[int, int], mixer: str) -> None:
    from nomatmul.engine.backends.cuda.nvrtc import CompileError, compile_cubin
    from nomatmul.engine.backends.cuda.plan import Plan
    from nomatmul.engine.backends.cuda.prompt import defines
    from nomatmul.formats.config import ModelConfig

    config = ModelConfig(vocab_size=67, hidden_size=44, num_layers=2, channel_mixer=mixer)
    assert compile_cubin("prompt.cu", defines(Plan.of(config)), capability)[:4] == b"\x7fELF"
    with pytest.raises(CompileError, match=r"sizes 42 and .* are not multiples of 4"):
        defines(Plan.of(dataclasses.replace(config, hidden_size=42)))


@pytest.mark.usefixtures("_nvrtc")
@pytest.mark.parametrize("glu", [False, True])
def test_the_product_of_hopper_compiles_for_every_tile(glu: bool) -> None:
    from nomatmul.engine.backends.cuda.hopper import STAGES, best_rows, defines
    from nomatmul.engine.backends.cuda.nvrtc import compile_cubin

    for rows, stages in STAGES.items():
        assert stages * (128 + rows) * 128 + 1024 + 16 * stages <= 227 << 10
        assert compile_cubin("product.cu", defines(rows, glu), (9, 0), "a")[:4] == b"\x7fELF"
    assert best_rows(1, 2048, 2560, 132) == 160  # two even waves
    assert best_rows(1, 128, 64, 132) == 128
