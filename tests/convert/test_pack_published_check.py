"""What packing published decoders costs is measured against the source, and said."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from support.published_kinds import bonsai, falcon, values
from support.published_lm import QWEN3, random_model, write_values

import nomatmul
from nomatmul import cli
from nomatmul.convert import pack
from nomatmul.convert.check import mean_kl
from nomatmul.formats.packed import PackedReader


def test_the_check_keeps_to_the_positions_of_the_model(tmp_path, rng):
    short = {**QWEN3, "max_position_embeddings": 8}
    source = write_values(tmp_path / "source", random_model(short, rng, group=32))
    assert pack(source, tmp_path / "packed").check.tokens == 8
    shortest = {**QWEN3, "max_position_embeddings": 1}
    source = write_values(tmp_path / "other", random_model(shortest, rng, group=32))
    with pytest.raises(ValueError, match="has 1 position; the check needs two"):
        pack(source, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", [bonsai, values, falcon], ids=lambda kind: kind.__name__)
def test_what_packing_costs_is_measured(tmp_path, rng, kind):
    """Weights-only models compute with float activations at the source, int8 when packed."""
    check = pack(kind(tmp_path / "source", rng), tmp_path / "packed").check
    assert check.source_backend == "numpy oracle"
    assert check.text == "random token ids"
    assert 1e-9 < check.mean_kl < 2e-2
    assert 1e-4 < check.relative_error < 6e-2
    assert check.same_argmax > 0.9


def test_the_cost_of_an_int8_head_is_seen(tmp_path, rng):
    source = falcon(tmp_path / "source", rng)
    cheap = pack(source, tmp_path / "int8", head="int8").check
    exact = pack(source, tmp_path / "floats", head="bfloat16").check
    assert exact.mean_kl < cheap.mean_kl


@pytest.mark.parametrize("kind", [bonsai, falcon], ids=lambda kind: kind.__name__)
def test_the_cost_of_int8_keys_and_values_is_measured(tmp_path, rng, kind, capsys):
    source, target = kind(tmp_path / "source", rng), tmp_path / "packed"
    assert cli.main(["pack", str(source), str(target), "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)["check"]["kv_int8"]
    ids = np.random.default_rng(0).integers(0, PackedReader(target).config.vocab_size, 64)
    wide, narrow = (nomatmul.load(target, kv=kv).logits(ids) for kv in ("f16", "int8"))
    assert cost["mean_kl"] == mean_kl(wide, narrow) > 0
    assert cost["same_argmax"] == np.mean(wide.argmax(1) == narrow.argmax(1)) > 0.9


def test_the_cost_of_int8_keys_and_values_is_one_line(tmp_path, rng, capsys):
    source = bonsai(tmp_path / "source", rng)
    assert cli.main(["pack", str(source), str(tmp_path / "packed")]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    words = r"keys and values in int8 +mean KL \d\.\d\de-\d\d, same token \d+\.\d %"
    assert re.fullmatch(words, line)


def test_a_source_that_memory_cannot_hold_is_not_compared(tmp_path, rng, monkeypatch):
    monkeypatch.setattr("nomatmul.convert.check.available_memory", lambda: 100_000)
    source = bonsai(tmp_path / "source", rng)
    with pytest.warns(UserWarning, match="was not compared with its source, which would need 0.0"):
        assert pack(source, tmp_path / "packed").check is None
    assert (tmp_path / "packed" / "config.json").is_file()
