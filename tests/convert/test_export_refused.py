"""Exports that cannot be: what has no form is refused by name, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal

import numpy as np
import pytest
from model_files import write_published
from support.exported import GROUPS, SIZES, TENSOR, trained
from support.published_lm import BITNET, LLAMA, random_model, write_packed, write_values

from nomatmul.cli.signals import clean_up_when_terminated
from nomatmul.convert.export import export
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.rotary import RopeScaling


def mlgru(directory, rng):
    return trained(directory, ModelConfig(vocab_size=258, hidden_size=256, num_layers=1), rng)


def trees(directory, rng):
    config = dict(SIZES, linear="dense", linear_norm="all", rounding="away", num_kv_heads=None)
    config |= {"channel_mixer": "fff", "fff_trees": 2, "fff_depth": 2, "intermediate_size": None}
    return trained(directory, ModelConfig(**config), rng)


def sub_norms(directory, rng):
    return write_packed(directory, random_model(BITNET, rng), legacy=False)


def own_norms(directory, rng):
    config = dataclasses.replace(TENSOR, linear_norm="all", split_gate=False)
    return trained(directory, config, rng)


def no_positions(directory, rng):
    return trained(directory, dataclasses.replace(GROUPS[128], positions="none"), rng)


def layer_norms(directory, rng):
    return trained(directory, dataclasses.replace(GROUPS[128], norm="layer"), rng)


def squared(directory, rng):
    return trained(directory, dataclasses.replace(GROUPS[128], glu_activation="relu2"), rng)


def groups_of_32(directory, rng):
    return trained(directory, GROUPS[32], rng)


def groups_of_128(directory, rng):
    return trained(directory, GROUPS[128], rng)


def narrow(directory, rng):
    return trained(directory, dataclasses.replace(TENSOR, intermediate_size=384), rng)


def published_recurrence(directory, rng):
    write_published(directory, rng)
    return directory


def llama3_of_others(directory, rng):
    scaling = RopeScaling("llama3", 8.0, 1.0, 8.0, 8192)
    return trained(directory, dataclasses.replace(GROUPS[128], rope_scaling=scaling), rng)


def tiny_scales(directory, rng):
    model = random_model(
        {**LLAMA, "hidden_size": 256, "intermediate_size": 256, "head_dim": 64}, rng
    )
    name = "model.layers.1.mlp.up_proj"
    t, scale = model.ternary[name]
    model.ternary[name] = t, (scale * np.float32(1e-8)).astype(np.float32)
    return write_values(directory, model)


def words(directory, rng):
    from model_files import write_tokenizer

    write_tokenizer(groups_of_128(directory, rng))
    return directory


NO_FORM = {
    mlgru: ("", "layer 0 has token_mixer 'mlgru', not 'attention'"),
    published_recurrence: ("", "layer 0 has token_mixer 'mlgru', not 'attention'"),
    trees: ("", "layer 0 has channel_mixer 'fff', not 'glu'"),
    sub_norms: ("", "it has sub-norms"),
    own_norms: ("", "it has a norm inside each ternary layer"),
    no_positions: ("", "positions are 'none', not 'rotary'"),
    layer_norms: ("", "its norms are not the RMSNorms"),
    squared: ("gguf", "activation 'silu', not 'relu2' .--to unpacked can say it"),
    groups_of_32: ("gguf", "a scale for each 32 inputs, which no GGUF type holds .*--to unpacked"),
    groups_of_128: ("tq2_0", "a scale for each 128 inputs, which no TQ2_0 holds exactly"
                    " .--type pq2_0 or --type q2_0 or --to unpacked"),
    narrow: ("gguf", "down_proj.weight has rows of 384 inputs, which the 256 of a block of TQ2_0 do"
             " not divide .--type pq2_0 or --type q2_0 or --to unpacked"),
    llama3_of_others: ("gguf", "only Llama's own"),
    tiny_scales: ("gguf", "mlp.up_proj.weight: the scale .* is no number that float16 holds"),
    words: ("gguf", "is WordLevel; a GGUF file has BPE"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*(int8 activations|has no tokenizer)")
@pytest.mark.parametrize("kind", NO_FORM, ids=lambda kind: kind.__name__)
def test_what_has_no_form_is_refused_by_name(tmp_path, rng, kind):
    which, message = NO_FORM[kind]
    source = kind(tmp_path / "source", rng)
    out = tmp_path / "out"
    out.mkdir()
    options = {"type": which} if which == "tq2_0" else {}
    targets = [out / "x.gguf"] if which else [out / "x.gguf", out / "x"]
    for target in targets:
        with pytest.raises(ValueError, match=message):
            export(source, target, **options)
    assert list(out.iterdir()) == []
    if which == "gguf" and kind is not words:
        export(source, out / "x")
        assert open_checkpoint(out / "x").config.num_layers == 2


BAD_WORDS = {
    "type": ({"type": "i2_s"}, "x.gguf", "type 'i2_s' is unknown"),
    "to": ({"to": "onnx"}, "x", "to 'onnx' is unknown"),
    "embedding": ({"embedding": "int4"}, "x.gguf", "embedding 'int4' does not go with --to gguf"),
    "q8_0": ({"embedding": "q8_0"}, "x", "embedding 'q8_0' does not go with --to unpacked"),
    "type elsewhere": ({"type": "tq2_0"}, "x", "type 'tq2_0' is of GGUF files"),
    "suffix": ({"to": "gguf"}, "x.bin", r"must end in \.gguf"),
    "no directory": ({}, "no/x.gguf", "no is no directory"),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_words_that_mean_nothing(tmp_path, rng, case):
    options, name, message = BAD_WORDS[case]
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "nowhere", tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_replaced(tmp_path, rng):
    source = trained(tmp_path / "source", GROUPS[128], rng)
    for name in ("x.gguf", "x"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match="already exists"):
            export(source, tmp_path / name)
        assert (tmp_path / name).read_text() == "mine"
    (tmp_path / "empty.gguf").mkdir()
    with pytest.raises(ValueError, match="is a directory, not a file"):
        export(source, tmp_path / "empty.gguf")
    (tmp_path / "empty").mkdir()
    export(source, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize("name", ["x.gguf", "x"])
def test_a_stopped_export_leaves_nothing(tmp_path, rng, name):
    """In the middle of the tensors, by SIGTERM as by Ctrl-C."""
    source, out = trained(tmp_path / "source", GROUPS[128], rng), tmp_path / "out"
    out.mkdir()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    clean_up_when_terminated()
    try:
        with pytest.raises(KeyboardInterrupt):
            export(
                source,
                out / name,
                progress=lambda done, *_: os.kill(os.getpid(), signal.SIGTERM) if done == 3 else 0,
            )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert list(out.iterdir()) == []


def test_damage_is_found_and_nothing_is_left(tmp_path, rng):
    source = trained(tmp_path / "source", GROUPS[128], rng)
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[:-8] + b"\0\0\xc0\x7f\0\0\xc0\x7f")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("x.gguf", "x"):
        with pytest.raises(ValueError, match="not finite"):
            export(source, out / name)
    assert list(out.iterdir()) == []
    shutil.rmtree(source)
    with pytest.raises(ValueError, match="does not exist"):
        export(source, out / "x.gguf")
