"""The scan against the recurrence, values and every gradient; Triton in its interpreter."""

from __future__ import annotations

import subprocess

import pytest
import torch
from machine import need_triton
from torch import Tensor

from nomatmul.ops.mlgru import mlgru_recurrent, mlgru_scan

LENGTHS = (1, 2, 31, 32, 33, 63, 2048)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def draw(steps: int, dtype: torch.dtype, batch: int = 2, channels: int = 5) -> list[Tensor]:
    torch.manual_seed(steps)
    shape = (batch, steps, channels)
    f = torch.rand(shape, dtype=dtype)
    f[:, :: max(1, steps // 3)] = 0.0  # the gate is linear: closed and open are ordinary values
    f[:, 1 :: max(1, steps // 2)] = 1.0
    tensors = [torch.randn(shape, dtype=dtype), f, torch.randn(batch, channels, dtype=dtype)]
    return [t.requires_grad_() for t in tensors]


@pytest.mark.parametrize("steps", LENGTHS)
def test_scan_equals_recurrence_with_all_gradients(steps):
    inputs = draw(steps, torch.float64)
    weight_h = torch.randn_like(inputs[0])
    weight_last = torch.randn_like(inputs[2])
    results = []
    for operation in (mlgru_scan, mlgru_recurrent):
        h, last = operation(*inputs)
        total = (h * weight_h).sum() + (last * weight_last).sum()
        results.append([h, last, *torch.autograd.grad(total, inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert relative(ours, theirs) < 1e-13


@pytest.mark.parametrize("steps", [33, 2048])
def test_float32_is_close_to_float64(steps):
    inputs = draw(steps, torch.float64)
    exact, _ = mlgru_recurrent(*inputs)
    low, last = mlgru_scan(*[t.float() for t in inputs])
    assert low.dtype == last.dtype == torch.float32
    assert relative(low.double(), exact) < 1e-6


def test_no_initial_state_means_zeros_and_pieces_join():
    i, f, _ = draw(50, torch.float64)
    whole, last = mlgru_scan(i, f)
    first, carry = mlgru_scan(i[:, :20], f[:, :20])
    second, end = mlgru_scan(i[:, 20:], f[:, 20:], carry)
    assert relative(torch.cat([first, second], 1), whole) < 1e-13
    assert relative(end, last) < 1e-13


def test_operator_obeys_torchs_rules():
    """Fake tensors, autograd registration and schema, as torch.compile needs them."""
    inputs = draw(9, torch.float32)
    torch.library.opcheck(torch.ops.nomatmul.mlgru_scan.default, inputs)


def test_bad_shapes_are_refused():
    i, f, h0 = draw(4, torch.float32)
    with pytest.raises(ValueError, match="one shape"):
        mlgru_scan(i, f[:, :3], h0)
    with pytest.raises(ValueError, match="T >= 1"):
        mlgru_scan(i[:, :0], f[:, :0], h0)
    with pytest.raises(ValueError, match="h0 has shape"):
        mlgru_scan(i, f, h0[:1])


def test_unknown_implementation_is_refused(monkeypatch):
    monkeypatch.setenv("NOMATMUL_OPS", "fast")
    with pytest.raises(ValueError, match="NOMATMUL_OPS='fast'"):
        mlgru_scan(*draw(4, torch.float32))


_INTERPRETED = """
import torch, triton.runtime.interpreter as interpreter
patch = interpreter._patch_lang_tensor
def patched(tensor, scope):
    patch(tensor, scope)  # numpy 2.4 refuses int() of one-element arrays
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
interpreter._patch_lang_tensor = patched
from nomatmul.ops.mlgru import naive, triton as kernels
torch.manual_seed(0)
for batch, steps, channels in ((2, 33, 5), (1, 1, 40), (1, 70, 33)):
    i, f = torch.randn(batch, steps, channels), torch.rand(batch, steps, channels)
    h0, dh = torch.randn(batch, channels), torch.randn(batch, steps, channels)
    h = naive.blocked_scan(i, f, h0)
    pairs = [(kernels.blocked_scan(i, f, h0), h)]
    back = (dh, f, h, h0)
    pairs += zip(kernels.blocked_scan_backward(*back), naive.blocked_scan_backward(*back))
    for ours, theirs in pairs:
        error = float((ours - theirs).norm() / theirs.norm())
        assert error < 2e-6, (batch, steps, channels, error)
print("equal")
"""


def test_triton_kernels_in_the_interpreter(interpreting_python):
    done = subprocess.run(
        [interpreting_python, "-c", _INTERPRETED],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_triton_kernels_on_the_gpu():
    need_triton()
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    inputs = draw(300, torch.float32, channels=70)
    on_gpu = [t.detach().cuda().requires_grad_() for t in inputs]
    results = []
    for values in (on_gpu, inputs):
        h, last = mlgru_scan(*values)
        results.append([h, last, *torch.autograd.grad(h.sum() + last.square().sum(), values)])
    for ours, theirs in zip(*results, strict=True):
        assert relative(ours.cpu(), theirs) < 2e-6
