"""A comparison reads its text as training does: JSON by its contents, every byte of a pipe."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from train_jobs import make_text, tiny_config

from nomatmul.evaluate.compare import CompareOptions, prepare_data
from nomatmul.train.shards import read_index

HELD_OUT = [f"The mast of ship {i} is down." for i in range(30)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text(make_text(900))
    return path


def prepare(out: Path, data: Path, valid: Path) -> tuple[dict, dict]:
    """The indexes of the training and of the held-out tokens."""
    options = CompareOptions(tiny_config(), (str(data),), out, 100, (str(valid),))
    train, held_out = prepare_data(options, lambda _: None)
    return read_index(Path(train[0])), read_index(Path(held_out[0]))


def test_rows_and_pipes_are_read_whole(tmp_path: Path, text: Path) -> None:
    valid, pipe = tmp_path / "held_out.txt", tmp_path / "pipe"
    valid.write_text(json.dumps([{"text": row} for row in HELD_OUT], indent=1))
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(text.read_bytes(),))
    writer.start()
    train, held_out = prepare(tmp_path / "out", pipe, valid)
    writer.join()
    assert train["text_bytes"] == text.stat().st_size
    assert held_out["documents"] == len(HELD_OUT)
    assert held_out["text_bytes"] == sum(map(len, HELD_OUT))


@pytest.mark.parametrize("role", ["data", "valid"])
def test_what_is_no_text_is_refused_before_anything_is_written(
    tmp_path: Path, text: Path, role: str
) -> None:
    wide = tmp_path / "wide.txt"
    wide.write_bytes("The mast is down.\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"wide\.txt is UTF-16, not UTF-8 text"):
        prepare(tmp_path / "out", **({"data": text, "valid": text} | {role: wide}))
    assert not (tmp_path / "out").exists()


def test_one_pipe_is_not_both_texts(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="pipe is named twice"):
        prepare(tmp_path / "out", pipe, pipe)
    assert not (tmp_path / "out").exists()
