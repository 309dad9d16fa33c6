"""Packed directories to damage, and published decoders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from packed_files import KINDS, write_packed_kind
from support.published_lm import BITNET, LLAMA, Published, random_model


@pytest.fixture(scope="module", params=KINDS)
def packed(request, tmp_path_factory) -> Path:
    """A small sound packed directory of some kind and version, not to be changed."""
    return write_packed_kind(tmp_path_factory.mktemp("packed"), request.param)


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


@pytest.fixture
def bitnet(rng) -> Published:
    """A published BitNet, not written yet."""
    return random_model(BITNET, rng)


@pytest.fixture
def llama(rng) -> Published:
    """A published Llama, not written yet."""
    return random_model(LLAMA, rng)
