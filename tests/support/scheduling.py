"""Jobs, the models they run on, and what a cold single run of one gives."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from chat_models import ATTENTION, RECURRENT, chat_model

from nomatmul.engine import LanguageModel
from nomatmul.engine.logprobs import top_logprobs
from nomatmul.serve.job import Delta, Job, Ticket
from nomatmul.serve.scheduler import Scheduler

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
CONFIGS = {"recurrent": RECURRENT, "attention": ATTENTION}


@dataclasses.dataclass
class Model:
    """A served model, as far as the scheduler looks."""

    lm: LanguageModel
    grammars: Any = None
    end_tokens: frozenset[int] = frozenset()


def tiny_model(directory: Any, kind: str) -> Model:
    """A random model of a byte-level vocabulary of 270; "attention" has 512 positions."""
    return Model(chat_model(directory, CONFIGS[kind], TEMPLATE))


@contextmanager
def scheduling(
    models: dict[str, Model], cache: Any = None, *, start: bool = True, **options: Any
) -> Iterator[Scheduler]:
    """A scheduler that ends with the block."""
    scheduler = Scheduler(models, cache, **options)
    try:
        if start:
            scheduler.start()
        yield scheduler
    finally:
        scheduler.close(0)


def wait(ticket: Ticket, seconds: float = 60) -> list[Delta]:
    """One `Delta` a choice, when all have ended; of a thread without an event loop."""
    import asyncio

    from nomatmul.serve.bridge import collect

    return asyncio.run(asyncio.wait_for(collect(ticket), seconds))


def prompt(count: int, seed: int = 0) -> tuple[int, ...]:
    """Token ids of the tiny models, of printable ASCII."""
    return tuple(np.random.default_rng(seed).integers(0, 94, count).tolist())


Row = tuple[int, float | None, tuple[tuple[int, float], ...]]


def rows(delta: Delta) -> list[Row]:
    """Numbers of the tokens of a choice."""
    return [
        (token.id, token.logprob, tuple((one, value) for one, _, value in token.top))
        for token in delta.tokens
    ]


def cold(model: Model, job: Job, index: int) -> tuple[str, str | None, int, list[Row]]:
    """(text, finish, tokens made, rows of tokens) of one choice computed alone, id by id."""
    lm, ids = model.lm, job.prompts[index // job.n]
    text = lm.text_generation(
        ids,
        job.max_tokens,
        dataclasses.replace(job.sampling, seed=(job.sampling.seed or 0) + index),
        job.stop,
        end_tokens=job.end_tokens | model.end_tokens,
        matcher=None if job.grammar is None else model.grammars.compile(job.grammar),
    )
    session, found, pieces, made = lm.session(), [], [], 0
    if job.echo and job.logprobs is not None:
        found.append((ids[0], None, ()))
        logits_TV = lm.logits(ids)
        for row_V, token in zip(logits_TV, ids[1:], strict=False):
            found.append(_row(row_V, token, job.logprobs))
    feed: Sequence[int] = ids if job.max_tokens else ()
    while feed:
        for token in feed:
            logits_V = session.append([token])
        pieces.append(text.take(logits_V))
        assert text.token is not None
        made += 1
        if job.logprobs is not None:
            found.append(_row(logits_V, text.token, job.logprobs))
        feed = text.needs
    return "".join(pieces), text.finish_reason or "length", made, found


def _row(logits_V: np.ndarray, token: int, count: int) -> Row:
    logprob, best = top_logprobs(logits_V, token, count)
    return token, logprob, tuple(best)


def assert_cold(model: Model, job: Job, found: Sequence[Delta]) -> None:
    """Each choice has the bytes of a cold single run."""
    assert len(found) == job.choices
    for index, delta in enumerate(found):
        assert (delta.text, delta.finish, delta.count, rows(delta)) == cold(model, job, index)


def stepping(model: Model, step: Callable[..., Any]) -> Model:
    """The same model whose every step goes through `step(original, sessions, ids, want)`."""
    old = model.lm
    lm = old.on(old.backend)
    original = lm.step

    def through(sessions: Any, ids: Any, logits: Any = "last") -> Any:
        return step(original, sessions, ids, logits)

    lm.step = through  # type: ignore[method-assign]
    return dataclasses.replace(model, lm=lm)


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
