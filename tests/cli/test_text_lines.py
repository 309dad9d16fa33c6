"""`--file` has one text a line, and only line feeds end a line."""

from __future__ import annotations

import io

import pytest

from nomatmul.cli.encoding import read_texts

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
