"""Texts that are read while nothing else is to be done: they delay nobody and are nobody's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.scheduling import (
    Gate,
    Model,
    assert_cold,
    prompt,
    scheduling,
    stepping,
    tiny_model,
    wait,
)

from nomatmul.serve.cache import StateCache
from nomatmul.serve.cuts import TAIL
from nomatmul.serve.job import Closing, Job
from nomatmul.serve.policy import LEAST_CHUNK
from nomatmul.serve.scheduler import Scheduler

KINDS = ("recurrent", "attention")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Both kinds of state."""
    base = tmp_path_factory.mktemp("models")
    return {kind: tiny_model(base / kind, kind) for kind in KINDS}


def _cache(models: dict[str, Model], max_bytes: int = 1 << 24) -> StateCache:
    return StateCache({name: model.lm for name, model in models.items()}, max_bytes)


@pytest.fixture(params=KINDS)
def gate(models: dict[str, Model], request: pytest.FixtureRequest) -> Iterator[Gate]:
    """The steps of one of them."""
    found = Gate(models[request.param])
    yield found
    found.open = True


@pytest.fixture
def scheduler(gate: Gate) -> Iterator[Scheduler]:
    """One of the model "m", with a cache."""
    models = {"m": gate.model}
    cache = _cache(models)
    with scheduling(models, cache, max_streams=2) as found:
        yield found
        gate.open = True
    cache.close()


def _is_growing(scheduler: Scheduler) -> bool:
    return scheduler._batches["m"].states.only_grows


def test_a_request_finds_what_was_read(gate: Gate, scheduler: Scheduler) -> None:
    """Its end, and where the last tokens are others the snapshot before them."""
    gate.open = True
    ids = prompt(100)
    assert scheduler.read_again("m", ids).result(30) == 100
    assert scheduler.read_again("m", ids).result(30) == 0
    growing = _is_growing(scheduler)
    changed = 98 if growing else 100 - TAIL
    for more, cached in (((*ids, 7, 8), 100), ((*ids[:-2], 7, 8), changed)):
        ticket = scheduler.submit(Job("m", (more,), 5))
        assert_cold(gate.model, ticket.job, wait(ticket))
        assert ticket.usage.cached_tokens == cached
        assert ticket.usage.cached_tokens + ticket.usage.computed_tokens == len(more)
    stats = scheduler.stats()
    assert stats.reread_tokens == 100
    assert (stats.submitted, stats.finished, stats.prompt_tokens) == (2, 2, 102 + 100)
    assert stats.cached_tokens + stats.computed_tokens == stats.prompt_tokens


def test_a_request_waits_for_one_short_step(gate: Gate, scheduler: Scheduler) -> None:
    """Then it runs to its end, and the text is read on where it was left."""
    ids = prompt(100)
    future = scheduler.read_again("m", ids)
    gate.wait_for_step()
    assert gate.steps == [[LEAST_CHUNK]]
    assert (scheduler.stats().running, scheduler.stats().waiting) == (0, 0)
    words = prompt(20, 1)
    ticket = scheduler.submit(Job("m", (words,), 3))
    for _ in range(20):
        gate.step()
        if ticket.finished:
            break
    assert gate.steps[1] == [20]  # the request's own, before anything else of the text
    assert [feed for (feed,) in gate.steps[2:5]] == [1, 1, 1]
    assert not future.done()
    gate.open = True
    assert_cold(gate.model, ticket.job, wait(ticket))
    assert future.result(30) == scheduler.stats().reread_tokens == 100  # nothing twice


def test_the_next_turn_goes_on_from_what_is_read_so_far(gate: Gate, scheduler: Scheduler) -> None:
    ids = prompt(100)
    future = scheduler.read_again("m", ids)
    gate.wait_for_step()
    gate.step()  # one is over, the second one under way
    ticket = scheduler.submit(Job("m", ((*ids, 7, 8),), 3))
    gate.open = True
    assert_cold(gate.model, ticket.job, wait(ticket))
    assert ticket.usage.cached_tokens == 2 * LEAST_CHUNK
    assert ticket.usage.computed_tokens == 102 - 2 * LEAST_CHUNK
    future.result(30)


def test_the_oldest_make_room_and_none_waits_twice(gate: Gate, scheduler: Scheduler) -> None:
    first = scheduler.read_again("m", prompt(20))
    gate.wait_for_step()
    others = [scheduler.read_again("m", prompt(20, 1 + number)) for number in range(2)]
    assert scheduler.read_again("m", prompt(20, 2)) is others[1]
    assert not others[0].done()
    newest = scheduler.read_again("m", prompt(20, 9))
    assert others[0].result(0) == 0
    gate.open = True
    assert [future.result(30) for future in (first, others[1], newest)] == [20, 20, 20]


def test_a_close_ends_it_and_keeps_what_was_read(models: dict[str, Model]) -> None:
    gate = Gate(models["recurrent"])
    cache = _cache({"m": gate.model})
    with scheduling({"m": gate.model}, cache) as scheduler:
        futures = [scheduler.read_again("m", prompt(100, number)) for number in range(2)]
        gate.wait_for_step()
        call = scheduler.call(lambda: None)  # runs between this step and the next
        gate.step()
        call.result(30)
        gate.open = True
        scheduler.close(60)  # does not wait for a text
        found = [future.result(0) for future in futures]
        assert sum(found) == scheduler.stats().reread_tokens
        with pytest.raises(Closing):
            scheduler.read_again("m", prompt(9))
        if found[0]:
            assert cache.find("m", (*prompt(100), 7)).length == found[0]
    cache.close()


def test_without_a_cache_nothing_is_done(models: dict[str, Model]) -> None:
    gate = Gate(models["recurrent"])
    for cache in (None, _cache({"m": gate.model}, 0)):
        with scheduling({"m": gate.model}, cache) as scheduler:
            assert scheduler.read_again("m", prompt(50)).result(0) == 0
            scheduler.call(lambda: None).result(30)
    assert gate.steps == []


def test_where_the_cache_has_no_room_it_ends(models: dict[str, Model]) -> None:
    """What was read is gone each time it makes way: it does not begin anew for ever."""
    gate = Gate(models["recurrent"])
    cache = _cache({"m": gate.model}, 100)  # for no state
    with scheduling({"m": gate.model}, cache) as scheduler:
        future = scheduler.read_again("m", prompt(400))
        gate.wait_for_step()
        ticket = scheduler.submit(Job("m", (prompt(9, 1),), 2))
        gate.open = True
        assert_cold(gate.model, ticket.job, wait(ticket))
        assert future.result(30) == LEAST_CHUNK
    cache.close()


def test_a_fault_costs_nobody_an_answer(
    models: dict[str, Model], caplog: pytest.LogCaptureFixture
) -> None:
    def step(original: Any, sessions: Any, ids: Any, want: str) -> Any:
        if want == "none" and len(ids[0]) > 1:
            raise RuntimeError("a step that fails")
        return original(sessions, ids, want)

    model = stepping(models["recurrent"], step)
    cache = _cache({"m": model})
    with scheduling({"m": model}, cache) as scheduler:
        assert scheduler.read_again("m", prompt(50)).result(30) == 0
        ticket = scheduler.submit(Job("m", (prompt(9),), 3))
        assert_cold(model, ticket.job, wait(ticket))
    cache.close()
    assert "a text that was to be read again" in caplog.text


def test_what_the_model_cannot_read_is_refused(models: dict[str, Model]) -> None:
    cache = _cache(models)
    with (
        scheduling(models, cache, start=False) as scheduler,
        pytest.raises(ValueError, match="512 positions"),
    ):
        scheduler.read_again("attention", prompt(513))
    cache.close()
