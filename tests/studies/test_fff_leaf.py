"""The leaf form: mixture, one leaf, hardening, leak and schedule."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nomatmul.formats.config import ModelConfig
from nomatmul.models import CausalLM, CausalLMConfig, FFFTraining, auxiliary_loss
from nomatmul.models.channels.trees import TreeLayer
from nomatmul.train.optimizer import decay_groups
from studies.fff.layers import replace_trees
from studies.fff.leaf import LeafFFF, LeafTraining, hard_leaves, mixture

DENSE = {"bias": True, "out": 4}
TERNARY = {"linear": "ternary", "out": 4}


def make(seed=0, **options) -> LeafFFF:
    torch.manual_seed(seed)
    layer = LeafFFF(6, **{"leaf_width": 3, "trees": 2, "depth": 2, **options}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def leaf_output(layer, x, leaf):
    """One leaf of a dense layer, for one token."""
    h = F.gelu(layer.leaf_in[leaf] @ x + layer.leaf_in_bias[leaf])
    return layer.leaf_out[leaf] @ h + layer.leaf_out_bias[leaf]


def node_logits(layer, x, tree):
    rows = slice(tree * 3, tree * 3 + 3)
    return layer.nodes[rows] @ x + layer.node_bias[rows]


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


# -- auxiliary losses ------------------------------------------------------------------------------


def test_hardening_is_the_entropy_of_all_nodes_and_training_lowers_it(x):
    layer = make(**DENSE).train()
    layer.plan_training(LeafTraining(hardening=2))
    layer(x)
    p = torch.sigmoid(x @ layer.nodes.T + layer.node_bias)
    entropy = (-(p * p.log()) - (1 - p) * (1 - p).log()).mean(0).sum()
    first = auxiliary_loss(layer)
    torch.testing.assert_close(first, 2 * entropy)
    optimizer = torch.optim.Adam(layer.parameters(), 0.1)
    for _ in range(20):
        optimizer.zero_grad()
        layer(x)
        auxiliary_loss(layer).backward()
        optimizer.step()
    layer(x)
    assert auxiliary_loss(layer) < first / 2


def test_entropy_of_a_certain_node_is_zero_not_nan():
    layer = make(**DENSE).train()
    with torch.no_grad():
        layer.node_bias.fill_(1e4)
    layer.plan_training(LeafTraining(hardening=1))
    layer(torch.randn(3, 6, dtype=torch.float64))
    loss = auxiliary_loss(layer)
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(layer.nodes.grad).all()


def test_balance_is_the_switch_loss_of_leaves(x):
    layer = make(**DENSE).train()
    layer.plan_training(FFFTraining(balance=3))
    layer(x)
    want = 0.0
    for tree in range(2):
        z = torch.stack([node_logits(layer, token, tree) for token in x])
        ends = hard_leaves(z.unsqueeze(1), 2)[:, 0]
        taken = torch.bincount(ends, minlength=4) / 11
        mean = mixture(torch.sigmoid(z).unsqueeze(1))[:, 0].mean(0)
        want += 3 * 4 * (taken * mean).sum() / 2
    torch.testing.assert_close(auxiliary_loss(layer), want)


@pytest.mark.parametrize("train", [False, True])
def test_usage_counts_leaves(x, train):
    layer = make(**DENSE).train(train)
    layer.count_usage()
    layer(x)
    z = (x @ layer.nodes.T + layer.node_bias).view(11, 2, 3)
    want = torch.stack([torch.bincount(hard_leaves(z, 2)[:, t], minlength=4) for t in range(2)])
    usage = layer.usage()
    assert torch.equal(usage.visits, want)
    assert usage.tokens == 11
    assert 0 <= usage.entropy <= 1


# -- leak ------------------------------------------------------------------------------------------


def test_region_leak_swaps_sides_at_random_in_training_only(x):
    layer = make(**DENSE, seed=2)
    hard = layer.eval()(x)
    layer.plan_training(LeafTraining(region_leak=1, hardness=1))
    assert torch.equal(layer.eval()(x), hard)
    # always swapped and hard: every decision turned round
    swapped = layer.train()(x)
    with torch.no_grad():
        layer.nodes.neg_()
        layer.node_bias.neg_()
    torch.testing.assert_close(swapped, layer.eval()(x))


def test_region_leak_swaps_that_share_of_decisions():
    layer = LeafFFF(4, leaf_width=1, depth=1, trees=1)
    layer.plan_training(LeafTraining(region_leak=0.25))
    z = torch.full((20_000, 1, 1), 2.0)
    torch.manual_seed(0)
    share = layer._shares(z)
    high = torch.sigmoid(torch.tensor(2.0))
    swapped = (share - high).abs() > 1e-6
    assert torch.allclose(share[swapped], 1 - high)
    # five standard deviations of 20,000 draws
    assert swapped.float().mean().item() == pytest.approx(0.25, abs=5 * math.sqrt(0.1875 / 2e4))


# -- types and shapes ------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hardening": math.inf}, "hardening inf must be finite"),
        ({"hardness": 1.5}, r"hardness 1.5 must lie in 0\.\.1"),
        ({"region_leak": math.nan}, r"region_leak nan must lie in 0\.\.1"),
    ],
)
def test_bad_plans_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LeafTraining(**options)


# -- inside a model --------------------------------------------------------------------------------


def with_leaves(**dials) -> CausalLM:
    sizes = {"vocab_size": 16, "num_layers": 2, "hidden_size": 8, "intermediate_size": 8}
    trees = {"channel_mixer": "fff", "fff_trees": 2, "fff_depth": 1, "activation": "silu"}
    torch.manual_seed(7)
    model = CausalLM(CausalLMConfig.from_model_config(ModelConfig(**sizes, **trees, **dials)))
    ternary = model.config.linear == "ternary"
    assert (
        replace_trees(
            model,
            lambda layer: LeafFFF(
                layer.hidden, leaf_width=4, trees=2, depth=2, linear=layer.linear, bias=not ternary
            ),
        )
        == 2
    )
    return model


@pytest.mark.parametrize("linear", ["dense", "ternary"])
def test_a_model_of_them_learns_and_recomputes(linear):
    ids = torch.randint(0, 16, (2, 9), generator=torch.Generator().manual_seed(0))
    results = []
    for mode in ("none", "block"):
        model = with_leaves(linear=linear).train()
        model.set_fff_training(LeafTraining(hardening=0.1, balance=0.2, count_usage=True))
        model.set_recompute(mode)
        loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
        auxiliary = model.auxiliary_loss()
        (loss + auxiliary).backward()
        visits = [m.visits for m in model.modules() if isinstance(m, TreeLayer)]
        results.append([loss, auxiliary, *visits, *(p.grad for p in model.parameters())])
    assert results[0][1] > 0
    assert all(gradient is not None for gradient in results[0])
    torch.testing.assert_close(results[1], results[0])

    model.set_fff_training(LeafTraining(hardening=0.001, hardness=0.5))
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), 0.02)
    for _ in range(25):
        optimizer.zero_grad()
        last, _ = model.loss(ids[:, :-1], ids[:, 1:])
        (last + model.auxiliary_loss()).backward()
        optimizer.step()
    assert last < loss - 0.5
    weights = model.layers[0].channel.leaf_out
    assert weights.std().item() < 0.2  # drawn as the model's others, not in +-1/2


def test_tables_of_biases_are_not_decayed():
    layer = LeafFFF(8, leaf_width=4, depth=2, bias=True)
    matrices = set(map(id, (layer.nodes, layer.leaf_in, layer.leaf_out)))
    decayed, plain = decay_groups(layer, 0.1)
    assert {id(p) for p in decayed["params"]} == matrices
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
