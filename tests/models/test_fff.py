"""The FFF layer: options, gradients against the masked form, balance, usage, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nomatmul.models import FFF, FFFTraining, auxiliary_loss, set_fff_training
from nomatmul.models.channels.trees import balance_loss
from nomatmul.ops.fff import walk


def make(seed=0, **options) -> FFF:
    torch.manual_seed(seed)
    layer = FFF(6, **{"trees": 3, "depth": 2, **options}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


def learn(layer, x):
    """(y, auxiliary loss, gradient of x, gradients of the parameters) of one training pass."""
    x = x.clone().requires_grad_()
    layer.train().zero_grad()
    y = layer(x)
    auxiliary = auxiliary_loss(layer)
    (y.sin().square().sum() + auxiliary).backward()
    parameters = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": y, "auxiliary": auxiliary, "x": x.grad, **parameters}


OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "narrow": {"out": 4, "activation": "relu"},
    "root only": {"depth": 0},
    "one deep tree": {"trees": 1, "depth": 6, "activation": "silu"},
    "master": {"master_width": 5, "bias": True, "out": 7},
    "ternary": {"linear": "ternary", "activation": "silu"},
    "ternary master": {"linear": "ternary", "master_width": 5},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("route", [False, True])
def test_every_gradient_equals_the_masked_form(name, route):
    x = torch.randn(2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for implementation in (None, "masked"):
        layer = make(implementation=implementation, **OPTIONS[name])
        set_fff_training(layer, FFFTraining(balance=0.3, route_gradient=route))
        results.append(learn(layer, x))
    assert all(value is not None for value in results[0].values())
    torch.testing.assert_close(results[0], results[1])


def test_the_layer_is_the_sum_over_visited_nodes():
    layer = make(bias=True, out=4)
    x = torch.randn(9, 6, dtype=torch.float64)
    want = torch.zeros(9, 4, dtype=torch.float64)
    for n in range(9):
        for tree in range(3):
            j = 0
            for _ in range(3):
                row = tree * 7 + j
                logit = layer.w_in[row] @ x[n] + layer.bias[row]
                want[n] += F.gelu(logit) * layer.w_out[row]
                j = 2 * j + (2 if logit > 0 else 1)
    torch.testing.assert_close(layer(x), want)


def test_first_weights_are_the_authors():
    torch.manual_seed(0)
    layer = FFF(64, trees=4, depth=5, bias=True)
    for parameter, bound in (
        (layer.w_in, 1 / 8),
        (layer.bias, 1 / 8),
        (layer.w_out, 1 / math.sqrt(4 * 6)),
    ):
        assert parameter.abs().max() <= bound
        assert parameter.abs().mean().item() == pytest.approx(bound / 2, rel=0.1)
    layer.initial_std = 0.5
    layer.reset_parameters()
    assert layer.w_out.std().item() == pytest.approx(0.5, rel=0.05)
    assert not layer.bias.any()


@pytest.mark.parametrize("linear", ["dense", "ternary"])
def test_any_leading_shape_and_no_tokens(linear):
    layer = make(master_width=3, out=5, linear=linear)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    assert layer(x).shape == (2, 3, 4, 5)
    torch.testing.assert_close(layer(x)[1, 2], layer(x[1, 2]))
    nothing = layer(x[:0].requires_grad_())
    assert nothing.shape == (0, 3, 4, 5)
    nothing.sum().backward()
    assert not layer.w_in.grad.any()


@pytest.mark.parametrize("options", [{"bias": True}, {"linear": "ternary", "master_width": 3}])
def test_autocast_gives_its_type_and_gradients_of_the_parameters(options):
    torch.manual_seed(0)
    layer = FFF(8, trees=2, depth=2, **options)
    layer.plan_training(FFFTraining(balance=0.1, route_gradient=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(5, 8))
    (y.float().sum() + auxiliary_loss(layer)).backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in layer.parameters())


# -- balance ---------------------------------------------------------------------------------------


def test_balance_is_the_mean_of_every_nodes_two_sided_loss():
    torch.manual_seed(4)
    x, w = torch.randn(40, 5), torch.randn(2 * 7, 5)
    logits, nodes = walk(x, w, trees=2, depth=2)
    want = 0.0
    for row in range(14):
        if row % 7 >= 3:
            continue  # ends decide nothing
        z = logits[nodes == row]
        if not len(z):
            continue
        right, soft = (z > 0).float().mean(), torch.sigmoid(z).mean()
        # weight: its share of all decisions, 2 trees x 2 levels x 40 tokens
        want += len(z) / 160 * 2 * (right * soft + (1 - right) * (1 - soft))
    torch.testing.assert_close(balance_loss(logits, nodes, 14), want)


def test_balance_is_one_when_even_and_learns_to_be():
    logits = torch.tensor([[[3.0, 1]], [[-3.0, 1]]])
    nodes = torch.tensor([[[0, 2]], [[0, 1]]], dtype=torch.int32)
    assert balance_loss(logits, nodes, 3).item() == pytest.approx(1)
    crowded = balance_loss(logits.abs(), torch.zeros_like(nodes), 3)
    assert crowded.item() == pytest.approx(2 * torch.sigmoid(torch.tensor(3.0)).item())

    torch.manual_seed(0)
    layer = FFF(8, trees=2, depth=3, bias=True)
    with torch.no_grad():
        layer.bias += 2  # everybody goes right
    layer.plan_training(FFFTraining(balance=1, count_usage=True))
    x = torch.randn(256, 8)
    before = layer.train()(x) is not None and layer.usage()
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        layer(x)
        auxiliary_loss(layer).backward()
        optimizer.step()
    layer.count_usage()
    layer(x)
    after = layer.usage()
    assert after.entropy > before.entropy + 0.1
    assert after.dead < before.dead


def test_auxiliary_loss_is_taken_once_and_only_in_training():
    layer = make()
    model = torch.nn.Sequential(layer, make(seed=1), torch.nn.Linear(6, 2).double())
    x = torch.randn(5, 6, dtype=torch.float64)
    assert set_fff_training(model, FFFTraining(balance=0.5)) == 2
    model.train()(x)
    one = layer.auxiliary
    both = auxiliary_loss(model)
    assert both.item() > one.item() > 0
    assert auxiliary_loss(model).item() == 0
    model.eval()(x)
    assert auxiliary_loss(model).item() == 0
    set_fff_training(model, FFFTraining())
    model.train()(x)
    assert auxiliary_loss(model).item() == 0
    assert auxiliary_loss(torch.nn.Linear(1, 1)).item() == 0


# -- usage -----------------------------------------------------------------------------------------


def test_usage_counts_visits_and_stays_out_of_the_state_dict():
    layer = make(trees=2, depth=1)
    names = set(layer.state_dict())
    with pytest.raises(ValueError, match="no visits were counted"):
        layer.usage()
    layer.count_usage()
    x = torch.randn(10, 6, dtype=torch.float64)
    layer(x)
    layer.train()(x)
    _, _, nodes = layer.walk_and_sum(x)
    usage = layer.usage()
    want = 2 * torch.bincount(nodes.flatten().long(), minlength=6).view(2, 3)
    assert torch.equal(usage.visits, want)
    assert usage.tokens == 20
    share = want[:, 1:] / 20
    entropy = -(share * share.clamp(min=1e-30).log()).sum(1).mean() / math.log(2)
    assert usage.entropy == pytest.approx(entropy.item())
    assert usage.dead == (want == 0).double().mean()
    assert set(layer.state_dict()) == names
    layer.count_usage(False)
    with pytest.raises(ValueError, match="no visits were counted"):
        layer.usage()


def test_a_new_plan_keeps_what_was_counted():
    layer = make(depth=0)
    layer.plan_training(FFFTraining(count_usage=True))
    layer(torch.ones(4, 6, dtype=torch.float64))
    layer.plan_training(FFFTraining(balance=1, count_usage=True))
    assert layer.usage().tokens == 4
    assert layer.usage().entropy == 1  # one end: nothing could be more even
    layer.plan_training(FFFTraining())
    assert layer.visits is None


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "hidden is 0, it must be at least 1"),
        ({"out": 0}, "out is 0, it must be at least 1"),
        ({"trees": -2}, "trees is -2, it must be at least 1"),
        ({"depth": -1}, r"depth is -1, it must lie in 0\.\.24"),
        ({"depth": 25}, r"depth is 25, it must lie in 0\.\.24"),
        ({"trees": 100, "depth": 24}, "100 trees of depth 24 have more nodes than int32 can num"),
        ({"master_width": -1}, "master_width is -1, it must be at least 0"),
        ({"linear": "sparse"}, "linear 'sparse' is not known"),
        ({"linear": "ternary", "bias": True}, "a ternary layer has no bias"),
        ({"activation": "elu"}, "activation 'elu' is not known"),
    ],
)
def test_bad_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FFF(**{"hidden": 4, "depth": 1, **options})


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


@pytest.mark.parametrize("balance", [-1, math.inf, math.nan])
def test_bad_plans_are_named(balance):
    with pytest.raises(ValueError, match=f"balance {balance} must be finite and at least 0"):
        FFFTraining(balance=balance)
