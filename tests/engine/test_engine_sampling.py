"""Samplers: what they draw from, how often, and that a seed repeats it."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomatmul.engine.sampling import Sampler, Sampling, _quick_draw, candidates

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


# -- penalties on made tokens, biases, masks ------------------------------------------------------


def test_presence_and_frequency_penalties_count_made_tokens_alone() -> None:
    logits = np.array([2.0, 1.5, 1.2], np.float32)
    once = Sampler(Sampling(presence_penalty=0.6), history=[0, 0, 0])
    # 2.0 1.5 1.2 -> 1.4 1.5 1.2 -> 1.4 0.9 1.2 -> as before: a second time costs nothing
    assert [once.sample(logits) for _ in range(4)] == [0, 1, 0, 0]
    each = Sampler(Sampling(frequency_penalty=0.3), history=[1])
    # 2.0 -> 1.7 -> 1.4 -> (1.5 of token 1) -> 1.2 ... the lower id of equals
    assert [each.sample(logits) for _ in range(4)] == [0, 0, 1, 0]
    liked = Sampler(Sampling(presence_penalty=-1.0, logit_bias={0: -0.6}))
    assert [liked.sample(logits) for _ in range(3)] == [1, 1, 1]


def test_penalties_follow_openais_formula_on_long_texts() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 200)).astype(np.float32)
    sampler = Sampler(Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={7: 2.5}))
    counts = np.zeros(200, np.float32)
    for row in rows:
        changed = row - np.float32(0.25) * counts - np.float32(0.5) * (counts > 0)
        changed[7] += np.float32(2.5)
        token = sampler.sample(row)
        assert changed[token] >= changed.max() - 1e-5
        counts[token] += 1
    assert (counts > 0).sum() > 64  # more than the first room for them


def test_a_bias_moves_a_token_and_the_lowest_bans_it() -> None:
    logits = np.array([50.0, 1.0, 0.5], np.float32)
    assert Sampler(Sampling(logit_bias={2: 100})).sample(logits) == 2
    assert Sampler(Sampling(logit_bias={0: -99})).sample(logits) == 1
    huge = np.array([1e6, 1.0, 0.5], np.float32)
    assert Sampler(Sampling(logit_bias={0: -99})).sample(huge) == 0
    assert Sampler(Sampling(logit_bias={0: -100})).sample(huge) == 1
    drawn = Sampler(Sampling(temperature=1e4, seed=1, logit_bias={1: -100}))
    assert {drawn.sample(logits) for _ in range(200)} == {0, 2}
    assert logits.tolist() == [50.0, 1.0, 0.5]
    with pytest.raises(ValueError, match="no token may be chosen here"):
        Sampler(Sampling(logit_bias={0: -100, 1: -100, 2: -100})).sample(logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("legal", [None, [0, 1, 2], [1, 2, 4]])
def test_a_mask_leaves_what_is_allowed_and_legal(temperature: float, legal: Any) -> None:
    ids = None if legal is None else np.array(legal)
    allowed = np.array([False, True, False, True, True])
    expected = {1, 3, 4} & set(legal or range(5))
    sampler = Sampler(Sampling(temperature=temperature, seed=5), legal=ids)
    found = {sampler.sample(LOGITS, allowed) for _ in range(300)}
    assert found == ({1} if temperature == 0 else expected)
    unbound = {sampler.sample(LOGITS) for _ in range(300)}  # a mask is of one token
    assert unbound == ({min(legal or [0])} if temperature == 0 else set(legal or range(5)))
    with pytest.raises(ValueError, match="no token may be chosen here: bias and grammar leave"):
        sampler.sample(LOGITS, np.zeros(5, bool))


def test_a_sampling_with_biases_is_a_value() -> None:
    one, two = Sampling(logit_bias={3: 1, 1: -2}), Sampling(logit_bias={1: -2.0, 3: 1.0})
    assert one == two
    assert hash(one) == hash(two)
    assert dataclasses.replace(one, seed=4).logit_bias == ((1, -2.0), (3, 1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"presence_penalty": 2.5},
            "presence_penalty must be .* least -2 and at most 2, got 2.5",
        ),
        (
            {"frequency_penalty": -3},
            "frequency_penalty must be .* least -2 and at most 2, got -3",
        ),
        ({"frequency_penalty": math.nan}, "frequency_penalty must be a finite number"),
        ({"presence_penalty": True}, "presence_penalty must be a finite number"),
        ({"logit_bias": {1: 101}}, "logit_bias of token 1 must be .* at most 100, got 101"),
        ({"logit_bias": {1: math.nan}}, "logit_bias of token 1 must be a finite number"),
        ({"logit_bias": {1: "2"}}, "logit_bias of token 1 must be a finite number"),
        ({"logit_bias": {-1: 1}}, "a token id of logit_bias must be a whole number .*, got -1"),
        ({"logit_bias": {"1": 1}}, "a token id of logit_bias must be a whole number .*, got '1'"),
        ({"logit_bias": [1, 2]}, "logit_bias must map token ids to numbers, got list"),
    ],
)
def test_bad_penalties_name_the_value_and_the_limit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


# -- short cuts take the token that the long way takes --------------------------------------------


def long_way(logits: np.ndarray, options: Sampling, share: float) -> int:
    """A draw as numpy's textbook has it: every probability, sorted and added up one by one."""
    scaled = (logits.astype(np.float64) - np.float64(logits.max())) / options.temperature
    ids = np.arange(len(scaled))
    if 0 < options.top_k < len(scaled):
        ids = np.lexsort((ids, -scaled))[: options.top_k]
    p = np.exp(scaled[ids])
    p /= p.sum()
    if options.top_p < 1:
        order = np.lexsort((ids, -p)) if options.top_k == 0 else np.arange(len(p))
        kept = order[np.cumsum(p[order]) - p[order] < options.top_p]
        ids, p = ids[kept], p[kept]
    p = p / p.sum()
    at = np.searchsorted(np.cumsum(p), share * p.sum(), side="right")
    return int(ids[min(at, len(ids) - 1)])


@pytest.mark.parametrize("size", [1, 127, 128, 129, 5000])
@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 1}, {"top_k": 40}, {"top_k": 4000}, {"top_p": 0.9}, {"top_p": 0.999}],
)
def test_short_cuts_change_no_draw(size: int, spread: float, options: dict[str, Any]) -> None:
    rng, draws = np.random.default_rng(size), random.Random(7)
    sampling = Sampling(temperature=0.8, seed=7, **options)
    sampler = Sampler(sampling)
    for row in range(12):
        logits = rng.normal(0, spread, size).astype(np.float32)
        if row % 3 == 0:
            logits = np.round(logits)  # many ties
        assert sampler.sample(logits) == long_way(logits, sampling, draws.random())


def test_a_draw_at_a_border_is_left_to_the_long_way() -> None:
    scaled = np.zeros(256)  # a border at each multiple of 1 / 256
    assert _quick_draw(scaled.copy(), 0.5) is None
    assert _quick_draw(scaled.copy(), 0.5 + 1e-9) == 128
    assert _quick_draw(scaled.copy(), np.nextafter(1.0, 0.0)) is None
    assert _quick_draw(np.array([0.0, -np.inf, 0.0]), 0.6) == 2
