"""`--file` has one text a line, and only line feeds end a line."""

from __future__ import annotations

import io
import json
import os
import threading

import pytest

from nomatmul.cli.encoding import read_texts
from nomatmul.cli.sampling import checked_text

# str.splitlines cuts at all of these
INSIDE = "a\u2028b\u2029c\x0bd\x0ce\x1cf\x1dg\x1eh\x85i"


@pytest.mark.parametrize("way", ["file", "stdin"])
def test_a_line_is_one_text(tmp_path, monkeypatch, way):
    content = f"\ufefffirst\r\n{INSIDE}\n\n  \nlast"
    expected = ["zeroth", "first", INSIDE, "last"]
    if way == "file":
        (tmp_path / "texts.txt").write_bytes(content.encode())
        assert read_texts(("zeroth",), str(tmp_path / "texts.txt")) == expected
    else:
        monkeypatch.setattr("sys.stdin", io.StringIO(content))
        assert read_texts(("zeroth",), "-") == expected


def test_texts_come_through_pipes(run, packed, text, tmp_path):
    """A named pipe gives every byte once, to `eval` and to `--file`."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def through(read):
        writer = threading.Thread(target=pipe.write_bytes, args=(text.read_bytes(),))
        writer.start()
        found = read()
        writer.join()
        return found

    scores = [
        json.loads(answer.out)
        for answer in (
            run("eval", "--model", packed, "--text", text, "--json"),
            through(lambda: run("eval", "--model", packed, "--text", pipe, "--json")),
        )
    ]
    assert scores[0]["tokens"] == scores[1]["tokens"] == 59
    assert scores[0]["loss"] == scores[1]["loss"]
    assert through(lambda: read_texts((), str(pipe))) == [text.read_text()]


@pytest.mark.parametrize("command", ["eval --text", "pack --check-text"])
def test_a_file_that_is_no_plain_text_is_refused(run, packed, training, tmp_path, command):
    path = tmp_path / "rows.txt"
    path.write_text('{"text": "w1 w2 w3"}\n' * 3)
    verb, option = command.split()
    model = ("--model", packed) if verb == "eval" else (training, tmp_path / "new")
    done = run(verb, *model, option, path)
    assert done.status == 1
    assert "rows.txt holds JSON, not plain text" in done.err
    assert not (tmp_path / "new").exists()


def test_a_prompt_is_utf_8_whatever_the_locale_says():
    """With an ASCII locale and Python's UTF-8 mode off, arguments keep their bytes apart."""
    apart = "日本語 é".encode().decode("ascii", "surrogateescape")
    assert checked_text(apart) == checked_text("日本語 é") == "日本語 é"
    for bytes_ in (b"caf\xe9", b"caf\xc3"):
        with pytest.raises(ValueError, match=r"not UTF-8 text \(character 3\)"):
            checked_text(bytes_.decode("utf-8", "surrogateescape"))
