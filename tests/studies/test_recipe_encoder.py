"""The scores of the encoder of the box: what counts as a right guess."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from train_jobs import make_text

from nomatmul.train.documents import find_sources
from nomatmul.train.recipes import recipe
from nomatmul.train.shards import build_shards
from nomatmul.train.tokenizer import train_word_piece
from nomatmul.train.tokens import open_stream
from studies.recipes import encoder_scores


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "text.txt").write_text(make_text(4000, 1))
    sources = find_sources([str(folder / "text.txt")])
    build_shards(sources, train_word_piece(sources, 200), folder / "tokens", workers=1)
    return folder / "tokens"


def test_a_guesser_that_knows_the_text_is_right_and_one_that_copies_is_not(tokens: Path) -> None:
    stream, length = open_stream(tokens), encoder_scores.LENGTH
    whole = stream.windows(np.arange(16) * length, length).astype(np.int64)
    vocabulary = 200

    def knows(ids_BT: np.ndarray) -> np.ndarray:
        return 50.0 * np.eye(vocabulary, dtype=np.float32)[whole[: len(ids_BT)]]

    def copies(ids_BT: np.ndarray) -> np.ndarray:
        return 50.0 * np.eye(vocabulary, dtype=np.float32)[ids_BT]

    best = encoder_scores.accuracy(knows, tokens, 16)
    assert best["words"] == 16 * round(0.15 * length)
    assert (best["accuracy"], best["accuracy_masks"]) == (1.0, 1.0)
    assert best["nats"] == pytest.approx(0, abs=1e-4)
    plain = encoder_scores.accuracy(copies, tokens, 16)
    assert plain["accuracy_masks"] == 0
    assert 0.05 < plain["accuracy"] < 0.2  # the tenth that is shown as it is, and lucky words
    assert plain["nats"] > 30


def test_both_encoders_have_as_many_bytes() -> None:
    """Rows of int8 with their scales, and biases; embedding and attention are the same."""
    trees, dense = (recipe(name).model for name in ("best_encoder_8_minutes", "bert_8_minutes"))
    size, master = trees.hidden_size, trees.fff_master_width
    assert (trees.fff_trees, trees.fff_depth) == (40, 3)
    nodes = 40 * 15 * (2 * size + 2 * 4 + 4)
    layer = [nodes + 2 * size * master + 4 * (master + size)]
    layer.append(2 * size * dense.mlp_size + 4 * (dense.mlp_size + size))
    assert layer[0] == pytest.approx(layer[1], rel=0.01)
    own = {"channel_mixer", "fff_trees", "fff_depth", "fff_bias", "fff_master_width"}
    left, right = trees.to_dict(), dense.to_dict()
    assert {k: v for k, v in left.items() if k not in own} == {
        k: v for k, v in right.items() if k not in own
    }
