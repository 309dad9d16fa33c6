"""Damage to a checkpoint without checksums: it opens, or it raises ValueError, nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import write_published

from nomatmul.formats.checkpoint import open_checkpoint

FILES = ("config.json", "model.safetensors")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A small sound published directory, not to be changed."""
    root = tmp_path_factory.mktemp("published")
    rng = np.random.default_rng(1)
    write_published(root, rng, hidden_size=8, intermediate_size=5, vocab_size=7)
    return root


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_refused_or_reads_as_finite_floats(sound, data):
    name = data.draw(st.sampled_from(FILES))
    damaged = bytearray((sound / name).read_bytes())
    near = min(len(damaged) - 1, data.draw(st.sampled_from([len(damaged) - 1, 2000, 20])))
    at = data.draw(st.integers(0, near))
    kind = data.draw(st.sampled_from(["set", "cut", "insert", "append"]))
    if kind == "set":
        damaged[at] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        del damaged[at:]
    elif kind == "insert":
        damaged[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    else:
        damaged += data.draw(st.binary(min_size=1, max_size=9))
    directory = sound / "spare"
    directory.mkdir(exist_ok=True)
    for file in FILES:
        source = bytes(damaged) if file == name else (sound / file).read_bytes()
        (directory / file).write_bytes(source)
    lines = ["read"]
    try:
        checkpoint = open_checkpoint(directory)
        for tensor in checkpoint.names():
            values = checkpoint.read(tensor)
            assert values.shape == checkpoint.shape(tensor)
            assert np.isfinite(values).all()
    except ValueError as error:
        lines = str(error).splitlines()
    assert len(lines) == 1
