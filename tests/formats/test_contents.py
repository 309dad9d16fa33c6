"""What a file is, is told from its bytes: JSON in every layout, other encodings, other formats."""

from __future__ import annotations

import gzip
import io
import json

import pytest

from nomatmul.formats.files.contents import HEAD_BYTES, check_text, json_layout, read_values
from nomatmul.formats.files.texts import read_text

ROWS = [{"text": f'No. {i}: "{{" and [", \u00e9\n' * (1 + i % 3)} for i in range(200)]
LAYOUTS = {
    "lines": "".join(json.dumps(row) + "\n" for row in ROWS),
    "array": json.dumps(ROWS),
    "indented array": json.dumps(ROWS, indent=2),
    "indented objects": "\n".join(json.dumps(row, indent=1) for row in ROWS) + "\n",
    "long object": json.dumps({"text": "word " * HEAD_BYTES}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_json_are_known_and_read(name):
    text = LAYOUTS[name]
    head = text[:HEAD_BYTES]
    layout = json_layout(head, whole=len(text) <= HEAD_BYTES)
    assert layout == ("lines" if name == "lines" else "values")
    values = list(read_values(io.StringIO(text)))
    assert values == (ROWS if name != "long object" else [json.loads(text)])


@pytest.mark.parametrize(
    "text",
    [
        "[1] A footnote comes first.\n[2] And a second.",
        "{braces} in prose\nmore",
        '{"a": 1}\nis how an object is written.\nThat was an example.\nNo more.',
        "[Enter GHOST]\nHAMLET: Speak.\n",
        '"Yes," he said.\n',
        "",
        "[" * 5000,
    ],
)
def test_prose_is_no_json(text):
    assert json_layout(text, whole=True) is None


def test_damaged_json_is_json_still():
    cut = LAYOUTS["indented array"][:-40]
    assert json_layout(cut, whole=True) == "values"
    values = read_values(io.StringIO(cut))
    with pytest.raises(ValueError, match=r"not JSON|not closed"):
        for _ in values:
            pass
    broken = LAYOUTS["lines"].replace('{"text": "No. 3:', '{"text": No. 3:')
    assert json_layout(broken, whole=True) == "lines"


FOREIGN = {
    "UTF-16, not UTF-8 text: .*iconv -f UTF-16 ": "\ufeffthe river".encode("utf-16-le"),
    "UTF-16LE, not UTF-8 text": "the river\n".encode("utf-16-le"),
    "UTF-16BE, not UTF-8 text": "the river\n".encode("utf-16-be"),
    "UTF-32, not UTF-8 text": "the river".encode("utf-32"),
    "a parquet file": b"PAR1\x15\x04",
    "a zip archive": b"PK\x03\x04\x14\x00",
    "a PDF document": b"%PDF-1.7\n",
    "compressed twice": gzip.compress(gzip.compress(b"text")),
    "a tar archive": b"name".ljust(257, b"\0") + b"ustar\0",
    "binary data": bytes(range(1, 100)) + b"\0",
    r"not UTF-8 text \(byte 3\)": b"caf\xe9 and more words",
}


@pytest.mark.parametrize("words", FOREIGN)
def test_what_is_no_text_is_named(tmp_path, words):
    path = tmp_path / "a.txt"
    path.write_bytes(FOREIGN[words])
    with pytest.raises(ValueError, match=rf"a\.txt is {words}") as info:
        read_text(path)
    assert "\n" not in str(info.value)


def test_json_is_not_read_as_plain_text(tmp_path):
    path = tmp_path / "a.txt"
    for name in ("lines", "indented array"):
        path.write_bytes(gzip.compress(LAYOUTS[name].encode()))
        for limit in (None, 100, 1000):
            with pytest.raises(ValueError, match=r"a\.txt holds JSON.*jq -r \.text"):
                read_text(path, limit)


def test_a_device_is_refused():
    for name in ("/dev/zero", "/dev/null"):
        with pytest.raises(ValueError, match=f"{name} is a device, not a file of text"):
            read_text(name)


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfthe \xc3\xa9")
    assert read_text(path) == "the \u00e9"


def test_a_character_cut_at_the_end_of_the_head_is_no_fault():
    text = "\u6f22" * 50
    for cut in range(100, 104):
        assert text.startswith(check_text(text.encode()[:cut], "a", whole=False))
    with pytest.raises(ValueError, match="not UTF-8 text"):
        check_text(text.encode()[:100], "a", whole=True)
