"""Ternary linears of published forms: roundings, blocks and groups of scales, stored values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nomatmul.formats.quantise import quantise_weight
from nomatmul.ops.bitlinear import (
    Form,
    absmax_quantize,
    bit_linear,
    dequantize,
    latents,
    root_mean_square,
    ternarize,
    ternary_linear,
)

FORMS = {
    "a matrix, away": Form(),
    "a matrix, even": Form("even"),
    "blocks of rows, up": Form("up", scale_rows=4),
    "groups of inputs": Form(scale_group=32),
}
ROUNDINGS = {
    "away": lambda x: x.trunc() + torch.where((x - x.trunc()).abs() >= 0.5, x.sign(), 0.0),
    "even": torch.round,
    "up": lambda x: torch.floor(x + 0.5),
}


def straight_through(x: Tensor, q: Tensor) -> Tensor:
    return x + (q - x).detach()


def reference(y: Tensor, w: Tensor, form: Form) -> Tensor:
    """The same in float64, each quantiser written as autograd sees it."""
    cut = w.reshape(*form.scale_shape(*w.shape), -1)
    scale = cut.abs().mean(-1, keepdim=True).clamp(min=1e-5)
    t = (cut / scale).round().clamp(-1, 1)
    w = straight_through(w, (t * scale).reshape(w.shape))
    if not form.scale_group:
        step = y.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        y = straight_through(y, ROUNDINGS[form.rounding](y / step).clamp(-128, 127) * step)
    return y @ w.T


def draw() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(2, 3, 64), torch.randn(12, 64) * 0.05, torch.randn(2, 3, 12)


@pytest.mark.parametrize("name", FORMS)
def test_values_and_gradients_are_those_of_the_straight_through_estimator(name):
    y, w, grad = draw()
    ours = [v.clone().requires_grad_() for v in (y, w)]
    theirs = [v.double().requires_grad_() for v in (y, w)]
    out = ternary_linear(*ours, form=FORMS[name])
    expected = reference(*theirs, FORMS[name])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad((out * grad).sum(), ours)
    wanted = torch.autograd.grad((expected * grad).sum(), theirs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_stored_values_compute_what_their_latent_weights_do(name):
    y, w, grad = draw()
    form = FORMS[name]
    t, scale = ternarize(w, form)
    stored = t.to(torch.int8), scale
    y.requires_grad_()
    out = ternary_linear(y, *stored, form=form)
    assert torch.equal(out, ternary_linear(y, w, form=form))
    (dy,) = torch.autograd.grad((out * grad).sum(), y)
    expected = grad @ dequantize(*stored)
    torch.testing.assert_close(dy, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_floats_through_stored_groups_is_exact():
    y, w, _ = draw()
    form = Form(scale_group=32)
    t, scale = ternarize(w, form)
    y = y[:1].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: ternary_linear(y, t, scale, form=form), y)


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        ("away", [3, 1, 2, -1, -2, -3, 0]),
        ("even", [2, 0, 2, 0, -2, -2, 0]),
        ("up", [3, 1, 2, 0, -1, -2, 0]),
    ],
)
def test_ties_of_activations_go_where_the_model_was_trained(rounding, expected):
    halves = torch.tensor([[2.5, 0.5, 1.5, -0.5, -1.5, -2.5, 0.25, 127.0]])
    q, step = absmax_quantize(halves, rounding)
    assert q[0].tolist() == [*expected, 127]
    assert step.item() == 1


def test_every_block_and_every_group_has_the_scale_of_a_matrix_alone():
    _, w, _ = draw()
    for form, parts in (
        (Form(scale_rows=4), w.reshape(3, 4, 64)),
        (Form(scale_group=32), w.reshape(24, 1, 32)),
    ):
        t, scale = ternarize(w, form)
        for part, values, s in zip(parts, t.reshape(parts.shape), scale.flatten(), strict=True):
            expected, expected_scale = quantise_weight(part.numpy())
            np.testing.assert_array_equal(values.numpy(), expected)
            np.testing.assert_allclose(s.numpy(), expected_scale, rtol=1e-6)


def test_a_bit_linear_is_one_of_the_forms():
    x, w, _ = draw()
    norm = torch.rand(64) + 0.5
    y = x / root_mean_square(x, 1e-6) * norm
    assert torch.equal(ternary_linear(y, w, form=Form()), bit_linear(x, w, norm, 1e-6))


@pytest.mark.parametrize("name", FORMS)
def test_latent_weights_of_stored_values_give_them_back(name):
    """A mean of |W| is not the stored scale of the same values: absmean of them is."""
    _, w, _ = draw()
    form = FORMS[name]
    t, scale = ternarize(w, form)
    t[:, :32] = 0  # a group without any weight, and less than two of three in each other
    t[0, 40] = 1
    scale = scale * 1.7
    again, found = ternarize(latents(t.to(torch.int8), scale), form)
    assert torch.equal(again, t)
    some = t.reshape(*scale.shape, -1).abs().amax(-1) > 0
    torch.testing.assert_close(found[some], scale[some], rtol=1e-6, atol=0)
    once, wrong = ternarize(dequantize(t, scale), form)
    assert torch.equal(once, t)
    assert not torch.allclose(wrong[some], scale[some], rtol=0.05)


def test_a_scale_below_the_quantisers_floor_is_refused():
    t = torch.ones(2, 32)
    with pytest.raises(ValueError, match="a scale of 1e-06 is below 1e-05"):
        latents(t, torch.tensor([1e-6]))
    with pytest.raises(ValueError, match="ternary_linear: 31 features, weight 32"):
        ternary_linear(torch.ones(1, 31), t, form=Form())
