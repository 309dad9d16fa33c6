"""Another vocabulary size: every part has it, old rows stay, and a refusal changes nothing."""

from __future__ import annotations

import pytest
import torch
from dials import DIALS
from encoders import build as build_encoder
from torch import nn

from nomatmul.models import (
    BitLinear,
    CausalLM,
    Encoder,
    EncoderForSequenceClassification,
    EncoderForTokenClassification,
    MaskedLM,
)

HEADS = {
    "ternary": {},
    "ternary, tied": {"tie_embeddings": True},
    "dense": {"linear": "dense"},
    "dense, tied": {"linear": "dense", "tie_embeddings": True},
}
ENCODERS = (MaskedLM, Encoder, EncoderForSequenceClassification, EncoderForTokenClassification)


def check(model: nn.Module, size: int, folder) -> None:
    head = getattr(model, "head", None)
    assert len(model.embedding.weight) == model.embedding.num_embeddings == size
    assert model.config.vocab_size == model.config.model_config.vocab_size == size
    assert model.model_config.vocab_size == size
    if head is not None:
        assert len(head.weight) == head.out_features == size
        assert (head.weight is model.embedding.weight) == model.config.tie_embeddings
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    ids = torch.tensor([[3, size - 1, 4]])
    with torch.no_grad():
        ours, theirs = model(ids)[0], again(ids)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # sums depend on alignment
    if head is not None:
        assert ours.shape[-1] == size


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_new_tokens_leave_the_old_ones_alone(build, ids, tmp_path, name, mean):
    model = build(**HEADS[name])
    with torch.no_grad():
        before = model(ids).logits
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert model.resize_token_embeddings(71, mean_resizing=mean) is model.embedding
    for key, value in model.named_parameters():
        assert torch.equal(value[: len(old[key])], old[key]), key
    with torch.no_grad():
        logits = model(ids).logits
    torch.testing.assert_close(logits[..., :64], before, rtol=0, atol=2e-5)
    if mean and not isinstance(model.head, BitLinear):
        torch.testing.assert_close(model.embedding.weight[70], old["embedding.weight"].mean(0))
    check(model, 71, tmp_path)
    model.train()(ids, labels=ids + 6).loss.backward()
    assert model.head.weight.grad[64:].abs().max() > 0


@pytest.mark.parametrize("name", HEADS)
def test_tokens_are_cut_off(build, ids, tmp_path, name):
    model = build(**HEADS[name])
    old = model.embedding.weight.detach().clone()
    model.resize_token_embeddings(40)
    assert torch.equal(model.embedding.weight, old[:40])
    check(model, 40, tmp_path)
    with pytest.raises(ValueError, match="token id 63 is out of range: the vocabulary has 40"):
        model(torch.tensor([[63]]))


@pytest.mark.parametrize("linear", ["dense", "ternary"])
@pytest.mark.parametrize("cls", ENCODERS)
def test_encoders(tmp_path, cls, linear):
    model = build_encoder(cls, linear=linear, norm_eps=1e-6)
    model.resize_token_embeddings(70, pad_to_multiple_of=16)
    check(model, 80, tmp_path / "more")
    model.resize_token_embeddings(pad_to_multiple_of=32)
    check(model, 96, tmp_path / "padded")
    model.resize_token_embeddings(33)
    check(model, 33, tmp_path / "fewer")


@pytest.mark.parametrize("name", DIALS)
def test_every_dial(build, name, tmp_path):
    model = build(name)
    model.resize_token_embeddings(66)
    check(model, 66, tmp_path)


def test_nothing_asked_changes_nothing(build):
    model = build()
    weight = model.embedding.weight
    assert model.resize_token_embeddings() is model.embedding
    assert model.embedding.weight is weight
    model.resize_token_embeddings(pad_to_multiple_of=16)
    assert model.embedding.weight is weight


def test_frozen_weights_and_types_stay(build):
    model = build().to(torch.bfloat16)
    model.embedding.weight.requires_grad_(False)
    model.resize_token_embeddings(65)
    assert not model.embedding.weight.requires_grad
    assert model.head.weight.requires_grad
    assert model.embedding.weight.dtype == model.head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, {"new_num_tokens": 0}, "above 0, got 0"),
        (None, {"new_num_tokens": 70.5}, "above 0, got 70.5"),
        (None, {"new_num_tokens": 70, "pad_to_multiple_of": -8}, "pad_to_multiple_of"),
        (None, {"new_num_tokens": 2}, "eos_token_id"),
        ("head", {"new_num_tokens": 70}, "the model's own"),
        ("embedding", {"new_num_tokens": 70}, "the model's own"),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(build, change, arguments, message):
    model: CausalLM = build(eos_token_id=5)
    if change is not None:  # as an adapter's wrapper
        setattr(model, change, nn.Sequential(getattr(model, change)))
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=message):
        model.resize_token_embeddings(**arguments)
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in before.items()}
    assert model.config.vocab_size == model.model_config.vocab_size == 64
