"""Ternary layers whose weights are not rounded: the product that they are, on every path."""

from __future__ import annotations

import pytest
import torch
from dials import DIALS
from torch import Tensor
from torch.nn.functional import linear

from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.models import BitLinear, TernaryLinear
from nomatmul.models.layers import DenseLinear
from nomatmul.ops.bitlinear import Form

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "intermediate_size": 48}
TERNARY = [
    name
    for name, dials in DIALS.items()
    if architecture_of(ModelConfig(**{**SIZES, **dials})).is_ternary
]
LAYERS = {
    "bit linear": BitLinear(24, 10),
    "no norm, even": TernaryLinear(24, 10, form=Form("even")),
    "blocks of rows, up": TernaryLinear(24, 10, eps=1e-5, form=Form("up", scale_rows=5)),
    "groups of inputs": TernaryLinear(24, 10, form=Form(scale_group=8)),
}
TIES = {
    "away": lambda x: x.trunc() + torch.where((x - x.trunc()).abs() >= 0.5, x.sign(), 0.0),
    "even": torch.round,
    "up": lambda x: torch.floor(x + 0.5),
}


def oracle(x: Tensor, weight: Tensor, norm: Tensor | None, layer: TernaryLinear) -> Tensor:
    """In float64, int8 taken as the identity by autograd; the weight as it is."""
    if layer.norm is not None and norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + layer.norm.eps) * norm
    if not layer.form.scale_group:
        step = x.abs().amax(-1, keepdim=True) / 127
        x = x + (TIES[layer.form.rounding](x / step) * step - x).detach()
    return linear(x, weight)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_product_of_its_weights_with_int8_inputs(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]
    with torch.no_grad():
        layer.weight.normal_(std=0.3)
        if layer.norm is not None:
            layer.norm.weight.uniform_(0.5, 1.5)
    x, grad = torch.randn(3, 5, 24), torch.randn(3, 5, 10)
    rounded = layer(x)
    layer.full_precision = True
    ours = [x.requires_grad_(), *layer.parameters()]
    theirs = [t.detach().double().requires_grad_() for t in ours]
    out = layer(x)
    expected = oracle(theirs[0], theirs[1], theirs[2] if layer.norm is not None else None, layer)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert (rounded - out).norm() > 0.1 * out.norm()
    got = torch.autograd.grad((out * grad).sum(), ours)
    wanted = torch.autograd.grad((expected * grad).sum(), theirs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
    layer.full_precision = False
    assert torch.equal(layer(x), rounded)


def losses(model, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss, z = model.loss(ids, ids.roll(-1, 1), chunk=9)
    (loss + 0.1 * z).backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def far(ours: list[Tensor], theirs: list[Tensor]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-20)) for a, b in pairs)


@pytest.mark.parametrize("mode", ["none", "mlp", "block"])
@pytest.mark.parametrize("name", TERNARY)
def test_the_whole_model_takes_and_leaves_it(build, ids, fuse, name, mode) -> None:
    """Layer by layer, recomputed and fused; every ternary layer, the head and trees alike."""
    model = build(name).train()
    ternary = losses(model, ids)
    model.set_full_precision(True)
    expected = losses(model, ids)
    gaps = [abs(float(a - b)) for a, b in zip(ternary[:1], expected[:1], strict=True)]
    assert gaps[0] > 1e-4
    model.set_recompute(mode)
    assert far(losses(model, ids), expected) < 3e-6
    fuse()
    # a sum's last bit may turn an int8 value; tests/ops compares in float64
    assert far(losses(model, ids), expected) < 5e-3
    model.set_full_precision(False)
    assert far(losses(model, ids), ternary) < 3e-6


def test_dense_layers_know_nothing_of_it(build, ids) -> None:
    model = build("transformer++")
    before = model(ids).logits
    model.set_full_precision(True)
    assert torch.equal(model(ids).logits, before)
    assert not hasattr(DenseLinear, "full_precision")
