"""Tokenizer, token shards and streams: lossless, equal for any number of workers, resumable."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from nomatmul.formats.special_tokens import CHAT_TOKENS, END_OF_TEXT, special_ids
from nomatmul.train import chunks, shards
from nomatmul.train.documents import find_sources
from nomatmul.train.shards import build_shards, read_index
from nomatmul.train.tokenizer import (
    fingerprint,
    load_tokenizer,
    train_tokenizer,
)
from nomatmul.train.tokens import join_streams, open_stream


@pytest.fixture(scope="module")
def tokenizer(text_file: Path) -> Tokenizer:
    return train_tokenizer(find_sources([str(text_file)]), 300)


@pytest.fixture(scope="module")
def documents_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("documents") / "d.jsonl"
    rows = [{"text": f"document {n} about the old bridge.\n" * (n % 5)} for n in range(60)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def ids_of(directory: Path) -> np.ndarray:
    stream = open_stream(directory)
    return stream.read(0, len(stream))


def test_the_trained_tokenizer_is_the_same_every_time(
    text_file: Path, tokenizer: Tokenizer
) -> None:
    again = train_tokenizer(find_sources([str(text_file)]), 300)
    assert fingerprint(again) == fingerprint(tokenizer)
    assert tokenizer.get_vocab_size() <= 300
    special = special_ids(tokenizer)
    assert (special.bos, special.eos, special.pad) == (0, 0, 1)


def test_a_tokenizer_for_conversations_has_their_tokens_behind_its_own(text_file: Path) -> None:
    made = train_tokenizer(find_sources([str(text_file)]), 300, CHAT_TOKENS)
    assert [made.token_to_id(name) for name in CHAT_TOKENS] == [2, 3, 4, 5]
    assert not {2, 3, 4, 5} & set(made.encode("".join(CHAT_TOKENS), add_special_tokens=False).ids)
    with pytest.raises(ValueError, match="vocab_size 261 is below 262"):
        train_tokenizer(find_sources([str(text_file)]), 261, CHAT_TOKENS)


@given(text=st.text(max_size=80))
@settings(max_examples=60)
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_digits_are_single_and_special_words_are_text(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("2024", add_special_tokens=False).ids) == 4
    ids = tokenizer.encode(END_OF_TEXT, add_special_tokens=False).ids
    assert 0 not in ids
    assert tokenizer.decode(ids) == END_OF_TEXT


def test_a_vocabulary_without_room_for_bytes_is_refused(text_file: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size 200 is below 258"):
        train_tokenizer(find_sources([str(text_file)]), 200)


def test_documents_end_with_the_end_token(
    tmp_path: Path, tokenizer: Tokenizer, documents_file: Path
) -> None:
    build_shards(find_sources([str(documents_file)]), tokenizer, tmp_path / "t", workers=1)
    ids = ids_of(tmp_path / "t")
    texts = [json.loads(line)["text"] for line in documents_file.read_text().splitlines()]
    wanted: list[int] = []
    for text in filter(None, texts):
        wanted += [*tokenizer.encode(text, add_special_tokens=False).ids, 0]
    assert ids.tolist() == wanted
    index = read_index(tmp_path / "t")
    assert index["documents"] == sum(bool(text) for text in texts)
    assert index["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert index["dtype"] == "uint16"


def test_a_start_token_is_used_when_the_tokenizer_has_one(
    tmp_path: Path, tokenizer: Tokenizer, documents_file: Path
) -> None:
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_special_tokens(["<s>", "</s>"])
    special = special_ids(other)
    assert special.bos == other.token_to_id("<s>")
    build_shards(find_sources([str(documents_file)]), other, tmp_path / "t", workers=1)
    ids = ids_of(tmp_path / "t")
    assert ids[0] == special.bos
    assert np.count_nonzero(ids == special.bos) == np.count_nonzero(ids == special.eos) == 48


def test_workers_and_repeats_do_not_change_a_byte(
    tmp_path: Path, tokenizer: Tokenizer, documents_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHUNK_CHARACTERS", 600)
    sources = find_sources([str(documents_file), str(documents_file)])
    build_shards(sources, tokenizer, tmp_path / "one", workers=1)
    build_shards(sources, tokenizer, tmp_path / "two", workers=2)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert len([name for name in names if name.endswith(".bin")]) > 6
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_killed_build_keeps_its_finished_shards(
    tmp_path: Path, tokenizer: Tokenizer, documents_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHUNK_CHARACTERS", 600)
    sources = find_sources([str(documents_file)])
    whole = build_shards(sources, tokenizer, tmp_path / "whole", workers=1)
    encode, calls = chunks._encode_chunk, []

    def dies(*arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(chunks, "_encode_chunk", dies)
    with pytest.raises(KeyboardInterrupt):
        build_shards(sources, tokenizer, tmp_path / "cut", workers=1)
    assert not shards.is_token_directory(tmp_path / "cut")
    count = len(read_index(whole)["shards"])
    build_shards(sources, tokenizer, tmp_path / "cut", workers=1)
    assert len(calls) == 4 + count - 3
    assert (ids_of(tmp_path / "cut") == ids_of(whole)).all()
    build_shards(sources, tokenizer, tmp_path / "cut", workers=1)
    assert len(calls) == 4 + count - 3  # nothing to do


def test_changed_text_is_encoded_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one old bridge")
    build_shards(find_sources([str(path)]), tokenizer, tmp_path / "t", workers=1)
    before = ids_of(tmp_path / "t").tolist()
    os.utime(path, (1, 1))  # a new time alone is no change
    stamp = (tmp_path / "t" / "index.json").stat().st_mtime_ns
    build_shards(find_sources([str(path)]), tokenizer, tmp_path / "t", workers=1)
    assert (tmp_path / "t" / "index.json").stat().st_mtime_ns == stamp
    path.write_text("two old bridges")
    build_shards(find_sources([str(path)]), tokenizer, tmp_path / "t", workers=1)
    assert ids_of(tmp_path / "t").tolist() != before


def test_damaged_shards_are_found(
    tmp_path: Path, tokenizer: Tokenizer, documents_file: Path
) -> None:
    build_shards(find_sources([str(documents_file)]), tokenizer, tmp_path / "t", workers=1)
    shard = tmp_path / "t" / "shard-0000-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"shard-0000-00000.bin has \d+ bytes, its index says"):
        open_stream(tmp_path / "t")
    (tmp_path / "t" / "index.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="is no index of token shards"):
        open_stream(tmp_path / "t")


def test_windows_cross_shards_and_streams(
    tmp_path: Path, tokenizer: Tokenizer, documents_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHUNK_CHARACTERS", 600)
    build_shards(find_sources([str(documents_file)]), tokenizer, tmp_path / "t", workers=1)
    stream = open_stream(tmp_path / "t")
    both = join_streams([stream, stream])
    flat = np.concatenate([stream.read(0, len(stream))] * 2)
    starts = np.asarray([0, 1, len(stream) - 5, len(both) - 500])
    got = both.windows(starts, 500)
    assert all((row == flat[s : s + 500]).all() for row, s in zip(got, starts, strict=True))
    part = both.part(100, 400)
    assert (part.read(3, 50) == flat[103:150]).all()
    assert (part.part(7, 20).read(0, 13) == flat[107:120]).all()
    assert both.text_bytes == 2 * (stream.text_bytes or 0)


def test_bytes_of_text_are_exact(
    tmp_path: Path, tokenizer: Tokenizer, documents_file: Path
) -> None:
    build_shards(find_sources([str(documents_file)]), tokenizer, tmp_path / "t", workers=1)
    stream = open_stream(tmp_path / "t")
    whole = stream.bytes_of(0, len(stream))
    cut = int(np.flatnonzero(stream.read(0, len(stream)) == 0)[9]) + 1
    assert stream.bytes_of(0, cut) + stream.bytes_of(cut, len(stream)) == whole


def test_foreign_tokenizer_files(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\x0a\x0e\x00 not json")
    with pytest.raises(ValueError, match=r"is no tokenizer.json \(a SentencePiece model"):
        load_tokenizer(path)
    with pytest.raises(ValueError, match=r"cannot read .*absent\.json"):
        load_tokenizer(tmp_path / "absent.json")
