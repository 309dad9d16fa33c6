"""The training kernels without a GPU: in Triton's interpreter, and compiled for real chips."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
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
from kernel_cases import FAMILIES, failures
found = [line for name in FAMILIES for line in failures("cpu", torch.float32, name)[0]]
print("\\n".join(found) or "equal")
"""
_WHOLE_MODEL = f"""{_PATCH}
from kernel_cases import least_model_errors
from nomatmul.models import CausalLM, CausalLMConfig
from nomatmul.ops.bitlinear import ternary_cache
from nomatmul.ops.bitlinear import triton as products
products._SUMMERS = 4  # programs of a launch, which the interpreter runs one after the other
torch.manual_seed(1)
sizes = dict(vocab_size=20, hidden_size=24, num_layers=2, intermediate_size=40)
model = CausalLM(CausalLMConfig(**sizes)).train()
with ternary_cache():
    loss, worst = least_model_errors(model, 1)
print("equal" if loss < 2e-6 and worst < 5e-5 else (loss, worst))
"""
_HERE = Path(__file__).parent


def _run(python: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    source = str(_HERE.parents[1] / "src")
    paths = os.pathsep.join([source, str(_HERE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [python, *arguments],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_kernels_equal_their_references_in_the_interpreter(interpreting_python):
    done = _run(interpreting_python, "-c", _INTERPRETED)
    assert done.stdout.startswith("equal"), done.stdout + done.stderr[-2000:]


def test_a_whole_model_equals_its_layers_in_the_interpreter(interpreting_python):
    done = _run(interpreting_python, "-c", _WHOLE_MODEL)
    assert done.stdout.startswith("equal"), done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("capability", [75, pytest.param(80, marks=pytest.mark.slow), 90])
def test_kernels_compile_for(capability, tmp_path, warm_python):
    need_triton()
    script, cache = str(_HERE / "triton_offline.py"), str(tmp_path)
    done = _run(warm_python, script, str(capability), TRITON_CACHE_DIR=cache)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
