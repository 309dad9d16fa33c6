"""Whole models from GGUF files: the oracle's logits are those that llama.cpp computed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from nomatmul.reference.model import ReferenceModel

RECORDED = Path(__file__).resolve().parents[1] / "golden" / "gguf-models"
NAMES = sorted(path.stem for path in RECORDED.glob("*.gguf"))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_llama_cpp_s(tmp_path, name):
    """Rows of q and k in their order, each rotary scaling, q and k norms."""
    shutil.copy(RECORDED / f"{name}.gguf", tmp_path)
    recorded = load_file(RECORDED / "logits.safetensors")
    ids, wanted = recorded["ids"], recorded[name]
    for path in (tmp_path, tmp_path / f"{name}.gguf"):
        found = ReferenceModel.load(path).forward(ids[None]).logits_BTV[0]
        assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_each_kind_was_recorded():
    assert len(NAMES) == 4
