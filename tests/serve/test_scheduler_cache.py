"""What the state cache spares: computed tokens are the new ones, exactly."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.scheduling import Model, assert_cold, prompt, scheduling, tiny_model, wait

from nomatmul.serve.cache import StateCache
from nomatmul.serve.job import Job, Usage
from nomatmul.serve.reading import Reading
from nomatmul.serve.scheduler import Scheduler

Ids = tuple[int, ...]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Both kinds of state."""
    base = tmp_path_factory.mktemp("models")
    return {kind: tiny_model(base / kind, kind) for kind in ("recurrent", "attention")}


@pytest.fixture(params=["recurrent", "attention"])
def kind(request: pytest.FixtureRequest) -> str:
    """Name of a model."""
    name: str = request.param
    return name


def _cache(models: dict[str, Model], directory: Path | None = None) -> StateCache:
    return StateCache({name: model.lm for name, model in models.items()}, 1 << 24, directory)


@pytest.fixture
def scheduler(models: dict[str, Model]) -> Iterator[Scheduler]:
    """One with room for everything."""
    cache = _cache(models)
    with scheduling(models, cache) as found:
        yield found
    cache.close()


class Conversation:
    """Turns of a conversation as ids: the canonical ones are those that were made."""

    def __init__(self, models: dict[str, Model], kind: str, scheduler: Scheduler) -> None:
        self.model, self.kind, self.scheduler = models[kind], kind, scheduler

    def ask(self, before: Ids, boundaries: Ids, words: Ids, **fields: Any) -> tuple[Ids, Usage]:
        """(ids of all with the answer, usage) behind a conversation so far."""
        ids = before + words
        job = Job(self.kind, (ids,), 9, boundaries=(*boundaries, len(ids)), **fields)
        ticket = self.scheduler.submit(job)
        assert_cold(self.model, job, wait(ticket))
        self.scheduler.call(lambda: None).result(30)  # the step that feeds the last token
        made = self.model.lm.generate_ids(ids, max_tokens=9)
        return (*ids, *made), ticket.usage


def test_ten_turns_compute_their_new_tokens(
    models: dict[str, Model], kind: str, scheduler: Scheduler
) -> None:
    """Going on, editing an earlier message, asking again, and branching."""
    talk = Conversation(models, kind, scheduler)
    history: list[Ids] = [()]
    ends: list[int] = []
    total = 0
    for turn in range(6):  # going on
        words = prompt(10 + turn, 100 + turn)
        ids, usage = talk.ask(history[-1], tuple(ends), words)
        assert (usage.computed_tokens, usage.cached_tokens) == (len(words), len(history[-1]))
        history.append(ids)
        ends += [len(ids) - 9, len(ids)]
        total += len(words)
    for turn in (1, 3, 5):  # another message in the place of the turn's own
        words = prompt(12, 200 + turn)
        _, usage = talk.ask(history[turn], tuple(ends[: 2 * turn]), words)
        assert (usage.computed_tokens, usage.cached_tokens) == (len(words), len(history[turn]))
        total += len(words)
    _, usage = talk.ask(history[2], tuple(ends[:4]), prompt(12, 102))  # the same again
    assert (usage.computed_tokens, usage.cached_tokens) == (0, usage.prompt_tokens)
    assert scheduler.stats().computed_tokens == total


def test_a_turn_behind_an_end_token_computes_its_new_tokens(
    models: dict[str, Model], kind: str, scheduler: Scheduler
) -> None:
    """The end token is part of the next turn's prefix."""
    lm, ids = models[kind].lm, prompt(20)
    made = lm.generate_ids(ids, max_tokens=5)
    end = made[-1]
    count = made.index(end) + 1
    job = Job(kind, (ids,), 50, end_tokens=frozenset([end]))
    assert wait(scheduler.submit(job))[0].finish == "end"
    scheduler.call(lambda: None).result(30)
    ticket = scheduler.submit(Job(kind, ((*ids, *made[:count], 7, 8),), 3))
    assert_cold(models[kind], ticket.job, wait(ticket))
    assert (ticket.usage.computed_tokens, ticket.usage.cached_tokens) == (2, 20 + count)


def test_states_survive_a_restart(models: dict[str, Model], kind: str, tmp_path: Path) -> None:
    """Of keys and values that grew on, one position is computed for its logits."""
    ids = prompt(50)
    for computed in (50, int(kind == "attention")):
        cache = _cache(models, tmp_path / "states")
        with scheduling(models, cache) as scheduler:
            ticket = scheduler.submit(Job(kind, (ids,), 4))
            assert_cold(models[kind], ticket.job, wait(ticket))
            scheduler.call(lambda: None).result(30)  # the step that feeds the last token
        cache.close()
        assert ticket.usage.computed_tokens == computed


def test_a_longer_prompt_waits_for_the_one_being_read(
    models: dict[str, Model], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in chunks of 8; the second goes on from where the first one ends."""
    monkeypatch.setattr("nomatmul.serve.policy.Pace.chunk", lambda *_, **__: 8)
    cache = _cache(models)
    with scheduling(models, cache, start=False) as scheduler:
        first, second = (
            scheduler.submit(Job(kind, (prompt(60)[:count],), 3, client=str(count)))
            for count in (40, 60)
        )
        scheduler.start()
        for ticket in (first, second):
            assert_cold(models[kind], ticket.job, wait(ticket))
        assert scheduler.stats().computed_tokens == 60
    cache.close()
    assert (second.usage.cached_tokens, second.usage.computed_tokens) == (40, 20)


def test_who_waits_for_an_equal_prompt_finds_all_of_it(
    models: dict[str, Model], kind: str, scheduler: Scheduler
) -> None:
    """The first one is scored, so that the second one does not simply join it."""
    hold = threading.Event()
    held = scheduler.call(lambda: hold.wait(30))
    jobs = [
        Job(kind, (prompt(40),), 0, logprobs=1, echo=True),
        Job(kind, (prompt(40),), 3),
    ]
    tickets = [scheduler.submit(job) for job in jobs]
    hold.set()
    assert held.result(30)
    for job, ticket in zip(jobs, tickets, strict=True):
        assert_cold(models[kind], job, wait(ticket))
    assert (tickets[1].usage.computed_tokens, tickets[1].usage.cached_tokens) == (0, 40)


def test_a_fault_where_one_waits_for_another_ends_it(
    models: dict[str, Model], scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails when it goes on, and nothing else is there to be stepped."""
    original = Reading.begin

    def begin(reading: Reading, lm: Any, others: Any = ()) -> None:
        if not others and len(reading.ids) == 40 and reading.scored is None:
            raise MemoryError
        original(reading, lm, others)

    monkeypatch.setattr(Reading, "begin", begin)
    hold = threading.Event()
    scheduler.call(lambda: hold.wait(30))
    first = scheduler.submit(Job("recurrent", (prompt(40),), 0, logprobs=1, echo=True))
    second = scheduler.submit(Job("recurrent", (prompt(40),), 3))
    hold.set()
    assert wait(first)[0].finish == "length"
    assert wait(second)[0].finish == "error"
    assert second.error == "not enough memory"


def test_who_shares_a_beginning_does_not_wait_for_the_end(
    models: dict[str, Model], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most conversations of a model begin alike, if only by its start token."""
    monkeypatch.setattr("nomatmul.serve.policy.Pace.chunk", lambda *_, **__: 8)
    cache = _cache(models)
    with scheduling(models, cache, start=False) as scheduler:
        prompts = (prompt(400), prompt(20)[:10] + prompt(20, 1))
        long, short = (
            scheduler.submit(Job(kind, (ids,), 3, client=str(len(ids)))) for ids in prompts
        )
        scheduler.start()
        for ticket in (long, short):
            assert_cold(models[kind], ticket.job, wait(ticket))
    cache.close()
    assert short.usage.cached_tokens == (10 if kind == "attention" else 0)
    assert short.usage.total_s < long.usage.first_token_s


def test_who_waits_for_a_cancelled_prompt_reads_itself(
    models: dict[str, Model], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nomatmul.serve.policy.Pace.chunk", lambda *_, **__: 8)
    cache = _cache(models)
    with scheduling(models, cache, start=False) as scheduler:
        first, second = (
            scheduler.submit(Job(kind, (prompt(60)[:count],), 3)) for count in (40, 60)
        )
        scheduler.call(lambda: None)
        scheduler.start()
        scheduler.cancel(first)
        wait(first)
        assert_cold(models[kind], second.job, wait(second))
    cache.close()


def test_a_named_state_is_pinned(models: dict[str, Model], kind: str, scheduler: Scheduler) -> None:
    ids = prompt(30)
    wait(scheduler.submit(Job(kind, (ids,), 0, keep="book")))

    def named() -> Any:
        assert scheduler._cache is not None
        return scheduler._cache.named(kind, "book")

    assert scheduler.call(named).result(30) == ids
    ticket = scheduler.submit(Job(kind, ((*ids, 5),), 2))
    wait(ticket)
    assert ticket.usage.computed_tokens == 1


def test_a_name_that_the_cache_refuses_ends_with_its_reason(models: dict[str, Model]) -> None:
    cache = StateCache({name: model.lm for name, model in models.items()}, 64)
    with scheduling(models, cache) as scheduler:
        ticket = scheduler.submit(Job("recurrent", (prompt(30),), 0, keep="book"))
        assert wait(ticket)[0].finish == "error"
    cache.close()
    assert ticket.error is not None
    assert "64" in ticket.error


def test_the_last_position_is_not_fed_again(
    models: dict[str, Model], scheduler: Scheduler, caplog: pytest.LogCaptureFixture
) -> None:
    """512 positions: the last made token has none."""
    for count in (510, 512):
        ticket = scheduler.submit(Job("attention", (prompt(count),), 50))
        assert_cold(models["attention"], ticket.job, wait(ticket))
        scheduler.call(lambda: None).result(30)
    assert not caplog.records
