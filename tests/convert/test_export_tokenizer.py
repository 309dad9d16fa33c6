"""Tokenizers as GGUF files have them: what is read again gives the same ids, or it is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from nomatmul.convert.export_tokenizer import PROBES, vocabulary_metadata
from nomatmul.convert.sentencepiece import convert_tokenizer
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.files.gguf import GgufFile
from nomatmul.formats.published.gguf_pretokenizers import GPT2, PRE_TOKENIZERS, SINGLE_DIGITS
from nomatmul.formats.published.gguf_tokenizer import tokenizer_files
from nomatmul.formats.published.gguf_tokens import token_ids
from nomatmul.formats.tokenizer import tokenizer_from_bytes

RECORDED = Path(__file__).resolve().parents[1] / "golden" / "gguf-tokenizers"
IDS = json.loads((RECORDED / "ids.json").read_text("utf-8"))
VALUES = {"hidden_size": 32, "num_layers": 1, "intermediate_size": 32}


def config_of(tokenizer, more=0, **tokens):
    size = tokenizer.get_vocab_size(with_added_tokens=True) + more
    return ModelConfig(vocab_size=size, **VALUES, **tokens)


def written(path, tokenizer, more=0, start=None, **tokens):
    """The metadata of a tokenizer, as a reader gives them."""
    tokenizer.save(str(path / "tokenizer.json"))
    config = config_of(tokenizer, more, **tokens)
    found = vocabulary_metadata(path / "tokenizer.json", config, start, "the model")
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in found.items()}


def read(metadata):
    return tokenizer_from_bytes(tokenizer_files(metadata)["tokenizer.json"], "x")


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_byte_level_vocabularies_get_llama_cpp_s_name(tmp_path, name):
    """And of the names with recorded ids, these."""
    metadata = {**GgufFile(RECORDED / "bpe.gguf").metadata, "tokenizer.ggml.pre": name}
    tokenizer = read(metadata)
    found = written(tmp_path, tokenizer, eos_token_id=0)
    assert PRE_TOKENIZERS[found["tokenizer.ggml.pre"]].patterns == PRE_TOKENIZERS[name].patterns
    whole = PRE_TOKENIZERS[found["tokenizer.ggml.pre"]].ignore_merges
    assert whole == PRE_TOKENIZERS[name].ignore_merges
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        assert found[key] == metadata[key]
    again = read(found)
    for text in IDS["texts"]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert again.encode(text, add_special_tokens=False).ids == ids


def byte_level(merges=(), pattern=SINGLE_DIGITS, **options):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|endoftext|>", "<|pad|>", *alphabet, *("".join(pair) for pair in merges)]
    ids = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=list(merges), **options))
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|pad|>"])
    return tokenizer


def test_a_vocabulary_that_was_trained_here_is_cut_as_gpt_2_s(tmp_path):
    tokenizer = byte_level([("Ġ", "1"), ("t", "h"), ("Ġ", "th")])
    found = written(tmp_path, tokenizer, eos_token_id=0)
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    text = "the 1234 th1s 11 1"
    assert read(found).encode(text).ids == tokenizer.encode(text).ids
    assert PRE_TOKENIZERS["gpt-2"].patterns == (GPT2,)


@pytest.mark.train
def test_the_cut_of_such_a_vocabulary_is_known():
    from nomatmul.train.tokenizer import _SPLIT

    assert _SPLIT == SINGLE_DIGITS


def test_one_whose_merges_join_digits_is_refused(tmp_path):
    tokenizer = byte_level([("1", "2"), ("Ġ", "12")])
    with pytest.raises(ValueError, match=r"for which llama\.cpp has no name"):
        written(tmp_path, tokenizer, eos_token_id=0)


def test_ids_and_types_of_all_tokens(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.add_special_tokens(["<|end|>"])
    found = written(
        tmp_path, tokenizer, more=3, start=0, bos_token_id=0, eos_token_id=(0, 259), pad_token_id=1
    )
    names, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"].tolist()
    assert len(names) == len(types) == 263
    assert (names[0], types[0], names[258], types[258]) == ("<|endoftext|>", 3, "<tool>", 4)
    assert (names[259], types[259], types[2], names[262]) == ("<|end|>", 3, 1, "[PAD262]")
    assert types[260:] == [5, 5, 5]
    ends = {k: found.get(f"tokenizer.ggml.{k}_token_id") for k in ("bos", "eos", "eot", "padding")}
    assert ends == {"bos": 0, "eos": 0, "eot": 259, "padding": 1}
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert read(found).encode("a").ids[0] == 0


def test_the_end_tokens_are_found_again(tmp_path):
    from nomatmul.formats.published.gguf_keys import Keys

    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|end|>", "<stop>"])
    ends = (258, 0, 259)
    found = written(tmp_path, tokenizer, eos_token_id=ends)
    assert set(token_ids(Keys(found, "x"), 260)["eos_token_id"]) == set(ends)
    assert found["tokenizer.ggml.add_bos_token"] is False
    ends = (258, 0, 1, 259)
    with pytest.warns(UserWarning, match="will not end at '<stop>'"):
        written(tmp_path, tokenizer, eos_token_id=ends)
    with pytest.warns(UserWarning, match="no end token"):
        written(tmp_path, tokenizer, eos_token_id=None)


def test_a_chat_template_goes_along(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    found = written(tmp_path, byte_level(), eos_token_id=0)
    assert found["tokenizer.chat_template"] == "{{ messages }}"


def test_sentencepiece_merges_become_scores(tmp_path, sentencepiece_file):
    tokenizer = convert_tokenizer(sentencepiece_file)
    tokenizer.encode_special_tokens = True
    found = written(tmp_path, tokenizer, start=1, bos_token_id=1, eos_token_id=2)
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.token_type"][:4].tolist() == [2, 3, 3, 6]
    again = read(found)
    for text, ids in zip(IDS["texts"], IDS["ids"]["mistral"], strict=True):
        assert again.encode(text, add_special_tokens=False).ids == ids, text


def small_sentencepiece():
    """Letters, bytes, and some pairs of letters and of spaces."""
    pairs = [("\u2581", "t"), ("\u2581\u2581", "\u2581"), ("h", "e"), ("\u2581t", "he")]
    pairs[1:1] = [("\u2581", "\u2581")]
    names = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *"abcdefghijklmnopqrst",
    ]
    names += ["".join(pair) for pair in pairs]
    ids = {name: i for i, name in enumerate(names)}
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    return Tokenizer(models.BPE(vocab=ids, merges=pairs, **options))


@pytest.mark.parametrize("scheme", ["first", "never"])
def test_sentencepiece_in_its_newer_form(tmp_path, scheme):
    tokenizer = small_sentencepiece()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = written(tmp_path, tokenizer, eos_token_id=0)
    told = ["puts no space before a text that begins with one" in str(w.message) for w in caught]
    assert told == [True] * (scheme == "first")
    assert found["tokenizer.ggml.add_space_prefix"] is (scheme == "first")
    again = read(found)
    for text in PROBES:
        if scheme == "never" or not text.startswith(" "):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert again.encode(text, add_special_tokens=False).ids == ids


def test_accents_that_only_the_model_composes_are_warned_of(tmp_path):
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    with pytest.warns(UserWarning, match="composes accents"):
        written(tmp_path, tokenizer, eos_token_id=0)


def lowercase():
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def words():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def bert_cuts():
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def space_in_front():
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def two_ranks():
    names = ["<unk>", "\u2581", "a", "b", "c", "ab", "bc", "abc"]
    merges = [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")]
    ids = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    return tokenizer


def words_stay_whole():
    return byte_level([("t", "h")], GPT2, ignore_merges=True)


REFUSED = {
    lowercase: r"changes texts before it cuts them \(Lowercase\)",
    words: "is WordLevel; a GGUF file has BPE",
    bert_cuts: "prepares texts by BertPreTokenizer",
    space_in_front: "prepares texts by ByteLevel",
    two_ranks: "merges 'a' and 'bc' too late for one score a token",
    words_stay_whole: "for which llama.cpp has no name",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_has_no_form_is_refused(tmp_path, kind):
    with pytest.raises(ValueError, match=REFUSED[kind]):
        written(tmp_path, kind(), eos_token_id=0)


def test_other_ids_are_found(tmp_path, monkeypatch):
    """Whatever is overlooked: what is written is read and compared."""
    from nomatmul.convert import export_tokenizer

    monkeypatch.setattr(export_tokenizer, "_joins_digits", lambda merges: False)
    with pytest.raises(ValueError, match=r"gives other ids .* from token"):
        written(tmp_path, byte_level([("1", "2")]), eos_token_id=0)


def test_a_model_without_a_tokenizer(tmp_path):
    config = ModelConfig(vocab_size=40, **VALUES)
    with pytest.warns(UserWarning, match="has no tokenizer"):
        found = vocabulary_metadata(None, config, None, "the model")
    assert found == {"tokenizer.ggml.model": "no_vocab"}
