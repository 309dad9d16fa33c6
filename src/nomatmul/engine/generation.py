"""From a model's logits to a text: one stream, or many texts side by side.

What a sequence does between two steps of the model is written once, in `Generation` (logits to
tokens) and `TextWriter` (tokens to text, why it ended); a stream, a batch and a server differ in
who steps the model.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from nomatmul.engine.sampling import Sampler
from nomatmul.engine.text import Detokenizer, StopCutter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from nomatmul.engine.session import Session, Stepper
    from nomatmul.engine.state import Float

_LANES = 16  # texts of a batch that are written side by side


class Matcher(Protocol):
    """A grammar that has read the tokens of a text so far."""

    @property
    def done(self) -> bool:
        """Whether the text is complete: nothing but an end token may follow."""

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, bool [V]; end tokens where the text may end here."""

    def accept(self, token: int) -> None:
        """Go on by an allowed token that is no end token."""


class TextWriter:
    """The text of one sequence while its tokens are made.

    end_tokens: each of them ends the text. token_ids: tokens made so far (an end token is not
    among them, it is `end_token`). finish_reason: None while it runs, then "length" (max_tokens),
    "stop" (a stop string), "end" (an end token) or "grammar" (a matcher's text is complete).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop: Sequence[str],
        end_tokens: Iterable[int],
    ) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.end_token: int | None = None
        self._end_tokens = frozenset(end_tokens)
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._cutter = StopCutter(stop)

    def push(self, token: int) -> str:
        """Return the text that is certain after one more token; the token may end the text."""
        if token in self._end_tokens:
            self.end_token = token
            return self.finish("end")
        self.token_ids.append(token)
        piece = self._cutter.push(self._detokenizer.push(token))
        if self._cutter.stopped:
            self.finish_reason = "stop"
        return piece

    def finish(self, reason: str) -> str:
        """End the text and return what was held back of it."""
        rest = self._cutter.push(self._detokenizer.finish())
        if not self._cutter.stopped:
            rest += self._cutter.finish()
        self.finish_reason = "stop" if self._cutter.stopped else reason
        return rest


class TextStream:
    """Iterator over pieces of text.

    tokens: the token ids as they are made. end_tokens: an id or several. prompt_ids, token_ids,
    end_token and finish_reason: see `TextWriter`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        tokens: Generator[int, None, None],
        stop: Sequence[str],
        end_tokens: int | Iterable[int] | None,
    ) -> None:
        self.prompt_ids = list(prompt_ids)
        self._tokens = tokens
        ends = (end_tokens,) if isinstance(end_tokens, int) else end_tokens or ()
        self._writer = TextWriter(tokenizer, prompt_ids, stop, ends)
        self._pieces: Generator[str, None, None] = self._run()

    @property
    def token_ids(self) -> list[int]:
        """Tokens made so far."""
        return self._writer.token_ids

    @property
    def end_token(self) -> int | None:
        """The end token that ended the text; None where something else did."""
        return self._writer.end_token

    @property
    def finish_reason(self) -> str | None:
        """Why the text ended; None while it runs, or where it was closed early."""
        return self._writer.finish_reason

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the stream early; a session that it feeds then holds all tokens made so far."""
        self._pieces.close()

    def _run(self) -> Generator[str, None, None]:
        try:
            for token in self._tokens:
                piece = self._writer.push(token)
                if piece:
                    yield piece
                if self._writer.finish_reason:
                    return
            if rest := self._writer.finish("length"):
                yield rest
        finally:
            self._tokens.close()


class Generation:
    """The tokens of one sequence as a state machine: it asks for logits and never runs the model.

    needs: the ids to feed next, whose last logits `take` is to be given; [] when enough tokens are
    made. unseen: what the model has not seen yet of what a session that goes on must have seen. A
    driver may step any number of sequences together.
    """

    def __init__(self, prompt_ids: Sequence[int], max_tokens: int, sampler: Sampler) -> None:
        self.needs = list(prompt_ids) if max_tokens else []
        self.unseen = [] if max_tokens else list(prompt_ids)
        self._left, self._sampler = max_tokens, sampler

    def take(self, logits_V: Float, allowed: NDArray[np.bool_] | None = None) -> int:
        """Choose and return the next token; errors as of `Sampler.sample`."""
        self.needs, self.unseen = [], []
        token = self._sampler.sample(logits_V, allowed)
        self._left -= 1
        self.unseen = [token]
        self.needs = self.unseen if self._left else []
        return token


class TextGeneration:
    """As Generation, of a text: `take` returns what is certain after one more token.

    token: the last one that was chosen, an end token, too; None before the first. matcher: what
    the text must follow; its end ends the text.
    """

    def __init__(
        self, generation: Generation, writer: TextWriter, matcher: Matcher | None = None
    ) -> None:
        self._generation, self.writer, self._matcher = generation, writer, matcher
        self.token: int | None = None

    @property
    def needs(self) -> list[int]:
        """The ids to feed next; [] when the text has ended."""
        return [] if self.writer.finish_reason else self._generation.needs

    @property
    def unseen(self) -> list[int]:
        """What a session that goes on behind this text must yet be fed, [] or one token."""
        return self._generation.unseen

    @property
    def finish_reason(self) -> str | None:
        """Why the text ended, None while it runs: see `TextWriter`."""
        return self.writer.finish_reason

    def take(self, logits_V: Float) -> str:
        """Choose the next token and return the text that is certain now.

        Errors as of `Sampler.sample`; the text is over then.
        """
        matcher = self._matcher
        allowed = None if matcher is None else matcher.allowed()
        self.token = self._generation.take(logits_V, allowed)
        piece = self.writer.push(self.token)
        if self.writer.finish_reason:
            return piece
        if matcher is not None:
            matcher.accept(self.token)
            if matcher.done:
                return piece + self.writer.finish("grammar")
        return piece if self._generation.needs else piece + self.writer.finish("length")


def make_tokens(
    lm: Stepper, generation: Generation, session: Session | None = None
) -> Generator[int, None, None]:
    """Yield made tokens for as long as they are asked for.

    Each token is fed back when the next one is asked for; the last one only into a session of the
    caller, who may go on from it. A step that was interrupted changed nothing, so its token is fed
    then, too; an interrupted prompt is not.
    """
    sequence = session if session is not None else lm.session()
    try:
        while generation.needs:
            yield generation.take(sequence.append(generation.needs))
    finally:
        if session is not None and generation.unseen:
            sequence.append(generation.unseen, logits="none")


def write_texts(lm: Stepper, texts: Sequence[TextGeneration]) -> list[str]:
    """Return the text that each of them makes, written side by side."""
    pieces: list[list[str]] = [[] for _ in texts]
    waiting = [number for number, text in enumerate(texts) if text.needs]
    live: dict[int, Session] = {}
    while waiting or live:
        while waiting and len(live) < _LANES:
            live[waiting.pop(0)] = lm.session()
        rows = lm.step(list(live.values()), [texts[number].needs for number in live])
        for number, logits_V in zip(live, rows, strict=True):
            pieces[number].append(texts[number].take(logits_V))
        live = {number: session for number, session in live.items() if texts[number].needs}
    return ["".join(parts) for parts in pieces]
