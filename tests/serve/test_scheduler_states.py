"""Whatever else happens meanwhile, an answer is that of a cold single run.

A stateful test: random jobs that share prefixes, cancelled, read slowly, on a cache that evicts, of
a server that is restarted with the same directory.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.scheduling import Model, cold, prompt, rows, tiny_model, wait

from nomatmul.engine import Sampling
from nomatmul.serve.cache import Found, StateCache
from nomatmul.serve.job import Delta, Job, Ticket
from nomatmul.serve.scheduler import Scheduler

CUT = {"cancelled", "shutdown"}
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 20]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 3),
)


class Noting(StateCache):
    """A cache whose promises are noted."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.promised: dict[tuple[str, tuple[int, ...]], set[int]] = {}

    def find(self, model: str, ids: Any) -> Found:
        found = super().find(model, ids)
        key = (model, tuple(int(one) for one in ids))
        self.promised.setdefault(key, set()).add(found.length)
        return found


class Serving(RuleBasedStateMachine):
    """Every finished choice is compared; every ticket ends."""

    models: dict[str, Model]
    known: dict[tuple[Job, int], Any]  # cold runs, of all examples

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.texts: list[tuple[int, ...]] = [(), prompt(40), prompt(90, 1)]
        self.open: list[tuple[Ticket, list[Delta]]] = []
        self.again: list[Future[int]] = []
        self.cut: set[int] = set()
        self.start(20_000)

    def start(self, max_bytes: int) -> None:
        lms = {name: model.lm for name, model in self.models.items()}
        self.cache = Noting(lms, max_bytes, self.directory)
        self.scheduler = Scheduler(
            self.models, self.cache, max_streams=3, max_queue=500, step_seconds=0.003
        )
        self.scheduler.start()
        self.since = 0  # jobs submitted to it

    def stop(self, grace: float) -> None:
        self.scheduler.close(grace)
        self.cache.close()
        for ticket, taken in self.open:
            self.check(ticket, self.read(ticket, taken))
        self.open.clear()
        assert all(future.done() for future in self.again)
        self.again.clear()
        stats = self.scheduler.stats()
        over = stats.finished + stats.cancelled + stats.failed + stats.shut_down + stats.timed_out
        assert (stats.running, stats.waiting, stats.failed) == (0, 0, 0)
        assert stats.submitted == over

    # --- what may happen -----------------------------------------------------

    @rule(
        model=st.sampled_from(["recurrent", "attention"]),
        base=st.integers(0, 10**6),
        cut=st.sampled_from([1.0, 1.0, 0.8, 0.4]),
        more=st.integers(1, 40),
        seed=st.integers(0, 2),
        n=st.sampled_from([1, 1, 2, 5]),
        second=st.booleans(),
        max_tokens=st.integers(0, 12),
        sampling=samplings,
        logprobs=st.sampled_from([None, None, 0, 3]),
        echo=st.booleans(),
        stop=st.sampled_from([(), (), ("e",), ("ab", "Z")]),
        client=st.sampled_from("ab"),
    )
    def submit(
        self, model: str, base: int, cut: float, more: int, seed: int, second: bool, **fields: Any
    ) -> None:
        """A prompt that goes on from another one, or from where it is cut."""
        text = self.texts[base % len(self.texts)]
        ids = (*text[: int(len(text) * cut)], *prompt(more, seed))[-300:]
        prompts = (ids, (*ids[: len(ids) // 2], *prompt(3, seed))) if second else (ids,)
        boundaries = tuple(range(16, len(ids), 16))
        job = Job(model, prompts, boundaries=boundaries, **fields)
        self.open.append((self.scheduler.submit(job), []))
        self.since += 1
        # the next turn: the canonical ids of prompt and answer, whether it is ever made or not
        answer = self.cold(job, 0)[0]
        self.texts.append((*ids, *self.models[model].lm.prompt_ids(answer or "x", fresh=False)))

    @precondition(lambda self: self.open)
    @rule(
        at=st.integers(0, 10**6),
        logprobs=st.sampled_from([None, 2]),
        echo=st.booleans(),
        client=st.sampled_from("ab"),
    )
    def submit_again(self, at: int, **changes: Any) -> None:
        """A prompt that may just be read for another job."""
        job = dataclasses.replace(self.open[at % len(self.open)][0].job, **changes)
        self.open.append((self.scheduler.submit(job), []))
        self.since += 1

    @rule(model=st.sampled_from(["recurrent", "attention"]), base=st.integers(1, 10**6))
    def read_again(self, model: str, base: int) -> None:
        """A text that no job has asked for, or not yet."""
        ids = self.texts[1 + base % (len(self.texts) - 1)]
        self.again.append(self.scheduler.read_again(model, ids, (16, 32)))

    @precondition(lambda self: self.open)
    @rule(at=st.integers(0, 10**6))
    def cancel(self, at: int) -> None:
        ticket, _ = self.open[at % len(self.open)]
        self.cut.add(id(ticket))
        self.scheduler.cancel(ticket)

    @precondition(lambda self: self.open)
    @rule(at=st.integers(0, 10**6))
    def take(self, at: int) -> None:
        """A reader takes what is there, which may be nothing."""
        ticket, taken = self.open[at % len(self.open)]
        taken += ticket.take()

    @precondition(lambda self: self.open)
    @rule(at=st.integers(0, 10**6))
    def read_to_the_end(self, at: int) -> None:
        ticket, taken = self.open.pop(at % len(self.open))
        self.check(ticket, self.read(ticket, taken))

    @precondition(lambda self: self.since > 3)
    @rule(max_bytes=st.sampled_from([0, 3_000, 20_000, 10**9]), grace=st.sampled_from([0.0, 60.0]))
    def restart(self, max_bytes: int, grace: float) -> None:
        if grace == 0.0:
            self.cut |= {id(ticket) for ticket, _ in self.open}
        self.stop(grace)
        self.start(max_bytes)

    @invariant()
    def the_cache_keeps_its_limit(self) -> None:
        stats = self.scheduler.call(self.cache.stats).result(60)  # between two changes of it
        assert stats.bytes <= stats.max_bytes

    def teardown(self) -> None:
        while self.open:
            self.read_to_the_end(0)
        self.stop(60)
        shutil.rmtree(self.directory)

    # --- what must hold ------------------------------------------------------

    def cold(self, job: Job, index: int) -> Any:
        key = (dataclasses.replace(job, client="", boundaries=()), index)
        if key not in self.known:
            self.known[key] = cold(self.models[job.model], job, index)
        return self.known[key]

    def read(self, ticket: Ticket, taken: list[Delta]) -> list[Delta]:
        whole = [Delta(index) for index in range(ticket.job.choices)]
        if not ticket.done:
            taken += wait(ticket)
        for delta in taken:
            one = whole[delta.index]
            assert one.finish is None or delta.finish == one.finish or not delta.count
            one.text += delta.text
            one.count += delta.count
            one.tokens += delta.tokens
            one.finish = delta.finish or one.finish
        return whole

    def check(self, ticket: Ticket, found: list[Delta]) -> None:
        job, usage = ticket.job, ticket.usage
        assert ticket.error is None
        for delta in found:
            text, finish, made, tokens = self.cold(job, delta.index)
            if delta.finish in CUT:
                # of jobs that waited when a server closed, too
                assert text.startswith(delta.text)
                assert tokens[: len(delta.tokens)] == rows(delta)
            else:
                assert (delta.text, delta.finish, delta.count) == (text, finish, made)
                assert rows(delta) == tokens
        if {delta.finish for delta in found} & CUT:
            return
        assert usage.completion_tokens == sum(delta.count for delta in found)
        assert usage.cached_tokens + usage.computed_tokens == usage.prompt_tokens
        if len(job.prompts) == 1 and not (job.echo and job.logprobs is not None):
            # what the cache promised, or all where another job's reading of it was joined
            (ids,) = job.prompts
            promised = self.cache.promised.get((job.model, ids), {0})
            assert usage.cached_tokens in promised | {len(ids)}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[dict[str, Model]]:
    """Both kinds of state; no thread is left."""
    before = set(threading.enumerate())  # servers of other tests
    yield {kind: tiny_model(tmp_path / kind, kind) for kind in ("recurrent", "attention")}
    names = [thread.name for thread in set(threading.enumerate()) - before]
    assert not [name for name in names if name.startswith("nomatmul")]


def test_any_interleaving_gives_the_answers_of_cold_runs(served: dict[str, Model]) -> None:
    class Case(Serving):
        models, known = served, {}

    quick = settings(
        max_examples=15,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    run_state_machine_as_test(Case, settings=quick)
    Case.models, Case.known = {}, {}  # hypothesis keeps the class, and the core reports its models
