"""Shares, flips and maxima of ternary layers."""

from __future__ import annotations

import pytest
import torch

from nomatmul.models.diagnostics import ActivationMaxima, FlipCounter, bit_linears, ternary_shares


def test_shares_count_the_weights(build):
    model = build()
    layer = model.layers[0].mixer.i_proj
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, :16] = 1.0
        layer.weight[1, :4] = -1.0
    shares = ternary_shares(model)
    assert len(shares) == 2 * 6 + 1
    assert shares["layers.0.mixer.i_proj"] == pytest.approx((4 / 1024, 1004 / 1024, 16 / 1024))
    assert all(sum(s) == pytest.approx(1) for s in shares.values())
    assert ternary_shares(build("transformer++")) == {}


def test_flips_are_counted_between_calls(build):
    model = build()
    counter = FlipCounter(model)
    assert set(counter.update().values()) == {0.0}
    with torch.no_grad():
        model.head.weight.neg_()
    flips = counter.update()
    zero = ternary_shares(model)["head"][1]
    assert flips["head"] == pytest.approx(1 - zero)
    assert flips["layers.0.mixer.o_proj"] == 0
    assert set(counter.update().values()) == {0.0}
    assert FlipCounter(build("transformer++")).update() == {}


def test_maxima_are_those_of_the_inputs_and_outputs(build, ids):
    model = build()
    with ActivationMaxima(model) as maxima:
        model(ids[:1])
        hidden = model.hidden(ids)
        logits = model.head(hidden)
    assert set(maxima.inputs) == {name for name, _ in bit_linears(model)}
    assert maxima.inputs["head"] == pytest.approx(hidden.abs().max().item())
    assert maxima.outputs["head"] == pytest.approx(logits.abs().max().item())
    assert not model.head._forward_hooks
