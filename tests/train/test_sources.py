"""Sources by their contents, and pipes: every byte is used once, or the name is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from test_documents import read

from nomatmul.train import chunks, shards
from nomatmul.train.documents import find_sources, read_pieces
from nomatmul.train.inputs import DataArgs, check_inputs
from nomatmul.train.shards import build_shards, read_index
from nomatmul.train.tokenizer import train_tokenizer

TEXTS = [f"Boat {i} waits." for i in range(40)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "A.JSONL", "A.Json", "a.ndjson", "a.txt", "a", "a.JSONL.GZ"]
)
@pytest.mark.parametrize("layout", ["lines", "array", "indented"])
def test_json_is_rows_whatever_its_name(tmp_path: Path, name: str, layout: str) -> None:
    rows = [{"text": text} for text in TEXTS]
    text = {"lines": LINES, "array": json.dumps(rows), "indented": json.dumps(rows, indent=2)}
    data = b"\xef\xbb\xbf" + text[layout].encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("GZ") else data)
    assert read(tmp_path / name) == TEXTS


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "zstd"])
def test_compressed_rows_need_no_ending(tmp_path: Path, kind: str) -> None:
    import zstandard

    packers = {
        "gzip": gzip.compress,
        "bzip2": bz2.compress,
        "xz": lzma.compress,
        "zstd": zstandard.compress,
    }
    (tmp_path / "corpus").write_bytes(packers[kind](LINES.encode()))
    assert read(tmp_path / "corpus") == TEXTS


@pytest.mark.parametrize(
    "text",
    [
        "{Enter the harbour master}\nWho goes there?\n",
        "[1] Tides are given in metres.\n[2] Depths, too.\n",
        '{"boat": 3}\nis how the log writes a boat.\nThe next page\nsays why.\n',
        "{{Infobox ship\n| name = Gull\n}}\nA ship.\n",
    ],
)
def test_prose_with_braces_is_one_text(tmp_path: Path, text: str) -> None:
    for name, data in (("a.txt", text.encode()), ("a.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name) == [text]


def test_an_object_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"id": 1, "text": "one"}, indent=2))
    assert read(tmp_path / "a.json") == ["one"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "a.json",
            b'{"rows": [{"text": "x"}]}',
            r"row 1: no text under 'text' and no 'messages' \(it has: rows\)",
        ),
        (
            "a.json",
            b'["one", "two"]',
            r"row 1: no text under 'text' and no 'messages' \(it has: str\)",
        ),
        ("a.json", b'[{"text": "x"},\n {"text": ]', "row 2: not JSON"),
        ("a.jsonl", b"plain words\n", "row 1: not JSON"),
        ("a.json", b"plain words\n", "row 1: not JSON"),
        ("a.CSV", b"id,text\n1,x\n", "a.CSV is a table by its name: .*JSON lines"),
        ("a.tsv.gz", gzip.compress(b"id\ttext\n", mtime=0), "is a table by its name"),
        ("a.parquet", b"text\n", "a.parquet is no parquet file"),
        ("a.txt", "words \u00e9".encode("utf-16"), "a.txt is UTF-16"),
        ("a.txt", b"words \0 and", "a.txt is binary data"),
        ("a.txt", b"caf\xe9 and more", "a.txt is not UTF-8 text"),
        ("a.gz", gzip.compress(b"PAR1 and more", mtime=0), "a compressed parquet file"),
        ("a.gz", gzip.compress(b"", mtime=0), "a.gz is empty"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as info:
        read(tmp_path / name)
    assert "\n" not in str(info.value)


def test_a_marker_line_can_be_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n<|endoftext|>\nthree\n")
    start = r"^<\|endoftext\|>$"
    assert read(path, document_start=start)[1] == "<|endoftext|>\ntwo\n"
    kept, dropped = (
        find_sources([str(path)], document_start=start, drop_start=drop)[0]
        for drop in (False, True)
    )
    assert [text for text, _ in read_pieces(dropped)] == ["one\n", "two\n", "three\n"]
    assert kept.settings() != dropped.settings()  # tokens of one are not taken for the other's
    with pytest.raises(ValueError, match="only where one is named"):
        find_sources([str(path)], drop_start=True)


@pytest.fixture
def pipe() -> Callable[[bytes], str]:
    """A function that makes the name of a pipe through which the bytes come."""
    opened, threads = [], []

    def make(data: bytes) -> str:
        reader, writer = os.pipe()
        opened.append(reader)
        threads.append(threading.Thread(target=lambda: os.fdopen(writer, "wb").write(data)))
        threads[-1].start()
        return f"/dev/fd/{reader}"

    yield make
    for thread in threads:
        thread.join()
    for reader in opened:
        os.close(reader)


TEXT = "the river runs under an old stone bridge\n" * 5000


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_pipe_loses_nothing(pipe: Callable[[bytes], str], tmp_path: Path, pack: Callable) -> None:
    data = pack(TEXT.encode())  # once: gzip writes the time
    source = find_sources([pipe(data)])[0]
    for _ in range(2):  # it can be read as often as a file
        assert "".join(text for text, _ in read_pieces(source)) == TEXT
    tokenizer = train_tokenizer([source], 300)
    index = read_index(build_shards([source], tokenizer, tmp_path / "t"))
    assert index["text_bytes"] == len(TEXT)
    again = find_sources([pipe(data)])
    assert shards.is_current(tmp_path / "t", again, None)
    other = find_sources([pipe(pack(TEXT.upper().encode()))])
    assert not shards.is_current(tmp_path / "t", other, None)


def test_rows_come_through_a_pipe(pipe: Callable[[bytes], str]) -> None:
    source = find_sources([pipe(LINES.encode())])[0]
    assert [text for text, _ in read_pieces(source)] == TEXTS


def test_a_named_pipe_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(TEXT,))
    writer.start()
    assert "".join(t for t, _ in read_pieces(find_sources([str(path)])[0])) == TEXT
    writer.join()
    (tmp_path / "text").write_text(TEXT)
    with open(tmp_path / "text") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert "".join(t for t, _ in read_pieces(find_sources(["-"])[0])) == TEXT


def test_pipes_that_cannot_be_read_are_refused(
    pipe: Callable[[bytes], str], config, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="/dev/zero is a device"):
        find_sources(["/dev/zero"])
    name = pipe(b"")
    with pytest.raises(ValueError, match=f"{name} is empty"):
        find_sources([name])
    path = tmp_path / "fifo"
    os.mkfifo(path)
    for args in (DataArgs((str(path),), (str(path),)), DataArgs(("-", "-"))):
        with pytest.raises(ValueError, match="is named twice"):
            check_inputs(config, args)


def test_workers_are_no_more_than_usable_cpus(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = find_sources([str(text_file)])
    tokenizer = train_tokenizer(sources, 300)
    asked = []

    def pool(workers: int, *_: object) -> None:
        asked.append(workers)

    monkeypatch.setattr(chunks, "_pool", pool)
    monkeypatch.setattr(shards, "CHUNK_CHARACTERS", 2000)  # many chunks of a small text
    for usable in (1, 3):
        monkeypatch.setattr(chunks, "usable_cpus", lambda usable=usable: usable)
        build_shards(sources, tokenizer, tmp_path / str(usable))
    monkeypatch.setattr(shards, "CHUNK_CHARACTERS", text_file.stat().st_size * 3)
    monkeypatch.setattr(chunks, "usable_cpus", lambda: 64)
    build_shards(sources, tokenizer, tmp_path / "few")
    assert asked == [3, 3]  # none for one CPU; no more than the text has chunks
