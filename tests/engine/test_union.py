"""The union (mlgru, fff, ternary) in the native engine: equal to the oracle's paths and integers,
and to itself however a sequence is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine_models import random_ids, rebuilt, state_of
from union_models import oracle_trees, union

import nomatmul
from nomatmul.engine import load, random_model
from nomatmul.engine.native import native
from nomatmul.formats.config import ModelConfig

# one deep tree, many shallow ones, single nodes, more than a task of trees and a run of walkers
SHAPES = {
    "5x3": union(),
    "1x7": union(fff_trees=1, fff_depth=7, hidden_size=42),
    "41x1": union(fff_trees=41, fff_depth=1, hidden_size=260),
    "3x0": union(fff_trees=3, fff_depth=0, hidden_size=1, vocab_size=2),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return request.param


@pytest.mark.parametrize("isa", native().kernels.isas())
def test_paths_and_accumulators_equal_the_oracles(
    make_packed: Callable[..., Path], config: ModelConfig, isa: str
) -> None:
    directory = make_packed(config)
    lm = load(directory, isa=isa, threads=2)
    x_TD = np.random.default_rng(5).standard_normal((67, config.hidden_size), dtype=np.float32)
    x_TD[0] = 0  # nothing but ties
    for layer, trees in enumerate(oracle_trees(directory)):
        expected_TA, expected_rows = (found.reshape(67, -1) for found in trees.walk(x_TD))
        for tokens in (1, 2, 67):
            rows_TA, logits_TA = lm.backend.model.walk(layer, x_TD[:tokens])
            np.testing.assert_array_equal(rows_TA, expected_rows[:tokens])
            np.testing.assert_array_equal(logits_TA, expected_TA[:tokens])


def test_logits_equal_the_oracles(make_packed: Callable[..., Path]) -> None:
    directory = make_packed(union(), "1.6bit", "int8")
    fast, slow = load(directory, threads=2), load(directory, backend="numpy")
    ids = random_ids(45, 131)
    found, expected = fast.logits(ids), slow.logits(ids)
    np.testing.assert_array_equal(found, expected)


def test_however_it_is_computed_the_bits_are_the_same(config: ModelConfig) -> None:
    lm = random_model(config, seed=5, threads=1)
    ids = random_ids(150, config.vocab_size)
    whole = lm.logits(ids)
    assert np.isfinite(whole).all()
    for options in ({"threads": 2}, {"threads": 5, "chunk": 70}, {"threads": 2, "chunk": 1}):
        np.testing.assert_array_equal(rebuilt(lm, **options).logits(ids), whole)
    for isa in native().kernels.isas():
        other = rebuilt(lm, threads=2, isa=isa)
        np.testing.assert_array_equal(other.logits(ids[:40]), whole[:40])
        session = other.session()
        np.testing.assert_array_equal([session.append([token]) for token in ids[:9]], whole[:9])


def test_sessions_batches_and_saved_states(tmp_path: Path) -> None:
    lm = random_model(union(), "1.6bit", "bf16", threads=2)
    ids = random_ids(60, 131)
    whole = lm.logits(ids)
    session = lm.session()
    session.append(ids[:20])
    fork = session.fork()
    session.save(tmp_path / "state")
    rows = lm.step([session, lm.session(), lm.session()], [ids[20:50], ids[:1], ids[:33]])
    np.testing.assert_array_equal(rows, whole[[49, 0, 32]])
    np.testing.assert_array_equal(fork.append(ids[20:]), whole[-1])
    np.testing.assert_array_equal(lm.session(tmp_path / "state").append(ids[20:21]), whole[20])


@pytest.mark.parametrize("name", ["channel_norm.weight", "channel.norm_out.weight"])
def test_values_that_are_not_finite_leave_the_session_as_it_was(name: str) -> None:
    lm = random_model(union(), threads=2)
    session = lm.session()
    session.append([1, 2, 3])
    before = state_of(session)
    lm.backend.weights.arrays[f"layers.1.{name}"][:] = np.inf
    for ids in ([4], list(range(40))):
        with pytest.raises(ValueError, match=r"channel mixer of layer 1 are not finite"):
            session.append(ids)
    np.testing.assert_array_equal(state_of(session), before)


def test_text_and_footprint(make_packed: Callable[..., Path]) -> None:
    config = union(vocab_size=300)
    lm = nomatmul.load(make_packed(config), threads=1)
    assert isinstance(lm.generate("The river", max_tokens=5), str)
    assert lm.generate_ids([1, 2], max_tokens=4, temperature=1.0, seed=3)
    parts = lm.footprint()
    # rows of 75 elements take 32 bytes; four projections a layer and both sides of each node
    assert parts["core"] == 2 * 32 * (4 * 75 + 2 * 5 * 15)
    norms = 4 * (2 * (2 * 75 + 75 + 4 * 76 + 75) + 2 * (75 + 75 + 2) + 75 + 76)
    assert parts["norms"] == norms
    assert lm.token_logprobs([1, 2, 3]).shape == (2,)


def test_memory_mapped_weights(make_packed: Callable[..., Path]) -> None:
    directory = make_packed(union())
    ids = random_ids(12, 131)
    mapped = load(directory, mmap=True, threads=1)
    np.testing.assert_array_equal(mapped.logits(ids), load(directory, threads=2).logits(ids))
