"""Continuations of shared contexts have the likelihoods that they have alone."""

from __future__ import annotations

import numpy as np
import pytest
from engine_models import ATTENTION, CONFIG

from nomatmul.engine import random_model
from nomatmul.engine.causal_model import CausalModel
from nomatmul.evaluate import continuations
from nomatmul.evaluate.continuations import score_continuations
from nomatmul.formats.config import ModelConfig


@pytest.mark.parametrize("config", [CONFIG, ATTENTION])
@pytest.mark.parametrize("lanes", [1, 3, 16])
def test_each_equals_its_text_scored_alone(
    config: ModelConfig, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuations, "_ROWS", 5)  # long ones are read in several steps
    lm = random_model(config, seed=3, threads=1)
    rng = np.random.default_rng(0)
    contexts = [rng.integers(0, 90, length).tolist() for length in (1, 4, 4, 9, 12)]
    pairs = [
        (contexts[number % 5], rng.integers(0, 90, length).tolist())
        for number, length in enumerate((1, 2, 7, 13, 3, 1, 6, 4, 1, 8))
    ]
    greedy = lm.generate_ids(contexts[3], max_tokens=4)
    pairs += [(contexts[3], greedy), (contexts[3], [*greedy[:-1], (greedy[-1] + 1) % 90])]
    found = score_continuations(lm, pairs, lanes=lanes)
    for (context, ids), (logprob, _) in zip(pairs, found, strict=True):
        alone = lm.token_logprobs([*context, *ids])[len(context) - 1 :]
        assert logprob == pytest.approx(alone.sum(), abs=1e-12 * len(ids))
    assert [is_greedy for _, is_greedy in found[-2:]] == [True, False]


def test_a_context_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, fed = random_model(CONFIG, threads=1), []
    step = CausalModel.step

    def counted(self, sessions, ids, logits="last"):
        fed.append(sum(map(len, ids)))
        return step(self, sessions, ids, logits)

    monkeypatch.setattr(CausalModel, "step", counted)
    score_continuations(lm, [([5] * 50, [1, 2, 3]), ([5] * 50, [4]), ([5] * 50, [6, 7])])
    assert sum(fed) == 50 + 2 + 0 + 1  # no last token is fed


def test_an_empty_continuation_is_certain() -> None:
    lm = random_model(CONFIG, threads=1)
    assert score_continuations(lm, [([1, 2], [])]) == [(0.0, True)]
    assert score_continuations(lm, []) == []
