"""SentencePiece files: a vocabulary made here byte by byte, and Mistral's where it is at hand."""

from __future__ import annotations

import argparse
import base64
import inspect
import zlib

import pytest
from sentencepiece_files import PLAIN, SPACE, field, vocabulary
from tokenizers import Tokenizer

from nomatmul.convert.sentencepiece import convert_tokenizer, read_vocabulary
from nomatmul.formats.tokenizer import prepare

# A table compiled by SentencePiece from three rules: U+FF21 (a wide A) becomes A, a new line a
# space, U+FB01 (a ligature) "fi".
CHARACTER_MAP = zlib.decompress(
    base64.b85decode(
        b"c-ke?b&!@-6bIm!9hjkGs0F1PmPSQ-Y3c5gSOgW2ZkBG4P`VqI?nX*MloC`Flo(LDyPgm3%rn24d(Izs=A0YE4uT"
        b"*e2;wISLMJ*VJS-R-CkR|eFOXp}o<dv_5T8(MLXwb}WF#dyyH11!DP;;$lZrHi^8sl|$A@GfJ(<Wz7BZ8KtmGg&x"
        b"yVT#a+CM{lY{)^qaXz+Od&p^2%qpVpHh_K6r&_1C`~CMDMLBRQi1YRq9UJBnW|KwI@PF24Qf-1y40aQ^=L=~8q<i"
        b"TG@&`oXh{n`rxk5zO*`7so+vu-1z*yUulb73bmAMj(2cJ2pgX<jNgsOCkG>3`KZ6*^;LzY1$`FP#jFF6BG@}^H7{"
        b")V>iA-P;-!g^Ce8*I#@jWw`&Mam!huO?yE(@5?A{MfQ#VlhfD_G7dR<fEH*0P56tYae^*vuxjvW4wzV<$V<9okd&"
        b"vWFko#{u?ph=csdVUF+<KXa5{IL2{)<s>IK%_+|C8^3dwKly{dILCSZ<{vI_k$<_&CGJGT3a-d&T;+fM;|ABc#m!"
        b"J3x4Fk%9&n#WJmd+FdB#&-@SIn?<PERi{k_N_szdM=LfeK1"
    )
)


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


@pytest.mark.parametrize(
    ("normalizer", "text", "seen"),
    [
        (PLAIN, " ab  ab ", f"{SPACE}{SPACE}ab{SPACE}{SPACE}ab{SPACE}"),
        # SentencePiece's own defaults, which a field that is absent means
        (b"", " ab  ab ", f"{SPACE}ab{SPACE}ab"),
        (b"", "   ", ""),
        (field(3, 0), " ab  ab ", f"ab{SPACE}ab"),
        (field(2, CHARACTER_MAP), "\n\uff21b \n \ufb01", f"{SPACE}Ab{SPACE}fi"),
        (field(2, CHARACTER_MAP) + PLAIN, "\uff21b\n \ufb01", f"{SPACE}Ab{SPACE}{SPACE}fi"),
    ],
)
def test_texts_are_normalised_as_the_file_says(tmp_path, normalizer, text, seen):
    """What a trained file does by default was once not done: other tokens, and no word of it."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(vocabulary(normalizer=normalizer))
    tokenizer = convert_tokenizer(path)
    assert tokenizer.normalizer.normalize_str(text) == seen
    restored = Tokenizer.from_str(tokenizer.to_str())  # through tokenizer.json, as packing does
    assert restored.encode(text).ids == tokenizer.encode(text).ids


def test_normalisations_that_are_damaged_or_unknown_are_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    for normalizer, trainer, message in (
        (field(2, b"\xff" * 20), b"", "damaged table of characters"),
        (field(2, 7), b"", "a number where bytes belong"),
        (PLAIN, field(24, 1), "puts spaces behind words"),
    ):
        path.write_bytes(vocabulary(normalizer=normalizer, trainer=trainer))
        with pytest.raises(ValueError, match=message):
            convert_tokenizer(path)


def test_settings_are_read(model_file):
    found = read_vocabulary(model_file)
    assert found.byte_fallback
    assert not found.single_spaces
    assert not found.character_map
    assert found.add_dummy_prefix
    assert len(found.pieces) == 265


def test_other_kinds_and_damage_are_refused(tmp_path, model_file):
    path = tmp_path / "other.model"
    path.write_bytes(vocabulary(model_type=3))
    with pytest.raises(ValueError, match="is of the word kind, not BPE or unigram"):
        convert_tokenizer(path)
    data = model_file.read_bytes()
    for damaged in (b"", data[:100], b"\xff" * 40, b"GGUF" + data):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="no SentencePiece vocabulary"):
            convert_tokenizer(path)


def test_mistral_vocabulary(sentencepiece_file):
    tokenizer = convert_tokenizer(sentencepiece_file)
    assert tokenizer.get_vocab_size() == 32000
    ids = tokenizer.encode("Hello world", add_special_tokens=False).ids
    assert ids == [22557, 1526]


@pytest.mark.train
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_texts_are_cut_as_sentencepiece_cuts_them(kind, tmp_path):
    """Vocabularies that the library itself trained, of each kind, with and without its options."""
    import sentencepiece

    text = inspect.getsource(argparse)[:50_000]
    for number, options in enumerate(({}, {"byte_fallback": True, "add_dummy_prefix": False})):
        path = tmp_path / f"{kind}{number}"
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(text.split("\n")), model_prefix=str(path), vocab_size=700,
            model_type=kind, minloglevel=2, **options,
        )  # fmt: skip
        path = path.with_suffix(".model")
        library = sentencepiece.SentencePieceProcessor(model_file=str(path))
        tokenizer = convert_tokenizer(path)
        prepare(tokenizer)
        for line in ["", " two  spaces ", "Größe \u4e2d\u6587", "ﬁne", *text.split("\n")[:150]]:
            assert tokenizer.encode(line).ids == library.encode(line), (line, options)
