"""Every bad input of every command: exit status 1, one line on stderr, nothing on stdout."""

from __future__ import annotations

import bz2
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from model_files import write_training
from safetensors.numpy import load_file, save_file

from nomatmul.formats.config import ModelConfig


@pytest.fixture
def refused(run):
    """Run a command that must be refused with a message that holds some words."""

    def refused(words: str, *arguments: object) -> None:
        done = run(*arguments)
        lines = done.err.splitlines()
        assert done.status == 1, done
        assert len(lines) == 1, done.err
        assert lines[0].startswith("nomatmul: error: ")
        assert "internal error" not in lines[0]
        assert words in lines[0]
        assert done.out == ""

    return refused


def _missing(model: Path) -> Path:
    return model.with_name("nowhere")


def _file(model: Path) -> Path:
    return model / "config.json"


def _empty(model: Path) -> Path:
    empty = model.with_name("empty")
    empty.mkdir()
    return empty


def _no_weights(model: Path) -> Path:
    (model / "model.safetensors").unlink()
    return model


def _truncated(model: Path) -> Path:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return model


def _foreign(model: Path) -> Path:
    (model / "model.safetensors").write_bytes(b"GGUF" + bytes(5000))
    return model


def _flipped(model: Path) -> Path:
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1000] ^= 16
    weights.write_bytes(data)
    return model


def _changed_config(**changes: object):
    def change(model: Path) -> Path:
        path = model / "config.json"
        values = json.loads(path.read_text())
        values.get("model", values).update(changes)
        path.write_text(json.dumps(values))
        return model

    return change


def _broken_json(model: Path) -> Path:
    (model / "config.json").write_text('{"format": ')
    return model


def _other_tokenizer(model: Path) -> Path:
    path = model / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    return model


DAMAGED = {
    "missing": (_missing, "nowhere"),
    "a file": (_file, "config.json"),
    "empty": (_empty, "empty"),
    "no weights": (_no_weights, "model.safetensors"),
    "truncated": (_truncated, "model.safetensors"),
    "foreign": (_foreign, "model.safetensors"),
    "bit flipped": (_flipped, "checksum"),
    "unknown key": (_changed_config(extra=1), "'extra'"),
    "unknown dial": (_changed_config(token_mixer="lstm"), "'lstm'"),
    "other shape": (_changed_config(hidden_size=64), "config.json"),
    "broken JSON": (_broken_json, "config.json"),
    "other tokenizer": (_other_tokenizer, "tokenizer.json"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_bad_packed_model_is_refused_by_every_command(refused, packed, text, tmp_path, damage):
    model = tmp_path / "model"
    shutil.copytree(packed, model)
    change, words = DAMAGED[damage]
    model = change(model)
    refused(words, "generate", "--model", model, "--prompt", "w1")
    refused(words, "chat", "--model", model)
    refused(words, "eval", "--model", model, "--text", text)
    refused(words, "footprint", "--model", model)


def test_chat_refuses_bad_options_before_the_first_turn(refused, packed):
    refused("temperature", "chat", "--model", packed, "--temperature", "-1")
    refused("max_tokens", "chat", "--model", packed, "--max-tokens", "-1")


def test_a_model_that_is_not_packed_is_refused(refused, training):
    words = f"{training} is not packed: `nomatmul pack {training} {training}-packed` packs it"
    refused(words, "generate", "--model", training, "--prompt", "w1")


def test_a_bad_model_is_refused_by_bench(refused, tmp_path):
    refused("nowhere", "bench", "--size", tmp_path / "nowhere")


NOT_PACKABLE = {
    "missing": (_missing, "nowhere"),
    "a file": (_file, "config.json"),
    "empty": (_empty, "no config.json"),
    "no weights": (_no_weights, "holds no weights"),
    "truncated": (_truncated, "model.safetensors"),
    "foreign": (_foreign, "model.safetensors"),
    "unknown key": (_changed_config(extra=1), "'extra'"),
    "unknown dial": (_changed_config(token_mixer="lstm"), "'lstm'"),
    "other shape": (_changed_config(intermediate_size=48), "shape"),
    "other vocabulary": (_changed_config(vocab_size=20), "shape"),
    "broken JSON": (_broken_json, "config.json"),
}


@pytest.mark.parametrize("damage", NOT_PACKABLE)
def test_a_bad_source_is_not_packed(refused, training, tmp_path, damage):
    source = tmp_path / "source"
    shutil.copytree(training, source)
    change, words = NOT_PACKABLE[damage]
    refused(words, "pack", change(source), tmp_path / "out" / "packed")
    assert not list(tmp_path.glob("out/*")) + list(tmp_path.glob("out/.*"))


@pytest.mark.parametrize(
    "name", ["layers.1.channel.down_proj.weight", "embedding.weight", "layers.0.mixer_norm.weight"]
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_packed(refused, training, tmp_path, name, value):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(training, source)
    out.mkdir()
    tensors = load_file(source / "model.safetensors")
    tensors[name] = tensors[name].copy()
    tensors[name].flat[7] = value
    save_file(tensors, source / "model.safetensors")
    refused("not finite", "pack", source, out / "packed")
    assert list(out.iterdir()) == []


def test_what_cannot_be_packed(refused, training, packed, tmp_path):
    refused("is packed already", "pack", packed, tmp_path / "again")
    dense = tmp_path / "dense"
    config = ModelConfig(
        vocab_size=48, hidden_size=32, num_layers=1, num_heads=2, token_mixer="attention",
        linear="dense", intermediate_size=40,
    )  # fmt: skip
    write_training(dense, config, np.random.default_rng(0))
    refused("nothing ternary to pack", "pack", dense, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_destination_is_never_overwritten(refused, training, tmp_path):
    for name, make in (("file", Path.touch), ("directory", Path.mkdir)):
        target = tmp_path / name
        make(target)
        if target.is_dir():
            (target / "mine").touch()
        refused("already exists", "pack", training, target)
    refused("cannot write", "pack", training, tmp_path / "file" / "inside")


def test_a_wrong_check_text_is_reported_before_packing(refused, training, tmp_path):
    refused("nowhere.txt", "pack", training, tmp_path / "p", "--check-text", "nowhere.txt")
    assert not (tmp_path / "p").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(refused, training, tmp_path):
    from model_files import write_tokenizer

    source = tmp_path / "source"
    shutil.copytree(training, source)
    write_tokenizer(source, words=49)
    refused("48", "pack", source, tmp_path / "packed")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (bz2.compress(b"w1 w2 w3" * 900)[:40], "damaged compressed file"),
        (b"w1", "nothing is left to score"),
        (b"   ", "nothing is left to score"),
    ],
)
def test_a_bad_text_is_not_scored(refused, packed, tmp_path, content, words):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    refused(words, "eval", "--model", packed, "--text", path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "\n"), "the prompt is empty"),
        (("--prompt", "w1", "--max-tokens", "-1"), "max_tokens"),
        (("--prompt", "w1", "--temperature", "-1"), "temperature"),
        (("--prompt", "w1", "--top-p", "0"), "top_p"),
        (("--prompt", "w1", "--top-k", "-2"), "top_k"),
        (("--prompt", "w1", "--min-p", "2"), "min_p"),
        (("--prompt", "w1", "--repetition-penalty", "0"), "repetition_penalty"),
        (("--prompt", "w1", "--threads", "0"), "threads"),
        (("--prompt", "w1", "--stop", ""), "stop string"),
        (("--prompt", "w1 \udcff"), "not UTF-8"),
    ],
)
def test_bad_options_of_generate(refused, packed, options, words):
    refused(words, "generate", "--model", packed, *options)


def test_an_empty_standard_input_is_an_empty_prompt(refused, packed, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    refused("the prompt is empty", "generate", "--model", packed, "--prompt", "-")


def test_a_model_without_tokenizer_makes_no_text(refused, training, text, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(training, source)
    (source / "tokenizer.json").unlink()
    packed = tmp_path / "packed"
    from nomatmul.convert import pack

    assert pack(source, packed, check=False).tokenizer == "none"
    refused("tokenizer", "generate", "--model", packed, "--prompt", "w1")
    refused("tokenizer", "eval", "--model", packed, "--text", text)


def test_an_instruction_set_that_is_not_there(refused, packed, monkeypatch):
    monkeypatch.setenv("NOMATMUL_ISA", "sse9")
    refused("sse9", "generate", "--model", packed, "--prompt", "w1")
    refused("sse9", "doctor")


def test_bad_options_of_other_commands(refused, packed, text, tmp_path):
    refused("--max-tokens", "eval", "--model", packed, "--text", text, "--max-tokens", "0")
    refused("--prefill", "bench", "--size", packed, "--prefill", "0")
    refused("--steps", "bench", "--size", packed, "--steps", "9999999999")
    refused("--batch", "bench", "--size", packed, "--batch", "1,9999999")
    refused("threads", "bench", "--size", packed, "--threads", "5000")
    refused("sse9", "bench", "--size", packed, "--isa", "sse9")


@pytest.mark.train
def test_training_refuses_an_unknown_recipe_and_missing_data(refused, text, tmp_path):
    out = tmp_path / "run"
    refused("'cpu_second'", "train", "cpu_second", "--data", text, "--out", out)
    refused("nowhere", "train", "cpu_minute", "--data", tmp_path / "nowhere", "--out", out)
    refused("'stepz=3'", "train", "cpu_minute", "--data", text, "--out", out, "--set", "stepz=3")
    assert not out.exists()
