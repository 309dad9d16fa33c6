"""Tokenizers from GGUF metadata: llama.cpp's ids, the original's ids, and what is refused."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import finish
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nomatmul.convert.sentencepiece import convert_tokenizer, read_vocabulary
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.gguf import GgufFile
from nomatmul.formats.published.gguf_tokenizer import tokenizer_files
from nomatmul.formats.tokenizer import tokenizer_from_bytes

RECORDED = Path(__file__).resolve().parents[1] / "golden" / "gguf-tokenizers"
IDS = json.loads((RECORDED / "ids.json").read_text())
BPE = {name: ids for name, ids in IDS["ids"].items() if not name.startswith("mistral")}
# Here llama.cpp has no class for the case of a letter and leaves out marks, which stand apart:
# texts of composed characters are the same.
APPROXIMATE = ("tekken", "gpt-4o")


def tokenizer_of(metadata, *, special_in_text=False):
    data = tokenizer_files(metadata)["tokenizer.json"]
    return tokenizer_from_bytes(data, "x", special_in_text=special_in_text)


@pytest.fixture(scope="module")
def byte_level():
    return GgufFile(RECORDED / "bpe.gguf").metadata


@pytest.fixture(scope="module")
def mistral(sentencepiece_file):
    names, scores, types = zip(*read_vocabulary(sentencepiece_file).pieces, strict=True)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(names),
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
    }


@pytest.mark.parametrize("name", BPE)
def test_byte_level_ids_are_llama_cpp_s(byte_level, name):
    tokenizer = tokenizer_of({**byte_level, "tokenizer.ggml.pre": name})
    for text, ids in zip(IDS["texts"], BPE[name], strict=True):
        if name not in APPROXIMATE or "\u0301" not in text:
            assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("name", "other"),
    [("falcon_e", "llama-bpe"), ("grok-2", "qwen2"), ("minimax-m2", "gpt-4o")],
)
def test_other_names_of_a_pre_tokenizer(byte_level, name, other):
    found, wanted = (tokenizer_of({**byte_level, "tokenizer.ggml.pre": n}) for n in (name, other))
    for text in IDS["texts"]:
        ids = found.encode(text, add_special_tokens=False).ids
        assert ids == wanted.encode(text, add_special_tokens=False).ids


def test_qwen35_keeps_marks_at_their_letters(byte_level):
    """Its pattern is qwen2's but for marks, and so is the cut of texts without."""
    cuts = {}
    for name in ("qwen2", "qwen35"):
        pieces = tokenizer_of({**byte_level, "tokenizer.ggml.pre": name}).pre_tokenizer
        cuts[name] = lambda text, p=pieces: [at for _, at in p.pre_tokenize_str(text)]
    for text in IDS["texts"]:
        if not any(unicodedata.category(letter).startswith("M") for letter in text):
            assert cuts["qwen35"](text) == cuts["qwen2"](text)
    assert cuts["qwen35"]("e\u0301te\u0301 12") == [(0, 5), (5, 6), (6, 7), (7, 8)]
    assert len(cuts["qwen2"]("e\u0301te\u0301 12")) > 4


def test_the_recorded_vocabulary_tells_pre_tokenizers_apart():
    assert len({json.dumps(ids) for ids in BPE.values()}) >= 10


def test_sentencepiece_ids_are_llama_cpp_s(mistral):
    tokenizer = tokenizer_of(mistral)
    for text, ids in zip(IDS["texts"], IDS["ids"]["mistral"], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
    special = tokenizer_of(mistral, special_in_text=True)
    for text, ids in zip(IDS["texts"], IDS["ids"]["mistral, special"], strict=True):
        assert special.encode(text).ids == ids, text


def test_sentencepiece_ids_are_the_file_s_own(mistral, sentencepiece_file):
    found, wanted = tokenizer_of(mistral), convert_tokenizer(sentencepiece_file)
    wanted.encode_special_tokens = True
    for text in IDS["texts"]:
        ids = wanted.encode(text, add_special_tokens=False).ids
        assert found.encode(text, add_special_tokens=False).ids == ids
        assert found.decode(ids) == wanted.decode(ids)


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def original():
    """A tokenizer of Qwen's kind as the `tokenizers` library trains it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(IDS["texts"] * 9, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def write_original(path, tokenizer, **options):
    writer = gguf.GGUFWriter(path, "qwen3")
    vocabulary = tokenizer.get_vocab()
    names = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = {"<|endoftext|>": 3, "<|im_start|>": 3, "<|im_end|>": 3, "<think>": 4}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(names)
    writer.add_token_types([kinds.get(name, 1) for name in names])
    writer.add_token_merges(
        [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    )
    writer.add_bos_token_id(vocabulary["<|endoftext|>"])
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    writer.add_pad_token_id(vocabulary["<|endoftext|>"])
    for name, value in options.items():
        getattr(writer, f"add_{name}")(value)
    finish(writer)
    return GgufFile(path).metadata


@pytest.mark.parametrize("special_in_text", [False, True])
def test_ids_are_those_of_the_original(tmp_path, original, special_in_text):
    found = tokenizer_of(
        write_original(tmp_path / "x.gguf", original), special_in_text=special_in_text
    )
    original.encode_special_tokens = not special_in_text
    assert found.get_vocab() == original.get_vocab()
    for text in (*IDS["texts"], "a<think>b</think> <|im_end|>"):
        wanted = original.encode(text, add_special_tokens=False)
        encoded = found.encode(text, add_special_tokens=False)
        assert encoded.ids == wanted.ids
        assert encoded.offsets == wanted.offsets
        assert found.decode(wanted.ids) == original.decode(wanted.ids)


def test_special_tokens_and_the_chat_template(tmp_path, original):
    metadata = write_original(
        tmp_path / "x.gguf",
        original,
        add_bos_token=True,
        add_eos_token=True,
        chat_template="{{ x }}",
    )
    files = tokenizer_files(metadata)
    assert files["chat_template.jinja"] == b"{{ x }}"
    assert json.loads(files["tokenizer_config.json"]) == {
        "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "add_bos_token": True, "add_eos_token": True,
    }  # fmt: skip
    tokenizer = tokenizer_of(metadata)
    start, end = map(tokenizer.token_to_id, ("<|endoftext|>", "<|im_end|>"))
    plain = tokenizer.encode("a b", add_special_tokens=False).ids
    assert tokenizer.encode("a b").ids == [start, *plain, end]
    pair = tokenizer.encode("a b", "a b").ids
    assert pair == [start, *plain, end] * 2


def test_without_options_nothing_is_added(tmp_path, original):
    files = tokenizer_files(write_original(tmp_path / "x.gguf", original))
    assert "chat_template.jinja" not in files
    assert json.loads(files["tokenizer_config.json"])["add_bos_token"] is False
    assert json.loads(files["tokenizer.json"])["post_processor"] is None


@pytest.mark.parametrize(("name", "added"), [("llama-bpe", True), ("qwen2", False)])
def test_a_pre_tokenizer_s_own_start(byte_level, name, added):
    metadata = {**byte_level, "tokenizer.ggml.pre": name}
    files = tokenizer_files(metadata)
    assert json.loads(files["tokenizer_config.json"])["add_bos_token"] is added
    ids = tokenizer_of(metadata).encode("a").ids
    assert (ids[0] == metadata["tokenizer.ggml.bos_token_id"]) is added
    off = {**metadata, "tokenizer.ggml.add_bos_token": False}
    assert tokenizer_of(off).encode("a").ids == ids[added:]


def test_a_file_without_a_pre_tokenizer_is_cut_as_llama_cpp_does(byte_level):
    metadata = {k: v for k, v in byte_level.items() if k != "tokenizer.ggml.pre"}
    with pytest.warns(UserWarning, match=r"names no pre-tokenizer .* taking 'default'"):
        tokenizer = tokenizer_of(metadata)
    for text, ids in zip(IDS["texts"], BPE["default"], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids
    # but for Llama 3's vocabulary, which BitNet-2B-4T has
    names = [*byte_level["tokenizer.ggml.tokens"][:-1], "<|begin_of_text|>"]
    with pytest.warns(UserWarning, match="taking 'llama-bpe'"):
        tokenizer = tokenizer_of({**metadata, "tokenizer.ggml.tokens": names})
    for text, ids in zip(IDS["texts"], BPE["llama-bpe"], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids


@pytest.mark.parametrize(("prefix", "tokens"), [(None, ["\u2581ab"]), (False, ["ab"])])
def test_a_space_before_a_text(prefix, tokens):
    names = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581ab"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.scores": -np.arange(len(names), dtype=np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3, 1, 1, 1, 1, 1], np.int32),
    }
    if prefix is not None:
        metadata["tokenizer.ggml.add_space_prefix"] = prefix
    assert tokenizer_of(metadata).encode("ab", add_special_tokens=False).tokens == tokens


def test_what_llama_cpp_writes_beside_sentencepiece():
    """Its converter names a pre-tokenizer there, too; older files have merges that nobody reads."""
    names = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581ab"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.scores": -np.arange(len(names), dtype=np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3, 1, 1, 1, 1, 1], np.int32),
    }
    plain = tokenizer_of(metadata).to_str()
    more = {"tokenizer.ggml.pre": "default", "tokenizer.ggml.merges": ["a b"]}
    assert tokenizer_of({**metadata, **more}).to_str() == plain
    with pytest.raises(FormatError, match="pre is 'qwen2' beside SentencePiece"):
        tokenizer_of({**metadata, "tokenizer.ggml.pre": "qwen2"})


def test_a_model_without_a_tokenizer_has_no_files():
    assert tokenizer_files({}) == {}
    assert tokenizer_files({"tokenizer.ggml.model": "no_vocab"}) == {}


PRE = "tokenizer.ggml."
REFUSED = {
    "kind": ({"model": "bert"}, "a tokenizer of the kind 'bert'; it must be 'gpt2' or 'llama'"),
    "pre": ({"pre": "kimi-k2"}, "the pre-tokenizer 'kimi-k2' is not known"),
    "pre number": ({"pre": 3}, "pre is 3; it must be a string"),
    "no tokens": ({"tokens": None}, "tokens must be a list of tokens"),
    "few types": ({"token_type": np.ones(3, np.int32)}, "903 tokens and 3 types"),
    "types": ({"token_type": np.full(903, 9, np.int32)}, "has the unknown type 9"),
    "float types": ({"token_type": np.ones(903, np.float32)}, "a list of whole numbers"),
    "no merges": ({"merges": None}, "merges must be a list of pairs"),
    "merges": ({"merges": ["a qqqq"]}, "the merge 'a qqqq' is not of tokens"),
    "merge": ({"merges": ["ab"]}, "the merge 'ab' is not of tokens"),
    "bos": ({"bos_token_id": 903}, "bos_token_id is 903; the vocabulary has 903"),
    "no bos": ({"bos_token_id": None, "add_bos_token": True}, "but the file names no such token"),
    "prefix": ({"add_space_prefix": True}, "add_space_prefix is true beside byte-level BPE"),
    "spaces": ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is true, which is"),
    "lower": ({"normalizer.lowercase": True}, "unknown option .* of the tokenizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_by_name(byte_level, name):
    changes, message = REFUSED[name]
    metadata = {**byte_level, **{PRE + key: value for key, value in changes.items()}}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises(FormatError, match=message) as caught:
        tokenizer_files(metadata, "some.gguf")
    assert "some.gguf" in str(caught.value)


def test_tokens_that_are_the_same_are_refused(byte_level):
    names = list(byte_level["tokenizer.ggml.tokens"])
    names[7] = names[3]
    with pytest.raises(FormatError, match="tokens 3 and 7 are both"):
        tokenizer_files({**byte_level, "tokenizer.ggml.tokens": names})


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, "32000 tokens, but none scores"),
        (np.zeros(3, np.float32), "32000 tokens, but 3 scores"),
        (np.full(32000, np.nan, np.float32), "scores must be finite"),
    ],
)
def test_bad_scores_are_refused(mistral, scores, message):
    metadata = {k: v for k, v in mistral.items() if k != "tokenizer.ggml.scores"}
    if scores is not None:
        metadata["tokenizer.ggml.scores"] = scores
    with pytest.raises(FormatError, match=message):
        tokenizer_files(metadata)


WORDS = ("a", "b", "ab", "<s>", "</s>", "\u2581", "<0x0A>", "", "\u0120", "\x00", "\n")


@given(
    tokens=st.lists(st.sampled_from(WORDS), max_size=8, unique=True),
    model=st.sampled_from(["gpt2", "llama"]),
    kinds=st.lists(st.integers(-1, 7), max_size=8),
    merges=st.lists(st.sampled_from(["a b", " ", "", "a  b", "b", "\u2581 a"]), max_size=3),
    options=st.dictionaries(
        st.sampled_from(["add_bos_token", "bos_token_id", "eos_token_id", "pre", "x"]),
        st.one_of(st.integers(-1, 9), st.booleans(), st.just("qwen2"), st.text(max_size=2)),
        max_size=3,
    ),
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore:.*names no pre-tokenizer")
def test_any_vocabulary_is_read_or_refused_in_one_line(tokens, model, kinds, merges, options):
    metadata = {
        f"{PRE}model": model,
        f"{PRE}tokens": tokens,
        f"{PRE}token_type": np.array(kinds[: len(tokens)], np.int32),
        f"{PRE}scores": np.arange(len(tokens), dtype=np.float32),
        f"{PRE}merges": merges,
        **{PRE + key: value for key, value in options.items()},
    }
    try:
        lines = [str(len(tokenizer_files(metadata)))]
    except FormatError as error:
        lines = str(error).splitlines()
    assert len(lines) == 1
