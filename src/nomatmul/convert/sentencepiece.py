"""A SentencePiece vocabulary (`tokenizer.model`, as Llama and Mistral ship) as tokenizer.json.

Published MatMul-free models use Mistral's vocabulary. The file is a protocol-buffer message of
which a handful of fields matter, so it is read here without the sentencepiece and protobuf
packages (message layout: sentencepiece_model.proto of google/sentencepiece).
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nomatmul.formats.sentencepiece import NORMAL, Vocabulary, build_tokenizer

__all__ = ["NORMAL", "Vocabulary", "convert_tokenizer", "read_vocabulary"]

_UNIGRAM, _BPE = 1, 2
_KINDS = {3: "word", 4: "character"}


def convert_tokenizer(source: Path, *, add_dummy_prefix: bool = True) -> Any:
    """The `tokenizers.Tokenizer` that splits text as the SentencePiece file `source` does.

    add_dummy_prefix: does a text begin with a space, if the file says so? Raises ValueError when
    the file is damaged or is neither of the BPE nor the unigram kind.
    """
    vocabulary = read_vocabulary(source)
    added = vocabulary.add_dummy_prefix and add_dummy_prefix
    return build_tokenizer(dataclasses.replace(vocabulary, add_dummy_prefix=added), source)


def read_vocabulary(source: Path, any_kind: bool = False) -> Vocabulary:
    """Read the pieces and settings of a SentencePiece file.

    any_kind: also of a kind that cannot be converted (to look at its pieces only).
    Raises ValueError when it is damaged, or neither a BPE nor a unigram vocabulary.
    """
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for field, value in _fields(source.read_bytes()):
            if field == 1:
                pieces.append(_piece(value))
            elif field == 2:
                trainer = dict(_fields(value))
            elif field == 3:
                normalizer = dict(_fields(value))
        character_map = _bytes(normalizer.get(2, b""))
    except (IndexError, struct.error, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{source} is no SentencePiece vocabulary ({error})") from None
    if not pieces or not trainer:
        lacks = "pieces" if trainer else "settings"
        raise ValueError(f"{source} is no SentencePiece vocabulary (it has no {lacks})")
    kind = trainer.get(3, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE) and not any_kind:
        raise ValueError(
            f"{source} is of the {_KINDS.get(kind, kind)} kind, not BPE or unigram; save it as"
            " tokenizer.json first"
        )
    if trainer.get(24, 0) and not any_kind:
        raise ValueError(f"{source} puts spaces behind words; save it as tokenizer.json first")
    return Vocabulary(
        pieces,
        byte_fallback=bool(trainer.get(35, 0)),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        character_map=character_map,
        single_spaces=bool(normalizer.get(4, 1)),
        unigram=kind == _UNIGRAM,
    )


def _piece(message: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(message))
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return _bytes(fields.get(1, b"")).decode("utf-8"), score, int(fields.get(3, NORMAL))


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):  # bytes(n) would be n zeros
        raise TypeError(f"a number where bytes belong: {value}")
    return value


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message: int for varints, bytes for the rest."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if wire == 2:
            length, at = _varint(message, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise IndexError(f"wire type {wire} at byte {at}")
        if at + length > len(message):
            raise IndexError(f"field of {length} bytes at {at} runs over the end")
        yield key >> 3, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise IndexError(f"number of more than 64 bits at byte {at}")
