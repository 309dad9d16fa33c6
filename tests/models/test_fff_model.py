"""Blocks and language models with FFF: training plan, recomputation, compilation, files."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from nomatmul.formats.config import ModelConfig
from nomatmul.models import FFF, Block, CausalLM, FFFTraining, auxiliary_loss
from nomatmul.models.channels.ffn import FFN
from nomatmul.models.layers import LayerNorm, RMSNorm, make_norm

TREES = ["union", "trees with all there is"]
PLAN = FFFTraining(balance=0.2, route_gradient=True, count_usage=True)


@pytest.mark.parametrize("name", TREES)
def test_recomputing_changes_nothing(build, ids, name):
    results = []
    for mode in ("none", "mlp", "block"):
        model = build(name).train()
        model.set_fff_training(PLAN)
        model.set_recompute(mode)
        loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
        auxiliary = model.auxiliary_loss()
        (loss + auxiliary).backward()
        assert model.auxiliary_loss().item() == 0  # nothing left over from a second pass
        visits = {n: m.visits for n, m in model.named_modules() if isinstance(m, FFF)}
        gradients = {n: p.grad for n, p in model.named_parameters()}
        assert all(gradient is not None for gradient in gradients.values())
        results.append({"loss": loss, "auxiliary": auxiliary, **gradients, **visits})
    assert results[0]["auxiliary"] > 0
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


@pytest.mark.parametrize("name", TREES)
def test_it_learns(build, ids, name):
    model = build(name).train()
    model.set_fff_training(FFFTraining(balance=0.01))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
        (loss + model.auxiliary_loss()).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("name", TREES)
def test_saved_and_loaded_models_are_equal(build, ids, name, tmp_path):
    model = build(name)
    model.set_fff_training(PLAN)
    model.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path).eval()
    assert again.config.model_config == model.config.model_config
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", TREES)
def test_a_model_compiles_without_a_graph_break(build, ids, name):
    model = build(name).train()
    model.set_fff_training(FFFTraining(balance=0.2, route_gradient=True))
    block = next(b for b in model.layers if isinstance(b.channel, FFF))
    x = torch.randn(2, 5, 32)

    def run(x):
        return block.channel(x).square().sum() + auxiliary_loss(block)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    gradients = []
    for function in (run, compiled):
        block.zero_grad()
        function(x).backward()
        gradients.append({n: p.grad for n, p in block.channel.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])


def test_the_first_weights_of_a_model_are_normal(build):
    from nomatmul.models import CausalLMConfig

    sizes = {"vocab_size": 8, "hidden_size": 64, "num_layers": 2, "linear": "dense"}
    trees = {"channel_mixer": "fff", "fff_trees": 4, "fff_depth": 4, "fff_bias": True}
    model = CausalLM(CausalLMConfig(**sizes, **trees, initializer_range=0.1))
    for weight in (model.layers[1].channel.w_in, model.layers[1].channel.w_out):
        assert weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert not model.layers[1].channel.bias.any()


def test_the_layers_without_trees_hold_an_ffn(build):
    model = build("trees with all there is")
    first, second = (layer.channel for layer in model.layers)
    assert isinstance(first, FFN)
    assert first.up_proj.weight.shape == (48, 32)
    assert isinstance(second, FFF)
    assert second.master.up_proj.weight.shape == (8, 32)
    assert isinstance(model.final_norm, LayerNorm)


def test_dropout_is_on_both_sublayers_in_training_only():
    config = ModelConfig(8, 16, 1, token_mixer="attention", linear="dense", channel_mixer="ffn")
    block = Block(config, 0)
    x = torch.randn(1, 4, 16)
    block.dropout = 0.999999
    assert not torch.equal(block.eval()(x), x)
    # all of what the two sublayers add is dropped
    assert torch.equal(block.train()(x), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_kinds(dtype):
    x = torch.randn(3, 8, dtype=dtype)
    layer = make_norm(8, "layer", 1e-12)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(1, 2, 8))
        layer.bias.copy_(torch.linspace(-1, 1, 8))
    want = nn.functional.layer_norm(
        x.double(), (8,), layer.weight.double(), layer.bias.double(), 1e-12
    )
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x), want.to(dtype))
    assert isinstance(make_norm(8, "rms"), RMSNorm)
    with pytest.raises(ValueError, match="norm 'batch' is not known"):
        make_norm(8, "batch")


def test_configs_with_dials_that_are_gone_load_where_they_were_off(build, ids, tmp_path):
    model = build("union")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "fff_gated": False, "fff_leaf_width": None}))
    assert torch.equal(CausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    path.write_text(json.dumps({**values, "fff_gated": True}))
    with pytest.raises(ValueError, match="fff_gated True is no longer part of nomatmul"):
        CausalLM.from_pretrained(tmp_path)
