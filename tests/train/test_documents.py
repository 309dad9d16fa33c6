"""Reading text: every kind of source, lossless pieces, errors that name the file and row."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from nomatmul.train import documents
from nomatmul.train.documents import Source, find_sources, read_pieces


def read(path: Path, **settings: str | None) -> list[str]:
    """Whole documents of one file."""
    out, parts = [], []
    for text, ends in read_pieces(find_sources([str(path)], **settings)[0]):
        parts.append(text)
        if ends:
            out.append("".join(parts))
            parts = []
    assert not parts
    return out


def test_a_text_file_is_one_document_kept_to_the_byte(tmp_path: Path) -> None:
    text = "  first line\r\nsecond\tcafé 漢字 🙂\n\n\nend without a line break"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert read(path) == [text]


def test_document_start_cuts_a_file_in_front_of_matching_lines(tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_text("= One =\nbody\n= = no title = =\n= Two =\nbody = 2\n")
    wanted = ["= One =\nbody\n= = no title = =\n", "= Two =\nbody = 2\n"]
    assert read(path, document_start=r"^= [^=].* =$") == wanted


def test_text_before_the_first_match_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("preface\nCHAPTER 1\nx\n")
    assert read(path, document_start="^CHAPTER") == ["preface\n", "CHAPTER 1\nx\n"]


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_files(tmp_path: Path, suffix: str, compress) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(b'{"text": "one"}\n\n{"text": "two"}\n'))
    assert read(path) == ["one", "two"]


def test_zstd(tmp_path: Path) -> None:
    import zstandard

    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"packed text"))
    assert read(path) == ["packed text"]


def test_jsonl_field_and_odd_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"body": "one"}, {"body": ""}, {"body": "two \ud800"}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert read(path, text_field="body") == ["one", "two ?"]
    with pytest.raises(
        ValueError, match=r"a.jsonl, row 1: no text under 'text' and no 'messages' \(it has: body\)"
    ):
        read(path)
    path.write_text('{"text": "fine"}\nnot json\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2: not JSON"):
        read(path)


def test_saved_data_set_and_parquet(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_dict({"text": ["one", "two"]})
    data.save_to_disk(str(tmp_path / "saved"))
    data.to_parquet(str(tmp_path / "a.parquet"))
    assert read(tmp_path / "saved") == ["one", "two"]
    assert read(tmp_path / "a.parquet") == ["one", "two"]


@pytest.mark.parametrize("name", ["a[1].parquet", "a*.parquet", "what?.parquet"])
def test_a_parquet_files_name_is_no_pattern(tmp_path: Path, name: str) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["mine"]}).to_parquet(str(tmp_path / name))
    for other in ("a1.parquet", "aside.parquet", "whatx.parquet"):
        datasets.Dataset.from_dict({"text": ["another"]}).to_parquet(str(tmp_path / other))
    assert read(tmp_path / name) == ["mine"]


def test_parquet_rows_are_counted_and_damage_is_named(tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "a.parquet"
    rows = {"text": [*["long"] * 2000, None], "id": list(range(2001))}
    datasets.Dataset.from_dict(rows).to_parquet(str(path))
    with pytest.raises(ValueError, match=r"a\.parquet, row 2001: no text .*it has: text, id"):
        read(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"a\.parquet: damaged parquet file"):
        read(path)


def test_long_documents_come_in_pieces_that_join_to_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", 50)
    for text in ("word " * 100, "line of text\n\n" * 40, "x" * 333, "a\n" * 200):
        path = tmp_path / "a.txt"
        path.write_text(text)
        pieces = list(read_pieces(Source(str(path), "text")))
        assert "".join(piece for piece, _ in pieces) == text
        assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
        assert max(len(piece) for piece, _ in pieces) <= 100
        assert len(pieces) > 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b"good \xff bad", "a.txt is not UTF-8 text"),
        ("a.txt.gz", gzip.compress(b"some text " * 50, mtime=0)[:-9], "a.txt.gz"),
        ("a.txt.bz2", bz2.compress(b"some text " * 50)[:-9], "a.txt.bz2"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_missing_file_directory_and_expression(tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent.txt"):
        find_sources([str(tmp_path / "absent.txt")])
    with pytest.raises(ValueError, match="is a directory, but no data set"):
        find_sources([str(tmp_path)])
    with pytest.raises(ValueError, match="is no regular expression"):
        find_sources([str(text_file)], document_start="(")
    with pytest.raises(ValueError, match="no data"):
        find_sources([])
