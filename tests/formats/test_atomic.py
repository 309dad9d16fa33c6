"""Files that appear whole or not at all; and what is no file is written to, not replaced."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.files.directory import new_directory


def test_an_older_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "file"
    write_file(path, b"old")
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_file(tmp_path / "directory", b"x")
    assert sorted(os.listdir(tmp_path)) == ["directory", "file"]


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "target")
    for content in (b"first", b"second"):
        write_file(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "elsewhere" / "target").read_bytes() == content
    assert os.listdir(tmp_path / "elsewhere") == ["target"]


def test_a_pipe_is_written_to(tmp_path):
    """Renaming over it made a file of it; over /dev/null as root that breaks a machine."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    found = []
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()))
    reader.start()
    write_file(path, b"content")
    reader.join(timeout=20)
    assert found == [b"content"]
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_an_older_directory_survives_what_comes_between_the_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, say: the old one has lost its name, the new one has not got it yet."""
    place, replace = tmp_path / "model", os.replace
    place.mkdir()
    (place / "weights").write_text("old")

    def interrupted(source: Path, target: Path) -> None:
        if Path(source).name.endswith(".tmp"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), new_directory(place) as fresh:
        (fresh / "weights").touch()
    assert (place / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
