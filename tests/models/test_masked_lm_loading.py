"""Saving, loading, transformers' Auto classes, and what must be refused."""

from __future__ import annotations

import shutil

import crammed
import pytest
import torch
from encoders import DIALS, build, some_ids
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.models import (
    CausalLM,
    CausalLMConfig,
    Encoder,
    EncoderConfig,
    EncoderForSequenceClassification,
    EncoderForTokenClassification,
    MaskedLM,
)


@pytest.mark.parametrize("name", DIALS)
@torch.no_grad()
def test_save_and_load_give_the_same_model(tmp_path, name):
    model, ids = build(MaskedLM, name), some_ids()
    model.save_pretrained(tmp_path)
    again = MaskedLM.from_pretrained(tmp_path)
    assert again.config.model_config == model.config.model_config
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not again.training
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == model.config.model_config
    assert (checkpoint.kind, checkpoint.reading.task) == ("training", "masked")
    assert checkpoint.names() == [*dict.fromkeys(checkpoint.names())]
    for parameter, value in model.named_parameters():
        assert torch.equal(torch.from_numpy(checkpoint.read(parameter)), value), parameter
    assert len(checkpoint.names()) == len(list(model.named_parameters()))


@torch.no_grad()
def test_classifiers_are_what_formats_reads(tmp_path):
    names = {0: "bad", 1: "good"}
    for kind, task in (
        (EncoderForSequenceClassification, "sequence"),
        (EncoderForTokenClassification, "token"),
    ):
        model = build(kind, id2label=names, pooler="max", pool_padding=True)
        model.save_pretrained(tmp_path / task)
        checkpoint = open_checkpoint(tmp_path / task)
        assert checkpoint.reading.task == task
        assert checkpoint.reading.labels == ("bad", "good")
        assert checkpoint.reading.head == model.config.head
        assert set(checkpoint.names()) == {name for name, _ in model.named_parameters()}
        for parameter, value in model.named_parameters():
            assert torch.equal(torch.from_numpy(checkpoint.read(parameter)), value), parameter


def test_labels_without_names(tmp_path):
    build(EncoderForSequenceClassification, num_labels=3).save_pretrained(tmp_path / "three")
    assert open_checkpoint(tmp_path / "three").reading.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    build(EncoderForSequenceClassification).save_pretrained(tmp_path / "two")
    assert open_checkpoint(tmp_path / "two").reading.labels == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize("published", [False, True])
def test_auto_classes(tmp_path, published):
    if published:
        crammed.make(tmp_path)
    else:
        build(MaskedLM, "ultrafastbert").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is EncoderConfig
    assert config.model_config.fff_trees == 3
    ids, expected = some_ids(1, 9).clamp(max=47), MaskedLM.from_pretrained(tmp_path)
    masked = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(masked) is MaskedLM
    assert torch.equal(masked(ids).logits, expected(ids).logits)
    bare = AutoModel.from_pretrained(tmp_path)
    assert type(bare) is Encoder
    assert torch.equal(bare(ids).last_hidden_state, expected.hidden(ids))
    for auto, kind in (
        (AutoModelForSequenceClassification, EncoderForSequenceClassification),
        (AutoModelForTokenClassification, EncoderForTokenClassification),
    ):
        with pytest.warns(UserWarning, match="drawn at random"):
            model = auto.from_pretrained(tmp_path, num_labels=7)
        assert type(model) is kind
        assert model(ids).logits.shape[-1] == 7
    half = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16


def test_the_recorded_checkpoint_is_saved_as_our_own(crammed_tiny, tmp_path):
    model = MaskedLM.from_pretrained(crammed_tiny)
    model.save_pretrained(tmp_path)
    again, ids = MaskedLM.from_pretrained(tmp_path), some_ids()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.config.model_config == model.config.model_config
    assert again.config.head == model.config.head


def test_config_defaults_are_the_same_for_both_readers(tmp_path):
    """A field that config.json leaves out means crammed BERT's value to transformers and to us."""
    from nomatmul.formats.checkpoint import config_from_training

    assert EncoderConfig().model_config == config_from_training({"model_type": "nomatmul-encoder"})
    plain = ModelConfig(8, 8, 1, token_mixer="attention", causal=False, norm="rms")
    assert EncoderConfig.from_model_config(plain).model_config == plain
    saved = EncoderConfig.from_model_config(plain)
    saved.save_pretrained(tmp_path)
    assert EncoderConfig.from_pretrained(tmp_path).model_config == plain


def test_decoders_and_encoders_are_not_mixed_up(tmp_path):
    build(MaskedLM).save_pretrained(tmp_path / "encoder")
    decoder = CausalLM(CausalLMConfig(64, 32, 1, intermediate_size=48))
    decoder.save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match="encoder is an encoder: use MaskedLM, not CausalLM"):
        CausalLM.from_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="decoder is a decoder: use CausalLM, not MaskedLM"):
        MaskedLM.from_pretrained(tmp_path / "decoder")


def _changed(source, target, change) -> None:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def test_odd_tensors_are_refused(tmp_path):
    build(MaskedLM, "ultrafastbert").save_pretrained(tmp_path / "good")

    def poison(tensors):
        tensors["layers.1.channel.w_out"][3, 3] = float("nan")

    for number, (change, message) in enumerate(
        (
            (lambda t: t.pop("position_scale"), "missing tensor position_scale"),
            (lambda t: t.update(extra=torch.zeros(2)), "unexpected tensor extra"),
            (lambda t: t.update({"layers.0.channel.w_in": torch.zeros(20, 32)}), "cannot load"),
            (poison, "layers.1.channel.w_out holds NaN"),
        )
    ):
        _changed(tmp_path / "good", tmp_path / str(number), change)
        with pytest.raises(ValueError, match=message):
            MaskedLM.from_pretrained(tmp_path / str(number))


def test_a_depth_that_does_not_match_the_weights_is_refused(tmp_path):
    values = crammed.config()
    stored = crammed.tensors(values)
    values["arch"]["intermed_depth"] = 3
    crammed.write(tmp_path, values, stored)
    with pytest.raises(ValueError, match=r"has shape \[21, 16\], the config asks for \[45, 16"):
        MaskedLM.from_pretrained(tmp_path)
