"""Rotary frequencies and their scalings, against transformers' own and against definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nomatmul.formats.rotary import RopeScaling, frequencies, tables

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def test_unscaled_pairs_turn_by_powers_of_theta():
    inverse, factor = frequencies(8, 10000.0)
    np.testing.assert_allclose(inverse, [1, 0.1, 0.01, 0.001], rtol=1e-15)
    assert factor == 1.0
    cos, sin = tables(np.array([[0, 7]]), inverse, 2.0)
    assert cos.shape == sin.shape == (1, 2, 4)
    assert cos.dtype == sin.dtype == np.float32
    np.testing.assert_array_equal(cos[0, 0], [2, 2, 2, 2])
    assert sin[0, 1, 1] == np.float32(np.sin(7 * inverse[1])) * np.float32(2)


@pytest.mark.parametrize(
    "words",
    [
        {"rope_type": "linear", "factor": 2.5},
        LLAMA3,
        {**LLAMA3, "original_max_position_embeddings": 8192, "factor": 32.0},
        YARN,
        {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
        {**YARN, "attention_factor": 1.3},
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        {**YARN, "truncate": True, "attention_factor": None},
    ],
)
@pytest.mark.parametrize("head_size", [16, 128])
def test_scalings_are_those_of_transformers(words, head_size):
    config = LlamaConfig(
        hidden_size=4 * head_size, num_attention_heads=4, max_position_embeddings=4096,
        rope_parameters={**words, "rope_theta": 500000.0},
    )  # fmt: skip
    theirs, their_factor = ROPE_INIT_FUNCTIONS[words["rope_type"]](config, torch.device("cpu"))
    inverse, factor = frequencies(head_size, 500000.0, RopeScaling.from_dict(words))
    np.testing.assert_allclose(inverse, theirs.double().numpy(), rtol=2e-6)
    assert factor == pytest.approx(their_factor, rel=1e-12)
    plain, _ = frequencies(head_size, 500000.0)
    assert np.abs(inverse / plain - 1).max() > 0.1


def test_words_of_transformers_round_trip():
    for words in (LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0}):
        scaling = RopeScaling.from_dict(words)
        assert scaling is not None
        assert scaling.to_dict() == words
    old = {"type": "linear", "factor": 2}
    assert RopeScaling.from_dict(old) == RopeScaling("linear", 2.0)
    assert RopeScaling.from_dict({"rope_type": "linear", **old}) == RopeScaling("linear", 2.0)
    assert RopeScaling.from_dict({"rope_type": "default"}) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic' is unknown; legal values are 'linear"),
        ({"rope_type": "longrope", "factor": 2.0}, "rope_scaling 'longrope' is unknown"),
        ({"rope_type": ["yarn"], "factor": 2.0}, "is unknown"),
        ({"factor": 2.0}, "needs one rope_type"),
        ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, "needs one rope_type"),
        ("linear", "must be an object with a rope_type, got 'linear'"),
        ({"rope_type": "linear"}, "rope_scaling 'linear' needs factor"),
        ({"rope_type": "linear", "factor": 0}, "rope_scaling factor 0 must be finite and above 0"),
        ({"rope_type": "linear", "factor": "2"}, "factor must be a number, got '2'"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 1.0}, "beta_fast does not belong to"),
        ({"rope_type": "linear", "factor": 2.0, "colour": 1}, "has the unknown key 'colour'"),
        ({"rope_type": "yarn", "factor": 2.0}, "needs original_max_position_embeddings"),
        ({**YARN, "original_max_position_embeddings": 1.5}, "must be a whole number, got 1.5"),
        ({**YARN, "beta_fast": 1.0, "beta_slow": 2.0}, "beta_slow 2.0 must be below beta_fast 1.0"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "low_freq_factor 1.0 must be below high_freq_factor"),
        ({**YARN, "truncate": False}, "has the unknown key 'truncate'"),
    ],
)
def test_scalings_that_are_not_understood_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling.from_dict(words)
