"""Symmetric trees and ternary layers in a dense model, and that the study trains them."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from nomatmul.formats.config import ModelConfig
from nomatmul.models import FFF
from nomatmul.train.model import build_model
from studies.fff import run
from studies.fff.plan import AGAIN, EXCHANGED, exchange_of, named_cell
from studies.fff.symmetric import EXCHANGES, SymmetricFFF, exchange

NODE = {"after": lambda z: z, "tanh": torch.tanh, "abs": torch.abs}


@pytest.mark.parametrize("form", NODE)
def test_a_visited_neuron_adds_what_the_form_says(form):
    torch.manual_seed(1)
    layer = SymmetricFFF(6, 5, trees=2, depth=2, bias=True, form=form).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    y, logits, nodes = layer.walk_and_sum(x)
    for n in range(7):
        want = torch.zeros(5, dtype=torch.float64)
        for tree in range(2):
            j = 0
            for level in range(3):
                node = tree * 7 + j
                logit = x[n] @ layer.w_in[node] + layer.bias[node]
                assert nodes[n, tree, level] == node
                torch.testing.assert_close(logits[n, tree, level], logit)
                want = want + NODE[form](logit) * layer.w_out[node]
                j = 2 * j + 1 + int(logit > 0)
        torch.testing.assert_close(y[n], F.gelu(want) if form == "after" else want)


def test_both_signs_of_a_root_learn_alike():
    """With gelu the side below zero has a tenth of the other's gradient; with tanh as much."""
    found = {}
    for name, layer in (
        ("gelu", FFF(1, trees=1, depth=0, implementation="masked")),
        ("tanh", SymmetricFFF(1, trees=1, depth=0, form="tanh")),
    ):
        torch.nn.init.ones_(layer.w_in)
        torch.nn.init.ones_(layer.w_out)
        x = torch.tensor([[-2.0], [2.0]], requires_grad=True)
        (gradient,) = torch.autograd.grad(layer(x).sum(), x)
        found[name] = abs(float(gradient[0] / gradient[1]))
    assert found["gelu"] < 0.1
    assert found["tanh"] == pytest.approx(1)


@pytest.mark.parametrize("name", EXCHANGES)
def test_a_model_gets_them_with_its_own_weights(name):
    trees = {"channel_mixer": "fff", "fff_trees": 3, "fff_depth": 2}
    dense = {"channel_mixer": "ffn", "intermediate_size": 12}
    for channel in (trees, dense) if name == "ternary" else (trees,):
        torch.manual_seed(2)
        config = ModelConfig(
            vocab_size=32, hidden_size=8, num_layers=2, token_mixer="attention", linear="dense",
            num_heads=2, **channel,
        )  # fmt: skip
        model = build_model(config)
        exchange(model, name)
        ids = torch.randint(0, 32, (2, 6))
        model(ids).logits.square().mean().backward()
        for block in model.layers:
            kinds = (SymmetricFFF,) if name != "ternary" else (FFF, type(block.channel))
            assert isinstance(block.channel, kinds)
            weights = [w for w in block.channel.parameters() if w.dim() == 2]
            assert weights
            assert all(w.std() < 0.2 and float(w.grad.abs().max()) > 0 for w in weights)


def test_the_second_look_has_known_cells_once():
    assert set(EXCHANGED) == set(EXCHANGES)
    named = [named_cell(text) for cells in AGAIN.values() for text in cells]
    runs = [(section, name) for section, name, _ in named]
    assert len(runs) == len(set(runs))
    assert exchange_of("fff-16x6-after") == "after"
    assert exchange_of("fff-16x6-every2") == ""


def test_a_study_of_such_cells_leaves_rows(tmp_path, monkeypatch, warm_python):
    monkeypatch.setattr(sys, "executable", warm_python)
    cells = ["causal:fff-2x2-tanh:1", "causal:dense-ternary:1", "encoder:fff-1x3-after:1"]
    run.main(
        ["all", "--tiny", "--out", str(tmp_path / "out"), "--sections", "encoder,causal",
         "--glue-models", "none", "--cells", *cells, "--tokens", "512"]
    )  # fmt: skip
    rows = run.read_rows(tmp_path / "out" / "fff-study-rows.jsonl")
    assert {(row["section"], row["variant"], row["status"]) for row in rows} == {
        (*cell.split(":")[:2], "ok") for cell in cells
    }
