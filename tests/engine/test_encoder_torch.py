"""A model saved by torch, packed, and run without it: the same logits for every task."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from encoders import build, some_ids

import nomatmul
from nomatmul.convert import pack
from nomatmul.models import (
    EncoderForSequenceClassification,
    EncoderForTokenClassification,
    MaskedLM,
)

KINDS = (EncoderForSequenceClassification, EncoderForTokenClassification, MaskedLM)


@pytest.mark.parametrize("name", ["ultrafastbert", "glu, rotary", "trees in one layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_torch(kind, name, tmp_path):
    source = build(kind, name)
    source.save_pretrained(tmp_path / "source")
    pack(tmp_path / "source", tmp_path / "packed", check=False)
    ids, mask = some_ids(), torch.ones(2, 17, dtype=torch.long)
    mask[0, 9:] = 0
    with torch.no_grad():
        wanted = source(ids, attention_mask=mask).logits.numpy()
    found = nomatmul.load(tmp_path / "packed").logits(ids.numpy(), mask.numpy())
    # as in test_encoder.py: two blocks of eight stages and four more, 32 wide, either side
    scale = max(1.0, float(np.abs(wanted).max()))
    assert np.abs(found - wanted).max() < 4 * 2 * np.sqrt(20 * 32) * 2.0**-24 * scale
