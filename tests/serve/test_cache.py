"""The state cache in memory: what it finds, what it counts, what goes first."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.cache_models import attention, box, check, entries_of, recurrent

from nomatmul.engine import LanguageModel, Session
from nomatmul.serve.cache import StateCache
from nomatmul.serve.cuts import DISTANCE, INTERVAL, LAST, cuts_of

BIG = 1 << 30
BOTH = pytest.mark.parametrize("make", [recurrent, attention], ids=["overwritten", "growing"])


def cache_of(lm: LanguageModel, max_bytes: int = BIG) -> StateCache:
    return StateCache({"m": lm}, max_bytes)


def read(cache: StateCache, ids: list[int], boundaries: tuple[int, ...] = ()) -> int:
    """Read a prompt as the scheduler does; return how many ids were computed. Checks the logits."""
    lm = cache.models["m"]
    found = cache.find("m", ids)
    assert found.session.position == found.length <= len(ids)
    assert (found.logits is not None) == (found.length == len(ids))
    session, at, logits = found.session, found.length, found.logits
    for cut in cache.cuts("m", ids, at, boundaries) if at < len(ids) else ():
        assert at < cut <= len(ids)
        logits = session.append(ids[at:cut])
        at = cut
        cache.keep("m", ids[:cut], session, logits if cut == len(ids) else None)
    assert at == len(ids)
    np.testing.assert_array_equal(logits, lm.session().append(ids))
    check(cache)
    return len(ids) - found.length


def answer(cache: StateCache, ids: list[int], made: list[int]) -> None:
    """Go on from a prompt that was read, keep what it has come to."""
    found = cache.find("m", ids)
    found.session.append(made, logits="none")
    cache.keep("m", [*ids, *made], found.session)
    check(cache)


class Requests(RuleBasedStateMachine):
    """Prompts, answers, names and evictions in any order: every answer equals a cold one, and at
    every step the count equals one from scratch."""

    @initialize(grows=st.booleans(), size=st.sampled_from([4_000, 30_000, 120_000]))
    def begin(self, grows: bool, size: int) -> None:
        self.cache = cache_of(attention() if grows else recurrent(), size)
        self.live: list[Session] = []
        self.named: dict[str, list[int]] = {}

    @rule(data=st.data(), cut=st.booleans(), tail=st.lists(st.integers(0, 2), max_size=5))
    def prompt(self, data: st.DataObject, cut: bool, tail: list[int]) -> None:
        ids = [*self.known(data, cut), *tail] or [1]
        ends = data.draw(st.lists(st.integers(1, len(ids)), max_size=3))
        read(self.cache, ids, tuple(ends))
        again = self.cache.find("m", ids)
        if self.cache._store.at("m", np.array(ids, np.int32)) is not None:
            assert again.length >= len(ids) - 1
        self.live = [*self.live[-2:], again.session]  # pages are shared with what goes on

    @rule(data=st.data(), count=st.integers(1, 70))
    def answer(self, data: st.DataObject, count: int) -> None:
        ids = self.known(data, False)
        if ids and len(ids) + count < 190:
            read(self.cache, ids)
            answer(self.cache, ids, [3 + n % 5 for n in range(count)])

    @rule(data=st.data(), name=st.sampled_from("ab"))
    def name(self, data: st.DataObject, name: str) -> None:
        ids = self.known(data, True) or [1, 2]
        session = self.cache.models["m"].session()
        logits = session.append(ids)
        before = self.cache.named("m", name)
        try:
            self.cache.keep("m", ids, session, logits, name)
        except ValueError:
            assert self.cache.named("m", name) == before
            return
        self.named[name] = ids

    @rule(name=st.sampled_from("ab"))
    def forget(self, name: str) -> None:
        assert self.cache.forget("m", name) == (self.named.pop(name, None) is not None)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "cache"):
            check(self.cache)
            for name, ids in self.named.items():
                assert self.cache.named("m", name) == tuple(ids)
                assert self.cache.find("m", ids).length == len(ids)

    def known(self, data: st.DataObject, cut: bool) -> list[int]:
        entries = sorted(entries_of(self.cache), key=lambda e: e.node.ids().tolist())
        if not entries:
            return []
        ids = data.draw(st.sampled_from(entries)).node.ids().tolist()
        return ids[: data.draw(st.integers(0, len(ids)))] if cut else ids[:180]


Requests.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestRequests = Requests.TestCase


@BOTH
def test_the_same_prompt_again_computes_nothing(make) -> None:
    cache = cache_of(make())
    ids = [1, 2, 3, 4, 5]
    assert [read(cache, ids) for _ in range(3)] == [5, 0, 0]
    answer(cache, ids, [6, 7])
    assert read(cache, ids) == 0  # regenerate
    assert read(cache, [*ids, 6, 7, 8]) == 1  # go on
    assert read(cache, [*ids, 9]) == 1  # branch
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.evicted) == (6, 1, 0)


def test_growing_states_serve_any_prefix_and_are_kept_once() -> None:
    cache = cache_of(attention())
    ids = [n % 90 for n in range(150)]
    assert read(cache, ids) == 150
    assert read(cache, ids[:100]) == 1  # the logits behind it are not known
    assert read(cache, ids[:100]) == 0
    assert read(cache, [*ids[:70], 95, 96]) == 2
    one = attention().session()
    one.append(ids)
    entries = entries_of(cache)
    assert [e.session is None for e in entries if e.node.end == 100] == [True]  # logits only
    assert cache.stats().bytes < 2 * sum(one.memory().values())


@pytest.mark.parametrize("make", [box, attention], ids=["box", "attention"])
def test_ten_turns_of_editing_and_branching_compute_the_new_tokens_only(make) -> None:
    lm = make()
    cache, rng = cache_of(lm), np.random.default_rng(7)
    grows = cache._store.grows["m"]
    messages: list[list[int]] = []
    past: list[tuple[list[int], list[int]]] = []  # (ids, boundaries) of every turn
    for turn in range(10):
        if turn in (3, 6, 8):  # edit an earlier message: all that follow it are gone
            messages = messages[: int(rng.integers(0, len(messages) // 2)) * 2]
        if turn == 5:  # regenerate
            messages = messages[:-2] + messages[-2:-1]
        else:
            messages.append(rng.integers(3, 90, int(rng.integers(2, 9))).tolist())
        ids = [token for message in messages for token in message]
        ends = np.cumsum([len(message) for message in messages]).tolist()
        reached = [0]
        for old, old_ends in past:
            common = next(
                (i for i, (a, b) in enumerate(zip(old, ids, strict=False)) if a != b), None
            )
            common = min(len(old), len(ids)) if common is None else common
            reached += [common] if grows else [end for end in old_ends if end <= common]
        computed = read(cache, ids, tuple(ends))
        assert computed == len(ids) - max(reached), turn
        assert computed == 0 if turn == 5 else computed > 0
        made = rng.integers(3, 90, 6).tolist()
        answer(cache, ids, made)
        messages.append(made)
        past.append((ids, ends))
        past.append(([*ids, *made], [*ends, len(ids) + 6]))


@BOTH
def test_a_state_larger_than_the_limit_is_not_kept(make) -> None:
    cache = cache_of(make(), 400)
    assert [read(cache, [1, 2, 3]) for _ in range(2)] == [3, 3]
    session = make().session()
    logits = session.append([1])
    with pytest.raises(ValueError, match=r"the state 'x' takes \d+ bytes .* more than .* 400"):
        cache.keep("m", [1], session, logits, "x")
    assert cache.stats().entries == 0
    assert cache.names("m") == []


@BOTH
def test_a_limit_of_nothing_turns_the_cache_off(make, tmp_path) -> None:
    cache = StateCache({"m": make()}, 0, tmp_path)
    assert [read(cache, [1, 2, 3], (1, 2)) for _ in range(2)] == [3, 3]
    assert cache.cuts("m", [1] * 9, 0, (3, 6)) == [9]
    session = make().session()
    logits = session.append([1])
    with pytest.raises(ValueError, match="the state cache is turned off"):
        cache.keep("m", [1], session, logits, "x")
    assert list(tmp_path.iterdir()) == []


def test_the_least_recently_used_goes_first() -> None:
    lm = recurrent()
    probe = cache_of(lm)
    read(probe, [1, 1])
    cache = cache_of(lm, 3 * probe.stats().bytes)
    for first in (1, 2, 3):
        read(cache, [first, first])
    read(cache, [1, 1])
    read(cache, [4, 4])
    assert {int(entry.node.edge[0]) for entry in entries_of(cache)} == {1, 3, 4}
    assert cache.stats().evicted == 1


def test_what_conversations_begin_with_is_as_recent_as_they_are() -> None:
    lm = recurrent()
    probe = cache_of(lm)
    read(probe, [1, 1, 1])
    cache = cache_of(lm, 5 * probe.stats().bytes)
    system = [1, 1, 1]
    read(cache, system)
    read(cache, [*system, 2])
    read(cache, [*system, 3])
    for first in range(10, 30):
        read(cache, [first, 4])
        assert read(cache, [*system, 3]) == 0
    assert cache.find("m", [*system, 9]).length == 3


def test_an_evicted_state_leaves_its_beginning_to_the_entries_above() -> None:
    cache = cache_of(attention())
    ids = [n % 90 for n in range(190)]
    read(cache, ids[:60])
    read(cache, ids)
    cache._store.touch(cache._store.at("m", np.array(ids[:60], np.int32)))
    cache.max_bytes = cache._store.max_bytes = cache.stats().bytes - 1
    cache._store.shrink()
    check(cache)
    assert [entry.node.end for entry in entries_of(cache)] == [60]
    assert read(cache, ids[:60]) == 0


@BOTH
def test_named_states_stay(make) -> None:
    lm = make()
    probe = cache_of(lm)
    read(probe, [1, 2, 3])
    cache = cache_of(lm, 4 * probe.stats().bytes)
    session = lm.session()
    cache.keep("m", [1, 2, 3], session, session.append([1, 2, 3]), "first", "what was asked")
    for first in range(4, 40):
        read(cache, [first, first])
    assert cache.stats().evicted > 20
    assert read(cache, [1, 2, 3]) == 0
    assert cache.names("m") == ["first"]
    assert cache.named("m", "first") == (1, 2, 3)
    assert cache.description("m", "first") == "what was asked"
    session = lm.session()
    cache.keep("m", [7], session, session.append([7]), "first")  # the name goes on to another
    assert cache.named("m", "first") == (7,)
    assert cache.forget("m", "first")
    assert not cache.forget("m", "first")
    assert cache.named("m", "first") is cache.description("m", "first") is None
    for first in range(4, 40):
        read(cache, [first, first])
    assert {entry.names == set() for entry in entries_of(cache)} == {True}
    assert read(cache, [7]) == 1


def test_a_state_that_is_named_again_keeps_its_own_pages() -> None:
    """Also where a longer one could serve in its place, which may go."""
    cache = cache_of(attention())
    for ids, name in (([1, 2, 3], "a"), ([1, 2, 3, 4, 5], None), ([1, 2, 3], "a")):
        session = cache.models["m"].session()
        cache.keep("m", ids, session, session.append(ids), name)
    (entry,) = (entry for entry in entries_of(cache) if entry.names)
    assert entry.session is not None


def test_a_name_of_one_model_makes_no_room_for_that_of_another() -> None:
    probe = StateCache({"m": recurrent(), "other": recurrent()}, BIG)
    session = probe.models["m"].session()
    probe.keep("m", [1, 2, 3], session, session.append([1, 2, 3]), "name")
    cache = StateCache(probe.models, probe.stats().bytes * 3 // 2)
    for model in ("m", "m", "other"):
        session = cache.models[model].session()
        row = session.append([1, 2, 3])
        if model == "m":
            cache.keep(model, [1, 2, 3], session, row, "name")
        else:
            with pytest.raises(ValueError, match="the state 'name' takes"):
                cache.keep(model, [1, 2, 3], session, row, "name")
    assert cache.stats().bytes <= cache.max_bytes


def test_names_and_their_documents_count() -> None:
    """Any number of names of one state would be memory without limit."""
    cache = cache_of(recurrent(), 50_000)
    session = cache.models["m"].session()
    row = session.append([1, 2, 3])
    for number in range(20):
        cache.keep("m", [1, 2, 3], session, row, f"name {number}", "x" * 1000)
        assert 1000 * number < cache.stats().bytes <= cache.max_bytes
    with pytest.raises(ValueError, match=r"the state 'long' takes"):
        cache.keep("m", [1, 2, 3], session, row, "long", "x" * 40_000)
    for name in cache.names("m"):
        assert cache.forget("m", name)
    assert cache.stats().bytes < 10_000


def test_two_models_share_the_limit_and_nothing_else() -> None:
    cache = StateCache({"m": recurrent(), "other": attention()}, BIG)
    read(cache, [1, 2, 3])
    assert cache.find("other", [1, 2, 3]).length == 0
    assert cache.find("m", [1, 2, 3]).length == 3


def test_cuts() -> None:
    assert cuts_of(10, 0, ()) == [10]
    assert cuts_of(10, 4, (2, 4, 6, 10, 12)) == [6, 10]
    # a cold prompt of many short messages stops rarely, but behind each of the last ones
    ends = range(10, 2010, 10)
    cuts = cuts_of(2005, 0, ends)
    assert cuts[-LAST - 1 :] == [*range(2000 - 10 * (LAST - 1), 2001, 10), 2005]
    early = cuts[: -LAST - 1]
    assert len(early) == 1960 // (DISTANCE + 8)
    assert min(np.diff([0, *early])) >= DISTANCE
    # a long text stops at intervals
    assert cuts_of(3 * INTERVAL + 5, 0, (5,)) == [5, *(5 + n * INTERVAL for n in (1, 2, 3))]
    assert cuts_of(3 * INTERVAL, INTERVAL, ()) == [2 * INTERVAL, 3 * INTERVAL]
    long = cuts_of(1_000_000, 0, ())
    assert long[-1] == 1_000_000
    assert len(long) < 60
    assert all(cut - before <= max(INTERVAL, before / 8) for before, cut in pairwise([0, *long]))
