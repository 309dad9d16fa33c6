"""The commands on a union model (mlgru, fff, ternary), from its checkpoint to text."""

from __future__ import annotations

import json

import numpy as np
import pytest
from model_files import write_tokenizer, write_training

from nomatmul.formats.config import ModelConfig


@pytest.fixture(scope="module")
def union(tmp_path_factory):
    """A checkpoint of random weights with a tokenizer."""
    directory = tmp_path_factory.mktemp("union") / "source"
    config = ModelConfig(
        vocab_size=48, hidden_size=32, num_layers=2, channel_mixer="fff", activation="silu",
        fff_trees=5, fff_depth=2,
    )  # fmt: skip
    write_training(directory, config, np.random.default_rng(0))
    write_tokenizer(directory)
    return directory


@pytest.mark.train
def test_from_checkpoint_to_text(run, union, tmp_path):
    packed = tmp_path / "packed"
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3 w4 w5 w6 w7 w8 " * 4)
    done = run("pack", "--json", union, packed)
    assert done.status == 0, done.err
    check = json.loads(done.out)["check"]
    assert check["relative_error"] < 2e-2
    options = ("--prompt", "w1 w2", "--temperature", "0", "--max-tokens", "5", "--json")
    made = json.loads(run("generate", "--model", packed, *options).out)
    assert made["tokens"] == 5
    losses = [
        json.loads(run("eval", "--model", model, "--text", text, "--json").out)["loss"]
        for model in (packed, union)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    report = json.loads(run("footprint", "--model", packed, "--json").out)
    # four projections of 32 rows and both sides of 35 nodes in 2 layers, 32 bytes a row
    assert report["core"] == 2 * (4 * 32 + 2 * 35) * 32
    bench = ("--steps", "2", "--prefill", "4", "--batch", "2", "--gib", "0.01", "--json")
    (result,) = json.loads(run("bench", "--size", packed, *bench).out)["results"]
    unvisited = 2 * 5 * (7 - 3) * 2 * 32
    assert result["bytes_read_per_token"] < report["weights"] - unvisited
