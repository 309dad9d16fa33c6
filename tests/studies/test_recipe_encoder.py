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
from studies.recipes import encoder_scores, encoder_tasks


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


def test_no_phrase_of_a_held_out_sentence_is_trained_on(tmp_path):
    sentences = [" ".join(f"w{n}x{k}" for k in range(20)) for n in range(40)]
    phrases = [" ".join(text.split()[first : first + 4]) for text in sentences for first in (0, 9)]
    rows = [f"{text} \t{n % 2}" for n, text in enumerate(sentences + phrases)]
    source = tmp_path / "glue/SST-2/train.tsv"
    source.parent.mkdir(parents=True)
    source.write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    (source.parent / "dev.tsv").write_text(source.read_text())
    encoder_tasks.held_part(tmp_path / "glue", "sst2", 60, tmp_path / "part")
    train, dev = (
        (tmp_path / f"part/SST-2/{part}.tsv").read_text().splitlines() for part in ("train", "dev")
    )
    assert train[0] == dev[0] == "sentence\tlabel"
    assert (len(dev), len(train)) == (1 + 12, 1 + 60)  # a tenth, drawn of the longest fifth
    held = [row.split("\t")[0].strip() for row in dev[1:]]
    assert all(len(text.split()) == 20 for text in held)
    for row in train[1:]:
        assert row in rows
        assert not any(row.split("\t")[0].strip() in text for text in held)
