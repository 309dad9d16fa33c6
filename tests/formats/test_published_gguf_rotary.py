"""Rotary scaling of GGUF models: keys, and the table of Llama 3 that says it without them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf_models import HEAD_SIZE, sizes, write_gguf

from nomatmul.formats.errors import FormatError
from nomatmul.formats.published.gguf import open_gguf
from nomatmul.formats.rotary import RopeScaling, frequencies


def scaling_of(tmp_path, rng, keys, change=lambda tensors: None):
    def all_keys(writer):
        sizes(writer)
        keys(writer)

    write_gguf(tmp_path / "x.gguf", "llama", rng, keys=all_keys, change=change)
    scaling = open_gguf(tmp_path / "x.gguf")[0]["rope_scaling"]
    RopeScaling.from_dict(scaling or {"rope_type": "default"})
    return scaling


def test_linear_rotary_scaling(tmp_path, rng):
    def keys(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    assert scaling_of(tmp_path, rng, keys) == {"rope_type": "linear", "factor": 4.0}


def test_no_rotary_scaling(tmp_path, rng):
    def keys(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)

    assert scaling_of(tmp_path, rng, keys) is None


def test_yarn(tmp_path, rng):
    def keys(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)
        writer.add_float32("llama.rope.scaling.yarn_beta_fast", 16.0)

    assert scaling_of(tmp_path, rng, keys) == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
    }  # fmt: skip


def llama3_factors(factor, base=500000.0, low=1.0, high=4.0, original=8192):
    """The table that llama.cpp's converter writes."""
    found = []
    for freq in 1.0 / base ** (np.arange(0, HEAD_SIZE, 2, dtype=np.float32) / HEAD_SIZE):
        wave = 2 * np.pi / freq
        if wave < original / high:
            found.append(1.0)
        elif wave > original / low:
            found.append(factor)
        else:
            smooth = (original / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0, 1.0])
def test_a_table_of_llama3_is_recognised(tmp_path, rng, factor):
    table = llama3_factors(factor)

    def change(tensors):
        tensors["rope_freqs.weight"] = table

    scaling = scaling_of(tmp_path, rng, lambda writer: None, change)
    if factor == 1.0:
        assert scaling is None
        return
    assert scaling == {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    plain = frequencies(HEAD_SIZE, 500000.0)[0]
    scaled = frequencies(HEAD_SIZE, 500000.0, RopeScaling.from_dict(scaling))[0]
    np.testing.assert_allclose(plain / scaled, table, rtol=1e-5)


@pytest.mark.parametrize("table", [llama3_factors(8.0, original=4096), np.zeros(32, np.float32)])
def test_another_table_is_refused(tmp_path, rng, table):
    def change(tensors):
        tensors["rope_freqs.weight"] = table

    with pytest.raises(FormatError, match=r"rope_freqs\.weight"):
        scaling_of(tmp_path, rng, lambda writer: None, change)
