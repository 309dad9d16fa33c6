"""Whose turn it is, what is refused, what is cut off, and what a fault ends."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from support.scheduling import Model, assert_cold, prompt, scheduling, stepping, tiny_model, wait

from nomatmul.engine import Sampling
from nomatmul.serve.job import Busy, Closing, Delta, Job, Ticket
from nomatmul.serve.scheduler import Scheduler

BAD = 200  # a token whose presence makes steps fail


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A recurrent model."""
    return tiny_model(tmp_path_factory.mktemp("models"), "recurrent")


class Gate:
    """Steps of a model that wait for leave, and are noted."""

    def __init__(self, model: Model) -> None:
        self.model = stepping(model, self._step)
        self.steps: list[list[int]] = []  # how many ids each session was fed
        self._leave = threading.Semaphore(0)
        self._entered = threading.Semaphore(0)
        self.open = False

    def _step(self, original: Any, sessions: Any, ids: Any, want: str) -> Any:
        self.steps.append([len(part) for part in ids])
        self._entered.release()
        while not self.open:
            if self._leave.acquire(timeout=0.05):
                break
        return original(sessions, ids, want)

    def wait_for_step(self) -> None:
        """Until a step is under way that has no leave yet."""
        assert self._entered.acquire(timeout=30)

    def step(self) -> None:
        """Let one step end and the next one begin."""
        self._leave.release()
        self.wait_for_step()


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
    with scheduling({"m": model}, max_streams=1) as scheduler:
        endless = Job("m", (prompt(3),), 10**9, timeout=0.2)
        tickets = [scheduler.submit(endless) for _ in range(2)]
        for ticket in tickets:
            assert wait(ticket)[0].finish == "timeout"
        assert tickets[0].usage.completion_tokens > 0
        assert tickets[1].usage.completion_tokens == 0
        assert scheduler.stats().timed_out == 2
        assert wait(scheduler.submit(Job("m", (prompt(3),), 2, timeout=60)))[0].finish == "length"


# --- faults ------------------------------------------------------------------


def _failing(error: Callable[[], Exception]) -> Any:
    def step(original: Any, sessions: Any, ids: Any, want: str) -> Any:
        if any(BAD in part for part in ids):
            raise error()
        return original(sessions, ids, want)

    return step


def _some(scheduler: Scheduler) -> list[Ticket]:
    jobs = [Job("m", (prompt(9, n),), 6 + n, sampling=Sampling(seed=n)) for n in range(4)]
    bad = Job("m", ((*prompt(4), BAD, 5), prompt(4)), 5)
    return [scheduler.submit(job) for job in (*jobs[:2], bad, *jobs[2:])]


@pytest.mark.parametrize(
    ("error", "message", "logged"),
    [
        (
            partial(ValueError, "values are not finite"),
            "values are not finite",
            "values are not finite",
        ),
        (MemoryError, "not enough memory", "not enough memory"),
        (partial(KeyError, "a fault"), "a fault of the server; its log says more", "Traceback"),
    ],
)
def test_a_failing_prompt_ends_alone(
    model: Model,
    error: Callable[[], Exception],
    message: str,
    logged: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A step of the model fails as a whole; the scheduler finds out whose fault it is."""
    with scheduling({"m": stepping(model, _failing(error))}, start=False) as scheduler:
        tickets = _some(scheduler)
        scheduler.start()
        found = [wait(ticket) for ticket in tickets]
        stats = scheduler.stats()
    bad = found.pop(2)
    assert [delta.finish for delta in bad] == ["error", "length"]
    assert tickets[2].error == message
    assert logged in caplog.text
    assert bad[1].text == model.lm.generate(prompt(4), max_tokens=5)
    for ticket, deltas in zip(tickets[:2] + tickets[3:], found, strict=True):
        assert_cold(model, ticket.job, deltas)
        assert ticket.error is None
    assert (stats.finished, stats.failed, stats.running) == (4, 1, 0)


def test_logits_that_are_not_finite_end_their_choice(model: Model) -> None:
    """As above, where the step itself raises nothing."""

    def step(original: Any, sessions: Any, ids: Any, want: str) -> Any:
        rows = original(sessions, ids, want)
        return [
            row * np.float32(np.nan) if BAD in part else row
            for row, part in zip(rows, ids, strict=True)
        ]

    ends_badly = Job("m", ((*prompt(4), BAD),), 5)
    with scheduling({"m": stepping(model, step)}, start=False) as scheduler:
        tickets = [scheduler.submit(ends_badly), scheduler.submit(Job("m", (prompt(9),), 5))]
        scheduler.start()
        bad, good = [wait(ticket) for ticket in tickets]
    assert bad == [Delta(0, finish="error")]
    assert "not finite" in str(tickets[0].error)
    assert_cold(model, tickets[1].job, good)


class _Panic(BaseException):
    """As libraries in Rust have it."""


class _Broken:
    """A grammar whose code fails at its third token."""

    done, tokens = False, 0

    def compile(self, spec: Any) -> _Broken:
        return _Broken()

    def allowed(self) -> np.ndarray:
        return np.ones(270, bool)

    def accept(self, token: int) -> None:
        self.tokens += 1
        if self.tokens == 3:
            raise _Panic("a fault of ours")


def test_a_fault_of_our_own_code_ends_one_job(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    served = Model(model.lm, grammars=_Broken())
    with scheduling({"m": served}, start=False) as scheduler:
        spec: Any = "any"
        bad = scheduler.submit(Job("m", (prompt(4),), 9, grammar=spec))
        good = scheduler.submit(Job("m", (prompt(9),), 9))
        scheduler.start()
        assert (wait(bad)[0].finish, wait(good)[0].finish) == ("error", "length")
    assert bad.error == "a fault of the server; its log says more"
    assert "_Panic: a fault of ours" in caplog.text


def test_the_thread_survives_a_fault_of_the_scheduler(
    model: Model, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> None:
        raise _Panic

    with scheduling({"m": model}) as scheduler:
        with monkeypatch.context() as patch:
            patch.setattr("nomatmul.serve.batch.Batch.step", fail)
            tickets = [scheduler.submit(Job("m", (prompt(4),), 9)) for _ in range(20)]
            assert {wait(ticket)[0].finish for ticket in tickets} == {"error"}
        assert "_Panic" in caplog.text
        assert wait(scheduler.submit(Job("m", (prompt(4),), 9)))[0].finish == "length"
        assert scheduler.stats().running == 0


# --- the end -----------------------------------------------------------------


class _Flushed:
    """A cache that only notes that it is written."""

    flushed, max_bytes = 0, 1

    def find(self, model: str, ids: Any) -> Any:
        raise OSError("the cache is broken")

    def cuts(self, *_: Any) -> list[int]:
        raise OSError("the cache is broken")

    def keep(self, *_: Any, **__: Any) -> None:
        raise OSError("the cache is broken")

    def flush(self) -> None:
        assert threading.current_thread().name == "nomatmul-engine"
        self.flushed += 1


def test_a_broken_cache_costs_no_answer(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    cache = _Flushed()
    with scheduling({"m": model}, cache) as scheduler:
        ticket = scheduler.submit(Job("m", (prompt(40),), 5, n=2))
        assert_cold(model, ticket.job, wait(ticket))
    assert "the cache is broken" in caplog.text
    assert cache.flushed == 1


def test_closing_cuts_what_runs_and_what_waits(model: Model) -> None:
    gate, before = Gate(model), set(threading.enumerate())  # other tests' servers may run
    with scheduling({"m": gate.model}, max_streams=1) as scheduler:
        tickets = [scheduler.submit(Job("m", (prompt(3),), 10**9)) for _ in range(3)]
        gate.wait_for_step()
        gate.step()
        left = scheduler.call(lambda: 1)
        closing = threading.Thread(target=scheduler.close, args=(0,))
        closing.start()
        gate.open = True
        for ticket in tickets:
            assert wait(ticket)[0].finish == "shutdown"
        closing.join(30)
        assert not closing.is_alive()
        with pytest.raises(Closing):
            scheduler.submit(tickets[0].job)
        assert left.done()
        assert scheduler.stats().shut_down == 3
    left_over = set(threading.enumerate()) - before
    assert not [one for one in left_over if one.name == "nomatmul-engine"]


def test_closing_lets_running_choices_end(model: Model) -> None:
    """Within a grace that is long enough; what waits is ended at once."""
    gate = Gate(model)
    with scheduling({"m": gate.model}, max_streams=1) as scheduler:
        running = scheduler.submit(Job("m", (prompt(3),), 30))
        waiting = scheduler.submit(Job("m", (prompt(3),), 30))
        gate.wait_for_step()
        closing = threading.Thread(target=scheduler.close, args=(60,))
        closing.start()
        gate.open = True
        assert wait(waiting)[0].finish == "shutdown"
        assert_cold(model, running.job, wait(running))
        closing.join(30)
        assert not closing.is_alive()


@pytest.mark.parametrize("bad", [{"max_streams": 0}, {"max_queue": -1}, {"step_seconds": 0.0}])
def test_limits_that_cannot_work_are_refused(model: Model, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Scheduler({"m": model}, None, **bad)


def test_the_engine_waits_a_short_time_for_other_threads(model: Model) -> None:
    before = sys.getswitchinterval()
    with scheduling({"m": model}):
        assert sys.getswitchinterval() == pytest.approx(0.0005)
    assert sys.getswitchinterval() == pytest.approx(before)


def test_closing_before_the_start_ends_all(model: Model) -> None:
    with scheduling({"m": model}, start=False) as scheduler:
        ticket = scheduler.submit(Job("m", (prompt(3),), 30))
        left = scheduler.call(lambda: 1)
        scheduler.close(10)
        assert wait(ticket)[0].finish == "shutdown"
        with pytest.raises(Closing):
            left.result(0)
