"""Whose turn it is, what is refused, and what is cut off."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from support.scheduling import (
    Gate,
    Model,
    assert_cold,
    prompt,
    scheduling,
    tiny_model,
    wait,
)

from nomatmul.serve.job import Busy, Closing, Job


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A recurrent model."""
    return tiny_model(tmp_path_factory.mktemp("models"), "recurrent")


# --- turns -------------------------------------------------------------------


def test_a_client_with_many_jobs_does_not_starve_another(model: Model) -> None:
    with scheduling({"m": model}, max_streams=2, max_queue=1000, start=False) as scheduler:
        many = [scheduler.submit(Job("m", (prompt(3, n),), 2, client="a")) for n in range(1000)]
        one = scheduler.submit(Job("m", (prompt(3, 5000),), 2, client="b"))
        scheduler.start()
        wait(one)
        for ticket in many:
            scheduler.cancel(ticket)
        for ticket in many:
            wait(ticket)
    begun = sum(ticket.usage.queue_s is not None for ticket in many)
    began = one.usage.queue_s
    assert began is not None
    assert sum((ticket.usage.queue_s or 99) < began for ticket in many) <= 1
    assert begun < 1000


def test_choices_of_one_job_take_turns_with_others(model: Model) -> None:
    """Eight choices on two streams; another client's job has the next free stream."""
    gate = Gate(model)
    with scheduling({"m": gate.model}, max_streams=2) as scheduler:
        first = scheduler.submit(Job("m", (prompt(3),), 2, n=8, client="a"))
        gate.wait_for_step()
        second = scheduler.submit(Job("m", (prompt(4),), 1, client="b"))
        gate.open = True
        wait(second)
        found = wait(first)
    assert second.usage.total_s is not None
    assert first.usage.total_s is not None
    assert second.submitted + second.usage.total_s < first.submitted + first.usage.total_s
    assert_cold(model, first.job, found)


def test_prompts_of_clients_are_read_in_turn(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 tokens: client a has two prompts of 40, client b one of 16."""
    monkeypatch.setattr("nomatmul.serve.policy.Pace.chunk", lambda *_, **__: 8)
    gate = Gate(model)
    gate.open = True
    with scheduling({"m": gate.model}, max_streams=8, start=False) as scheduler:
        jobs = [("a", 40), ("a", 41), ("b", 16)]
        tickets = [
            scheduler.submit(Job("m", (prompt(count, count),), 1, client=client))
            for client, count in jobs
        ]
        scheduler.start()
        for ticket in tickets:
            wait(ticket)
    times = [ticket.usage.first_token_s for ticket in tickets]
    assert times[2] < times[0] < times[1]
    assert max(sum(step) for step in gate.steps) == 8
    # a, b, a, b and then a alone
    assert len(gate.steps) == 2 + 5 + 6


def test_a_long_prompt_does_not_hold_up_a_short_one_of_its_client(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other chunk of 8 is of the shorter one."""
    monkeypatch.setattr("nomatmul.serve.policy.Pace.chunk", lambda *_, **__: 8)
    gate = Gate(model)
    with scheduling({"m": gate.model}, start=False) as scheduler:
        long, short = (scheduler.submit(Job("m", (prompt(n, n),), 1)) for n in (800, 16))
        scheduler.start()
        gate.wait_for_step()
        for _ in range(4):
            gate.step()
        assert (short.finished, long.finished) == (True, False)
        gate.open = True
        wait(long)
    assert gate.steps == [[8]] * 102


def test_streams_go_on_while_a_long_prompt_is_read(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nomatmul.serve.policy.Pace.chunk", lambda *_, **__: 16)
    gate = Gate(model)
    with scheduling({"m": gate.model}, max_streams=8) as scheduler:
        stream = scheduler.submit(Job("m", (prompt(3),), 30))
        gate.wait_for_step()
        reading = scheduler.submit(Job("m", (prompt(160),), 1))
        gate.open = True
        wait(stream)
        wait(reading)
    assert gate.steps[1:11] == [[1, 16]] * 10


# --- limits ------------------------------------------------------------------


def test_a_full_queue_refuses_and_says_when_to_come_again(model: Model) -> None:
    """Two streams, three places; and one more for a client that has none."""
    with scheduling({"m": model}, max_streams=2, max_queue=3, start=False) as scheduler:
        job = Job("m", (prompt(3),), 2, client="a")
        tickets = [scheduler.submit(job) for _ in range(5)]
        with pytest.raises(Busy) as caught:
            scheduler.submit(job)
        assert 1 <= caught.value.retry_after <= 60
        for name in "bcd":
            other = Job("m", (prompt(3),), 2, client=name)
            tickets.append(scheduler.submit(other))
            with pytest.raises(Busy):
                scheduler.submit(other)
        with pytest.raises(Busy):
            scheduler.submit(Job("m", (prompt(3),), 2, client="e"))
        stats = scheduler.stats()
        assert (stats.waiting, stats.submitted, stats.refused) == (8, 8, 5)
        scheduler.start()
        for ticket in tickets:
            assert wait(ticket)[0].finish == "length"
        wait(scheduler.submit(job))


def test_what_can_begin_at_once_needs_no_place_in_the_queue(model: Model) -> None:
    with scheduling({"m": model}, max_streams=1, max_queue=0) as scheduler:
        for _ in range(3):
            assert wait(scheduler.submit(Job("m", (prompt(3),), 2)))[0].finish == "length"


def test_short_work_runs_between_steps_and_is_bounded(model: Model) -> None:
    def fail() -> None:
        raise SystemExit(3)

    with scheduling({"m": model}, max_streams=1, max_queue=2, start=False) as scheduler:
        name = scheduler.call(lambda: threading.current_thread().name)
        failing = scheduler.call(fail)
        left = scheduler.call(lambda: 1)
        assert left.cancel()
        with pytest.raises(Busy):
            scheduler.call(lambda: 1)
        scheduler.start()
        assert name.result(30) == "nomatmul-engine"
        with pytest.raises(SystemExit):
            failing.result(30)
        assert scheduler.call(lambda: 5).result(30) == 5
    with pytest.raises(Closing):
        scheduler.call(lambda: 1)


def test_a_cancelled_job_stops_within_one_step(model: Model) -> None:
    gate = Gate(model)
    with scheduling({"m": gate.model}, max_streams=2) as scheduler:
        ticket = scheduler.submit(Job("m", (prompt(3),), 1000, n=2))
        waiting = scheduler.submit(Job("m", (prompt(3),), 1000))
        gate.wait_for_step()
        for _ in range(4):
            gate.step()
        for one in (ticket, waiting, ticket):
            scheduler.cancel(one)
        before = len(gate.steps)
        gate.open = True
        found = wait(ticket)
        assert [delta.finish for delta in wait(waiting)] == ["cancelled"]
        scheduler.call(lambda: None).result(30)
        assert len(gate.steps) == before
        stats = scheduler.stats()
        assert (stats.running, stats.waiting, stats.cancelled) == (0, 0, 2)
    assert [delta.finish for delta in found] == ["cancelled"] * 2
    text = model.lm.generate(prompt(3), max_tokens=1000)
    assert all(text.startswith(delta.text) for delta in found)
    assert all(delta.count >= 4 for delta in found)
    assert waiting.usage.queue_s is None


def test_a_cancelled_prompt_is_read_on_for_another_job(model: Model) -> None:
    gate = Gate(model)
    with scheduling({"m": gate.model}, step_seconds=0.001) as scheduler:
        first, second = (scheduler.submit(Job("m", (prompt(90),), 3)) for _ in range(2))
        gate.wait_for_step()
        gate.step()
        scheduler.cancel(first)
        gate.open = True
        assert wait(first)[0].finish == "cancelled"
        assert_cold(model, second.job, wait(second))
        assert scheduler.stats().computed_tokens == 90


def test_time_limits_end_running_and_waiting_jobs(model: Model) -> None:
    endless = Job("m", (prompt(3),), 10**9)
    with scheduling({"m": model}, max_streams=1) as scheduler:
        running = scheduler.submit(endless)
        waiting = scheduler.submit(replace(endless, timeout=0.05))
        assert wait(waiting)[0].finish == "timeout"
        assert waiting.usage.completion_tokens == 0
        scheduler.cancel(running)
        wait(running)
        timed = scheduler.submit(replace(endless, timeout=0.5))
        assert wait(timed)[0].finish == "timeout"
        assert timed.usage.completion_tokens > 0
        assert scheduler.stats().timed_out == 2
        assert wait(scheduler.submit(Job("m", (prompt(3),), 2, timeout=60)))[0].finish == "length"
