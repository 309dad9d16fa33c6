"""Samplers: what they draw from, how often, and that a seed repeats it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomatmul.engine.sampling import Sampler, Sampling, candidates

LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], dtype=np.float32))


def kept(**options: Any) -> dict[int, float]:
    ids, p = candidates(LOGITS, Sampling(**{"temperature": 1.0, **options}))
    return dict(zip(ids.tolist(), p.tolist(), strict=True))


def test_zero_temperature_takes_the_first_of_the_largest() -> None:
    assert Sampler(Sampling()).sample(np.array([1, 3, 3, 2], np.float32)) == 1


def test_plain_sampling_keeps_every_probability() -> None:
    assert kept() == pytest.approx({0: 0.4, 1: 0.3, 2: 0.15, 3: 0.1, 4: 0.05}, abs=1e-6)


def test_temperature_sharpens() -> None:
    squares = np.array([0.4, 0.3, 0.15, 0.1, 0.05]) ** 2
    expected = dict(enumerate((squares / squares.sum()).tolist()))
    assert kept(temperature=0.5) == pytest.approx(expected, abs=1e-6)


def test_top_k_keeps_k() -> None:
    assert kept(top_k=2) == pytest.approx({0: 4 / 7, 1: 3 / 7}, abs=1e-6)
    assert set(kept(top_k=100)) == set(range(5))


def test_top_k_breaks_ties_by_id() -> None:
    ids, _ = candidates(np.zeros(6, np.float32), Sampling(temperature=1.0, top_k=2))
    assert sorted(ids.tolist()) == [0, 1]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.05, {0}), (0.39, {0}), (0.5, {0, 1}), (0.84, {0, 1, 2}), (1.0, set(range(5)))],
)
def test_top_p_keeps_the_smallest_set_of_that_mass(top_p: float, expected: set[int]) -> None:
    assert set(kept(top_p=top_p)) == expected


def test_top_p_of_a_flat_large_vocabulary_looks_beyond_its_first_guess() -> None:
    ids, p = candidates(np.zeros(5000, np.float32), Sampling(temperature=1.0, top_p=0.5))
    assert abs(len(ids) - 2500) <= 1
    assert p.sum() == pytest.approx(1)


def test_min_p_is_relative_to_the_best() -> None:
    assert set(kept(min_p=0.3)) == {0, 1, 2}


def test_repetition_penalty_lowers_what_was_used() -> None:
    logits = np.array([2.0, 1.9, -1.0], np.float32)
    assert Sampler(Sampling(repetition_penalty=1.2), history=[0]).sample(logits) == 1
    # negative logits get more negative
    sampler = Sampler(Sampling(repetition_penalty=2.0), history=[0])
    assert sampler.sample(np.array([-1.0, -1.5, -9.0], np.float32)) == 1
    # what was drawn counts from then on
    sampler = Sampler(Sampling(repetition_penalty=3.0))
    assert [sampler.sample(logits), sampler.sample(logits), sampler.sample(logits)][:2] == [0, 1]


def test_penalty_leaves_the_callers_logits_alone() -> None:
    logits = np.array([2.0, 1.0], np.float32)
    Sampler(Sampling(repetition_penalty=2.0), history=[0]).sample(logits)
    assert logits.tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}, {"temperature": 0.7}]
)
def test_draws_follow_the_probabilities(options: dict[str, Any]) -> None:
    count = 4000
    sampler = Sampler(Sampling(**{"temperature": 1.0, **options}, seed=7))
    seen = np.bincount([sampler.sample(LOGITS) for _ in range(count)], minlength=5)
    expected = kept(**options)
    for token in range(5):
        p = expected.get(token, 0.0)
        # five standard deviations of a binomial count
        assert abs(seen[token] - count * p) <= 5 * math.sqrt(count * p * (1 - p)) + 1e-9


def test_a_seed_may_be_a_number_of_numpy() -> None:
    logits = np.zeros(1000, np.float32)
    draws = [
        Sampler(Sampling(temperature=1.0, seed=seed)).sample(logits)  # type: ignore[arg-type]
        for seed in (3, np.int64(3), np.uint8(3))
    ]
    assert len(set(draws)) == 1


def test_a_seed_repeats_and_another_differs() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.sample(LOGITS) for _ in range(50)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40),
    st.floats(1e-30, 1e4),
    st.integers(0, 50),
    st.floats(1e-6, 1),
    st.floats(0, 1),
)
def test_something_always_survives(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    options = Sampling(temperature, top_k, top_p, min_p, seed=1)
    values = np.array(logits, np.float32)
    ids, p = candidates(values, options)
    assert len(ids) >= 1
    assert p.sum() == pytest.approx(1)
    # logits so close that their probabilities are equal are a tie
    assert (float(values.max()) - float(values[ids].max())) / temperature < 1e-12
    assert 0 <= Sampler(options).sample(values) < len(values)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_logits_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        Sampler(Sampling()).sample(np.array([0, bad], np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature must be a finite number at least 0, got -0\.1"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"temperature": math.inf}, "temperature must be a finite number"),
        ({"temperature": 10**400}, "temperature must be a finite number"),
        ({"temperature": "hot"}, "temperature must be a finite number at least 0, got 'hot'"),
        ({"top_p": 0.0}, "top_p must be a finite number above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be a finite number above 0 and at most 1, got 1.1"),
        ({"min_p": 2}, "min_p must be a finite number at least 0 and at most 1, got 2"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a finite number at least 1e-06"),
        ({"repetition_penalty": 1e300}, "at most 1e\\+06, got 1e\\+300"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0, got -1"),
        ({"top_k": 1.5}, "top_k must be a whole number of at least 0, got 1.5"),
        ({"seed": 0.5}, "seed must be a whole number or None, got 0.5"),
    ],
)
def test_bad_options_name_the_value_and_the_limit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
