"""Answers while they are written, and what they share: the names of tokens, the state cache.

An answer asks for ids to be fed to its session and is given the logits behind them; who steps the
model is `batch`'s concern. Legend: V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.logprobs import top_logprobs
from nomatmul.serve.job import Job, Ticket, Token

if TYPE_CHECKING:
    from nomatmul.engine.language_model import LanguageModel
    from nomatmul.engine.session import Session
    from nomatmul.engine.state import Float
    from nomatmul.serve.cache import StateCache, Tokens
    from nomatmul.serve.grammar import Grammars

log = logging.getLogger("nomatmul.serve")


class Served(Protocol):
    """What the scheduler needs of a `ServedModel` that writes text."""

    @property
    def lm(self) -> LanguageModel: ...
    @property
    def grammars(self) -> Grammars: ...


class TokenNames:
    """The text of single tokens of a model, each looked up once."""

    def __init__(self, lm: LanguageModel) -> None:
        self._tokenizer = lm.tokenizer
        self.of = functools.cache(self._text)

    def _text(self, token: int) -> str:
        """Behind itself, since decoders drop a leading space."""
        once = self._decoded([token])
        twice = self._decoded([token, token])
        return twice.removeprefix(once) if twice.startswith(once) else once

    def _decoded(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def scored(self, logits_V: Float, token: int, count: int) -> Token:
        """A token with its logprob and the `count` likeliest ones in its place."""
        logprob, best = top_logprobs(logits_V, token, count)
        top = tuple((one, self.of(one), value) for one, value in best)
        return Token(token, self.of(token), logprob, top)


class States:
    """The state cache of one model; a cache that fails costs time and never an answer.

    One that is None keeps nothing.
    """

    def __init__(self, lm: LanguageModel, name: str, cache: StateCache | None) -> None:
        self._lm, self._name, self._cache = lm, name, cache
        self.only_grows = lm.backend.layout.overwritten is None

    def __bool__(self) -> bool:
        return self._cache is not None

    def find(self, ids: Tokens) -> tuple[Session, int, Float | None]:
        """(session, how many of the ids it has seen, logits where it has seen all of them)."""
        if self._cache is not None:
            try:
                found = self._cache.find(self._name, ids)
                return found.session, found.length, found.logits
            except BaseException:  # a cache costs nobody an answer
                log.exception("the state cache failed; a prompt is computed whole")
        return self._lm.session(), 0, None

    def cuts(self, ids: Tokens, start: int, boundaries: Sequence[int]) -> list[int]:
        """Ascending positions at which states are kept, the end of the ids the last of them."""
        if self._cache is not None:
            try:
                return self._cache.cuts(self._name, ids, start, boundaries)
            except BaseException:  # a cache costs nobody an answer
                log.exception("the state cache failed; a prompt is kept at its end only")
        return [len(ids)]

    def keep(self, ids: Tokens, session: Session, logits_V: Float | None = None) -> None:
        """Note the state of a session that has seen just these ids."""
        if self._cache is not None:
            try:
                self._cache.keep(self._name, ids, session, logits_V)
            except BaseException:  # a cache costs nobody an answer
                log.exception("the state cache failed; a state is not kept")

    def pin(self, ids: Tokens, session: Session, logits_V: Float, job: Job) -> None:
        """Note a state under a job's name; raises ValueError where the cache refuses it."""
        assert self._cache is not None, "named states need a cache: checked at submission"
        self._cache.keep(self._name, ids, session, logits_V, job.keep, job.document)


class Choice:
    """One answer while it is written.

    Raises ValueError for what the model refuses: `LanguageModel.text_generation`.
    """

    wants_logits = True

    def __init__(
        self,
        ticket: Ticket,
        index: int,
        prompt: NDArray[np.int32],
        served: Served,
        names: TokenNames,
        seed: int,
    ) -> None:
        job = ticket.job
        self.ticket, self.index, self.names = ticket, index, names
        self._prompt = prompt
        self.session: Session | None = None  # until the prompt has been read
        matcher = None if job.grammar is None else served.grammars.compile(job.grammar)
        self.text = served.lm.text_generation(
            prompt,
            job.max_tokens,
            dataclasses.replace(job.sampling, seed=seed + index),
            job.stop,
            end_tokens=job.end_tokens,
            matcher=matcher,
        )

    @property
    def feed(self) -> Sequence[int]:
        """The ids to feed next."""
        return self.text.needs

    @property
    def ended(self) -> bool:
        """Whether the answer has its finish."""
        return not self.ticket.runs(self.index)

    @property
    def ids(self) -> NDArray[np.int32]:
        """The prompt and all made tokens."""
        writer = self.text.writer
        end = [] if writer.end_token is None else [writer.end_token]
        return np.concatenate([self._prompt, np.array([*writer.token_ids, *end], np.int32)])

    def begin(self, session: Session, logits_V: Float, echoed: list[Token]) -> None:
        """Go on behind the prompt, whose state and last logits are given."""
        self.session = session.fork()
        if echoed:
            self.ticket.put(self.index, tokens=echoed)
        if self.text.needs:
            self.took(logits_V)
        else:
            self.ticket.put(self.index, finish="length")

    def took(self, logits_V: Float) -> None:
        """Choose the next token; raises ValueError for logits that are not finite."""
        piece = self.text.take(logits_V)
        token, count = self.text.token, self.ticket.job.logprobs
        assert token is not None
        tokens = None if count is None else [self.names.scored(logits_V, token, count)]
        self.ticket.put(self.index, piece, 1, tokens, self.text.finish_reason)


class Tail:
    """The last token of an answer on its way into the state, which is then kept: the prefix of the
    conversation's next turn."""

    wants_logits = False

    def __init__(self, choice: Choice, states: States) -> None:
        assert choice.session is not None
        self.session, self.feed = choice.session, choice.text.unseen
        self._ids, self._states = choice.ids, states

    def took(self, logits_V: Float) -> None:
        """Keep the state that has seen all."""
        self.keep()

    def keep(self) -> None:
        """Keep what the session has seen."""
        self._states.keep(self._ids[: self.session.position], self.session)
