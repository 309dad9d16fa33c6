"""Log-probabilities of one row: their values, their order, and that scoring agrees with them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nomatmul.engine import LanguageModel
from nomatmul.engine.logprobs import top_logprobs


def test_values_are_natural_logs_and_equal_ones_come_by_id() -> None:
    logits = np.log(np.array([0.1, 0.3, 0.3, 0.2, 0.1], np.float32)) + np.float32(5)
    logprob, best = top_logprobs(logits, 3, 4)
    assert logprob == pytest.approx(math.log(0.2), abs=1e-6)
    assert [token for token, _ in best] == [1, 2, 3, 0]
    values = [math.log(p) for p in (0.3, 0.3, 0.2, 0.1)]
    assert [value for _, value in best] == pytest.approx(values, abs=1e-6)
    assert best[2][1] == logprob  # of the token itself, not a rounding away
    assert best[0][1] == best[1][1]


def test_any_count_is_answered() -> None:
    logits = np.array([1.0, 2.0], np.float32)
    assert top_logprobs(logits, 0, 0)[1] == []
    assert [token for token, _ in top_logprobs(logits, 0, 9)[1]] == [1, 0]


def test_far_away_tokens_have_finite_values() -> None:
    logprob, best = top_logprobs(np.array([1e38, -1e38], np.float32), 1, 2)
    assert logprob < -1e38
    assert math.isfinite(logprob)
    assert best[0] == (0, 0.0)


def test_they_are_those_of_scoring(text_lm: LanguageModel) -> None:
    ids = [72, 69, 76, 76, 79]
    rows = text_lm.logits(ids)
    found = [top_logprobs(row, token, 1)[0] for row, token in zip(rows, ids[1:], strict=False)]
    np.testing.assert_allclose(found, text_lm.token_logprobs(ids), rtol=0, atol=1e-12)
