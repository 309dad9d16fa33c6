"""SentencePiece BPE models (`tokenizer.model` of Llama and Mistral) as a `tokenizers` tokenizer.

The file is a protocol buffer; only the few fields that decide the tokens are read, so that the
conversion needs no further library. What cannot be converted faithfully is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nomatmul.formats.errors import FormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# SentencePiece's own numbers (sentencepiece_model.proto).
_MODEL_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_SPACE = "\u2581"
_HINT = "convert it once with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"

Fields = dict[int, list["bytes | int | float"]]


def tokenizer_from_sentencepiece(data: bytes, path: Path) -> Tokenizer:
    """Build the equal `tokenizers` tokenizer, which puts the begin token in front as Llama does.

    Raises FormatError for damage, and for models other than byte-pair encoding without
    normalisation rules.
    """
    try:
        return _convert(data, path)
    except (ValueError, IndexError, KeyError, struct.error, TypeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} is no SentencePiece model: {error}") from None


def _convert(data: bytes, path: Path) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    model = _fields(data)
    trainer, rules = _fields(_last(model, 2, b"")), _fields(_last(model, 3, b""))
    if _last(trainer, 3, 1) != _MODEL_BPE:
        raise FormatError(f"{path} is not a byte-pair SentencePiece model; {_HINT}")
    if _last(rules, 2, b"") or _last(rules, 4, 1) or not _last(rules, 5, 1):
        raise FormatError(f"{path} has SentencePiece normalisation rules; {_HINT}")
    pieces = [_fields(entry) for entry in model[1]]
    texts = [_last(piece, 1, b"").decode("utf-8") for piece in pieces]
    kinds = [_last(piece, 3, _NORMAL) for piece in pieces]
    vocab = {text: index for index, text in enumerate(texts)}
    if len(vocab) != len(texts):
        raise FormatError(f"{path} names a piece twice")
    scores = {
        text: _last(piece, 2, 0.0)
        for text, piece, kind in zip(texts, pieces, kinds, strict=True)
        if kind in (_NORMAL, _USER_DEFINED)
    }
    unknown = texts[_last(trainer, 40, 0)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            _merges(vocab, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=_BYTE in kinds,
        )
    )
    prefix = [normalizers.Prepend(_SPACE)] if _last(rules, 3, 1) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text, kind in zip(texts, kinds, strict=True)
            if kind in (_UNKNOWN, _CONTROL)
        ]
    )
    begin = _signed(_last(trainer, 41, 1))
    if 0 <= begin < len(texts):
        token = texts[begin]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token}:0 $A:0",
            pair=f"{token}:0 $A:0 {token}:1 $B:1",
            special_tokens=[(token, begin)],
        )
    return tokenizer


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first: SentencePiece's own order."""
    found = [
        (score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    found.sort(key=lambda m: (-m[0], vocab[m[1]], vocab[m[2]]))
    return [(left, right) for _, left, right in found]


def _fields(data: bytes) -> Fields:
    """Return {field number: [values]} of one protocol-buffer message."""
    fields: Fields = {}
    for number, value in _walk(data):
        fields.setdefault(number, []).append(value)
    return fields


def _walk(data: bytes) -> Iterator[tuple[int, bytes | int | float]]:
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if kind == 2:
            length, position = _varint(data, position)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {position}")
        chunk = data[position : position + length]
        if len(chunk) != length:
            raise ValueError("the file is truncated")
        position += length
        yield (
            tag >> 3,
            chunk if kind == 2 else struct.unpack("<f" if length == 4 else "<d", chunk)[0],
        )


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError(f"a number at byte {position} does not end")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _last(fields: Fields, number: int, default):  # type: ignore[no-untyped-def]
    """The value of a field that occurs once; its type is that of `default`."""
    value = fields[number][-1] if number in fields else default
    if type(value) is not type(default):
        raise ValueError(f"field {number} has an unexpected type")
    return value
