"""Pieces of documents to token ids.

Documents are joined as [bos] text eos; bos only where the tokenizer has one that is not eos.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from nomatmul.formats.special_tokens import special_ids
from nomatmul.train.conversations import Conversation, ConversationEncoder

_BATCH_CHARACTERS = 1 << 20  # text handed to the tokenizer at once

Part = tuple[str | Conversation, bool, bool]  # what, whether it starts its document, ends it


class Chat(NamedTuple):
    """How conversations are rendered: the tokenizer's directory, and the template."""

    directory: Path
    template: str


def encode(tokenizer: Tokenizer, pieces: list[Part], chat: Chat) -> tuple[np.ndarray, int, int]:
    """(ids, UTF-8 bytes of the text that they decode to, how many pieces are conversations).

    Raises ValueError for a conversation that cannot be rendered.
    """
    special = special_ids(tokenizer)
    start = [] if special.bos in (None, special.eos) else [special.bos]
    parts: list[np.ndarray] = []
    text_bytes = conversations = position = 0
    encoder: ConversationEncoder | None = None
    while position < len(pieces):
        batch, length = [], 0
        while position < len(pieces) and length < _BATCH_CHARACTERS:
            batch.append(pieces[position])
            length += len(pieces[position][0])
            position += 1
        texts = [piece for piece, _, _ in batch if isinstance(piece, str)]
        encoded = iter(_ids_of(tokenizer, texts))
        text_bytes += sum(len(text.encode("utf-8")) for text in texts)
        for piece, starts, ends in batch:
            if isinstance(piece, Conversation):
                encoder = encoder or ConversationEncoder(tokenizer, *chat)
                inner = encoder.ids(piece)
                # As `TokenStream.bytes_of` counts: words that the template adds are text.
                text_bytes += len(tokenizer.decode(inner, skip_special_tokens=True).encode())
                conversations += 1
            else:
                inner = next(encoded)
            ids = (start if starts else []) + inner + ([special.eos] if ends else [])
            parts.append(np.asarray(ids, dtype=dtype_of(tokenizer)))
    return np.concatenate(parts), text_bytes, conversations


def _ids_of(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
    return [encoding.ids for encoding in encode(texts, add_special_tokens=False)]


def dtype_of(tokenizer: Tokenizer) -> np.dtype[Any]:
    """How ids are kept: two bytes, or four for vocabularies above 65,536."""
    return np.dtype("<u2" if tokenizer.get_vocab_size() <= 1 << 16 else "<u4")
