"""A large embedding of which a token looks up one row stays in the file."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
from random_packed import family, write_random

import nomatmul
from nomatmul.engine.backends import native
from nomatmul.formats.errors import FormatError
from nomatmul.formats.packed import PackedReader

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture
def large(monkeypatch):
    monkeypatch.setattr(native, "_LARGE", 1)


def in_file(lm) -> bool:
    """Whether the embedding is a view of the mapped file."""
    owner = lm.backend.weights.arrays["embedding.weight"]
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return isinstance(getattr(owner, "obj", owner), mmap.mmap)


@pytest.mark.parametrize("kind", ["falcon", "bitnet"])
def test_logits_are_the_same(tmp_path, monkeypatch, kind):
    config, forms = family(kind)[:2]
    write_random(tmp_path / "packed", config, forms)
    read = nomatmul.load(tmp_path / "packed")
    monkeypatch.setattr(native, "_LARGE", 1)
    mapped = nomatmul.load(tmp_path / "packed")
    table = forms.head == "none"  # the head reads all of it
    assert (in_file(read), in_file(mapped)) == (False, not table)
    np.testing.assert_array_equal(read.logits(IDS), mapped.logits(IDS))


def test_damage_is_found(tmp_path, large):
    write_random(tmp_path / "packed", *family("falcon"))
    info = PackedReader(tmp_path / "packed").infos["embedding.weight"]
    path = tmp_path / "packed" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[info.offset + info.nbytes // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"embedding\.weight does not match its checksum"):
        nomatmul.load(tmp_path / "packed")
    nomatmul.load(tmp_path / "packed", verify=False)
