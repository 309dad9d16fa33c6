"""BitLinear in torch against numpy's integers and a float64 autograd reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nomatmul.formats.quantise import quantise_activation
from nomatmul.ops.bitlinear import (
    absmax_quantize,
    absmean_ternarize,
    bit_linear,
    bit_linear_accumulators,
    round_half_away,
)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def straight_through(x: Tensor, q: Tensor) -> Tensor:
    return x + (q - x).detach()


def reference(x: Tensor, w: Tensor, norm: Tensor, eps: float) -> Tensor:
    """The authors' unfused form in float64: autograd does the rest."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm
    scale = 127 / y.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    y = straight_through(y, round_half_away(y * scale).clamp(-128, 127) / scale)
    w_scale = w.abs().mean().clamp(min=1e-5)
    w = straight_through(w, (w / w_scale).round().clamp(-1, 1) * w_scale)
    return y @ w.T


def draw(tokens: tuple[int, ...], k: int, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(k)
    return (
        torch.randn(*tokens, k),
        torch.randn(m, k) * 0.05,
        1 + 0.2 * torch.randn(k),
        torch.randn(*tokens, m),
    )


@pytest.mark.parametrize(("tokens", "k", "m"), [((2, 3), 32, 7), ((5,), 1, 4), ((1, 1), 129, 3)])
def test_gradients_are_those_of_the_straight_through_estimator(tokens, k, m):
    x, w, norm, grad = draw(tokens, k, m)
    ours = [v.clone().requires_grad_() for v in (x, w, norm)]
    theirs = [v.double().requires_grad_() for v in (x, w, norm)]
    out = bit_linear(*ours, 1e-6)
    expected = reference(*theirs, 1e-6)
    assert relative(out, expected) < 1e-5
    got = torch.autograd.grad((out * grad).sum(), ours)
    wanted = torch.autograd.grad((expected * grad).sum(), theirs)
    for a, b in zip(got, wanted, strict=True):
        # one feature is normalised away: its exact gradient is zero, up to eps
        assert relative(a, b) < 2e-5 or float((a.double() - b).abs().max()) < 1e-6


def test_integers_equal_numpy():
    x, w, norm, _ = draw((3, 5), 200, 17)
    q, t, acc = bit_linear_accumulators(x, w, norm)
    assert q.dtype == torch.int8
    assert acc.dtype == torch.int32
    exact = q.numpy().astype(np.int64) @ t.numpy().astype(np.int64).T
    np.testing.assert_array_equal(acc.numpy(), exact)


def test_activation_quantiser_equals_the_shared_one(rng):
    y = rng.standard_normal((4, 33)).astype(np.float32)
    y[2] = 0
    q, step = absmax_quantize(torch.from_numpy(y))
    expected_q, expected_step = quantise_activation(y)
    np.testing.assert_array_equal(q.numpy(), expected_q)
    np.testing.assert_array_equal(step.numpy(), expected_step)


def test_ties():
    values = torch.tensor([0.5, 1.5, -0.5, -2.5, 0.49999997, -0.49999997, 126.5])
    assert round_half_away(values).tolist() == [1, 2, -1, -3, 0, 0, 127]
    # mean|W| = 1, so 0.5 and 1.5 are ties of the weight quantiser: half to even
    t, w_scale = absmean_ternarize(torch.tensor([[0.5, -0.5, 1.5, -1.5]]))
    assert w_scale == 1
    assert t.tolist() == [[0, 0, 1, -1]]


def test_zero_input_and_zero_weights_stay_finite():
    w = torch.zeros(3, 8, requires_grad=True)
    out = bit_linear(torch.zeros(2, 8), w, torch.ones(8))
    out.sum().backward()
    assert out.abs().max() == 0
    assert torch.isfinite(w.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_types_do_not_touch_the_integers(dtype):
    """The product's error is one rounding of the output type, even where sums are large."""
    x, w, norm, _ = draw((4,), 2048, 8)
    w = w.abs() + 1  # every weight is +1: sums far above float16's 65504 / 128
    x = x.abs()
    expected = bit_linear(x, w, norm)
    low = bit_linear(x.to(dtype).float(), w, norm)
    got = bit_linear(x.to(dtype), w, norm)
    assert got.dtype == dtype
    assert torch.isfinite(got).all()
    assert relative(got, low) < 2 * torch.finfo(dtype).eps
    assert relative(low, expected) < 0.05


def test_autocast_keeps_norm_and_rounding_in_float32():
    x, w, norm, grad = draw((6,), 256, 16)
    ours = [v.clone().requires_grad_() for v in (x, w, norm)]
    with torch.autocast("cpu", torch.bfloat16):
        low = bit_linear(*ours)
    assert low.dtype == torch.bfloat16
    assert relative(low, bit_linear(x, w, norm)) < 2 * torch.finfo(torch.bfloat16).eps
    (low * grad).sum().backward()
    for value in ours:
        assert value.grad.dtype == torch.float32
    full = [v.clone().requires_grad_() for v in (x, w, norm)]
    (bit_linear(*full) * grad).sum().backward()
    for a, b in zip(ours, full, strict=True):
        assert relative(a.grad, b.grad) < 0.02


def test_wrong_width_is_named():
    with pytest.raises(ValueError, match="input has 5 features, weight 4"):
        bit_linear(torch.zeros(2, 5), torch.zeros(3, 4), torch.ones(4))
