"""The state cache's directory: what a restart finds, what is written, and its limits."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from support.cache_models import (
    BOTH,
    Open,
    attention,
    cache_path,
    check,
    entries_of,
    files_in,
    found,
    keep,
    recurrent,
)

from nomatmul.serve import cache_store


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
