"""Vectors of texts by a causal model: the hidden state behind the last token, divided by its
length.

Legend: B texts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from nomatmul.engine.language_model import LanguageModel
    from nomatmul.engine.language_text import Prompt
    from nomatmul.engine.state import Float

_TOGETHER = 16  # texts that go through the layers in one step


def embed_texts(lm: LanguageModel, texts: Sequence[Prompt]) -> Float:
    """Return float32 [B, D] of length 1; see LanguageModel.embed."""
    if isinstance(texts, str) or not len(texts):
        raise ValueError("embed takes a list of texts, at least one")
    ids = []
    for number, text in enumerate(texts):
        try:
            ids.append(lm.embedding_ids(text))
        except ValueError as error:
            raise ValueError(f"text {number}: {error}") from None
    # of like length side by side; none computes padding, so only the memory gains
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    vectors_BD = np.empty((len(ids), lm.config.hidden_size), np.float32)
    for start in range(0, len(order), _TOGETHER):
        part = order[start : start + _TOGETHER]
        states = [lm.backend.new_state() for _ in part]
        vectors_BD[part] = lm.backend.step(states, [ids[number] for number in part], "hidden")
    length_B1 = np.sqrt(np.sum(vectors_BD * vectors_BD, axis=1, keepdims=True, dtype=np.float64))
    return (vectors_BD / np.maximum(length_B1, 1e-12)).astype(np.float32)
