"""Log-probabilities of tokens, in the forms of /v1/chat/completions and of /v1/completions."""

from __future__ import annotations

import codecs
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from nomatmul.engine.text import BROKEN, byte_alphabet, spelt_bytes
from nomatmul.serve.job import Token

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TokenBytes:
    """The bytes of a tokenizer's tokens. Special ones and `ends`, no part of a text, have none."""

    def __init__(self, tokenizer: Tokenizer, ends: Collection[int]) -> None:
        self._tokenizer = tokenizer
        added = self._tokenizer.get_added_tokens_decoder()
        special = {index for index, token in added.items() if token.special}
        self._special = special | set(ends)

    def of(self, token: int, text: str) -> bytes | None:
        """The bytes of a token, whose own text is known; None for a special one."""
        if token in self._special:
            return None
        name = self._tokenizer.id_to_token(token) or ""
        if BROKEN not in text or not (name.startswith("<0x") or set(name) <= set(byte_alphabet())):
            return text.encode()
        return spelt_bytes(name)  # it is a piece of a character

    def shown(self, token: int, text: str) -> str:
        """A token's text; of a piece of a character its bytes, as OpenAI writes them."""
        data = self.of(token, text)
        if data is None or data == text.encode():
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(names: TokenBytes, tokens: list[Token]) -> dict[str, Any]:
    """`logprobs` of a chat's choice. The texts of tokens whose bytes are given join to the answer,
    but for what a stop string cut off."""

    def entry(token: int, text: str, logprob: float | None) -> dict[str, Any]:
        data = names.of(token, text)
        value = {"token": names.shown(token, text), "logprob": logprob}
        return {**value, "bytes": None if data is None else list(data)}

    content = [
        {
            **entry(token.id, token.text, token.logprob),
            "top_logprobs": [entry(*other) for other in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


class TextLogprobs:
    """`logprobs` of one choice of /v1/completions, piece by piece: offsets count characters.

    text: of an echoed prompt, which begins the choice's text.
    """

    def __init__(self, names: TokenBytes, count: int, text: str = "") -> None:
        self._names, self._count = names, count
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset, self._text = 0, text

    def fields(self, tokens: list[Token]) -> dict[str, Any]:
        """The four lists for the next tokens. Of two tokens that look alike, the likelier one
        stands in `top_logprobs`."""
        offsets = [self._advance(token) for token in tokens]
        return {
            "tokens": [self._names.shown(token.id, token.text) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens] if self._count else None,
            "text_offset": offsets,
        }

    def _advance(self, token: Token) -> int:
        start = self._offset
        data = self._names.of(token.id, token.text) or b""
        if not start and data[:1] == b" " and self._text and not self._text.startswith(" "):
            data = data[1:]  # which tokenizers put in front of a text and take away again
        self._offset += len(self._decoder.decode(data))
        return start

    def _top(self, token: Token) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        found: dict[str, float] = {}
        for other, text, logprob in (*token.top, (token.id, token.text, token.logprob)):
            found.setdefault(self._names.shown(other, text), logprob)
        return found
