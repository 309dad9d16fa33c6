"""From a model's logits to a text: one stream, or many texts side by side.

What a sequence does between two steps of the model is written once, in `Generation` (logits to
tokens) and `TextWriter` (tokens to text, why it ended); a stream, a batch and a server differ in
who steps the model.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from nomatmul.engine.sampling import Sampler
from nomatmul.engine.text import Detokenizer, StopCutter

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from nomatmul.engine.session import Session, Stepper
    from nomatmul.engine.state import Float

_LANES = 16  # texts of a batch that are written side by side


class TextWriter:
    """The text of one sequence while its tokens are made.

    end_tokens: each of them ends the text. token_ids: tokens made so far (an end token is not
    among them, it is `end_token`). finish_reason: None while it runs, then "length" (max_tokens),
    "stop" (a stop string) or "end" (an end token).
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

    def take(self, logits_V: Float) -> int:
        """Choose and return the next token. Raises ValueError for logits that are not finite."""
        self.needs, self.unseen = [], []
        token = self._sampler.sample(logits_V)
        self._left -= 1
        self.unseen = [token]
        self.needs = self.unseen if self._left else []
        return token


class TextGeneration:
    """As Generation, of a text: `take` returns what is certain after one more token."""

    def __init__(self, generation: Generation, writer: TextWriter) -> None:
        self._generation, self.writer = generation, writer

    @property
    def needs(self) -> list[int]:
        """The ids to feed next; [] when the text has ended."""
        return [] if self.writer.finish_reason else self._generation.needs

    def take(self, logits_V: Float) -> str:
        """Choose the next token and return the text that is certain now."""
        piece = self.writer.push(self._generation.take(logits_V))
        if not self.writer.finish_reason and not self._generation.needs:
            piece += self.writer.finish("length")
        return piece


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
