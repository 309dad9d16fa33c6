"""From a model's logits to a text: one stream, or many texts side by side.

What a sequence does between two steps of the model is written once, in `TextWriter` (tokens to
text, why it ended) and `Sampler`; a stream and a batch differ in who asks for the next step.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nomatmul.engine.sampling import Sampler
from nomatmul.engine.text import Detokenizer, StopCutter

if TYPE_CHECKING:
    from nomatmul.engine.language_model import LanguageModel
    from nomatmul.engine.session import Session
    from nomatmul.engine.state import Float

_LANES = 16  # texts of a batch that are written side by side


class TextWriter:
    """The text of one sequence while its tokens are made.

    end_tokens: each of them ends the text. token_ids: tokens made so far (an end token is not
    among them). finish_reason: None while it runs, then "length" (max_tokens), "stop" (a stop
    string) or "end" (an end token).
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int],
        stop: Sequence[str],
        end_tokens: Iterable[int],
    ) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._end_tokens = frozenset(end_tokens)
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._cutter = StopCutter(stop)

    def push(self, token: int) -> str:
        """Return the text that is certain after one more token; the token may end the text."""
        if token in self._end_tokens:
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

    tokens: the token ids as they are made. end_tokens: an id or several. prompt_ids, token_ids
    and finish_reason: see `TextWriter`.
    """

    def __init__(
        self,
        tokenizer: Any,
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


def make_tokens(
    lm: LanguageModel,
    ids: list[int],
    max_tokens: int,
    sampler: Sampler,
    session: Session | None = None,
) -> Generator[int, None, None]:
    """Yield made tokens for as long as they are asked for.

    Each token is fed back when the next one is asked for; the last one only into a session of the
    caller, who may go on from it. A step that was interrupted changed nothing, so its token is fed
    then, too; an interrupted prompt is not.
    """
    sequence = session if session is not None else lm.session()
    unseen: list[int] = ids if max_tokens == 0 else []  # made, and not fed yet
    fed = ids
    try:
        for _ in range(max_tokens):
            logits_V = sequence.append(fed)
            unseen = []
            unseen = fed = [sampler.sample(logits_V)]
            yield fed[0]
    finally:
        if session is not None and unseen:
            sequence.append(unseen, logits="none")


class _Lane:
    """One text of a batch."""

    def __init__(
        self, lm: LanguageModel, ids: list[int], sampler: Sampler, writer: TextWriter, left: int
    ) -> None:
        self.session, self.waiting = lm.session(), ids
        self.text = ""
        self._sampler, self._writer, self._left = sampler, writer, left

    def take(self, logits_V: Float) -> None:
        """Choose the next token and write its text."""
        token = self._sampler.sample(logits_V)
        self.waiting = [token]
        self.text += self._writer.push(token)
        self._left -= 1
        if self._left == 0 and not self.done:
            self.text += self._writer.finish("length")

    @property
    def done(self) -> bool:
        return self._writer.finish_reason is not None


def write_texts(
    lm: LanguageModel,
    prompts: Sequence[list[int]],
    max_tokens: int,
    samplers: Sequence[Sampler],
    stop: Sequence[str],
) -> list[str]:
    """Return the text that continues each prompt (token ids), written side by side."""
    if max_tokens == 0:
        return [""] * len(prompts)
    lanes = [
        _Lane(
            lm, ids, sampler, TextWriter(lm.tokenizer, ids, stop, lm.config.end_token_ids),
            max_tokens,
        )
        for ids, sampler in zip(prompts, samplers, strict=True)
    ]  # fmt: skip
    waiting = list(reversed(lanes))
    live: list[_Lane] = []
    while waiting or live:
        while waiting and len(live) < _LANES:
            live.append(waiting.pop())
        rows = lm.step([lane.session for lane in live], [lane.waiting for lane in live])
        for lane, logits_V in zip(live, rows, strict=True):
            lane.take(logits_V)
        live = [lane for lane in live if not lane.done]
    return [lane.text for lane in lanes]
