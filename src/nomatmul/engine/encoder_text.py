"""The text side of an encoder: tokens of texts, mask tokens, and answers back as text.

Legend: T tokens of one text, C classes, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.text import named_ids
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Text = str | tuple[str, str]
Float = NDArray[np.float32]
MASK_NAMES = ("[MASK]", "<mask>", "<|mask|>")


class TextSide:
    """A model's tokenizer with the checks that its texts need. The tokenizer is loaded at once.

    A tokenizer is shared by all threads, so its switches are set once, when it is loaded: texts
    with masks and texts to be cut have a tokenizer each, loaded when first asked for.
    Raises FormatError for a damaged tokenizer.json; methods raise ValueError without one.
    """

    def __init__(self, path: Path | None, config: ModelConfig) -> None:
        self._config, self._path = config, path
        self._tokenizer: Tokenizer | None = None
        if path is not None:
            # Like the trainer's: what is typed is text, even where it spells a special token.
            self._tokenizer = self._load(special_is_text=True)

    def _load(self, *, special_is_text: bool) -> Tokenizer:
        assert self._path is not None
        tokenizer = load_tokenizer(
            self._path, self._config.vocab_size, special_in_text=not special_is_text
        )
        return tokenizer

    @functools.cached_property
    def _masking(self) -> Tokenizer:
        return self._load(special_is_text=False)

    @functools.cached_property
    def _cutting(self) -> Tokenizer:
        tokenizer = self._load(special_is_text=True)
        limit = self._config.max_position_embeddings
        tokenizer.enable_truncation(limit, strategy="longest_first")
        return tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """The `tokenizers.Tokenizer`; raises ValueError for a model packed without one."""
        if self._tokenizer is None:
            raise ValueError(
                "this model was packed without a tokenizer, so it takes token ids only: logits(ids)"
            )
        return self._tokenizer

    @functools.cached_property
    def named_ids(self) -> NDArray[np.bool_]:
        """Which ids of the model's vocabulary the tokenizer has a token for, bool [V]."""
        return named_ids(self.tokenizer, self._config.vocab_size)

    @property
    def mask_token(self) -> str:
        """How the mask is spelt; raises ValueError for a tokenizer without one."""
        for name in MASK_NAMES:
            if self.tokenizer.token_to_id(name) is not None:
                return name
        raise ValueError(f"the tokenizer has no mask token: none of {', '.join(MASK_NAMES)}")

    def encode(self, texts: Text | Sequence[Text], truncate: bool) -> list[Tokens]:
        """Return the tokens of each text (or pair), special ones added; words like [SEP] are text.

        truncate: cut the longer text of what is too long for the model's positions.
        """
        batch = self._checked_texts(texts)
        tokenizer = self.tokenizer
        return [self._tokens(tokenizer, text, n, truncate) for n, text in enumerate(batch)]

    def encode_masked(self, text: str) -> tuple[list[int], list[int]]:
        """Return (ids, places of the mask token); here special tokens are told from text."""
        if not isinstance(text, str):
            raise ValueError(f"the text must be a string, got {type(text).__name__}")
        mask = self.mask_token
        ids = self._tokens(self._masking, _checked(text, 0), 0, False).ids
        mask_id = self.tokenizer.token_to_id(mask)
        places = [place for place, token in enumerate(ids) if token == mask_id]
        if not places:
            raise ValueError(f"the text has no {mask} to fill in")
        return ids, places

    def _tokens(self, tokenizer: Tokenizer, text: Text, number: int, truncate: bool) -> Tokens:
        """The tokens of one text as training had them, checked against the model's positions.

        Where the config names an end token (models that we trained): a start token (the end token
        where there is none), and every part with an end token behind it; else what the tokenizer
        itself adds. Lengths include special tokens.
        """
        parts = (text,) if isinstance(text, str) else text
        limit = self._config.max_position_embeddings
        end = next(iter(self._config.end_token_ids), None)
        if end is None:
            whole = tokenizer.encode(*parts)
            if len(whole.ids) > limit and truncate:
                whole = self._cutting.encode(*parts)
            tokens = Tokens([], [], [], [])
            tokens.add(whole)
        else:
            encodings = [tokenizer.encode(part, add_special_tokens=False) for part in parts]
            room = limit - 1 - len(parts)
            if truncate and room >= len(parts):
                _cut(encodings, room)
            start = self._config.bos_token_id
            tokens = Tokens([], [], [], [])
            tokens.add_special(end if start is None else start)
            for encoding in encodings:
                tokens.add(encoding)
                tokens.add_special(end)
        if not tokens.ids:
            raise ValueError(f"text {number} is empty")
        if len(tokens.ids) > limit:
            raise ValueError(
                f"text {number} has {len(tokens.ids)} tokens, the model has {limit} positions;"
                " shorten it, or ask for truncation"
            )
        return tokens

    def filled(self, ids: list[int], place: int, token: int) -> str:
        """The text of ids with a token put in at a place; other masks stay as they are spelt."""
        mask_id = self.tokenizer.token_to_id(self.mask_token)
        special = {token for token, added in _added(self.tokenizer).items() if added.special}
        kept = [token if at == place else i for at, i in enumerate(ids)]
        kept = [i for i in kept if i in (mask_id, token) or i not in special]
        return str(self.tokenizer.decode(kept, skip_special_tokens=False))

    def tagged(
        self, encoding: Tokens, scores_TC: Float, labels: tuple[str, ...]
    ) -> list[dict[str, Any]]:
        """The tokens of one text with their labels, without special tokens."""
        found = []
        special = encoding.special_tokens_mask
        for t, (start, end) in enumerate(encoding.offsets):
            if special[t]:
                continue
            top = int(scores_TC[t].argmax())
            found.append(
                {
                    "text": encoding.tokens[t],
                    "start": start,
                    "end": end,
                    "label": labels[top],
                    "score": float(scores_TC[t, top]),
                }
            )
        return found

    def _checked_texts(self, texts: Text | Sequence[Text]) -> list[Any]:
        single = isinstance(texts, str) or (
            isinstance(texts, tuple) and len(texts) == 2 and all(isinstance(x, str) for x in texts)
        )
        batch = [texts] if single else list(texts)
        if not batch:
            raise ValueError("there are no texts")
        for number, text in enumerate(batch):
            parts = text if isinstance(text, tuple | list) else (text,)
            if len(parts) > 2 or not parts or not all(isinstance(part, str) for part in parts):
                raise ValueError(f"text {number} must be a string or a pair of them, got {text!r}")
            for part in parts:
                _checked(part, number)
        return [tuple(text) if isinstance(text, list) else text for text in batch]


@dataclass
class Tokens:
    """Ids of a text with their spelling, places in the text, and which of them are special."""

    ids: list[int]
    tokens: list[str]
    offsets: list[tuple[int, int]]
    special_tokens_mask: list[int]

    def add(self, encoding: Encoding) -> None:
        """Append what a tokenizer made of a text."""
        self.ids += encoding.ids
        self.tokens += encoding.tokens
        self.offsets += encoding.offsets
        self.special_tokens_mask += encoding.special_tokens_mask

    def add_special(self, token: int) -> None:
        """Append a token that stands for no text."""
        self.ids.append(token)
        self.tokens.append("")
        self.offsets.append((0, 0))
        self.special_tokens_mask.append(1)


def _cut(encodings: list[Encoding], room: int) -> None:
    """Cut the ends until the texts fit into `room` tokens, the longer first, as training does."""
    over = sum(len(e.ids) for e in encodings) - room
    if over <= 0:
        return
    if len(encodings) == 1:
        encodings[0].truncate(room)
        return
    first = len(encodings[0].ids) >= len(encodings[1].ids)
    long, short = encodings if first else encodings[::-1]
    keep = max(len(long.ids) - over, min(len(short.ids), (room + 1) // 2))
    long.truncate(keep)
    short.truncate(room - keep)


def softmax(logits: Float) -> Float:
    """Probabilities over the last axis."""
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Float = e / e.sum(axis=-1, keepdims=True)
    return result


def best(scores: Float, count: int) -> NDArray[np.intp]:
    """The indices of the highest scores, best first; equal ones in the order of their index."""
    return np.argsort(-scores, kind="stable")[:count]


def _added(tokenizer: Tokenizer) -> dict[int, Any]:
    return dict(tokenizer.get_added_tokens_decoder())


def _checked(text: str, number: int) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text {number} is not UTF-8 (character {error.start})") from None
    return text
