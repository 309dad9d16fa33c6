"""FFF's Triton kernels without a GPU: in Triton's interpreter, and compiled for real chips.

As a script: `test_fff_triton.py interpret` or `test_fff_triton.py CAPABILITY...`; both
need a process of their own (triton reads TRITON_INTERPRET when it is imported).
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from machine import need_triton

_HERE = Path(__file__).parent

CASES = [  # tokens, inputs, outputs, trees, depth, form
    (5, 20, 16, 1, 0, "tiles"),
    (2, 16, 20, 1, 4, "gather"),
    (17, 20, 24, 3, 1, "tiles"),
    (2, 20, 24, 3, 2, "gather"),
    (4, 16, 16, 1, 7, "tiles"),
    (0, 16, 16, 1, 7, "tiles"),
]


def _run(python: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    source = str(_HERE.parents[1] / "src")
    folders = [source, str(_HERE), str(_HERE.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [python, str(Path(__file__)), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_kernels_equal_the_masked_form_in_the_interpreter(interpreting_python: str) -> None:
    done = _run(interpreting_python, "interpret")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("equal") == len(CASES)


# Twenty seconds a chip: the others are left to `make test-slow`.
OLDER = [pytest.param(chip, marks=pytest.mark.slow) for chip in (75, 80)]


@pytest.mark.parametrize("chip", [*OLDER, 90])
def test_kernels_compile_for_real_chips(chip: int, tmp_path: Path, warm_python: str) -> None:
    need_triton()
    done = _run(warm_python, str(chip), TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"sm_{chip} combine deep" in done.stdout


def test_stages_cover_every_level_of_every_depth():
    need_triton()
    from nomatmul.ops.fff.triton_parts import DEEPEST, Trees

    for depth, trees in itertools.product(range(25), (1, 3)):
        shape = Trees(trees, depth)
        firsts = [first for first, _ in shape.stages]
        sizes = [size for _, size in shape.stages]
        assert firsts == [sum(sizes[:s]) for s in range(len(sizes))]
        assert sum(sizes) == depth + 1
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] <= DEEPEST
        assert shape.together * shape.row >= 16
    with pytest.raises(ValueError, match="more nodes than int32 counts"):
        Trees(128, 24)
    with pytest.raises(ValueError, match="trees=0"):
        Trees(0, 3)


# -- as a script ----------------------------------------------------------------------------------


def _case(tokens: int, inputs: int, outputs: int, trees: int, depth: int, form: str) -> None:
    """One layer, forward and backward, on whole numbers: same paths, values as in float64."""
    import torch
    from kernel_cases import error, poisoned

    from nomatmul.ops import fff
    from nomatmul.ops.fff import triton as kernels

    kernels.DEEP_FROM = kernels.SHALLOW_FROM = 1 if form == "tiles" else 1 << 30
    rows = trees * (2 ** (depth + 1) - 1)

    def whole(high: int, *shape: int) -> Any:
        return torch.randint(-high, high + 1, shape).double()

    values = [whole(2, tokens, inputs), whole(1, rows, inputs), torch.randn(rows, outputs).double()]
    values.append(whole(1, rows))
    dy = torch.randn(tokens, outputs).double()

    def run(name: str, dtype: Any) -> tuple[Any, list[Any]]:
        leaves = [v.to(dtype).detach().requires_grad_() for v in values]
        y, logits, nodes = fff.fff(*leaves, trees=trees, depth=depth, implementation=name)
        loss = (y * dy.to(dtype)).sum() + 0.1 * logits.sum()
        return nodes, [y.detach(), logits.detach(), *torch.autograd.grad(loss, leaves)]

    path, expected = run("masked", torch.float64)
    with poisoned():
        nodes, ours = run("triton", torch.float32)
        h, w_out = torch.randn(nodes.shape), values[2].float()
        y = fff.combine(h, nodes, w_out, implementation="triton")
    assert torch.equal(nodes, path)
    worst = max(error(a, b) for a, b in zip(ours, expected, strict=True))
    assert worst < 2e-6, worst
    assert error(y, fff.combine(h, nodes, w_out, implementation="naive")) < 1e-6
    print("equal", tokens, trees, depth, form)


def _interpret() -> None:
    import torch
    import triton.runtime.interpreter as interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)  # numpy 2.4 refuses int() of one-element arrays
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    torch.manual_seed(3)
    for case in CASES:
        _case(*case)


_INDICES = {"nodes_ptr", "next_ptr", "perm_ptr", "table_ptr", "rows_ptr", "counts_ptr"}
_HALF = {"x_ptr", "w_ptr", "w_in_ptr", "w_out_ptr", "like_ptr", "bias_ptr", "y_ptr", "out_ptr"}


def _jobs(capability: int) -> list[tuple[str, Any, dict[str, Any]]]:
    """(name, kernel, constants and options): small trees, which compile fast."""
    from nomatmul.ops.fff import triton_combine as sums
    from nomatmul.ops.fff import triton_gather as gather
    from nomatmul.ops.fff import triton_sort as sort
    from nomatmul.ops.fff import triton_tiles as tiles
    from nomatmul.ops.fff import triton_weights as weights

    few = capability < 80
    product = {"BT": 16 if few else 64, "BK": 32 if few else 64, "num_warps": 4, "num_stages": 3}
    spread = {"BT": 16 if few else 64, "BD": 32, "num_warps": 4, "num_stages": 2}
    deep = {"LEVELS": 8, "LAST": 4, "FIRST": 4, "G": 4, "P": 1, "SORTED": True}
    shallow = {"LEVELS": 3, "LAST": 0, "FIRST": 0, "G": 3, "P": 4, "SORTED": False}
    found: list[tuple[str, Any, dict[str, Any]]] = []
    for shape in (deep, shallow):
        walked = {k: v for k, v in shape.items() if k != "LAST"}
        walk = {**walked, **product, "BIAS": True, "ACT": 1, "NEXT": True, "EVEN": False}
        found.append(("walk", tiles._walk_kernel, walk))
        row = {"A": 16 // shape["P"]}
        grouped = {**shape, **spread, **row, "PARTS": shape is shallow, "BIAS": True}
        found.append(("weights", weights._weights_kernel, grouped))
    found.append(("pick", tiles._pick_kernel, {**deep, **product, "EVEN": True}))
    two = {"LEVELS": 8, "STAGES": 2, "FIRSTS": 4 << 8, "SIZES": 4 << 8 | 4, "A": 16, "ADD": True}
    found.append(("combine deep", sums._combine_deep_kernel, {**two, **spread, "EVEN": True}))
    one = {"G": 3, "P": 4, "A": 4, "EVEN": False}
    found.append(("combine shallow", sums._combine_shallow_kernel, {**one, **spread}))
    if not few:
        return found  # what follows has nothing of a chip in it
    parts = {"PARTS": 16, "BLOCK": 256, "num_warps": 4}
    found.append(("sum parts", sums._sum_parts_kernel, parts))
    small = {"BK": 16, "BD": 16, "num_warps": 2}
    layer = {"LEVELS": 3, "G": 2, "ACT": 1, "BIAS": True, "OUT": True, "H": False}
    found.append(("gather", gather._gather_kernel, {**layer, **small}))
    rows = {"BA": 16, "BD": 32, "num_warps": 4}
    found.append(("sum rows", gather._sum_rows_kernel, rows))
    keys = {"KEYS": 16, "BLOCK": 32, "num_warps": 4}
    found.append(("count", sort._count_kernel, keys))
    table = {**keys, "TILE": 64, "SHARE": 2, "BLOCKS": 2}
    found.append(("scatter", sort._scatter_kernel, table))
    return found


def _compile(capability: int) -> None:
    from triton_offline import build

    half = "bf16" if capability >= 80 else "fp16"
    for name, kernel, values in _jobs(capability):
        types = {}
        for argument in kernel.arg_names:
            if argument in _INDICES or argument == "starts_ptr":
                types[argument] = "*i32"
            elif argument in _HALF:
                types[argument] = f"*{half}"
            else:
                types[argument] = "*fp32" if argument.endswith("_ptr") else "i32"
        built = build(kernel, capability, half, values, types)
        print(f"sm_{capability} {name}: {built.metadata.shared} bytes of shared memory", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        _interpret()
    else:
        for chip in sys.argv[1:]:
            _compile(int(chip))
