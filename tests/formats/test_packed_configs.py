"""config.json of a packed directory, of either kind and version: what lies is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from encoder_files import encoder_config, write_encoder
from model_files import write_json
from packed_files import DECODERS, ENCODER, refused, sign_config, to_version_1

from nomatmul.convert import pack
from nomatmul.formats.packed import PackedReader

# Of every kind and version.
CONFIG_EDITS = [
    (lambda c: c.update(colour=1), "unknown config key 'colour'"),
    (lambda c: c["model"].update(colour=1), "unknown config key 'colour'"),
    (lambda c: c["model"].update(token_mixer="lstm"), "token_mixer 'lstm' is unknown"),
    (lambda c: c["model"].update(norm_eps=1e-4), "does not match the checksum"),
    (lambda c: c.update(format_version=3), "format_version 3 is unknown|format .* is not"),
    (lambda c: c.update(format_version=True), "format_version True is unknown|format .* is not"),
    (lambda c: c.pop("format_version"), "format_version None is unknown|format .* is not"),
    (lambda c: c.update(format="gguf"), "format 'gguf' is not 'nomatmul-packed'"),
    (lambda c: c.update(format=["nomatmul-packed"]), "format .* is not 'nomatmul-packed'"),
    (lambda c: c.pop("model"), "missing config key 'model'"),
    (lambda c: c.update(model=[]), "a model config must be a JSON object"),
]
_TERNARY = [
    (lambda c: c["model"].update(linear="dense"), "has no linear 'dense' in a causal model"),
    (lambda c: c["model"].update(hidden_size=13), "does not match the checksum"),
]
_HEADS = [
    (lambda c: c.pop("head"), "an encoder needs a task head|missing config key 'head'"),
    (lambda c: c.update(head=[]), "key of head: a JSON object is needed, found list"),
    (lambda c: c["head"].update(colour=1), "unknown key of head 'colour'"),
    (lambda c: c["head"].pop("pooler"), "missing key of head 'pooler'"),
    (lambda c: c["head"].update(task="poem"), "task 'poem' is unknown"),
    (lambda c: c["head"].update(task=["token"]), "task .* is unknown"),
    (lambda c: c["head"].update(labels=[]), "task 'sequence' does not go with 0 labels"),
    (lambda c: c["head"].update(task="masked"), "task 'masked' does not go with 2 labels"),
    (lambda c: c["head"].update(labels="no"), "labels must be a list of names"),
    (lambda c: c["head"].update(labels=["a", "b", "c"]), "does not match the checksum"),
    (lambda c: c["head"].update(pooler="sum"), "pooler 'sum' is unknown"),
    (lambda c: c["head"].update(pool_padding=1), "pool_padding must be true or false"),
    (lambda c: c["head"].update(pooler_activation="relu2"), "pooler_activation .* is unknown"),
    (lambda c: c["head"].update(pooler_size=0), "pooler_size must be a whole number above 0"),
    (lambda c: c["model"].update(causal=True), "a causal model has no task head"),
    (lambda c: c["model"].update(linear="ternary"), "has no|fff_bias"),
    (lambda c: c["model"].update(token_mixer="mlgru"), "has no|sinusoidal"),
    (lambda c: c.update(forms={}), "missing key of forms"),
    (lambda c: c.update(forms=1), "key of forms: a JSON object is needed, found int"),
    (lambda c: c["forms"].update(colour="red"), "unknown key of forms 'colour'"),
    (lambda c: c["forms"].update(dense="2bit"), "dense form '2bit' is unknown"),
    (lambda c: c["forms"].update(rows=None), "rows form None is unknown"),
    (lambda c: c["forms"].update(embedding=["f32"]), "embedding form .* is unknown"),
]
KIND_EDITS = {
    "2bit": [
        *_TERNARY,
        (lambda c: c.pop("forms"), "missing config key 'forms'"),
        (lambda c: c["forms"].update(ternary="4bit"), "ternary form '4bit' is unknown"),
        (lambda c: c["forms"].update(ternary=["2bit"]), "ternary form .* is unknown"),
        (lambda c: c["forms"].update(embedding=None), "embedding form None is unknown"),
        (lambda c: c["forms"].update(rows="2bit"), "unknown key of forms 'rows'"),
        (lambda c: c["forms"].pop("ternary"), "missing key of forms 'ternary'"),
        (lambda c: c.update(head={}), "missing key of head"),
        (lambda c: c.update(format_version=1), "unknown config key 'forms'"),
    ],
    "2bit-v1": [
        *_TERNARY,
        (lambda c: c.update(packing="4bit"), "ternary form '4bit' is unknown"),
        (lambda c: c.update(packing=["2bit"]), "ternary form .* is unknown"),
        (lambda c: c.update(embedding=None), "embedding form None is unknown"),
        (lambda c: c.pop("packing"), "missing config key 'packing'"),
        (lambda c: c.update(format_version=2), "unknown config key 'embedding'"),
        (lambda c: c.update(forms={}), "unknown config key 'forms'"),
    ],
    "encoder": [
        *_HEADS,
        (lambda c: c["forms"].update(ternary="2bit"), "unknown key of forms 'ternary'"),
        (lambda c: c.update(format_version=1), "unknown config key 'forms'"),
    ],
    "encoder-v1": [
        *_HEADS,
        (lambda c: c.update(format="nomatmul-packed"), "unknown config key 'forms'"),
        (lambda c: c.update(format_version=2), "format 'nomatmul-packed-encoder' is not"),
    ],
}


def change_config(directory: Path, change) -> None:
    values = json.loads((directory / "config.json").read_text())
    change(values)
    write_json(directory / "config.json", values)


@pytest.mark.parametrize(("change", "message"), CONFIG_EDITS)
def test_configs_that_lie(copy, change, message):
    change_config(copy, change)
    refused(copy, message)


@pytest.mark.parametrize(
    ("packed", "change", "message"),
    [(kind, *edit) for kind, edits in KIND_EDITS.items() for edit in edits],
    indirect=["packed"],
)
def test_configs_of_one_kind_that_lie(copy, change, message):
    change_config(copy, change)
    refused(copy, message)


def test_a_form_of_rows_that_version_1_says_without_trees(tmp_path):
    dials = {**ENCODER, "channel_mixer": "ffn"}
    dials = {name: value for name, value in dials.items() if not name.startswith("fff_")}
    write_encoder(tmp_path / "source", encoder_config(**dials))
    pack(tmp_path / "source", tmp_path / "packed", check=False)
    to_version_1(tmp_path / "packed")
    PackedReader(tmp_path / "packed").verify_all()
    change_config(tmp_path / "packed", lambda c: c["forms"].update(rows="red"))
    refused(tmp_path / "packed", "rows form 'red' is unknown")


# with a right checksum the shapes tell
@pytest.mark.parametrize(
    ("packed", "message"),
    [
        ("2bit", r"head\.packed is U8 \[11, 32\], the config asks for U8 \[12, 32\]"),
        ("2bit-v1", r"head\.packed is U8 \[11, 32\], the config asks for U8 \[12, 32\]"),
        ("encoder", r"embedding\.weight is BF16 \[11, 12\], .* asks for BF16 \[12, 12\]"),
        ("encoder-v1", r"embedding\.weight is BF16 \[11, 12\], .* asks for BF16 \[12, 12\]"),
    ],
    indirect=["packed"],
)
def test_a_config_that_asks_for_another_shape(copy, message):
    change_config(copy, lambda c: c["model"].update(vocab_size=12))
    sign_config(copy)
    refused(copy, message)


@pytest.mark.parametrize("packed", DECODERS, indirect=True)
def test_a_config_that_asks_for_another_form(copy):
    def change(values):
        forms, key = (values["forms"], "ternary") if "forms" in values else (values, "packing")
        forms[key] = "1.6bit" if forms[key] == "2bit" else "2bit"

    change_config(copy, change)
    sign_config(copy)
    refused(copy, "illegal|padding|asks for")
