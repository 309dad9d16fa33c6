"""The nearest ternary matrix, as latent weights that training's quantiser rounds to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nomatmul.ops.bitlinear import Form, dequantize, fitted_latents, latents, ternarize

FORMS = (Form(scale_group=8), Form(scale_group=32), Form(), Form(scale_rows=4))


def weights(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 64, generator=generator) * torch.rand(8, 64, generator=generator)


def least_error(part: Tensor) -> float:
    """By trying every number of weights that are not zero."""
    sizes = part.abs().flatten().double().sort(descending=True).values
    tried = [
        float((sizes[:k] - sizes[:k].mean()).square().sum() + sizes[k:].square().sum())
        for k in range(1, len(sizes) + 1)
    ]
    return min(tried)


@pytest.mark.parametrize("form", FORMS)
def test_no_ternary_matrix_is_nearer(form: Form) -> None:
    weight = weights()
    values, scale = ternarize(fitted_latents(weight, form), form)
    shape = form.scale_shape(*weight.shape)
    errors = (dequantize(values, scale) - weight).double().square().reshape(*shape, -1).sum(-1)
    expected = [least_error(part) for part in weight.reshape(-1, weight.numel() // errors.numel())]
    torch.testing.assert_close(errors.flatten(), torch.tensor(expected).double(), rtol=1e-5, atol=0)
    plain = dequantize(*ternarize(weight, form)) - weight
    assert float(errors.sum()) < 0.95 * float(plain.square().sum())


@pytest.mark.parametrize("form", FORMS)
def test_signs_and_order_stay(form: Form) -> None:
    weight = weights(1)
    moved = fitted_latents(weight, form)
    assert moved.dtype == torch.float32
    assert torch.equal(moved.sign(), weight.sign())
    shape = form.scale_shape(*weight.shape)
    before = weight.abs().reshape(*shape, -1).argsort(-1)
    after = moved.abs().reshape(*shape, -1)
    assert bool((after.gather(-1, before).diff(dim=-1) >= 0).all())


def test_a_ternary_matrix_is_its_own() -> None:
    form = Form(scale_group=16)
    generator = torch.Generator().manual_seed(2)
    values = torch.randint(-1, 2, (4, 32), generator=generator).to(torch.int8)
    scale = torch.rand(4, 2, generator=generator) + 0.1
    again, other = ternarize(fitted_latents(dequantize(values, scale), form), form)
    assert torch.equal(again.to(torch.int8), values)
    torch.testing.assert_close(other, scale)
    fixed = ternarize(fitted_latents(latents(values, scale), form), form)[0]
    assert torch.equal(fixed.to(torch.int8), values)


def test_zeros_and_the_floor() -> None:
    form = Form(scale_group=4)
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1e-7, -2e-7, 0.0, 3e-7]])
    assert torch.equal(fitted_latents(weight, form), weight)
