"""Published ternary values in torch: kept as they are, moved, saved; latent weights of them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from dials import DIALS

from nomatmul.convert import pack
from nomatmul.formats.packed import PackedReader
from nomatmul.models import BitLinear, CausalLM, CausalLMConfig, StoredLinear, TernaryLinear
from nomatmul.models.diagnostics import bit_linears
from nomatmul.models.stored import StoredEmbedding, StoredHead, TernaryEmbedding

NAMES = ["norms in front of outputs", "no norms inside", "norms inside gate and up"]
NAMES += ["scales of groups", "ternary attention"]


def stored(name: str = "scales of groups") -> CausalLM:
    """A model of random values and scales, in float32."""
    torch.manual_seed(4)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "intermediate_size": 48}
    model = CausalLM(CausalLMConfig(**{**sizes, **DIALS[name]}, stored_linears=True))
    for module in model.modules():
        if isinstance(module, StoredLinear | StoredEmbedding):
            module.values.copy_(torch.randint(-1, 2, module.values.shape))
            module.scale.copy_(torch.rand(module.scale.shape) / 4 + 0.1)
    return model.eval()


def matrices(model: CausalLM) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {n: t for n, t in state.items() if n.endswith((".values", ".scale"))}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_saved_model_is_the_same_model(name, ids, tmp_path):
    model = stored(name)
    logits = model(ids).logits
    assert logits.std() > 0
    model.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path)
    assert again.config.stored_linears
    assert torch.equal(again(ids).logits, logits)
    found, expected = matrices(again), matrices(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], t) for n, t in expected.items())
    assert torch.equal(copy.deepcopy(model)(ids).logits, logits)


@torch.no_grad()
def test_no_type_rounds_a_scale(ids, tmp_path):
    model = stored()
    model.save_pretrained(tmp_path)
    expected = matrices(model)
    half = CausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    moved = copy.deepcopy(model).bfloat16()
    for other in (half, moved, copy.deepcopy(model).to("cpu", torch.float16)):
        found = matrices(other)
        assert all(t.dtype == expected[n].dtype for n, t in found.items())
        assert all(torch.equal(t, expected[n]) for n, t in found.items())
    assert half.final_norm.weight.dtype == torch.bfloat16
    logits = half(ids).logits
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, moved(ids).logits)
    torch.testing.assert_close(logits.float(), model(ids).logits, rtol=0.1, atol=0.1)


def test_training_is_refused_until_there_are_latent_weights(ids):
    model = stored().train()
    with pytest.raises(ValueError, match=r"do not train: call to_latents\(\) first"):
        model(ids, labels=ids)
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()
    model.to_latents()
    model(ids, labels=ids).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert len(grads) > 10
    assert all(g is not None and g.abs().max() > 0 for g in grads.values())


@pytest.mark.parametrize("name", NAMES)
def test_latent_weights_compute_what_the_values_do(name, ids, tmp_path):
    model = stored(name)
    expected = model(ids).logits.detach()
    values = {n: t.clone() for n, t in matrices(model).items()}
    model.to_latents()
    kinds = {type(module) for module in model.modules()}
    assert not kinds & {StoredLinear, StoredEmbedding, StoredHead}
    assert (BitLinear if name == "ternary attention" else TernaryLinear) in kinds
    checked = 0
    for at, layer in bit_linears(model):
        if f"{at}.values" in values:
            t, scale = layer.quantised()
            assert torch.equal(t.to(torch.int8), values[f"{at}.values"])
            torch.testing.assert_close(scale, values[f"{at}.scale"], rtol=1e-6, atol=0)
            checked += 1
    assert checked >= 12
    error = (model(ids).logits - expected).norm() / expected.norm()
    assert error < 2e-2  # a rounding of an activation may fall the other way
    if name == "scales of groups":  # which has none
        assert error < 1e-5
        assert isinstance(model.embedding, TernaryEmbedding)
        assert model.head.weight is model.embedding.weight
    model.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path)
    assert not again.config.stored_linears
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_scale_too_small_for_training_leaves_the_model_as_it_was(ids):
    model = stored()
    model.layers[1].channel.down_proj.scale[0, 0] = 1e-7
    expected = model(ids).logits
    with pytest.raises(ValueError, match="a scale of 1e-07 is below 1e-05"):
        model.to_latents()
    assert model.config.stored_linears
    assert torch.equal(model(ids).logits, expected)


def test_a_stored_vocabulary_has_its_size():
    model = stored()
    with pytest.raises(ValueError, match="cannot resize"):
        model.resize_token_embeddings(80)
    assert model.get_input_embeddings() is model.embedding
    assert isinstance(model.get_output_embeddings(), StoredHead)


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("name", ["norms in front of outputs", "scales of groups"])
def test_packing_a_saved_model_keeps_its_ternary_matrices(name, latent, tmp_path):
    model = stored(name)
    if latent:
        model.to_latents()
    model.save_pretrained(tmp_path / "saved")
    pack(tmp_path / "saved", tmp_path / "packed", check=False)
    reader = PackedReader(tmp_path / "packed")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, StoredLinear | TernaryLinear)}
    layers.pop("head", None)  # the embedding
    assert len(layers) == 12
    for at, layer in layers.items():
        values, scale = layer.quantised()
        found, found_scale = reader.ternary(at)
        np.testing.assert_array_equal(found, values.numpy())
        rtol = 1e-6 if latent else 0
        np.testing.assert_allclose(found_scale, scale.numpy(), rtol=rtol)
