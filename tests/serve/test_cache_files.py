"""The state cache's directory: restarts, damage, locks, disks that refuse, and sudden ends."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.cache_models import attention, check, entries_of, recurrent

from nomatmul.engine import LanguageModel
from nomatmul.serve import cache_store, write_behind
from nomatmul.serve.cache import StateCache

BIG = 1 << 30
BOTH = pytest.mark.parametrize("make", [recurrent, attention], ids=["overwritten", "growing"])
Open = Callable[..., StateCache]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """opened(lm, max_bytes, directory): a cache in a directory, closed with the test."""
    caches = []

    def make(
        lm: LanguageModel, max_bytes: int = BIG, directory: Path = tmp_path / "states"
    ) -> StateCache:
        caches.append(StateCache({"m": lm}, max_bytes, directory))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "state-files"]


def keep(
    cache: StateCache,
    ids: list[int],
    name: str | None = None,
    logits: bool = True,
    document: str = "",
) -> None:
    """Read a prompt and keep it, without asking what is known."""
    session = cache.models["m"].session()
    row = session.append(ids)
    cache.keep("m", ids, session, row if logits else None, name, document)


def found(cache: StateCache, ids: list[int]) -> int:
    """How much of a prompt is known; what is found goes on to the logits of a cold one."""
    had = cache.find("m", ids)
    cold = cache.models["m"].session().append(ids)
    logits = had.logits if had.length == len(ids) else had.session.append(ids[had.length :])
    np.testing.assert_array_equal(logits, cold)
    check(cache)
    return had.length


def files_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("nomatmul-*.state"))


@BOTH
def test_a_restart_finds_what_was_flushed(make, opened: Open) -> None:
    cache = opened(make())
    prompts = [[first, 2, 3, 4] for first in range(5, 9)]
    for ids in prompts:
        keep(cache, ids)
    keep(cache, [1, 1], logits=False)
    cache.flush()
    assert cache.stats().written == 5
    cache.flush()  # nothing is written twice
    assert cache.stats().written == 5
    cache.close()

    cache = opened(make())
    assert cache.stats().entries == 5
    assert cache.stats().read == 0  # only headers
    assert not any(entry.in_memory for entry in entries_of(cache))
    for ids in prompts:
        assert found(cache, ids) == 4
        assert found(cache, [*ids, 9]) == 4
    assert found(cache, [1, 1]) == (1 if cache._store.grows["m"] else 0)
    assert found(cache, [1, 1, 5]) == 2
    assert cache.stats().read == 5
    cache.flush()
    assert cache.stats().written == 0


def test_growing_states_are_written_once_for_all_their_prefixes(opened: Open) -> None:
    cache = opened(attention())
    directory = cache_path(cache)
    ids = [n % 90 for n in range(150)]
    for end in (20, 60, 100):
        keep(cache, ids[:end])
    cache.flush()
    assert len(files_in(directory)) == 1
    keep(cache, ids)
    cache.flush()
    cache._store.settle()
    cache._store.files.wait()
    assert len(files_in(directory)) == 1  # the longer one took its place
    cache.close()
    cache = opened(attention())
    assert found(cache, ids) == 150
    assert found(cache, [*ids[:33], 95]) == 33


def test_only_states_at_rest_are_written(opened: Open, monkeypatch) -> None:
    monkeypatch.setattr(cache_store, "QUIET_SECONDS", 1e6)
    cache = opened(attention())
    for end in (5, 10, 15):
        keep(cache, list(range(1, end)))
    assert [(e.node.end, e.queued is not None) for e in entries_of(cache)] == [
        (4, False),
        (9, False),
        (14, True),
    ]
    cache.close()
    assert files_in(cache_path(cache)) == []


def cache_path(cache: StateCache) -> Path:
    assert cache._directory is not None
    return cache._directory


@BOTH
def test_what_was_evicted_is_read_again(make, opened: Open) -> None:
    cache = opened(make())
    keep(cache, [1, 2, 3])
    cache.flush()
    cache.max_bytes = cache._store.max_bytes = cache.stats().bytes + 12  # and ids
    keep(cache, [4, 5, 6])
    check(cache)
    assert cache.stats().evicted == 1
    assert found(cache, [1, 2, 3]) == 3
    assert cache.stats().read == 1


def test_the_directory_has_the_same_limit(opened: Open) -> None:
    lm = recurrent()
    cache = opened(lm, 400_000)  # a file is planned with room for its header
    for first in range(20):
        keep(cache, [first, 2])
        cache.flush()
        check(cache)
        total = sum(path.stat().st_size for path in files_in(cache_path(cache)))
        assert cache.stats().file_bytes == total <= 400_000
    cache.close()
    cache = opened(lm, 80_000)  # a smaller one holds from the next state on
    keep(cache, [30, 2])
    cache.flush()
    assert cache.stats().file_bytes <= 80_000


@BOTH
def test_named_states_survive_a_restart_and_are_never_crowded_out(make, opened: Open) -> None:
    cache = opened(make(), 300_000)
    keep(cache, [1, 2, 3], "kept", document='{"prompt": "ünïcode"}')
    for first in range(4, 50):
        keep(cache, [first, first])
        cache.flush()
    cache.close()
    cache = opened(make(), 300_000)
    assert cache.names("m") == ["kept"]
    assert cache.description("m", "kept") == '{"prompt": "ünïcode"}'
    assert found(cache, [1, 2, 3]) == 3
    assert [entry.names for entry in entries_of(cache) if entry.node.end == 3] == [{"kept"}]
    assert cache.forget("m", "kept")
    cache.flush()
    cache.close()
    assert opened(make(), 300_000).names("m") == []


def test_a_large_directory_is_listed_beside_the_work(opened: Open, monkeypatch) -> None:
    cache = opened(recurrent())
    keep(cache, [1, 1], "kept")
    for first in range(2, 12):
        keep(cache, [first, 1])
    cache.flush()
    cache.close()
    for number, path in enumerate(files_in(cache_path(cache))):
        os.utime(path, (number, number))
    monkeypatch.setattr("nomatmul.serve.cache.LIST_SECONDS", 0.0)
    monkeypatch.setattr(cache_store, "_LIST_SLICE", 0.0)
    cache = opened(recurrent())
    assert [entry.names for entry in entries_of(cache)] == [{"kept"}]  # the others wait
    keep(cache, [11, 1])  # may be one of them
    assert cache.forget("m", "kept")
    lengths = [found(cache, [first, 1]) for first in range(2, 12)]
    assert set(lengths) <= {0, 2}
    assert [found(cache, [first, 1]) for first in range(1, 12)] == [2] * 11
    cache.flush()
    assert len(files_in(cache_path(cache))) == 11


def test_files_of_other_models_and_others_are_left_alone(opened: Open, tmp_path: Path) -> None:
    cache = opened(recurrent())
    keep(cache, [1, 2])
    cache.flush()
    cache.close()
    (tmp_path / "states" / "notes.txt").write_text("mine")
    (tmp_path / "states" / "nomatmul-9-0123-4567.state").write_text("of a later version")
    other = opened(attention())
    assert other.stats().entries == 0
    assert other.stats().dropped == 0
    keep(other, [1, 2])
    other.flush()
    other.close()
    assert (tmp_path / "states" / "notes.txt").read_text() == "mine"
    assert found(opened(recurrent()), [1, 2]) == 2


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
        ValueError, match=rf"{tmp_path / 'states'} is in .* \(process {os.getpid()}\)"
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


def test_the_newest_states_push_out_those_that_wait(opened: Open, request) -> None:
    cache = opened(recurrent())
    files = cache._store.files
    started, go = threading.Event(), threading.Event()
    request.addfinalizer(go.set)

    def slow() -> list[bytes]:
        started.set()
        assert go.wait(60)
        return [b"x"]

    files._writer.write("slow", slow)
    assert started.wait(60)
    for first in range(61):
        for second in range(2):
            keep(cache, [first, second])
    cache._store.settle()
    waiting = {int(e.node.ids()[0]) for e in entries_of(cache) if e.queued is not None}
    assert waiting == set(range(61 - 32, 61))
    go.set()
    cache.flush()
    assert cache.stats().written == 122  # at the end everything is


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
