"""Classification heads: pooling, losses, dropout, and the way from a masked model to them."""

from __future__ import annotations

import crammed
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoders import build, some_ids
from transformers import AutoModelForSequenceClassification

from nomatmul.models import (
    EncoderForSequenceClassification,
    EncoderForTokenClassification,
    MaskedLM,
)


def some_mask() -> torch.Tensor:
    mask = torch.ones(2, 17)
    mask[1, 9:] = 0
    return mask


@torch.no_grad()
@pytest.mark.parametrize("pooler", ["avg", "zero_index", "max", "lse"])
@pytest.mark.parametrize("padded", [False, True])
def test_poolers(pooler, padded):
    model = build(EncoderForSequenceClassification, pooler=pooler, pool_padding=padded)
    ids, mask = some_ids(), some_mask()
    hidden = model.hidden(ids, mask)
    expected = []
    for row, length in enumerate((17, 17 if padded else 9)):
        states = hidden[row, :length]
        expected.append(
            {
                "avg": states.mean(0),
                "zero_index": states[0],
                "max": states.max(0)[0],
                "lse": states.exp().sum(0).log(),
            }[pooler]
        )
    assert torch.allclose(model.pool(hidden, mask), torch.stack(expected), atol=1e-5)
    x = torch.tanh(model.pooler(torch.stack(expected)))
    assert torch.allclose(model(ids, mask).logits, model.classifier(x), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "ultrafastbert"])
def test_a_padded_sequence_is_classified_as_it_is_alone(name):
    model, ids = build(EncoderForSequenceClassification, name), some_ids()
    both = model(ids, attention_mask=some_mask()).logits
    assert torch.allclose(both[1:], model(ids[1:, :9]).logits, atol=1e-5)


def test_without_a_dense_layer():
    model = build(EncoderForSequenceClassification, pooler_size=None, num_labels=5)
    names = [name for name, _ in model.named_parameters() if "pooler" in name]
    assert names == []
    assert model(some_ids()).logits.shape == (2, 5)


def test_losses_of_sequences():
    ids = some_ids()
    model = build(EncoderForSequenceClassification, num_labels=3)
    logits = model(ids).logits
    classes = torch.tensor([2, 0])
    assert torch.allclose(model(ids, labels=classes).loss, F.cross_entropy(logits, classes))
    several = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    expected = F.binary_cross_entropy_with_logits(logits, several)
    assert torch.allclose(model(ids, labels=several).loss, expected)
    model.config.problem_type = "multi_label_classification"
    assert torch.allclose(model(ids, labels=several.long()).loss, expected)
    model = build(EncoderForSequenceClassification, num_labels=1)
    scores = torch.tensor([0.5, 3.0])
    expected = ((model(ids).logits[:, 0] - scores) ** 2).mean()
    assert torch.allclose(model(ids, labels=scores).loss, expected)


def test_losses_of_tokens():
    model, ids = build(EncoderForTokenClassification, "ultrafastbert", num_labels=4), some_ids()
    labels = torch.randint(0, 4, (2, 17))
    labels[0, 3:9] = -100
    logits = model(ids, some_mask()).logits
    assert logits.shape == (2, 17, 4)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert torch.allclose(model(ids, some_mask(), labels=labels).loss, expected)


def test_labels_out_of_range():
    ids = some_ids()
    model = build(EncoderForSequenceClassification, num_labels=3)
    with pytest.raises(ValueError, match="label 3 is out of range: the model has 3 labels"):
        model(ids, labels=torch.tensor([1, 3]))
    model = build(EncoderForTokenClassification, num_labels=3)
    labels = torch.full((2, 17), -100)
    labels[1, 4] = -2
    with pytest.raises(ValueError, match="label -2 is out of range"):
        model(ids, labels=labels)


def test_labels_of_another_shape():
    ids = some_ids()
    model = build(EncoderForSequenceClassification, num_labels=3)
    with pytest.raises(ValueError, match="3 labels do not fit 2 sequences"):
        model(ids, labels=torch.tensor([1, 2, 0]))
    with pytest.raises(ValueError, match=r"labels have shape \(2,\), expected \(2, 3\)"):
        model(ids, labels=torch.tensor([0.5, 1.0]))
    model = build(EncoderForTokenClassification, num_labels=3)
    with pytest.raises(ValueError, match=r"labels have shape \(2, 16\), expected \(2, 17\)"):
        model(ids, labels=torch.zeros(2, 16, dtype=torch.long))
    with pytest.raises(ValueError, match="num_labels is 0, it must be at least 1"):
        build(EncoderForTokenClassification, num_labels=0)


def test_dropout_is_for_training_classifiers_only():
    ids = some_ids()
    for kind, dropped in ((EncoderForSequenceClassification, True), (MaskedLM, False)):
        model = build(kind, "ultrafastbert")
        assert torch.equal(model(ids)[0], model(ids)[0])
        model.train()
        assert torch.equal(model.hidden(ids), model.hidden(ids)) is not dropped
        model.set_dropout(0.3)
        assert not torch.equal(model.hidden(ids), model.hidden(ids))
        with pytest.raises(ValueError, match=r"dropout 1 must lie in \[0, 1\)"):
            model.set_dropout(1)


# -- from a masked model ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [EncoderForSequenceClassification, EncoderForTokenClassification])
@pytest.mark.parametrize("name", ["ultrafastbert", "no channel mixer"])
def test_a_masked_model_becomes_a_classifier(tmp_path, kind, name):
    """The encoder is kept, whether the head is tied or not; only the classifier is drawn."""
    masked = build(MaskedLM, name)
    masked.save_pretrained(tmp_path / "masked")
    with pytest.warns(UserWarning, match=r"classifier.weight.*: drawn at random"):
        model = kind.from_pretrained(tmp_path / "masked", num_labels=3, classifier_dropout=0.0)
    ids = some_ids()
    assert torch.equal(model.hidden(ids), masked.hidden(ids))
    assert model(ids).logits.shape[-1] == 3
    assert model.config.classifier_dropout == 0
    assert 0 < model.classifier.weight.std() < 0.04
    assert bool((model.classifier.bias == 0).all())
    model.save_pretrained(tmp_path / "classifier")
    again = kind.from_pretrained(tmp_path / "classifier")
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match=r"unexpected tensor classifier.bias|missing tensor head"):
        MaskedLM.from_pretrained(tmp_path / "classifier")


def test_a_published_masked_model_becomes_a_classifier(tmp_path):
    values = crammed.config({"classification_head.head_dim": 12})
    stored = crammed.tensors(values)
    crammed.write(tmp_path, values, stored)
    with pytest.warns(UserWarning, match=r"pooler.weight.*: drawn at random"):
        model = EncoderForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    assert model.classifier.weight.shape == (4, 12)
    assert not model.config.pool_padding
    assert bool((model.pooler.bias == 0).all())
    assert 0.01 < model.pooler.weight.std() < 0.04


@torch.no_grad()
def test_a_published_classifier(tmp_path):
    """Its pooler takes the mean over padding too, as the authors' code does."""
    values = crammed.config()
    stored = crammed.tensors(values)
    crammed.add_classifier(values, stored, labels=3)
    crammed.write(tmp_path, values, stored)
    model = EncoderForSequenceClassification.from_pretrained(tmp_path)
    ids, mask = np.random.default_rng(3).integers(0, 48, (2, 9)), np.ones((2, 9))
    mask[1, 5:] = 0
    x = crammed.hidden(values, stored, ids, mask).mean(1)
    x = np.tanh(x @ stored["pooler.dense.weight"].T + stored["pooler.dense.bias"])
    expected = x @ stored["head.weight"].T + stored["head.bias"]
    logits = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits
    assert np.allclose(logits.numpy(), expected, atol=1e-5)
    assert model.config.num_labels == 3
    auto = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(auto(torch.from_numpy(ids)).logits, model(torch.from_numpy(ids)).logits)
