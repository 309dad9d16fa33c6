"""The whole model through the fused operations, on the CPU: same loss and gradients as its layers.

The operations run their plain steps here; tests/gpu does the same with the kernels.
"""

from __future__ import annotations

import pytest
import torch
from dials import DIALS

from nomatmul.formats.config import ModelConfig
from nomatmul.models import BitLinear, CausalLM, RMSNorm, TernaryLinear, block
from nomatmul.models.diagnostics import ActivationMaxima
from nomatmul.models.mixer import Pass
from nomatmul.ops.bitlinear import ternary_cache


def run(model: CausalLM, ids: torch.Tensor, backend: str = "") -> list[torch.Tensor]:
    torch._dynamo.reset()
    model.zero_grad()
    function = torch.compile(model.loss, fullgraph=True, backend=backend) if backend else model.loss
    loss, z = function(ids, ids.roll(-1, 1), chunk=9)
    (loss + 0.1 * z).backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def far(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-20)) for a, b in pairs)


@pytest.mark.parametrize("mode", ["none", "mlp", "block"])
@pytest.mark.parametrize("name", DIALS)
def test_fused_equals_layers_for_every_dial(build, ids, fuse, name, mode):
    model = build(name).train()
    expected = run(model, ids)
    model.set_recompute(mode)
    assert far(run(model, ids), expected) < 3e-6  # recomputation alone changes nothing
    fuse()
    assert far(run(model, ids), expected) < 3e-6


@pytest.mark.parametrize("mode", ["none", "mlp"])
def test_fused_compiles_into_one_graph(build, ids, fuse, mode):
    model = build().train()
    model.set_recompute(mode)
    fuse()
    eager = run(model, ids)
    assert far(run(model, ids, "aot_eager"), eager) < 1e-6
    with ternary_cache() as cache:
        assert far(run(model, ids, "inductor"), eager) < 3e-6
        assert len(cache) == 2 * 4 + 1
        with torch.no_grad():
            model.layers[0].mixer.o_proj.weight.neg_()  # seen although the cache is not cleared
        changed = run(model, ids)
        cache.clear()
        assert far(run(model, ids), changed) == 0
        assert far(changed, eager) > 1e-3


@pytest.mark.parametrize("stream", [None, torch.float32])
def test_fused_is_close_under_autocast(build, ids, fuse, stream):
    """Both round each layer to bf16, in places that differ a little."""
    model = build().train()
    model.residual_dtype = stream
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(model, ids)
        fuse()
        ours = run(model, ids)
    assert far(ours[:1], expected[:1]) < 1e-3
    assert far(ours, expected) < 8e-2


def test_what_fused_operations_cannot_do_goes_layer_by_layer(build, ids, fuse):
    """Caches, padding and hooks: equal results, hooks called."""
    model = build()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = model(ids, attention_mask=mask).logits
    whole = model(ids, use_cache=False).logits
    fuse()
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, padded)
    torch.testing.assert_close(model(ids, use_cache=True).logits, whole)
    torch.testing.assert_close(model(ids, use_cache=False).logits, whole, rtol=0, atol=2e-5)
    with ActivationMaxima(model) as maxima:
        model(ids, use_cache=False)
    assert "layers.0.mixer.i_proj" in maxima.inputs


def test_residual_stream_under_autocast(build, ids):
    """bf16 for every dial unless asked otherwise; the loss moves by less than 1 %."""
    for name in ("matmul-free", "transformer++"):
        model = build(name).train()
        losses = {}
        for kind in (None, torch.float32):
            model.residual_dtype = kind
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model.hidden(ids)
                loss, _ = model.loss(ids, ids.roll(-1, 1))
            assert hidden.dtype == (kind or torch.bfloat16)
            losses[kind] = loss.item()
        assert losses[None] == pytest.approx(losses[torch.float32], rel=1e-2)


def test_recompute_may_stop_at_a_layer(build, ids, fuse):
    model = build().train()
    fuse()
    expected = run(model, ids)
    model.set_recompute("mlp", 1)
    assert [layer.recompute for layer in model.layers] == ["mlp", "none"]
    assert far(run(model, ids), expected) == 0


def test_unknown_recompute_mode_is_refused(build):
    with pytest.raises(ValueError, match="recompute 'all' is not known: use one of none, mlp"):
        build().set_recompute("all")


@pytest.mark.parametrize(
    ("dials", "forms"),
    [
        (DIALS["matmul-free"], (True, True)),
        (DIALS["no channel mixer"], (True, True)),
        (DIALS["union"], (True, False)),
        (DIALS["dense mlgru"], (False, False)),
        (DIALS["ternary attention"], (False, False)),
        ({"norm": "layer"}, (False, False)),
    ],
)
def test_plans_know_which_models_have_fused_forms(dials, forms):
    """What training decides before a model is built is what its blocks can do."""
    config = ModelConfig(vocab_size=8, hidden_size=16, num_layers=2, **dials)
    assert block.fused_forms(config) == forms
    one = block.Block(config, 0)
    rms = isinstance(one.mixer_norm, RMSNorm)
    assert (rms and one.mixer.fuses((None, None))) == forms[0]
    assert one.channel is None or (rms and one.channel.fuses()) == forms[1]


@pytest.mark.parametrize("name", DIALS)
def test_what_is_told_of_a_config_is_what_its_layers_can_fuse(build, name):
    model = build(name)
    tokens = Pass(torch.zeros(1, 3, 32))
    mixers = [b.mixer.fuses(b.mixer.inputs(tokens)) for b in model.blocks]
    channels = [b.channel.fuses() for b in model.blocks if b.channel is not None]
    assert block.fused_forms(model.model_config) == (all(mixers), all(channels))
    plain = all(isinstance(m, BitLinear) for m in model.modules() if isinstance(m, TernaryLinear))
    assert plain or not any(channels)
