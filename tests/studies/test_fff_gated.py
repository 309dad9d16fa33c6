"""Trees of gated neurons: against the definition, the masked form, and inside a model."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nomatmul.models import CausalLM, CausalLMConfig, FFFTraining
from studies.fff.gated import GatedFFF
from studies.fff.layers import replace_trees


def make(trees, depth, linear="dense", implementation=None, **options):
    torch.manual_seed(4)
    layer = GatedFFF(
        6, 5, trees=trees, depth=depth, linear=linear, activation="silu",
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


def test_every_path_of_autocast_has_its_type():
    torch.manual_seed(6)
    for linear in ("dense", "ternary"):
        layer = GatedFFF(6, trees=3, depth=2, linear=linear)
        x = torch.randn(9, 6)
        y = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = layer(x)
        assert (y.dtype, low.dtype) == (torch.float32, torch.bfloat16)
        assert (low.float() - y).norm() < 0.1 * y.norm()


def test_a_model_of_them_trains():
    torch.manual_seed(7)
    config = CausalLMConfig(
        vocab_size=16, num_layers=2, hidden_size=8, channel_mixer="fff", fff_trees=3,
        fff_depth=1, activation="silu",
    )  # fmt: skip
    model = CausalLM(config)
    assert replace_trees(model, GatedFFF.like) == 2
    assert model.layers[0].channel.w_up.shape == (9, 8)
    assert model.layers[0].channel.w_up.std().item() == pytest.approx(0.02, rel=0.5)
    ids = torch.randint(0, 16, (2, 5))
    model(ids).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if "w_up" in name:
            assert float(parameter.grad.abs().max()) > 0


def test_gates_have_no_gradient_of_decisions():
    layer = make(1, 1)
    layer.plan_training(FFFTraining(route_gradient=True))
    with pytest.raises(ValueError, match="route_gradient"):
        layer(torch.randn(2, 6, dtype=torch.float64))
