"""Scoring against a model whose probabilities are known by construction."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from nomatmul.evaluate import score_text
from nomatmul.formats.config import ModelConfig


class Uniform:
    """Every token has probability 1 / vocab_size, whatever came before."""

    def __init__(self, bos: int | None = None) -> None:
        words = {
            word: i for i, word in enumerate(["<s>", "one", "two", "drei", "vier", "\u00fcnf"])
        }
        self.tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
        self.tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.config = ModelConfig(
            vocab_size=len(words), hidden_size=8, num_layers=1, bos_token_id=bos
        )
        self.asked: list[int] = []

    def token_logprobs(self, ids):
        self.asked = list(ids)
        return np.full(len(ids) - 1, -math.log(self.config.vocab_size))


def test_without_bos_the_first_token_is_context_only():
    model = Uniform()
    score = score_text(model, "one two drei")
    assert model.asked == [1, 2, 3]
    assert score.tokens == 2
    assert score.bytes == len("two drei")
    assert score.loss == pytest.approx(math.log(6))
    assert score.perplexity == pytest.approx(6)
    assert score.bits_per_byte == pytest.approx(2 * math.log2(6) / 8)


def test_with_bos_every_token_counts():
    model = Uniform(bos=0)
    score = score_text(model, "one two drei")
    assert model.asked == [0, 1, 2, 3]
    assert (score.tokens, score.bytes) == (3, 12)


def test_bytes_are_utf8_bytes():
    assert score_text(Uniform(bos=0), "one \u00fcnf").bytes == 8


@pytest.mark.parametrize(("bos", "tokens", "size"), [(0, 2, 7), (None, 2, 8)])
def test_max_tokens_counts_scored_tokens_and_their_bytes(bos, tokens, size):
    score = score_text(Uniform(bos=bos), "one two drei vier", max_tokens=2)
    assert (score.tokens, score.bytes) == (tokens, size)


@pytest.mark.parametrize("text", ["", "one"])
def test_nothing_to_score_is_refused(text):
    with pytest.raises(ValueError, match="nothing is left to score"):
        score_text(Uniform(), text)


def test_a_model_without_tokenizer_is_refused():
    model = Uniform()
    model.tokenizer = None
    with pytest.raises(ValueError, match=r"has no tokenizer,"):
        score_text(model, "one two")


def test_probabilities_that_are_not_numbers_are_refused():
    model = Uniform()
    model.token_logprobs = lambda ids: np.full(len(ids) - 1, np.nan)
    with pytest.raises(ValueError, match="not finite"):
        score_text(model, "one two")


def test_max_tokens_below_one_is_refused():
    with pytest.raises(ValueError, match="max_tokens is 0"):
        score_text(Uniform(), "one two", max_tokens=0)
