"""What the speed figures are made of; nothing here looks at how fast anything is."""

from __future__ import annotations

import dataclasses

import pytest

from nomatmul.engine import random_model
from nomatmul.evaluate import speed
from nomatmul.formats.config import ModelConfig

CONFIG = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, intermediate_size=48)


def test_median():
    assert speed.median([3.0, 1.0, 2.0]) == 2.0
    assert speed.median([4.0, 1.0, 2.0, 3.0]) == 2.5


def test_other_threads_share_the_weights_and_give_the_same_bits():
    lm = random_model(CONFIG)
    other = lm.with_threads(3)
    assert other.backend.threads == 3
    assert other.backend.weights is lm.backend.weights
    ids = [1, 5, 9]
    assert (lm.logits(ids) == other.logits(ids)).all()


def test_a_token_reads_everything_but_the_rest_of_the_embedding():
    lm = random_model(CONFIG, embedding="bf16")
    total = lm.footprint()["weights"]
    assert speed.bytes_read_per_token(lm) == total - (64 - 1) * 32 * 2


@pytest.mark.parametrize("tied", [False, True])
def test_of_a_dense_decoder_a_token_reads_its_head_or_the_whole_table(tied):
    config = dataclasses.replace(
        CONFIG, token_mixer="attention", linear="dense", num_heads=2, tie_embeddings=tied
    )
    lm = random_model(config, embedding="bf16", dense="bf16", head="bf16")
    unread = 0 if tied else (64 - 1) * 32 * 2
    assert speed.bytes_read_per_token(lm) == lm.footprint()["weights"] - unread


def test_of_trees_a_token_reads_the_rows_that_it_visits():
    config = ModelConfig(
        vocab_size=64, hidden_size=32, num_layers=2, channel_mixer="fff", activation="silu",
        fff_trees=3, fff_depth=2,
    )  # fmt: skip
    lm = random_model(config, embedding="bf16")
    unvisited = 2 * 3 * (7 - 3) * 2 * 32  # layers, trees, nodes of each, sides, bytes of a row
    expected = lm.footprint()["weights"] - (64 - 1) * 32 * 2 - unvisited
    assert speed.bytes_read_per_token(lm) == expected


def test_steps_and_prompts_are_timed():
    lm = random_model(CONFIG)
    assert len(speed.step_seconds(lm, 4, sequences=3)) == 4
    assert speed.prefill_seconds(lm, 5) > 0


def test_an_unknown_size_lists_the_sizes():
    request = speed.SpeedRequest(size="9T", threads=(1,))
    with pytest.raises(ValueError, match=r"9T is no size \(370M, 1\.3B, 2\.7B, union-370M, .*8B\)"):
        speed.open_model(request)
    with pytest.raises(ValueError, match=r"measuring 9T failed: 9T is no size"):
        speed.measure_in_subprocess(request)
