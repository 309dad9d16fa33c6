"""Models and checks that the tests of the state cache share."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine_models import ATTENTION

from nomatmul.engine import LanguageModel, load, random_model
from nomatmul.formats.config import ModelConfig
from nomatmul.serve.cache import StateCache
from nomatmul.serve.cache_entries import ID_BYTES, Entry, holder_below, memory_of

RECURRENT = ModelConfig(vocab_size=61, hidden_size=24, num_layers=2, intermediate_size=40)


@functools.cache
def box() -> LanguageModel:
    """The model in the box, one thread."""
    return load(threads=1)


@functools.cache
def recurrent() -> LanguageModel:
    """A tiny model whose state each token overwrites."""
    return random_model(RECURRENT, seed=1, threads=1)


@functools.cache
def attention() -> LanguageModel:
    """A tiny model whose states only grow; a page holds 64 positions."""
    return random_model(ATTENTION, seed=2, threads=1)


for made in (box, recurrent, attention):
    atexit.register(made.cache_clear)  # the core says so where models outlive it


def entries_of(cache: StateCache) -> list[Entry]:
    """All entries."""
    trees = cache._store.trees.values()
    nodes = (node for tree in trees for node in tree.root.below())
    return [node.value for node in nodes if node.value is not None]


def check(cache: StateCache) -> None:
    """What is counted equals a count from scratch, and the tree is as it should be."""
    store, entries = cache._store, entries_of(cache)
    held: dict[int, int] = {}
    for entry in entries:
        held |= memory_of(entry.session, entry.logits)
    ids = sum(len(n.edge) for tree in store.trees.values() for n in tree.root.below())
    namings = [one for named in cache._namings.values() for one in named.values()]
    names = sum(512 + 36 * len(one.ids) + len(one.document) for one in namings)
    assert cache.stats().bytes == sum(held.values()) + ID_BYTES * ids + names
    assert cache.stats().bytes <= cache.max_bytes
    assert cache.stats().entries == len(entries)
    assert set(store.recent) == {e for e in entries if e.in_memory and not e.names}
    for entry in entries:
        if entry.session is not None:
            assert entry.session.position == entry.node.end
            assert entry.logits is not None or not (entry.file and entry.file_logits)
        served = holder_below(entry.node) if store.grows[entry.model] else entry
        assert served is not None
        assert served.serves
    for tree in store.trees.values():
        for node in tree.root.below():
            if node is not tree.root:
                assert node.value is not None or len(node.children) > 1
                assert node.parent is not None
                assert node.end == node.parent.end + len(node.edge)


BIG = 1 << 30
BOTH = pytest.mark.parametrize("make", [recurrent, attention], ids=["overwritten", "growing"])
Open = Callable[..., StateCache]


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
    """The states in a cache's directory."""
    return sorted(directory.glob("nomatmul-*.state"))


def cache_path(cache: StateCache) -> Path:
    """The directory of a cache that has one."""
    assert cache._directory is not None
    return cache._directory
