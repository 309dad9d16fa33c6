"""The leaf form in training: what is added to the loss, usage, leak, and models that learn."""

from __future__ import annotations

import math

import pytest
import torch
from support.leaf_layers import DENSE, make, node_logits, tokens

from nomatmul.formats.config import ModelConfig
from nomatmul.models import CausalLM, CausalLMConfig, FFFTraining, auxiliary_loss
from nomatmul.models.channels.trees import TreeLayer
from nomatmul.train.optimizer import decay_groups
from studies.fff.layers import replace_trees
from studies.fff.leaf import LeafFFF
from studies.fff.leaf_mixture import LeafTraining, hard_leaves, mixture


@pytest.fixture
def x() -> torch.Tensor:
    return tokens()


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
