"""Small packed directories of each kind and version, sound or changed."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_files import encoder_config, write_encoder
from model_files import write_packed, write_published, write_tokenizer, write_training
from random_packed import FAMILIES, family, write_random

from nomatmul.convert import pack
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed import PackedReader

# Of write_packed_kind: decoders, a decoder of ternary trees, an encoder; some as version 1.
KINDS = ("2bit", "1.6bit", "trees", "encoder", "2bit-v1", "1.6bit-v1", "encoder-v1")
WITH_ATTENTION = ("falcon", "bonsai", "repack")  # of random_packed.FAMILIES; every form is in one
DECODERS = ("2bit", "1.6bit", "2bit-v1")
ENCODERS = ("encoder", "encoder-v1")
SIZES = {"hidden_size": 12, "intermediate_size": 7, "vocab_size": 11, "num_hidden_layers": 1}
ENCODER = {
    "vocab_size": 11, "hidden_size": 12, "num_layers": 1, "num_heads": 2,
    "channel_mixer": "fff", "fff_trees": 2, "fff_depth": 1, "fff_bias": True,
}  # fmt: skip


def write_decoder(root: Path, packing: str) -> None:
    write_published(root / "source", np.random.default_rng(1), **SIZES)
    tokenizer = write_tokenizer(root / "source", words=8)
    form = "bf16" if packing == "2bit" else "int8"
    write_packed(root / "sound", open_checkpoint(root / "source"), packing, form, tokenizer)


def write_encoder_of_trees(root: Path) -> None:
    write_encoder(root / "source", encoder_config(**ENCODER), "sequence", ("no", "yes"))
    write_tokenizer(root / "source", words=8)
    forms = {"rows": "int8", "dense": "int8", "embedding": "bf16"}
    pack(root / "source", root / "sound", check=False, **forms)


def write_decoder_of_trees(root: Path) -> None:
    trees = {"channel_mixer": "fff", "activation": "silu", "fff_trees": 2, "fff_depth": 1}
    write_training(root / "source", ModelConfig(11, 12, 1, **trees), np.random.default_rng(1))
    write_tokenizer(root / "source", words=8)
    pack(root / "source", root / "sound", check=False, embedding="int8")


def write_packed_kind(root: Path, name: str) -> Path:
    """Write a small sound directory of one of KINDS."""
    kind, _, version = name.partition("-")
    if kind == "encoder":
        write_encoder_of_trees(root)
    elif kind in FAMILIES:
        write_random(root / "sound", *family(kind), tokenizer_path=write_tokenizer(root, words=8))
    elif kind == "trees":
        write_decoder_of_trees(root)
    else:
        write_decoder(root, kind)
    if version:
        to_version_1(root / "sound")
    return root / "sound"


def refused(directory: Path, match: str = ".") -> None:
    with pytest.raises(ValueError, match=match) as caught:
        PackedReader(directory).verify_all()
    assert "\n" not in str(caught.value)


def to_version_1(directory: Path) -> None:
    """Turn a directory of version 2 into what the first writers left."""
    values = json.loads((directory / "config.json").read_text())
    forms, head, model = values["forms"], values.get("head"), values["model"]
    if head is None:
        old = {"format": "nomatmul-packed", "format_version": 1, "packing": forms["ternary"]}
        old["embedding"] = forms["embedding"]
    else:
        order = ("rows", "dense", "embedding")
        old = {"format": "nomatmul-packed-encoder", "format_version": 1}
        old |= {"forms": {kind: forms.get(kind, "f32") for kind in order}, "head": head}
    text = json.dumps({**old, "model": model}, indent=2) + "\n"
    (directory / "config.json").write_text(text)
    sign_config(directory)


def sign_config(directory: Path) -> None:
    """Make the checksum of config.json right."""
    digest = hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()
    edit_header(directory, lambda h: h["__metadata__"].update(config_sha256=digest))


def edit_header(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the safetensors header after `change(header)`; the data stays."""
    path = directory / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
