"""tokenizer.json: loaded, or refused in one line that says what to do."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import write_tokenizer

from nomatmul.formats.tokenizer import load_tokenizer


def test_directory_or_file(tmp_path):
    path = write_tokenizer(tmp_path)
    for where in (tmp_path, path):
        tokenizer = load_tokenizer(where, vocab_size=40)
        assert tokenizer.encode("w3 w1 nothing").ids == [3, 1, 0]


def test_padding_and_truncation_of_the_file_are_off(tmp_path):
    """Published files often have both; they cut prompts and texts that are scored, unseen."""
    from tokenizers import Tokenizer

    path = write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=6, pad_id=5, pad_token="w5")
    tokenizer.save(str(path))
    assert Tokenizer.from_file(str(path)).encode("w1 w2 w3 w4").ids == [1, 2, 3, 5, 5, 5]
    assert load_tokenizer(tmp_path).encode("w1 w2 w3 w4").ids == [1, 2, 3, 4]
    assert load_tokenizer(tmp_path).encode("w1").ids == [1]


def test_more_tokens_than_the_model_has(tmp_path):
    write_tokenizer(tmp_path)
    message = r"token ids up to 39, but the model's vocabulary is 39"
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path, vocab_size=39)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; copy the model's"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"SentencePiece .* `nomatmul pack` converts it"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"cannot read .*none\.json"):
        load_tokenizer(tmp_path / "none.json")


@given(data=st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_a_value_error_or_harmless(tmp_path, data):
    original = bytearray(write_tokenizer(tmp_path).read_bytes())
    at = data.draw(st.integers(0, len(original) - 1))
    if data.draw(st.booleans()):
        original[at] = data.draw(st.integers(0, 255))
    else:
        del original[at:]
    (tmp_path / "tokenizer.json").write_bytes(original)
    try:
        load_tokenizer(tmp_path)
    except ValueError as error:
        lines = str(error).splitlines()
    else:
        lines = ["loaded"]
    assert len(lines) == 1
