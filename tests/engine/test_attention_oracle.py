"""Packed decoders with attention: the native core has the bits of the oracle, on every instruction
set, however keys and values are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_packed import ATTENTION, FAMILIES, family, write_random

from nomatmul.engine import load
from nomatmul.engine.native import native
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed import Forms, PackedReader
from nomatmul.reference.model import ReferenceModel

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
DIALS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared heads with norms": {"num_kv_heads": 2, "qk_norm": True},
    "scaled positions, a head size": {"num_kv_heads": 1, "head_dim": 24, "rope_scaling": YARN},
    "odd sizes, no channel mixer": {"channel_mixer": "none", "head_dim": 38},
}


def assert_same_bits(directory: Path, tokens: int, kv: str) -> None:
    reader = PackedReader(directory)
    ids = np.random.default_rng(5).integers(0, reader.config.vocab_size, tokens)
    wanted = ReferenceModel.from_packed(reader, kv=kv).forward(ids).logits_BTV[0]
    for isa in native().kernels.isas():
        found = load(directory, isa=isa, kv=kv).logits(ids)
        np.testing.assert_array_equal(found, wanted, err_msg=isa)


@pytest.mark.parametrize("kv", ["f16", "int8", "f32"])
@pytest.mark.parametrize("dials", DIALS.values(), ids=DIALS)
def test_logits_have_the_bits_of_the_oracle(tmp_path: Path, dials: dict[str, Any], kv: str) -> None:
    sizes = {**ATTENTION, "intermediate_size": 80, "max_position_embeddings": 200}
    config = ModelConfig(**{**sizes, **dials})
    write_random(tmp_path / "m", config, Forms.of(config))
    assert_same_bits(tmp_path / "m", 90, kv)  # more than a page


@pytest.mark.parametrize("dials", [{}, {"hidden_size": 128, "num_heads": 8, "vocab_size": 301}])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_bits_of_the_oracle(
    tmp_path: Path, name: str, dials: dict[str, Any]
) -> None:
    """Every form of matrices, tables, heads and scales."""
    config, forms = family(name, **dials)
    write_random(tmp_path / "m", config, forms)
    assert_same_bits(tmp_path / "m", 40, "f16")
