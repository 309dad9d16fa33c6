"""A large embedding of which a token looks up one row stays in the file."""

from __future__ import annotations

import mmap
import signal
import subprocess
import sys

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


def test_a_private_model_outlives_its_file(tmp_path, large):
    """Cutting a mapped file short ends the process that looks at it; see the control below."""
    write_random(tmp_path / "packed", *family("falcon"))
    assert _logits_of_a_cut_file(tmp_path / "packed", private=True) == 0


def test_a_mapped_one_does_not(tmp_path, large):
    write_random(tmp_path / "packed", *family("falcon"))
    assert _logits_of_a_cut_file(tmp_path / "packed", private=False) == -signal.SIGBUS


def _logits_of_a_cut_file(directory, private: bool) -> int:
    """Exit status of a process that loads a model, empties its file and computes."""
    code = (
        "import os, nomatmul\n"
        "from nomatmul.engine.backends import native\n"
        "native._LARGE = 1\n"
        f"lm = nomatmul.load({str(directory)!r}, private={private}, threads=1)\n"
        f"before = None if not {private} else lm.logits({IDS})\n"
        f"os.truncate({str(directory / 'model.safetensors')!r}, 0)\n"
        f"after = lm.logits({IDS})\n"
        "assert (before == after).all()\n"
    )
    return subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode


def test_mapped_and_private_exclude_each_other(tmp_path):
    write_random(tmp_path / "packed", *family("falcon"))
    with pytest.raises(ValueError, match="choose one"):
        nomatmul.load(tmp_path / "packed", mmap=True, private=True)
