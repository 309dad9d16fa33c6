"""Jobs on the engine thread: every answer is that of a cold single run."""

from __future__ import annotations

import asyncio
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.scheduling import (
    Model,
    assert_cold,
    cold,
    prompt,
    rows,
    scheduling,
    stepping,
    tiny_model,
    wait,
)

from nomatmul.engine import Sampling, load
from nomatmul.serve.bridge import Bell, follow
from nomatmul.serve.grammar import Grammars, GrammarSpec
from nomatmul.serve.job import Delta, Job, Ticket

WARM = Sampling(temperature=1.0, seed=7)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Three models: recurrent, attention (512 positions), and the one in the box."""
    base: Path = tmp_path_factory.mktemp("models")
    found = {kind: tiny_model(base / kind, kind) for kind in ("recurrent", "attention")}
    return found | {"box": Model(load(threads=1))}


@pytest.fixture(params=["recurrent", "attention"])
def kind(request: pytest.FixtureRequest) -> str:
    """Name of a tiny model."""
    name: str = request.param
    return name


def test_many_jobs_of_several_models_equal_cold_runs(models: dict[str, Model]) -> None:
    jobs = [
        Job(
            name,
            (prompt(1 + 37 * number % 90, number),),
            5 + number,
            sampling=Sampling(temperature=0.3 * (number % 4), seed=number, top_p=0.9),
            stop=("e",) if number % 5 == 0 else (),
            logprobs=number % 3 if number % 2 else None,
            echo=number % 4 == 1,
            client=str(number % 3),
        )
        for number in range(12)
        for name in models
    ]
    with scheduling(models, max_streams=5, step_seconds=0.01) as scheduler:
        tickets = [scheduler.submit(job) for job in jobs]
        found = [wait(ticket) for ticket in tickets]
        stats = scheduler.stats()
    for job, deltas in zip(jobs, found, strict=True):
        assert_cold(models[job.model], job, deltas)
    assert stats.finished == len(jobs)
    assert stats.completion_tokens == sum(deltas[0].count for deltas in found)
    assert stats.computed_tokens == stats.prompt_tokens == sum(len(j.prompts[0]) for j in jobs)
    assert stats.running == stats.waiting == 0


def test_a_prompt_is_read_once_for_all_its_choices(models: dict[str, Model], kind: str) -> None:
    """More choices than streams, of two prompts."""
    job = Job(kind, (prompt(70, 1), prompt(9, 2)), 6, n=5, sampling=WARM, logprobs=2)
    with scheduling(models, max_streams=3) as scheduler:
        ticket = scheduler.submit(job)
        found = wait(ticket)
        assert scheduler.stats().computed_tokens == 79
    assert_cold(models[kind], job, found)
    assert len({delta.text for delta in found}) > 2  # seeds differ
    usage = ticket.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.computed_tokens) == (79, 0, 79)
    assert usage.completion_tokens == sum(delta.count for delta in found)
    assert usage.queue_s is not None
    assert usage.first_token_s is not None
    assert usage.total_s is not None
    assert usage.queue_s <= usage.first_token_s <= usage.total_s


def test_equal_prompts_at_the_same_time_are_read_once(models: dict[str, Model]) -> None:
    jobs = [Job("recurrent", (prompt(50),), 4, client=str(number)) for number in range(3)]
    with scheduling(models, start=False) as scheduler:
        tickets = [scheduler.submit(job) for job in jobs]
        scheduler.start()
        found = [wait(ticket) for ticket in tickets]
        assert scheduler.stats().computed_tokens == 50
    assert [ticket.usage.computed_tokens for ticket in tickets] == [50, 0, 0]
    assert [ticket.usage.cached_tokens for ticket in tickets] == [0, 50, 50]
    for job, deltas in zip(jobs, found, strict=True):
        assert_cold(models["recurrent"], job, deltas)


def test_equal_prompts_of_one_job_count_as_often_as_they_stand_there(
    models: dict[str, Model],
) -> None:
    job = Job("recurrent", (prompt(50),) * 3, 4, n=2, sampling=WARM)
    with scheduling(models, max_streams=6, start=False) as scheduler:
        ticket = scheduler.submit(job)
        scheduler.start()
        assert_cold(models["recurrent"], job, wait(ticket))
    usage = ticket.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.computed_tokens) == (150, 100, 50)


def test_a_job_without_seed_draws_one(models: dict[str, Model]) -> None:
    job = Job("recurrent", (prompt(5),), 30, n=2, sampling=Sampling(temperature=2.0))
    with scheduling(models) as scheduler:
        texts = [one.text for _ in range(2) for one in wait(scheduler.submit(job))]
    assert len(set(texts)) == 4


@pytest.mark.parametrize("length", [1, 2, 300])
def test_echoed_logprobs_are_those_of_token_logprobs(
    models: dict[str, Model], kind: str, length: int
) -> None:
    job = Job(kind, (prompt(length),), 0, logprobs=3, echo=True)
    with scheduling(models, max_streams=2) as scheduler:
        # another stream at the same time, whose rows are among those of the echoed prompt
        other = scheduler.submit(Job(kind, (prompt(4),), 20))
        (delta,) = wait(scheduler.submit(job))
        wait(other)
    assert (delta.finish, delta.count, delta.text) == ("length", 0, "")
    assert [token.id for token in delta.tokens] == list(job.prompts[0])
    lm = models[kind].lm
    if length > 1:
        found = np.array([token.logprob for token in delta.tokens[1:]])
        assert np.array_equal(found, lm.token_logprobs(job.prompts[0]))
    assert rows(delta) == cold(models[kind], job, 0)[3]
    assert "".join(token.text for token in delta.tokens) == lm.tokenizer.decode(job.prompts[0])


def _one(models: dict[str, Model], job: Job) -> Delta:
    with scheduling(models) as scheduler:
        (delta,) = wait(scheduler.submit(job))
    return delta


def _greedy(models: dict[str, Model], kind: str, count: int) -> list[int]:
    return models[kind].lm.generate_ids(prompt(5), max_tokens=count)


def test_an_end_token_ends_and_counts(models: dict[str, Model], kind: str) -> None:
    ids = _greedy(models, kind, 8)
    end = ids[-1]
    job = Job(kind, (prompt(5),), 20, end_tokens=frozenset([end]), logprobs=0)
    delta = _one(models, job)
    assert delta.finish == "end"
    assert delta.count == ids.index(end) + 1
    assert [token.id for token in delta.tokens] == ids[: delta.count]
    assert_cold(models[kind], job, [delta])


def test_a_banned_end_token_does_not_end(models: dict[str, Model], kind: str) -> None:
    end = _greedy(models, kind, 1)[0]
    banned = Sampling(logit_bias={end: -100})
    job = Job(kind, (prompt(5),), 20, sampling=banned, end_tokens=frozenset([end]))
    delta = _one(models, job)
    assert (delta.finish, delta.count) == ("length", 20)
    assert_cold(models[kind], job, [delta])


def test_the_models_positions_end_an_answer(models: dict[str, Model]) -> None:
    """512 positions; the last token needs none."""
    for length, made in ((510, 3), (512, 1)):
        job = Job("attention", (prompt(length),), 50)
        delta = _one(models, job)
        assert (delta.finish, delta.count) == ("length", made)
        assert_cold(models["attention"], job, [delta])


def test_a_stop_string_is_held_back(models: dict[str, Model], kind: str) -> None:
    text = models[kind].lm.generate(prompt(5), max_tokens=30)
    job = Job(kind, (prompt(5),), 30, stop=(text[9:12],))
    delta = _one(models, job)
    assert (delta.finish, delta.text) == ("stop", text[: text.find(text[9:12])])
    assert_cold(models[kind], job, [delta])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "no"}, "no model 'no'"),
        ({"prompts": ((),)}, "empty"),
        ({"prompts": ((5,), (270,))}, "prompt 1: .*270"),
        ({"prompts": ()}, "prompt"),
        ({"n": 0}, "n = 0"),
        ({"max_tokens": -1}, "-1"),
        ({"prompts": (prompt(513),)}, "513 .* 512"),
        ({"keep": "name"}, "no.* cache|cache"),
    ],
)
def test_a_job_that_cannot_run_is_refused(
    models: dict[str, Model], change: dict[str, Any], message: str
) -> None:
    values: dict[str, Any] = {"model": "attention", "prompts": ((5,),), "max_tokens": 1}
    with scheduling(models) as scheduler:
        with pytest.raises(ValueError, match=message):
            scheduler.submit(Job(**values | change))
        assert scheduler.stats().submitted == 0


def test_a_complete_grammar_ends_each_choice_by_itself(models: dict[str, Model], kind: str) -> None:
    lm = models[kind].lm
    grammars = Grammars(lm.tokenizer, lm.config.vocab_size, lm.config.end_token_ids)
    model = Model(lm, grammars)
    spec = GrammarSpec("regex", "[0-9]{2,4}x")
    job = Job(kind, (prompt(5), prompt(6)), 20, n=3, sampling=WARM, grammar=spec, logprobs=1)
    with scheduling({kind: model}, max_streams=4) as scheduler:
        found = wait(scheduler.submit(job))
    assert all(re.fullmatch("[0-9]{2,4}x", delta.text) for delta in found)
    assert {delta.finish for delta in found} == {"grammar"}
    assert_cold(model, job, found)


# --- news --------------------------------------------------------------------


def test_news_that_wait_are_one_delta_a_choice(models: dict[str, Model]) -> None:
    """Nobody reads until both choices have ended."""
    job = Job("recurrent", (prompt(5),), 40, n=2, sampling=WARM, logprobs=0)
    with scheduling(models) as scheduler:
        ticket = scheduler.submit(job)
        scheduler.call(lambda: None).result()
        while not ticket.finished:
            scheduler.call(lambda: None).result()
        assert not ticket.done
        found = ticket.take()
        assert ticket.done
        assert ticket.take() == []
    assert_cold(models["recurrent"], job, found)


def test_follow_brings_each_token_when_it_is_made(
    models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model makes the next token only when the reader has the last one."""
    monkeypatch.setattr("nomatmul.serve.bridge.WAKE_SECONDS", 0.0)
    read = threading.Semaphore(1)

    def step(original: Any, *arguments: Any) -> Any:
        assert read.acquire(timeout=30)
        return original(*arguments)

    async def texts(ticket: Ticket) -> list[str]:
        found = []
        async for news in follow(ticket):
            found += [delta.text for delta in news]
            read.release()
        return found

    with scheduling({"box": stepping(models["box"], step)}) as scheduler:
        ticket = scheduler.submit(Job("box", (prompt(5),), 6))
        found = asyncio.run(asyncio.wait_for(texts(ticket), 60))
    assert len(found) == 6
    assert "".join(found) == models["box"].lm.generate(prompt(5), max_tokens=6)


def test_a_loop_is_woken_once_for_all_its_tickets() -> None:
    calls = []

    class Loop:
        def call_soon_threadsafe(self, *call: Any) -> None:
            calls.append(call)

    bell, loops = Bell(), [Loop(), Loop()]
    for number in range(6):
        ticket = Ticket(Job("", ((1,),), 1))
        if number < 4:
            ticket.reader = (loops[number % 2], asyncio.Event())  # type: ignore[assignment]
        bell.add(ticket)
        bell.add(ticket)
    bell.ring()
    assert [len(events) for _, events in calls] == [2, 2]
    bell.ring()
    assert len(calls) == 2


def test_a_closed_event_loop_harms_nobody(models: dict[str, Model]) -> None:
    loop = asyncio.new_event_loop()
    with scheduling(models, start=False) as scheduler:
        left, other = (scheduler.submit(Job("recurrent", (prompt(5),), 5)) for _ in range(2))
        left.reader = (loop, asyncio.Event())
        loop.close()
        scheduler.start()
        assert wait(other)[0].finish == "length"
