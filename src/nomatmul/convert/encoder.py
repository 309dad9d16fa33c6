"""Packing an encoder: dense matrices, rows of FFFs and heads in the chosen forms, and the check.

Legend: D hidden size, V rows of an FFF, N/K rows and columns of a dense matrix, T tokens,
C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.convert.card import encoder_card
from nomatmul.convert.check import CheckText
from nomatmul.convert.source import prepare_tokenizer
from nomatmul.formats.checkpoint import Checkpoint
from nomatmul.formats.encoder import EncoderReading
from nomatmul.formats.packed.encoder import (
    EncoderReader,
    EncoderWriter,
    Forms,
    check_encoder,
    dense_shapes,
)
from nomatmul.formats.quantise import quantise_rows, to_bfloat16
from nomatmul.formats.tokenizer import load_tokenizer

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class EncoderCheck:
    """Packed against source on `tokens` tokens.

    relative_error: root mean square of the difference over that of the source, of the hidden
    states behind the final norm and of the head's logits. same_path: share of tokens, over all
    layers of trees, that visit the same nodes (None without trees). same_argmax: share of
    predictions (of tokens, or of sequences for a sequence classifier) that stay.
    """

    tokens: int
    text: str
    hidden_error: float
    logit_error: float
    largest_difference: float
    largest_logit: float
    same_argmax: float
    same_path: float | None


def pack_encoder(
    checkpoint: Checkpoint,
    target: Path,
    forms: Forms,
    progress: Progress,
) -> str:
    """Write the packed form of an encoder to the new directory `target`.

    Returns how its tokenizer came: "copied", "converted" or "none". Raises ValueError for a model
    that no packed encoder can hold, WriteError when the disk refuses; nothing is left then.
    """
    config, reading = checkpoint.config, checkpoint.reading
    assert reading is not None
    check_encoder(config)
    with prepare_tokenizer(checkpoint.directory, config) as (tokenizer_path, kind):
        card = encoder_card(config, forms, reading)
        writer = EncoderWriter(target, config, forms, reading, tokenizer_path, card)
        with writer:
            _write_tensors(checkpoint, forms, writer, progress)
    return kind


def _write_tensors(
    checkpoint: Checkpoint, forms: Forms, writer: EncoderWriter, progress: Progress
) -> None:
    """Write in the file's order; the scales of an int8 matrix come behind all matrices."""
    assert checkpoint.reading is not None
    dense = dense_shapes(checkpoint.config, checkpoint.reading)
    scales: dict[str, NDArray[np.float32]] = {}
    for done, name in enumerate(writer.names):
        progress(done, len(writer.names), name)
        layer, _, kind = name.rpartition(".")
        if name in scales:
            writer.add(name, scales.pop(name))
        elif name == "embedding.scale":
            writer.add(name, quantise_rows(checkpoint.read("embedding.weight"))[1])
        elif name == "embedding.weight":
            writer.add(name, _stored(checkpoint.read(name), forms.embedding)[0])
        elif kind == "rows":
            parts = [checkpoint.read(f"{layer}.{part}") for part in ("w_in", "w_out")]
            stored, scale = _stored(np.stack(parts, axis=1), forms.rows)
            writer.add(name, stored)
            if scale is not None:
                scales[f"{layer}.row_scale"] = scale
        elif kind == "weight" and layer in dense:
            stored, scale = _stored(_dense(checkpoint, layer), forms.dense)
            writer.add(name, stored)
            if scale is not None:
                scales[f"{layer}.scale"] = scale
        else:
            writer.add(name, checkpoint.read(name))
    progress(len(writer.names), len(writer.names), "")


def _dense(checkpoint: Checkpoint, layer: str) -> NDArray[np.float32]:
    """A dense matrix; q, k and v lie in one, in this order."""
    if not layer.endswith(".qkv_proj"):
        return checkpoint.read(f"{layer}.weight")
    at = layer.removesuffix(".qkv_proj")
    return np.concatenate([checkpoint.read(f"{at}.{c}_proj.weight") for c in "qkv"])


def _stored(
    values: NDArray[np.float32], form: str
) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """What the file holds of `values`, and the scale of each row where the form is int8."""
    if form == "f32":
        return values, None
    if form == "bf16":
        return to_bfloat16(values), None
    q, scale = quantise_rows(values.reshape(-1, values.shape[-1]))
    return q.reshape(values.shape), scale.reshape(values.shape[:-1])


def check_encoder_packed(checkpoint: Checkpoint, target: Path, text: CheckText) -> EncoderCheck:
    """Run source (float32, numpy's oracle) and packed model (engine) on one text and compare.

    Without a tokenizer the text is replaced by fixed pseudo-random token ids.
    """
    from nomatmul.engine import load
    from nomatmul.engine.heads import pooled
    from nomatmul.reference.model import ReferenceModel

    model = load(target, kind="encoder")
    assert checkpoint.reading is not None
    ids_BT, named = _check_ids(EncoderReader(target), text)
    expected = ReferenceModel.from_checkpoint(checkpoint).forward(ids_BT)
    found = model.hidden(ids_BT)
    logits = model.logits(ids_BT)
    if checkpoint.reading.task == "masked":
        wanted = expected.logits_BTV
    else:
        states = expected.hidden_BTD
        if checkpoint.reading.task == "sequence":
            seen = np.ones(ids_BT.shape[1], bool)
            states = np.stack([pooled(row, seen, checkpoint.reading) for row in states])
        wanted = _classes(checkpoint, checkpoint.reading, states)
    paths = model.paths(ids_BT)
    same = [
        (rows.reshape(expected.paths[layer].shape) == expected.paths[layer]).all(axis=(1, 2))
        for layer, rows in paths.items()
    ]
    return EncoderCheck(
        tokens=ids_BT.size,
        text=named,
        hidden_error=_relative(found, expected.hidden_BTD),
        logit_error=_relative(logits, wanted),
        largest_difference=float(np.abs(logits - wanted).max()),
        largest_logit=float(np.abs(wanted).max()),
        same_argmax=float(np.mean(logits.argmax(-1) == wanted.argmax(-1))),
        same_path=float(np.mean(same)) if same else None,
    )


def _classes(
    checkpoint: Checkpoint, reading: EncoderReading, x: NDArray[np.float32]
) -> NDArray[np.float32]:
    from nomatmul.reference.activations import ACTIVATIONS

    if "pooler.weight" in checkpoint.names():
        x = x @ checkpoint.read("pooler.weight").T + checkpoint.read("pooler.bias")
    if reading.task == "sequence":
        x = ACTIVATIONS[reading.head.pooler_activation](x)
    return x @ checkpoint.read("classifier.weight").T + checkpoint.read("classifier.bias")


def _relative(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    power = float(np.sqrt(np.mean(np.square(wanted, dtype=np.float64))))
    error = float(np.sqrt(np.mean(np.square(found - wanted, dtype=np.float64))))
    return error / max(power, 1e-30)


def _check_ids(reader: EncoderReader, text: CheckText) -> tuple[NDArray[np.int64], str]:
    limit = min(reader.config.max_position_embeddings, 128)
    if reader.tokenizer_path is None:
        rng = np.random.default_rng(0)
        return rng.integers(0, reader.config.vocab_size, (2, min(limit, 64))), "random token ids"
    ids = load_tokenizer(reader.tokenizer_path).encode(text.text).ids[:limit]
    if len(ids) < 2:
        raise ValueError(f"{text.name} has {len(ids)} token(s); the check needs two or more")
    return np.array([ids], np.int64), text.name
