"""--kv: how a model with attention keeps keys and values, in every command that loads one."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from model_files import write_tokenizer, write_training

import nomatmul
from nomatmul import cli
from nomatmul.cli.options import kv_option
from nomatmul.engine.state import KV_FORMS
from nomatmul.formats.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=48, hidden_size=32, num_layers=2, intermediate_size=40, token_mixer="attention",
    num_heads=4, num_kv_heads=2, use_lower_bound=False, max_position_embeddings=96,
)  # fmt: skip
ELEMENTS = 2 * CONFIG.num_layers * 2 * 8  # keys and values of a token: 2 heads of 8 elements
BYTES = {"f16": 2 * ELEMENTS, "f32": 4 * ELEMENTS, "int8": ELEMENTS + 4 * ELEMENTS // 8}


@pytest.fixture(scope="module")
def attention(tmp_path_factory) -> Path:
    """A packed model with attention and a tokenizer."""
    directory = tmp_path_factory.mktemp("attention")
    write_training(directory / "training", CONFIG, np.random.default_rng(3))
    write_tokenizer(directory / "training")
    words = ("pack", directory / "training", directory / "packed", "--no-check", "--json")
    assert cli.main([str(word) for word in words]) == 0
    return directory / "packed"


def test_the_choices_are_those_of_the_engine():
    assert kv_option().metadata["choices"] == KV_FORMS
    assert kv_option().default == "f16"


def test_footprint_says_what_a_token_takes(run, attention):
    plain = json.loads(run("footprint", "--model", attention, "--json").out)
    for kv, size in BYTES.items():
        report = json.loads(run("footprint", "--model", attention, "--kv", kv, "--json").out)
        assert (report["kv_token"], report["kv_longest"]) == (size, 96 * size)
        assert report["weights"] == plain["weights"]
    assert plain["kv_token"] == BYTES["f16"]
    out = run("footprint", "--model", attention, "--kv", "int8").out
    assert f"keys and values of a token {BYTES['int8']} B" in " ".join(out.split())


def test_footprint_of_a_model_without_attention_has_no_keys(run, packed):
    report = json.loads(run("footprint", "--model", packed, "--json").out)
    assert not {"kv_token", "kv_longest"} & set(report)


def test_eval_scores_with_the_keys_that_were_asked_for(run, attention, text):
    loss = {}
    for kv in KV_FORMS:
        done = run("eval", "--model", attention, "--text", text, "--kv", kv, "--json")
        loss[kv] = json.loads(done.out)["loss"]
    assert len(set(loss.values())) == 3
    assert abs(loss["f16"] - loss["f32"]) < abs(loss["int8"] - loss["f32"]) < 0.05


def test_generate_and_chat_keep_them_so(run, attention, monkeypatch):
    asked = []
    real = nomatmul.load

    def load(*arguments, **options):
        asked.append(options["kv"])
        return real(*arguments, **options)

    monkeypatch.setattr("nomatmul.load", load)
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2\n"))
    words = ("--model", attention, "--kv", "int8", "--max-tokens", 2)
    assert run("generate", "w1", *words).status == 0
    assert run("chat", *words).status == 0
    assert asked == ["int8", "int8"]


def test_bench_measures_with_them(run, attention, packed):
    words = ("--prefill", 4, "--steps", 1, "--batch", 1, "--gib", 0.01, "--threads", 1, "--json")
    assert run("bench", "--size", attention, "--kv", "int8", *words).status == 0
    done = run("bench", "--size", packed, "--kv", "int8", *words)
    assert done.status == 1
    assert f"kv 'int8' is about keys and values, and {packed} keeps none" in done.err


@pytest.mark.parametrize("kv", ["int8", "f32"])
def test_a_model_without_attention_refuses_them_by_name(run, packed, text, kv):
    words = f"nomatmul: error: kv '{kv}' is about keys and values, and {packed} keeps none"
    for command in (
        ("generate", "w1", "--model"),
        ("chat", "--model"),
        ("footprint", "--model"),
        ("eval", "--text", text, "--model"),
    ):
        done = run(*command, packed, "--kv", kv)
        assert (done.status, done.out) == (1, "")
        assert done.err.startswith(words)
        assert done.err.count("\n") == 1
    assert run("generate", "w1", "--model", packed, "--kv", "f16", "--max-tokens", 1).status == 0


def test_a_model_that_is_not_packed_refuses_them(run, training, text):
    done = run("eval", "--model", training, "--text", text, "--kv", "int8")
    assert (done.status, done.out) == (1, "")
    assert "--kv int8 is for packed models" in done.err


def test_an_encoder_refuses_them(run, tmp_path, crammed_tiny):
    assert run("pack", crammed_tiny, tmp_path / "packed", "--no-check").status == 0
    done = run("footprint", "--model", tmp_path / "packed", "--kv", "int8")
    assert (done.status, done.out) == (1, "")
    assert "keeps none" in done.err


def test_random_models_take_them_too():
    from nomatmul.engine import random_model

    narrow = random_model(CONFIG, kv="int8")
    assert narrow.footprint()["kv_token"] == BYTES["int8"]
    with pytest.raises(ValueError, match="kv is 'f64'"):
        random_model(CONFIG, kv="f64")
    with pytest.raises(ValueError, match="this model keeps none"):
        random_model(dataclasses.replace(CONFIG, token_mixer="mlgru", num_kv_heads=None), kv="f32")
