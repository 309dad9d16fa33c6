"""A small SentencePiece vocabulary, made byte by byte."""

from __future__ import annotations

import struct

SPACE = "\u2581"


def varint(value: int) -> bytes:
    out = b""
    while value >= 128:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


# As Llama and Mistral have it: a space in front, and spaces kept as they are.
PLAIN = field(3, 1) + field(4, 0)


def vocabulary(model_type: int = 2, normalizer: bytes = PLAIN, trainer: bytes = b"") -> bytes:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
    words = ["ab", f"{SPACE}ab", "abab", SPACE, "a", "b"]
    pieces += [(word, -float(i), 1) for i, word in enumerate(words)]
    message = b""
    for text, score, kind in pieces:
        message += field(1, field(1, text.encode()) + field(2, score) + field(3, kind))
    return message + field(2, field(3, model_type) + field(35, 1) + trainer) + field(3, normalizer)
