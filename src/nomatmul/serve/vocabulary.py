"""The tokens of a tokenizer as bytes, which is how a grammar sees them.

Legend: V vocabulary.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from nomatmul.engine.text import byte_alphabet
from nomatmul.formats.tokenizer import tokenizer_from_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """What llguidance asks of a tokenizer (its TokenizerWrapper, by the names of its attributes).

    tokens: bytes of each id, V of them. Ids without a text have none and never fit a grammar:
    special tokens, ids that only round the vocabulary up, and end tokens, which end a text whatever
    they spell.
    Raises ValueError for a tokenizer whose tokens are not pieces of bytes (WordPiece).
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_tokens: Collection[int]) -> None:
        self.tokens = _token_bytes(tokenizer, vocab_size, list(_parts(tokenizer.decoder)))
        self.special_token_ids = sorted(end_tokens)
        for end in end_tokens:
            self.tokens[end] = b""
        # without an end token llguidance appends one of its own, behind the model's vocabulary
        self.eos_token_id = min(end_tokens, default=None)
        self._tokenizer = _without_prefix(tokenizer)

    def __call__(self, text: str) -> list[int]:
        """The usual tokens of a text in the middle of another one."""
        ids = list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        written = text.encode()
        if b"".join(self.tokens[token] for token in ids) == written:
            return ids
        return self._longest(written)  # a normaliser changed the text, or has no token for it

    def _longest(self, written: bytes) -> list[int]:
        """The longest token that fits, again and again; bytes without a token are left out."""
        ids, at = [], 0
        while at < len(written):
            sizes = range(min(self._widest, len(written) - at), 0, -1)
            found = next((n for n in sizes if written[at : at + n] in self._by_bytes), None)
            if found is not None:
                ids.append(self._by_bytes[written[at : at + found]])
            at += found or 1
        return ids

    @functools.cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        return {spelt: token for token, spelt in enumerate(self.tokens) if spelt}

    @functools.cached_property
    def _widest(self) -> int:
        return max(map(len, self._by_bytes), default=0)


def _token_bytes(tokenizer: Tokenizer, size: int, decoders: list[dict[str, Any]]) -> list[bytes]:
    kinds = {decoder["type"] for decoder in decoders}
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
        raise ValueError(
            "structured output needs a byte-level tokenizer or one with byte fallback; the decoder"
            f" of this model's is {', '.join(sorted(kinds)) or 'none'}"
        )
    special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    alphabet = _alphabet() if "ByteLevel" in kinds else None
    tokens = [b""] * size
    for name, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if index < size and index not in special:
            tokens[index] = _spelt(name, alphabet)
    return tokens


def _alphabet() -> dict[int, str]:
    """For `str.translate`: a byte's letter becomes the byte in latin-1, all else what is none."""
    table = dict.fromkeys(range(256), "\uffff")
    return table | {ord(letter): chr(byte) for letter, byte in byte_alphabet().items()}


def _spelt(name: str, alphabet: dict[int, str] | None) -> bytes:
    if alphabet is not None:
        try:
            return name.translate(alphabet).encode("latin-1")
        except UnicodeEncodeError:  # as the decoder does: an added token with a space, for example
            return name.encode()
    if found := _BYTE_NAME.fullmatch(name):
        return bytes([int(found[1], 16)])
    return name.replace("\u2581", " ").encode()


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """What a tokenizer's component says of itself, part by part where it is a sequence of them.

    It is what is pickled of one; the tokenizer as a whole would bring its vocabulary along.
    """
    if component is not None:
        yield from _flat(json.loads(component.__getstate__()))


def _flat(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if part["type"] != "Sequence":
        yield part
        return
    for name in ("decoders", "normalizers", "pretokenizers"):
        for inner in part.get(name, ()):
            yield from _flat(inner)


def _without_prefix(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, or a copy, such that it puts no space in front of a text."""
    adding = [
        *(part["type"] == "Prepend" for part in _parts(tokenizer.normalizer)),
        *(part.get("add_prefix_space") for part in _parts(tokenizer.pre_tokenizer)),
        *(
            part.get("prepend_scheme", "never") != "never"
            for part in _parts(tokenizer.pre_tokenizer)
        ),
    ]
    if not any(adding):
        return tokenizer
    whole = json.loads(tokenizer.to_str())
    if whole["normalizer"] is not None:
        kept = [part for part in _flat(whole["normalizer"]) if part["type"] != "Prepend"]
        whole["normalizer"] = {"type": "Sequence", "normalizers": kept}
    for part in _flat(whole["pre_tokenizer"] or {"type": "Sequence"}):
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
        elif part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
    return tokenizer_from_bytes(json.dumps(whole).encode(), "tokenizer.json")
