"""A torch model behind the scorer's protocol: chunks and windows score each token once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model_files import write_tokenizer, write_training
from sentencepiece_files import vocabulary
from support.published_lm import LLAMA, random_model, write_values

import nomatmul
from nomatmul.convert import pack
from nomatmul.evaluate import score_text, torch_scorer
from nomatmul.evaluate.torch_scorer import TorchScorer
from nomatmul.formats.config import ModelConfig


def _scorer(tmp_path, rng, **dials) -> TorchScorer:
    config = ModelConfig(
        vocab_size=40, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, **dials
    )
    write_training(tmp_path / "model", config, rng)
    write_tokenizer(tmp_path / "model")
    return TorchScorer.from_directory(tmp_path / "model")


def _plain(scorer: TorchScorer, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        logits_TV = scorer.model(torch.tensor([ids]), use_cache=False).logits[0].double()
    logprobs_TV = torch.log_softmax(logits_TV, dim=-1)[:-1]
    return logprobs_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


@pytest.mark.parametrize("chunk", [1, 7, 30, 100])
def test_a_recurrent_model_carries_its_state(tmp_path, rng, monkeypatch, chunk):
    monkeypatch.setattr(torch_scorer, "CHUNK", chunk)
    scorer = _scorer(tmp_path, rng)
    ids = rng.integers(0, 40, 31).tolist()
    found = scorer.token_logprobs(ids)
    assert found.dtype == np.float64
    assert found.shape == (30,)
    np.testing.assert_allclose(found, _plain(scorer, ids), atol=2e-2)


@pytest.mark.parametrize("length", [2, 15, 16, 17, 18, 40, 41])
def test_attention_reads_windows_that_overlap(tmp_path, rng, length):
    scorer = _scorer(
        tmp_path, rng, token_mixer="attention", linear="dense", max_position_embeddings=16
    )
    ids = rng.integers(0, 40, length).tolist()
    found = scorer.token_logprobs(ids)
    assert found.shape == (length - 1,)
    np.testing.assert_allclose(found[:16], _plain(scorer, ids[:17])[:16], atol=1e-5)
    if length > 18:  # the last token is seen after at least half a window of what came before
        np.testing.assert_allclose(found[-1], _plain(scorer, ids[-9:])[-1], atol=2.0)


def test_ids_out_of_range_and_encoders_are_refused(tmp_path, rng):
    scorer = _scorer(tmp_path, rng)
    with pytest.raises(ValueError, match=r"outside 0\.\.39"):
        scorer.token_logprobs([1, 40])
    config = ModelConfig(vocab_size=40, hidden_size=32, num_layers=1, causal=False)
    with pytest.raises(ValueError, match="encoder"):
        TorchScorer(scorer.model, config, None)


def test_a_tokenizer_that_packing_converts_serves_here_too(tmp_path, rng):
    """SentencePiece beside the weights: ids, and the start token, are those of the packed model."""
    source = write_values(tmp_path / "source", random_model({**LLAMA, "vocab_size": 320}, rng))
    (source / "tokenizer.model").write_bytes(vocabulary())
    (source / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    pack(source, tmp_path / "packed", check=False)
    scorer, packed = TorchScorer.from_directory(source), nomatmul.load(tmp_path / "packed")
    assert scorer.config.bos_token_id is packed.config.bos_token_id is None
    found, wanted = score_text(scorer, "ab abab ba"), score_text(packed, "ab abab ba")
    assert (found.tokens, found.bytes) == (wanted.tokens, wanted.bytes)
    assert found.loss == pytest.approx(wanted.loss, rel=0.02)


def test_a_text_longer_than_the_positions_is_read_in_the_same_windows(tmp_path, rng):
    values = {**LLAMA, "vocab_size": 320, "max_position_embeddings": 16}
    source = write_values(tmp_path / "source", random_model(values, rng))
    (source / "tokenizer.model").write_bytes(vocabulary())
    pack(source, tmp_path / "packed", check=False)
    scorer, packed = TorchScorer.from_directory(source), nomatmul.load(tmp_path / "packed")
    text = "ab ba abab " * 12
    found, wanted = score_text(packed, text), score_text(scorer, text)
    assert found.tokens == wanted.tokens > 40
    assert found.loss == pytest.approx(wanted.loss, rel=0.02)
    ids = [1, *packed.tokenizer.encode(text).ids]
    with pytest.raises(ValueError, match="more than the 16 positions"):
        packed.token_logprobs(ids)  # windows are the evaluation's
