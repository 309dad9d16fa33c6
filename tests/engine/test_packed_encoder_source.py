"""A packed encoder opened as the checkpoint it was packed from: to compare, and to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from encoder_files import TREES, encoder_config, write_encoder, write_word_piece

import nomatmul
from nomatmul.convert import pack
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.packed import PackedReader
from nomatmul.models import (
    EncoderForSequenceClassification,
    EncoderForTokenClassification,
    MaskedLM,
)

MASTER = {**TREES, "fff_master_width": 5}
TASKS = {"masked": (), "sequence": ("no", "maybe", "yes"), "token": ("a", "b")}
CLASSES = {
    "masked": MaskedLM, "sequence": EncoderForSequenceClassification,
    "token": EncoderForTokenClassification,
}  # fmt: skip


def packed(root, dials, task, form):
    tensors = write_encoder(root / "source", encoder_config(**dials), task, TASKS[task])
    write_word_piece(root / "source")
    forms = {"rows": form, "dense": form, "embedding": form}
    pack(root / "source", root / "packed", check=False, **forms)
    return tensors


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dials", [TREES, MASTER, {}], ids=["trees", "master", "dense"])
def test_floats_come_back_as_they_were(tmp_path, dials, task):
    tensors = packed(tmp_path, dials, task, "f32")
    checkpoint = open_checkpoint(tmp_path / "packed")
    assert set(checkpoint.names()) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name), tensor, err_msg=name)
        np.testing.assert_array_equal(checkpoint.read(name, slice(1, 3)), tensor[1:3])


def test_a_fused_matrix_is_read_once(tmp_path, monkeypatch):
    packed(tmp_path, MASTER, "masked", "int8")
    checkpoint, found = open_checkpoint(tmp_path / "packed"), []
    monkeypatch.setattr(PackedReader, "read_into", _noted(PackedReader.read_into, found))
    for name in checkpoint.names():
        checkpoint.read(name)
    assert len(found) == len(set(found))
    assert len(found) > 0


def _noted(read, found):
    def read_into(self, name, *rest):
        found.append(name)
        return read(self, name, *rest)

    return read_into


def test_rounded_ones_are_within_half_a_step(tmp_path):
    tensors = packed(tmp_path, MASTER, "masked", "int8")
    checkpoint = open_checkpoint(tmp_path / "packed")
    for name, tensor in tensors.items():
        found = checkpoint.read(name)
        assert found.shape == tensor.shape
        if tensor.ndim == 2:  # one scale a row
            step = np.abs(tensor).max(1, keepdims=True) / 127
            assert (np.abs(found - tensor) <= 0.501 * step).all(), name
        else:
            np.testing.assert_array_equal(found, tensor)


@pytest.mark.parametrize("task", TASKS)
def test_torch_computes_with_the_values_that_the_engine_has(tmp_path, task):
    packed(tmp_path, MASTER, task, "f32")
    model = CLASSES[task].from_pretrained(tmp_path / "packed").eval()
    engine = nomatmul.load(tmp_path / "packed", kind="encoder", threads=1)
    assert model.config.id2label == dict(enumerate(TASKS[task])) or task == "masked"
    ids = np.array([[2, 6, 7, 9, 3]])
    with torch.no_grad():
        found = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(found, engine.logits(ids), atol=2e-5)


def test_a_masked_one_gets_a_fresh_head(tmp_path):
    packed(tmp_path, MASTER, "masked", "int8")
    with pytest.warns(UserWarning, match="classifier"):
        model = EncoderForSequenceClassification.from_pretrained(tmp_path / "packed", num_labels=4)
    assert model.classifier.weight.shape[0] == 4


def test_a_packed_encoder_of_the_first_version_loads_as_any():
    packed = Path(__file__).parents[1] / "golden/traces/packed-encoder-v1"
    model = MaskedLM.from_pretrained(packed).eval()
    checkpoint = open_checkpoint(packed)
    for name, tensor in model.state_dict().items():
        if name in checkpoint.names():
            np.testing.assert_array_equal(tensor.numpy(), checkpoint.read(name), err_msg=name)


def test_a_packed_decoder_is_still_the_engines():
    first = Path(__file__).parents[1] / "golden/traces/packed-decoder-v1"
    for packed in (nomatmul.engine.loading.BOX, first):
        with pytest.raises(ValueError, match="the engine loads it"):
            MaskedLM.from_pretrained(packed)
