"""The leaf form: mixture, one leaf, hardening, leak and schedule."""

from __future__ import annotations

import pytest
import torch
from support.leaf_layers import DENSE, TERNARY, leaf_output, make, node_logits, tokens

from nomatmul.models import auxiliary_loss
from studies.fff.leaf import LeafFFF
from studies.fff.leaf_mixture import LeafTraining, hard_leaves, mixture


@pytest.fixture
def x() -> torch.Tensor:
    return tokens()


def test_evaluation_is_the_one_leaf_at_the_end_of_the_path(x):
    layer = make(**DENSE).eval()
    want = torch.zeros(11, 4, dtype=torch.float64)
    for n, token in enumerate(x):
        for tree in range(2):
            z = node_logits(layer, token, tree)
            right = z[0] > 0
            leaf = 2 * int(right) + int(z[2 if right else 1] > 0)
            want[n] += leaf_output(layer, token, tree * 4 + leaf)
    torch.testing.assert_close(layer(x), want)


def test_training_mixes_all_leaves(x):
    layer = make(**DENSE).train()
    want = torch.zeros(11, 4, dtype=torch.float64)
    for n, token in enumerate(x):
        for tree in range(2):
            p = torch.sigmoid(node_logits(layer, token, tree))
            shares = [
                (1 - p[0]) * (1 - p[1]),
                (1 - p[0]) * p[1],
                p[0] * (1 - p[2]),
                p[0] * p[2],
            ]
            for leaf, share in enumerate(shares):
                want[n] += share * leaf_output(layer, token, tree * 4 + leaf)
    torch.testing.assert_close(layer(x), want)


def test_mixtures_sum_to_one_and_hard_shares_pick_the_hard_leaf():
    z = torch.randn(20, 3, 15, dtype=torch.float64)
    torch.testing.assert_close(
        mixture(torch.sigmoid(z)).sum(-1), torch.ones(20, 3, dtype=torch.float64)
    )
    hard = mixture((z > 0).double())
    assert torch.equal(hard.argmax(-1), hard_leaves(z, 4))
    assert torch.equal(hard.sort(-1).values[..., -1], torch.ones(20, 3, dtype=torch.float64))


@pytest.mark.parametrize("options", [DENSE, TERNARY, {"master_width": 2, "depth": 0}])
def test_schedule_ends_at_inference(x, options):
    layer = make(**options)
    with torch.no_grad():
        hard = layer.eval()(x)
        soft = layer.train()(x)
        distances = []
        for hardness in (0, 0.5, 0.9, 1):
            # a loss term keeps the mixture in use at 1
            layer.plan_training(LeafTraining(hardness=hardness, hardening=0.1))
            distances.append((layer(x) - hard).norm().item())
        assert distances[0] == (soft - hard).norm().item()
        assert distances[-1] < 1e-12
        if layer.depth:
            assert distances == sorted(distances, reverse=True)
        layer.plan_training(LeafTraining(hardness=1))
        assert layer.one_leaf
        assert torch.equal(layer(x), hard)


@pytest.mark.parametrize("options", [DENSE, TERNARY])
def test_gradients_of_one_leaf_equal_those_of_the_hard_mixture(x, options):
    """At hardness 1 the mixture's weights are steps, so both forms have the same gradients."""
    results = []
    for plan in (LeafTraining(hardness=1), LeafTraining(hardness=1, hardening=1e-30)):
        layer = make(**options).train()
        layer.plan_training(plan)
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.sin().sum().backward()
        gradients = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
        results.append({"y": y, "x": inputs.grad, **gradients})
    nodes = [results[1].pop(name, None) for name in ("nodes", "node_bias")]
    assert all(gradient is None or not gradient.any() for gradient in nodes)
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("options", [DENSE, TERNARY])
def test_soft_training_moves_every_parameter(x, options):
    layer = make(master_width=3, **options).train()
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.any(), name


def test_soft_gradients_equal_differences():
    layer = make(**DENSE).train()
    layer.plan_training(LeafTraining(hardening=0.7))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def loss(x, *_):
        return layer(x).square().sum() + auxiliary_loss(layer)

    assert torch.autograd.gradcheck(loss, (x, *layer.parameters()))


def test_route_gradient_reaches_the_nodes_and_changes_no_value(x):
    layer = make(**DENSE).train()
    layer.plan_training(LeafTraining(hardness=1))
    plain = layer(x)
    layer.plan_training(LeafTraining(hardness=1, route_gradient=True))
    routed = layer(x)
    assert torch.equal(plain, routed)
    # the surrogate: a level's share of the side taken is a factor of the tree's output
    want = torch.zeros(6, dtype=torch.float64)
    for n, token in enumerate(x):
        for tree in range(2):
            z = node_logits(layer, token, tree).detach()
            right = z[0] > 0
            second = 2 if right else 1
            leaf = tree * 4 + 2 * int(right) + int(z[second] > 0)
            felt = 2 * routed[n].detach() @ leaf_output(layer, token, leaf).detach()
            for node in (0, second):
                slope = torch.sigmoid(z[node]) * torch.sigmoid(-z[node])
                want[tree * 3 + node] += felt * slope * (1 if z[node] > 0 else -1)
    routed.square().sum().backward()
    torch.testing.assert_close(layer.node_bias.grad, want)


@pytest.mark.parametrize("options", [{"bias": True}, {"linear": "ternary"}])
@pytest.mark.parametrize("train", [False, True])
def test_types_and_shapes(options, train):
    torch.manual_seed(0)
    layer = LeafFFF(8, 5, leaf_width=2, trees=2, depth=2, **options).train(train)
    layer.plan_training(LeafTraining(hardness=0.5))
    x = torch.randn(2, 3, 8)
    y = layer(x)
    assert (y.shape, y.dtype) == ((2, 3, 5), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    assert (low.float() - y).norm() < 0.1 * y.norm()
    assert layer(x[:0]).shape == (0, 3, 5)


def test_first_weights_are_the_authors():
    torch.manual_seed(0)
    layer = LeafFFF(64, leaf_width=16, depth=4, bias=True)
    for name, bound in (
        ("nodes", 1 / 8),
        ("node_bias", 1 / 8),
        ("leaf_in", 1 / 8),
        ("leaf_in_bias", 1 / 8),
        ("leaf_out", 1 / 4),
        ("leaf_out_bias", 1 / 4),
    ):
        weights = getattr(layer, name)
        assert weights.abs().max() <= bound
        if weights.numel() > 100:
            assert weights.abs().mean().item() == pytest.approx(bound / 2, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leaf_width": 0}, "leaf_width is 0, it must be at least 1"),
        ({"hidden": 0}, "hidden is 0, it must be at least 1"),
        ({"depth": 25}, r"depth is 25, it must lie in 0\.\.24"),
        ({"linear": "ternary", "bias": True}, "a ternary layer has no bias"),
        ({"activation": "elu"}, "activation 'elu' is not known"),
    ],
)
def test_bad_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LeafFFF(**{"hidden": 4, "leaf_width": 2, "depth": 1, **options})


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("linear", ["dense", "ternary"])
def test_bad_inputs_are_named(train, linear):
    layer = make(linear=linear).train(train)
    with pytest.raises(ValueError, match=r"x must be \[.*6\], got \(3, 5\)"):
        layer(torch.ones(3, 5, dtype=torch.float64))
    x = torch.ones(3, 6, dtype=torch.float64)
    x[1, 2] = torch.nan
    with pytest.raises(ValueError, match="logit is NaN"):
        layer(x)
