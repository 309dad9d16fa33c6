"""A text as it is made: an iterator of pieces that knows afterwards what it made and why it
ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from nomatmul.engine.text import Detokenizer, StopCutter


class TextStream:
    """Iterator over pieces of text.

    token_ids: tokens made so far (an end token is not among them). finish_reason: None while it
    runs, then "length" (max_tokens), "stop" (a stop string) or "end" (the model's end token).
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int],
        tokens: Iterator[int],
        stop: Sequence[str],
        end_token: int | None,
    ) -> None:
        self.prompt_ids = list(prompt_ids)
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._tokens = tokens
        self._end_token = end_token
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._cutter = StopCutter(stop)
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the stream early; a session that it feeds then holds all tokens made so far."""
        self._pieces.close()

    def _run(self) -> Any:
        reason = "length"
        try:
            for token in self._tokens:
                if token == self._end_token:
                    reason = "end"
                    break
                self.token_ids.append(token)
                piece = self._cutter.push(self._detokenizer.push(token))
                if piece:
                    yield piece
                if self._cutter.stopped:
                    break
            if not self._cutter.stopped:
                rest = self._cutter.push(self._detokenizer.finish())
                if not self._cutter.stopped:
                    rest += self._cutter.finish()
                if rest:
                    yield rest
            self.finish_reason = "stop" if self._cutter.stopped else reason
        finally:
            self._tokens.close()  # type: ignore[attr-defined]
