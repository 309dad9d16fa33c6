"""Adapters (LoRA of peft) on our layers: they attach, learn, and are never passed by."""

from __future__ import annotations

import pytest
import torch
from dials import DIALS
from encoders import build as build_encoder
from encoders import some_ids, some_labels
from peft import LoraConfig, PeftModel, get_peft_model

from nomatmul.models import BitLinear, MaskedLM

CLOSE = {"rtol": 0, "atol": 2e-5}


def adapted(model, **options):
    """The model with adapters that are moved away from zero."""
    torch.manual_seed(4)
    made = get_peft_model(model, LoraConfig(**{"target_modules": "all-linear", "r": 4, **options}))
    return made


def move(model) -> None:
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.05)


@pytest.mark.parametrize("targets", ["all-linear", ["i_proj", "gate_proj", "q_proj"]])
@pytest.mark.parametrize("name", DIALS)
def test_adapters_attach_and_learn(build, ids, name, targets):
    model = build(name)
    with torch.no_grad():
        before = model(ids).logits
    lora = adapted(model, target_modules=targets)
    with torch.no_grad():
        torch.testing.assert_close(lora(input_ids=ids).logits, before, **CLOSE)
    move(lora)
    lora.train()(input_ids=ids, labels=ids).loss.backward()
    learns = {n: p.grad for n, p in lora.named_parameters() if p.requires_grad}
    assert learns
    assert all("lora_" in n and g is not None and g.abs().max() > 0 for n, g in learns.items())


def test_encoders_too():
    ids = some_ids()
    lora = adapted(build_encoder(MaskedLM, "ternary")).train()
    move(lora)
    lora(input_ids=ids, labels=some_labels(ids)).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in lora.parameters() if p.requires_grad)


@pytest.mark.parametrize("targets", ["all-linear", "head", "o_proj", "down_proj"])
@pytest.mark.parametrize("name", ["matmul-free", "dense mlgru"])
def test_fused_operations_do_not_pass_them_by(build, ids, fuse, name, targets):
    targets = targets if targets == "all-linear" else [targets]
    lora = adapted(build(name), target_modules=targets)
    plain = lora(input_ids=ids, labels=ids).loss
    move(lora)
    moved = lora(input_ids=ids, labels=ids).loss
    assert abs(moved - plain) > 1e-4
    fuse()
    torch.testing.assert_close(lora(input_ids=ids, labels=ids).loss, moved, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["matmul-free", "transformer++"])
def test_generate_save_and_load(build, ids, tmp_path, name):
    lora = adapted(build(name)).eval()
    move(lora)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    made = lora.generate(input_ids=ids, **options)
    assert torch.equal(made, lora.generate(input_ids=ids, use_cache=False, **options))
    lora.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(name), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, lora(input_ids=ids).logits)


def test_a_dense_model_takes_them_in(build, ids):
    lora = adapted(build("dense mlgru")).eval()
    move(lora)
    with torch.no_grad():
        logits = lora(input_ids=ids).logits
        merged = lora.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, logits, **CLOSE)


def test_sixteen_bit_weights(build, ids):
    for name in ("dense mlgru", "matmul-free"):
        lora = adapted(build(name).to(torch.bfloat16))
        assert lora(input_ids=ids).logits.dtype == torch.bfloat16


def test_a_ternary_layer_is_a_linear_layer_with_its_own_first_weights():
    torch.manual_seed(0)
    layer = BitLinear(16, 24)
    torch.manual_seed(0)
    expected = torch.nn.init.xavier_uniform_(torch.empty(24, 16), gain=2**-2.5)
    assert isinstance(layer, torch.nn.Linear)
    assert layer.bias is None
    assert torch.equal(layer.weight, expected)
    assert torch.equal(layer.norm.weight, torch.ones(16))
