"""SentencePiece files: a vocabulary made here byte by byte, and Mistral's where it is at hand."""

from __future__ import annotations

import struct

import pytest

from nomatmul.convert.sentencepiece import convert_tokenizer, read_vocabulary

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


def vocabulary(model_type: int = 2) -> bytes:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
    words = ["ab", f"{SPACE}ab", "abab", SPACE, "a", "b"]
    pieces += [(word, -float(i), 1) for i, word in enumerate(words)]
    message = b""
    for text, score, kind in pieces:
        message += field(1, field(1, text.encode()) + field(2, score) + field(3, kind))
    return message + field(2, field(3, model_type) + field(35, 1)) + field(3, field(3, 1))


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(vocabulary())
    return path


def test_merges_apply_best_score_first(model_file):
    tokenizer = convert_tokenizer(model_file)
    assert tokenizer.encode("ab abab", add_special_tokens=False).tokens == [
        f"{SPACE}ab",
        f"{SPACE}ab",
        "ab",
    ]


def test_text_comes_back_through_bytes(model_file):
    tokenizer = convert_tokenizer(model_file)
    text = "ab \u00fc\n\U0001f600  ab"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_settings_are_read(model_file):
    found = read_vocabulary(model_file)
    assert found.byte_fallback
    assert found.add_dummy_prefix
    assert len(found.pieces) == 265


def test_other_kinds_and_damage_are_refused(tmp_path, model_file):
    path = tmp_path / "other.model"
    path.write_bytes(vocabulary(model_type=1))
    with pytest.raises(ValueError, match="not of the BPE kind"):
        convert_tokenizer(path)
    data = model_file.read_bytes()
    for damaged in (b"", data[:100], b"\xff" * 40, b"GGUF" + data):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"no SentencePiece vocabulary|not of the BPE kind"):
            convert_tokenizer(path)


def test_mistral_vocabulary(shared):
    tokenizer = convert_tokenizer(shared / "data" / "tokenizers" / "mistral" / "tokenizer.model")
    assert tokenizer.get_vocab_size() == 32000
    ids = tokenizer.encode("Hello world", add_special_tokens=False).ids
    assert ids == [22557, 1526]
