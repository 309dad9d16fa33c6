"""Sessions of packed models with attention: the native engine and the numpy oracle keep the same
keys and values, and go on from each other's files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine_models import ATTENTION, random_ids

from nomatmul.engine import load
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.rotary import RopeScaling

DIALS = {
    "groups of three, norms": {},
    "every head its own": {"num_kv_heads": 6, "qk_norm": False},
    "one for all": {"num_kv_heads": 1, "num_layers": 1},
    "linear": {"rope_scaling": RopeScaling("linear", 2.5)},
    "llama3": {
        "rope_scaling": RopeScaling(
            "llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32,
        )
    },
    "yarn": {"rope_scaling": RopeScaling("yarn", 4.0, original_max_position_embeddings=40)},
}  # fmt: skip


def config_of(name: str) -> ModelConfig:
    return dataclasses.replace(ATTENTION, **DIALS[name])


@pytest.fixture(params=list(DIALS))
def directory(request: pytest.FixtureRequest, make_packed: Callable[..., Path]) -> Path:
    return make_packed(config_of(request.param))


@pytest.fixture
def plain(make_packed: Callable[..., Path]) -> Path:
    return make_packed(config_of("groups of three, norms"))


@pytest.mark.parametrize("kv", ["f16", "f32"])
def test_logits_and_pieces_are_the_oracles(directory: Path, kv: str) -> None:
    fast, slow = load(directory, threads=2, kv=kv), load(directory, backend="numpy", kv=kv)
    sessions = fast.session(), slow.session()
    ids = random_ids(75, ATTENTION.vocab_size)
    for a, b in ((0, 1), (1, 70), (70, 75)):
        found, expected = (session.append(ids[a:b], "all") for session in sessions)
        np.testing.assert_array_equal(found, expected)
    ours, theirs = (session.arrays() for session in sessions)
    assert list(ours) == list(theirs)
    for name, array in theirs.items():
        assert array.dtype == {"f16": np.float16, "f32": np.float32}[kv]
        np.testing.assert_array_equal(ours[name], array)


def test_each_goes_on_from_the_others_file(plain: Path, tmp_path: Path) -> None:
    models = load(plain, threads=2), load(plain, backend="numpy")
    ids, tail = random_ids(66, ATTENTION.vocab_size), random_ids(5, ATTENTION.vocab_size, 1)
    rows = []
    for number, (one, other) in enumerate([models, models[::-1]]):
        session = one.session()
        session.append(ids, "none")
        session.save(tmp_path / str(number))
        loaded = other.session(tmp_path / str(number))
        fork = loaded.fork()
        loaded.roll_back(40)
        rows += [fork.append(tail, "all"), session.append(tail, "all"), loaded.append(tail, "all")]
    for found, expected in zip(rows[:3], rows[3:], strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(rows[0], rows[1])


def test_hidden_states_are_the_oracles(plain: Path) -> None:
    fast, slow = load(plain, threads=2), load(plain, backend="numpy")
    texts = [random_ids(n, ATTENTION.vocab_size, n) for n in (3, 70)]
    np.testing.assert_array_equal(fast.embed(texts), slow.embed(texts))


def test_what_load_refuses(plain: Path, make_packed: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="kv is 'f64'; it must be 'f16' or 'int8' or 'f32'"):
        load(plain, kv="f64")
    with pytest.raises(ValueError, match="keeps keys and values as floats, got kv 'int8'"):
        load(plain, backend="numpy", kv="int8")
    with pytest.raises(ValueError, match=r"kv 'int8' is about keys and values, and .* keeps none"):
        load(make_packed(), kv="int8")
