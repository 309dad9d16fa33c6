"""The models that the accelerator's tests share are sound, small and awkward."""

from __future__ import annotations

import pytest
from hardware.models import RANDOM, TRAINED_NAMES, token_ids, trained_model, write_random_model

import nomatmul
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.packed import PackedReader
from nomatmul.formats.packed.layout import WEIGHTS_FILE


def test_a_random_model_is_the_same_in_every_run(tmp_path):
    first = write_random_model("trees-3x3", tmp_path / "a")
    assert write_random_model("trees-3x3", tmp_path / "a") == first  # taken as it is
    second = write_random_model("trees-3x3", tmp_path / "b")
    assert (first / WEIGHTS_FILE).read_bytes() == (second / WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize("name", RANDOM)
def test_random_models_run(name, tmp_path):
    lm = nomatmul.load(write_random_model(name, tmp_path), threads=1)
    assert len(list(lm.generate_ids(token_ids(name, 9), max_tokens=3))) == 3
    assert lm.config.hidden_size % 32 or name.startswith("equal")


def test_equal_models_have_equally_many_neurons():
    glu, trees = (
        architecture_of(RANDOM[name].config).blocks[0].channel
        for name in ("equal-glu", "equal-trees")
    )
    assert glu.neurons == trees.rows
    assert trees.active_rows * 5 <= trees.rows


@pytest.mark.parametrize("name", TRAINED_NAMES)
def test_trained_models_write_text(name):
    directory = trained_model(name)
    assert sum(path.stat().st_size for path in directory.iterdir()) < 200_000
    PackedReader(directory).verify_all()
    lm = nomatmul.load(directory, threads=1)
    text = str(lm.generate("The weights of", max_tokens=40, temperature=0))
    letters = sum(c.isalpha() or c.isspace() for c in text)
    assert letters > 0.7 * len(text) > 20
