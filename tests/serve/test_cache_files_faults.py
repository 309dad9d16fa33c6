"""The state cache's directory when something is wrong: damage, locks, full disks, sudden ends."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from support.cache_models import BIG, BOTH, Open, cache_path, files_in, found, keep, recurrent

from nomatmul.engine import LanguageModel
from nomatmul.serve import write_behind
from nomatmul.serve.cache import StateCache


@BOTH
def test_damaged_files_are_dropped_with_a_line_each(make, opened: Open, caplog) -> None:
    """Bits turned, ends cut off, files of random bytes: never a crash nor a wrong logit."""
    caplog.set_level(logging.WARNING, "nomatmul.serve")
    source, random_state = opened(make()), random.Random(5)
    prompts = [[first, 2, 3, 4] for first in range(5, 11)]
    for ids in prompts:
        keep(source, ids)
    source.flush()
    source.close()
    directory = cache_path(source)
    originals = {path: path.read_bytes() for path in files_in(directory)}
    assert len(originals) == len(prompts)
    whole = 0
    for round_ in range(25):
        for path, content in originals.items():
            path.write_bytes(damaged(content, random_state))
        caplog.clear()
        cache = opened(make())
        known = [found(cache, ids) for ids in prompts]
        whole += known.count(4)
        dropped = cache.stats().dropped
        lines = [r.getMessage() for r in caplog.records if "is dropped" in r.getMessage()]
        assert len(lines) == dropped > 0, round_
        assert len(files_in(directory)) == len(originals) - dropped
        assert all("\n" not in line for line in lines)
        cache.close()
    assert whole > 0  # what was not damaged served


def damaged(content: bytes, draw: random.Random) -> bytes:
    kind = draw.randrange(5)
    if kind == 0:
        return content
    if kind == 1:
        return content[: draw.randrange(len(content))]
    if kind == 2:
        return draw.randbytes(draw.randrange(300))
    if kind == 3:
        return content + b"x"
    bits = bytearray(content)
    bits[draw.randrange(len(bits))] ^= 1 << draw.randrange(8)
    return bytes(bits)


def test_a_damaged_name_is_dropped(opened: Open, caplog) -> None:
    cache = opened(recurrent())
    keep(cache, [1, 2], "a")
    keep(cache, [1, 3], "b")
    cache.flush()
    cache.close()
    names = sorted(cache_path(cache).glob("*.name"))
    assert len(names) == 2
    names[0].write_text(names[0].read_text().replace('"ids": [1, ', '"ids": [2, '))
    names[1].write_bytes(b"\xff{")
    cache = opened(recurrent())
    assert cache.names("m") == []
    assert cache.stats().dropped == 2
    assert found(cache, [1, 2]) == 2


def test_a_second_server_is_told_who_has_the_directory(opened: Open, tmp_path: Path) -> None:
    cache = opened(recurrent())
    with pytest.raises(
        ValueError, match=rf"{tmp_path / 'states'} is in .* \(process {os.getpid()} on "
    ):
        opened(recurrent())
    cache.close()
    opened(recurrent())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_is_reported_once(code: int, opened: Open, monkeypatch, caplog) -> None:
    def refuse(path: Path, content: object, sync: bool) -> None:
        raise OSError(code, os.strerror(code), str(path))

    cache = opened(recurrent())
    with monkeypatch.context() as patch:
        patch.setattr(write_behind, "write_file", refuse)
        for first in range(5):
            keep(cache, [first, 2])
        cache.flush()
        assert [os.strerror(code) in r.getMessage() for r in caplog.records] == [True]
        assert all(found(cache, [first, 2]) == 2 for first in range(5))
        assert cache.stats().written == 0
        assert cache.stats().file_bytes == 0
    cache.flush()  # room again
    assert cache.stats().written == 5


def test_a_directory_that_cannot_be_had_is_reported(tmp_path: Path, opened: Open, caplog) -> None:
    (tmp_path / "file").write_text("")
    cache = opened(recurrent(), BIG, tmp_path / "file" / "states")
    assert ["states stay in memory only" in r.getMessage() for r in caplog.records] == [True]
    keep(cache, [1, 2])
    cache.flush()
    assert found(cache, [1, 2]) == 2


@BOTH
def test_a_directory_that_vanishes_is_reported_once(make, opened: Open, caplog) -> None:
    cache = opened(make())
    keep(cache, [1, 2, 3])
    cache.flush()
    shutil.rmtree(cache_path(cache))
    for first in range(4, 9):
        keep(cache, [first, 2])
    cache.flush()
    assert len(caplog.records) == 1
    assert found(cache, [1, 2, 3]) == 3
    cache.max_bytes = cache._store.max_bytes = 1  # everything has to be read again
    cache._store.shrink()
    assert found(cache, [1, 2, 3]) == 0


def write_until_killed(lm: LanguageModel, directory: Path, out: int) -> None:
    """Keep states, flush now and then and say which turn that was."""
    cache = StateCache({"m": lm}, BIG, directory)
    for turn in range(100_000):
        keep(cache, prompt_of(turn))
        if turn % 4 == 3:
            cache.flush()
            os.write(out, b"%6d\n" % turn)


def prompt_of(turn: int) -> list[int]:
    return [1 + turn % 50, 2 + turn // 50 % 50, 3, turn % 7]


@BOTH
def test_a_killed_server_loses_what_was_not_written(make, opened: Open, caplog, tmp_path) -> None:
    """Killed at random moments in the middle of writing, again and again, in one directory."""
    directory, draw, known, lm = tmp_path / "states", random.Random(3), 0, make()
    for _ in range(12):
        told, out = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write_until_killed(lm, directory, out)
            finally:
                os._exit(1)
        os.close(out)  # else a child that dies of itself would be waited for
        try:
            for _ in range(1 + draw.randrange(4)):
                line = os.read(told, 7)
                assert len(line) == 7  # else it died of itself
                known = max(known, 1 + int(line))
            time.sleep(draw.random() * 0.01)  # not to wait for something: the moment is to vary
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(told)
        cache = opened(lm)
        assert caplog.records == []
        assert not list(directory.glob(".*.tmp"))
        assert all(found(cache, prompt_of(turn)) == 4 for turn in range(known))
        cache.close()
