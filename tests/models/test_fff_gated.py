"""Trees of gated neurons: against the definition, the masked form, and inside a model."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nomatmul.formats import capability
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed.encoder import check_encoder
from nomatmul.formats.packed.layout import check_packable
from nomatmul.models import FFF, CausalLM, FFFTraining
from nomatmul.models.config import CausalLMConfig
from nomatmul.ops import fff as ops
from nomatmul.ops.fff import native

ON_CPU = ["naive", *(["native"] if native.available() else [])]


def make(trees, depth, linear="dense", implementation=None, **options):
    torch.manual_seed(4)
    layer = FFF(
        6, 5, trees=trees, depth=depth, linear=linear, activation="silu", gated=True,
        implementation=implementation, **options,
    )  # fmt: skip
    return layer.double() if implementation in (None, "masked") else layer


def test_a_node_adds_the_product_of_its_two_halves():
    layer = make(2, 2)
    x = torch.randn(7, 6, dtype=torch.float64)
    w_in, w_up, w_out = (w.detach() for w in (layer.w_in, layer.w_up, layer.w_out))
    for row, got in zip(x, layer(x), strict=True):
        want = torch.zeros(5, dtype=torch.float64)
        for tree in range(2):
            j = 0
            for _ in range(3):
                node = tree * 7 + j
                logit = row @ w_in[node]
                want += F.silu(logit) * (row @ w_up[node]) * w_out[node]
                j = 2 * j + 1 + int(logit > 0)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("linear", ["dense", "ternary"])
@pytest.mark.parametrize(("trees", "depth"), [(1, 0), (1, 4), (5, 2)])
def test_conditional_and_masked_agree_to_the_last_gradient(linear, trees, depth):
    found = []
    for implementation in (None, "masked"):
        layer = make(trees, depth, linear, implementation)
        torch.manual_seed(5)
        x = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
        y, logits, nodes = layer.walk_and_sum(x)
        loss = (y.sin() * y).sum() + (
            logits * torch.linspace(-1, 1, trees * (depth + 1)).view_as(logits[0])
        ).sum()
        found.append([y, logits, nodes, *torch.autograd.grad(loss, [x, *layer.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_projections_of_every_implementation(implementation, tokens):
    torch.manual_seed(6)
    x, w = torch.randn(tokens, 6), torch.randn(21, 6)
    _, nodes = ops.walk(x, torch.randn(21, 6), trees=3, depth=2)
    got = [t.requires_grad_() for t in (x.clone(), w.clone())]
    want = [t.double().requires_grad_() for t in (x, w)]
    y = ops.project(got[0], nodes, got[1], implementation=implementation)
    reference = ops.project(want[0], nodes, want[1], implementation="masked")
    assert y.shape == (tokens, 3, 3)
    torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=1e-6)
    pairs = zip(
        torch.autograd.grad(y.square().sum(), got),
        torch.autograd.grad(reference.square().sum(), want),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_a_model_of_them_trains_and_has_the_tensors_it_says():
    torch.manual_seed(7)
    config = ModelConfig(
        vocab_size=16, num_layers=2, hidden_size=8, num_heads=1, channel_mixer="fff",
        fff_trees=3, fff_depth=1, fff_gated=True, activation="silu",
    )  # fmt: skip
    model = CausalLM(CausalLMConfig.from_model_config(config))
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == architecture_of(
        config
    ).tensors()
    ids = torch.randint(0, 16, (2, 5))
    model(ids).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if "w_up" in name:
            assert float(parameter.grad.abs().max()) > 0
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_what_does_not_fit_is_refused():
    layer = make(1, 1)
    layer.plan_training(FFFTraining(route_gradient=True))
    with pytest.raises(ValueError, match="route_gradient"):
        layer(torch.randn(2, 6, dtype=torch.float64))
    sizes = {"vocab_size": 16, "num_layers": 1, "hidden_size": 8}
    with pytest.raises(ValueError, match="fff_gated"):
        ModelConfig(**sizes, channel_mixer="glu", fff_gated=True)
    with pytest.raises(ValueError, match="fff_gated"):
        ModelConfig(
            **sizes, channel_mixer="fff", linear="dense", fff_trees=1, fff_depth=1,
            fff_leaf_width=2, fff_gated=True,
        )  # fmt: skip
    x, w = torch.randn(3, 6), torch.randn(7, 5)
    nodes = torch.zeros(3, 1, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="fff"):
        ops.project(x, nodes, w)
    with pytest.raises(ValueError, match="nodes"):
        ops.project(x, nodes[:2], torch.randn(7, 6))


def test_who_cannot_run_them_says_so():
    trees = {"channel_mixer": "fff", "fff_trees": 2, "fff_depth": 1, "fff_gated": True}
    causal = ModelConfig(vocab_size=16, num_layers=1, hidden_size=8, activation="silu", **trees)
    with pytest.raises(ValueError, match="a packed model has no trees of gated neurons"):
        check_packable(causal, "2bit", "f32")
    with pytest.raises(ValueError, match="fff_gated"):
        capability.check(causal, "numpy")
    encoder = ModelConfig(
        vocab_size=16, num_layers=1, hidden_size=8, causal=False, token_mixer="attention",
        linear="dense", **trees,
    )  # fmt: skip
    with pytest.raises(ValueError, match="fff_gated"):
        check_encoder(encoder)
