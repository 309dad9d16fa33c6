"""BERT's vocab.txt: the number of an entry is that of its line, whatever the entry is."""

from __future__ import annotations

import pytest

from nomatmul.train.tokenizer import WORD_PIECE_SPECIAL, load_tokenizer


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_entries_that_splitlines_would_cut(tmp_path, end):
    entries = [*WORD_PIECE_SPECIAL, "a", "\u2028", "\x85", "b", "##c"]
    (tmp_path / "vocab.txt").write_bytes("".join(entry + end for entry in entries).encode())
    tokenizer = load_tokenizer(tmp_path)
    for number, entry in enumerate(entries):
        assert tokenizer.token_to_id(entry) == number
    assert tokenizer.encode("a b bc", add_special_tokens=False).ids == [5, 8, 8, 9]
