"""The state cache over its whole life: any order of prompts, names, restarts and damage."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from support.cache_models import attention, check, entries_of, recurrent

from nomatmul.serve import cache_store
from nomatmul.serve.cache import StateCache

PROMPTS = st.lists(st.integers(1, 2), min_size=1, max_size=6)
NAMES = st.sampled_from("ab")


class Life(RuleBasedStateMachine):
    """What is found is equal to what a cold session computes, bit for bit, whatever happened."""

    @initialize(
        grows=st.booleans(),
        size=st.sampled_from([3_000, 100_000, 1 << 30]),
        slice_=st.sampled_from([0.0, 1.0]),
    )
    def begin(self, grows: bool, size: int, slice_: float) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.lm = attention() if grows else recurrent()
        self.size, self.removed = size * (10 if grows else 1), False
        self.named: dict[str, list[int]] = {}
        self.slices = cache_store._LIST_SLICE, cache_store.QUIET_SECONDS
        cache_store._LIST_SLICE, cache_store.QUIET_SECONDS = slice_, 0.0
        self.level = logging.getLogger("nomatmul.serve").level
        logging.getLogger("nomatmul.serve").setLevel(logging.CRITICAL)
        self.cache = StateCache({"m": self.lm}, self.size, self.directory)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
            shutil.rmtree(self.directory)
            cache_store._LIST_SLICE, cache_store.QUIET_SECONDS = self.slices
            logging.getLogger("nomatmul.serve").setLevel(self.level)

    @rule(ids=PROMPTS, repeat=st.sampled_from([1, 20]), logits=st.booleans())
    def prompt(self, ids: list[int], repeat: int, logits: bool) -> None:
        ids = ids * repeat
        found = self.cache.find("m", ids)
        row = found.logits
        if found.length < len(ids):
            row = found.session.append(ids[found.length :])
            self.cache.keep("m", ids, found.session, row if logits else None)
        np.testing.assert_array_equal(row, self.lm.session().append(ids))
        check(self.cache)

    @rule(ids=PROMPTS, name=NAMES)
    def name(self, ids: list[int], name: str) -> None:
        session = self.lm.session()
        row = session.append(ids)
        try:
            self.cache.keep("m", ids, session, row, name, str(ids))
            self.named[name] = ids
        except ValueError:
            assert self.size < 1 << 30
        check(self.cache)

    @rule(name=NAMES)
    def forget(self, name: str) -> None:
        assert self.cache.forget("m", name) == (self.named.pop(name, None) is not None)
        check(self.cache)

    @rule()
    def flush(self) -> None:
        self.cache.flush()
        check(self.cache)
        sizes = [path.stat().st_size for path in self.directory.glob("*.state")]
        counted = self.cache.stats().file_bytes
        assert sum(sizes) <= counted <= self.size
        assert counted == sum(sizes) or self.removed
        for name, ids in self.named.items():
            assert self.cache.named("m", name) == tuple(ids)
            assert self.cache.description("m", name) == str(ids)

    @rule()
    def restart(self) -> None:
        self.flush()
        self.cache.close()
        self.cache = StateCache({"m": self.lm}, self.size, self.directory)
        check(self.cache)
        assert self.cache.names("m") == sorted(self.named)

    @rule(which=st.integers(0, 9), at=st.none() | st.integers(0, 10_000))
    def damage(self, which: int, at: int | None) -> None:
        files = self.cache._store.files
        assert files is not None
        files.wait()
        found = sorted(self.directory.glob("*.state"))
        if found:
            file = found[which % len(found)]
            if at is None:
                file.unlink()  # noticed when it is needed
                self.removed = True
            else:
                content = bytearray(file.read_bytes())
                content[at % len(content)] ^= 1
                file.write_bytes(content)

    @rule()
    def evict_all(self) -> None:
        store = self.cache._store
        while store.recent:
            store._evict(next(iter(store.recent)))
            check(self.cache)
        assert not any(entry.in_memory for entry in entries_of(self.cache) if not entry.names)


Life.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestLife = Life.TestCase
