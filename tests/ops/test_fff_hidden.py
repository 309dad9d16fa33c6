"""The middle of a ternary FFF: Triton's one pass against plain PyTorch, without a GPU."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from machine import need_triton

_PATCH = """
import torch, triton.runtime.interpreter as interpreter
patch = interpreter._patch_lang_tensor
def patched(tensor, scope):
    patch(tensor, scope)  # numpy 2.4 refuses int() of one-element arrays
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
interpreter._patch_lang_tensor = patched
"""
_INTERPRETED = f"""{_PATCH}
from nomatmul.ops.fff import hidden, hidden_triton
torch.manual_seed(0)
for activation in ("gelu", "silu", "relu"):
    for tokens, trees, levels in ((5, 3, 3), (2, 1, 4), (3, 16, 7)):
        nodes = trees * (2**levels - 1)
        logits = torch.randn(tokens, trees, levels)
        rows = torch.randint(0, nodes, logits.shape, dtype=torch.int32)
        norm, d = 1 + 0.3 * torch.randn(nodes), torch.randn(logits.shape)
        first = logits, rows, norm, 1e-6, activation
        want, got = hidden.hidden_quantize(*first), hidden_triton.hidden_quantize(*first)
        assert torch.equal(got[0], want[0]), first
        torch.testing.assert_close(got[1], want[1])
        for route in (False, True):
            second = d, logits, rows, norm, want[1], 1e-6, activation, route
            pairs = zip(hidden_triton.hidden_backward(*second), hidden.hidden_backward(*second))
            for ours, theirs in pairs:
                assert (ours - theirs).norm() <= 2e-6 * theirs.norm(), (activation, route)

import os
from nomatmul.models import FFF, FFFTraining, auxiliary_loss
results = []
for ops in ("naive", "triton"):
    os.environ["NOMATMUL_OPS"] = ops
    torch.manual_seed(0)
    layer = FFF(16, trees=2, depth=2, linear="ternary", activation="silu").train()
    layer.plan_training(FFFTraining(balance=0.1, route_gradient=True))
    x = torch.randn(6, 16, requires_grad=True)
    y = layer(x)
    (y.sin().sum() + auxiliary_loss(layer)).backward()
    results.append([y, x.grad, *(p.grad for p in layer.parameters())])
for ours, theirs in zip(*results):
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
print("equal")
"""
_COMPILE = """
import sys
from triton_offline import build
from nomatmul.ops.fff import hidden_triton as ours
capability = int(sys.argv[1])
extra = {"rows_ptr": "*i32", "logits_ptr": "*fp32", "d_ptr": "*fp32", "q_ptr": "*fp32"}
for activation, block in enumerate((32, 2048, 512)):
    shape = {"BLOCK": block, "num_warps": max(block // 256, 1), "ACTIVATION": activation}
    first = {**shape, "enable_fp_fusion": False}
    build(ours._quantize_kernel, capability, "fp16", first, extra)
    build(ours._backward_kernel, capability, "fp16", {**shape, "SLOPE": True}, extra)
print("compiled")
"""
_HERE = Path(__file__).parent


def _run(python: str, script: str, *arguments: str, **environment: str) -> str:
    source = str(_HERE.parents[1] / "src")
    paths = os.pathsep.join([source, str(_HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [python, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout or done.stderr[-2000:]


def test_kernels_and_a_layer_equal_their_references_in_the_interpreter(interpreting_python):
    assert _run(interpreting_python, _INTERPRETED) == "equal\n"


def test_kernels_compile(tmp_path, warm_python):
    need_triton()
    assert _run(warm_python, _COMPILE, "90", TRITON_CACHE_DIR=str(tmp_path)) == "compiled\n"
