"""The tokenizer of a model directory: from each of its files, and refused where two disagree."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path

import pytest
from sentencepiece_files import SPACE, vocabulary
from tokenizers import Tokenizer

from nomatmul.convert.source import prepare_tokenizer, with_prompt_start
from nomatmul.convert.tokenizers import convert_directory
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.errors import FormatError
from nomatmul.formats.tokenizer import load_tokenizer

CONFIG = ModelConfig(vocab_size=270, hidden_size=32, num_layers=1, intermediate_size=48)
SIZE = 265  # of the vocabulary


@pytest.fixture
def directory(tmp_path) -> Path:
    """A model directory with a SentencePiece vocabulary only."""
    (tmp_path / "tokenizer.model").write_bytes(vocabulary())
    return tmp_path


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def test_added_tokens_get_their_ids(directory):
    write(directory / "added_tokens.json", {"<|end|>": SIZE + 1, "<tool>": SIZE})
    write(directory / "special_tokens_map.json", {"eos_token": "<|end|>", "more": ["</s>"]})
    write(directory / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    write(directory / "generation_config.json", {"top_k": 3})
    with prepare_tokenizer(directory, CONFIG) as (path, kind):
        assert kind == "converted"
        assert path is not None
        ordinary, parsed = load_tokenizer(path), load_tokenizer(path, special_in_text=True)
        beside = {file.name for file in path.parent.iterdir()}
    assert {"special_tokens_map.json", "tokenizer_config.json", "generation_config.json"} < beside
    assert parsed.encode("ab<tool>ab<|end|>").ids[-1] == SIZE + 1
    assert ordinary.encode("ab<|end|>").ids[-1] != SIZE + 1  # special: no text spells it
    assert SIZE in ordinary.encode("ab<tool>ab").ids
    assert not path.exists()


@pytest.mark.parametrize(("said", "prefixed"), [(None, True), (True, True), (False, False)])
def test_whether_a_text_begins_with_a_space(directory, said, prefixed):
    """tokenizer_config.json has the last word, as in transformers."""
    write(directory / "tokenizer_config.json", {"add_prefix_space": said})
    tokenizer = convert_directory(directory)
    encoded = tokenizer.encode("ab", add_special_tokens=False)
    assert encoded.tokens[0].startswith(SPACE) == prefixed
    assert tokenizer.decode(encoded.ids) == "ab"


def test_special_tokens_may_be_named_in_the_decoder_table(directory):
    table = {str(SIZE): {"content": "<|end|>", "special": True}, "2": {"content": "</s>"}}
    write(directory / "tokenizer_config.json", {"added_tokens_decoder": table})
    added = convert_directory(directory).get_added_tokens_decoder()
    assert (added[SIZE].content, added[SIZE].special) == ("<|end|>", True)


@pytest.mark.parametrize(
    ("added", "decoder", "message"),
    [
        ({"<a>": SIZE + 1}, {}, f"'<a>' has id {SIZE + 1}, but its place in the vocabulary is"),
        ({"<a>": "x"}, {}, "the id of '<a>' is 'x', not a whole number"),
        ({"<a>": SIZE}, {str(SIZE + 1): {"content": "<a>"}}, "disagree about the id of '<a>'"),
        ({}, {"x": {"content": "<a>"}}, "added token 'x'"),
        ({f"<a{i}>": SIZE + i for i in range(6)}, {}, "ids up to 270, but the model's vocabulary"),
    ],
)
def test_added_tokens_that_cannot_be(directory, added, decoder, message):
    write(directory / "added_tokens.json", added)
    write(directory / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    with pytest.raises(FormatError, match=message), prepare_tokenizer(directory, CONFIG):
        pass


def changed(tokenizer: Tokenizer, old: str, new: str) -> bytes:
    """tokenizer.json with another name for a token and in the merges that make it."""
    return tokenizer.to_str().replace(f'"{old}"', f'"{new}"').encode()


def test_two_tokenizers_must_agree(directory):
    tokenizer = convert_directory(directory)
    plain = directory / "tokenizer.json"
    plain.write_bytes(changed(tokenizer, "</s>", "<|done|>"))  # control tokens may be renamed
    with prepare_tokenizer(directory, CONFIG) as (path, kind):
        assert (path, kind) == (plain, "copied")
    document = json.loads(tokenizer.to_str())
    ids = document["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    plain.write_text(json.dumps(document))
    message = r"two tokenizers disagree: token \d+ is 'b' in .*tokenizer.json and 'a' in .*model"
    with pytest.raises(FormatError, match=message), prepare_tokenizer(directory, CONFIG):
        pass
    (directory / "tokenizer.model").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="no SentencePiece"), prepare_tokenizer(directory, CONFIG):
        pass


def test_a_shorter_tokenizer_disagrees_as_well(directory):
    document = json.loads(convert_directory(directory).to_str())
    document["model"]["merges"] = []
    del document["model"]["vocab"]["b"]  # the last id
    write(directory / "tokenizer.json", document)
    with (
        pytest.raises(FormatError, match=r"token 264 is None in .* and 'b'"),
        prepare_tokenizer(directory, CONFIG),
    ):
        pass


def test_a_vocabulary_of_tiktoken_is_compared(tmp_path):
    from tokenizers import models

    tokenizer = Tokenizer(models.BPE({"a": 0, "Ġ": 1, "Ã¼": 2}, []))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    lines = [
        f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate([b"a", b" ", b"\xc3\xbc"])
    ]
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    with prepare_tokenizer(tmp_path, CONFIG) as (_, kind):
        assert kind == "copied"
    (tmp_path / "tokenizer.model").write_text("".join(lines[:2]) + "Yg== 2\n")
    with (
        pytest.raises(FormatError, match=r"token 2 is 'Ã¼' in .* and 'b'"),
        prepare_tokenizer(tmp_path, CONFIG),
    ):
        pass


def test_a_tokenizer_from_the_weights_file_is_taken(directory):
    """As a GGUF file holds it; what lies beside must agree."""
    tokenizer = convert_directory(directory)
    own = {"tokenizer.json": tokenizer.to_str().encode(), "chat_template.jinja": b"own"}
    (directory / "chat_template.jinja").write_text("another")
    with prepare_tokenizer(directory, CONFIG, own) as (path, kind):
        assert kind == "gguf"
        assert path is not None
        assert (path.parent / "chat_template.jinja").read_bytes() == b"own"
        assert load_tokenizer(path).encode("ab").tokens == [f"{SPACE}ab"]
    document = json.loads(own["tokenizer.json"])
    document["model"]["vocab"]["c"] = document["model"]["vocab"].pop("b")
    document["model"]["merges"] = []
    write(directory / "tokenizer.json", document)
    message = "token 264 is 'b' in the GGUF's own and 'c' in .*tokenizer.json"
    with pytest.raises(FormatError, match=message), prepare_tokenizer(directory, CONFIG, own):
        pass
    with prepare_tokenizer(directory / "model.gguf", CONFIG, own) as (_, kind):
        assert kind == "gguf"  # what lies beside a single file is none of its business


def test_a_model_without_tokenizer_is_none(tmp_path):
    with prepare_tokenizer(tmp_path, CONFIG) as found:
        assert found == (None, "none")
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    with (
        pytest.warns(UserWarning, match=r"a tokenizer in vocab\.txt, which is not read"),
        prepare_tokenizer(tmp_path, CONFIG) as found,
    ):
        assert found == (None, "none")


@pytest.mark.parametrize(
    ("said", "processor", "kind", "kept"),
    [
        (None, False, "copied", False),  # as Qwen's: a start token is named and never used
        (None, True, "copied", True),  # as Llama 3's
        (None, False, "converted", True),  # as the Llama tokenizer does by itself
        (True, False, "gguf", True),
        (False, True, "copied", False),
    ],
)
def test_a_start_token_that_no_text_begins_with(directory, said, processor, kind, kept):
    from tokenizers.processors import TemplateProcessing

    tokenizer = convert_directory(directory)
    if processor:
        start = [("<s>", 1)]
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=start)
    path = directory / "tokenizer.json"
    tokenizer.save(str(path))
    if said is not None:
        write(directory / "tokenizer_config.json", {"add_bos_token": said})
    config = dataclasses.replace(CONFIG, bos_token_id=1)
    assert with_prompt_start(config, path, kind).bos_token_id == (1 if kept else None)
    assert with_prompt_start(config, None, "none") == config
