"""What a fault ends, and how the engine thread itself ends."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
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

from nomatmul.engine import Sampling
from nomatmul.serve.job import Closing, Delta, Job, Ticket
from nomatmul.serve.scheduler import Scheduler

BAD = 200  # a token whose presence makes steps fail


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A recurrent model."""
    return tiny_model(tmp_path_factory.mktemp("models"), "recurrent")


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
