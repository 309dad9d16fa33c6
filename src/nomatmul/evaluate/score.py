"""Loss, perplexity and bits per byte of a text under any model that gives log-probabilities.

Convention, the same for every backend: where the model's config has a `bos_token_id`, that token is
put in front and every token of the text is scored; where it has none, the first token of the text
is context only and is not scored. `loss` is the mean of -ln p over scored tokens (nats),
`perplexity` is exp(loss), and `bits_per_byte` is the sum of -log2 p over the bytes (UTF-8) of the
scored part of the text, so models with different tokenizers can be compared.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nomatmul.evaluate.windows import windows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nomatmul.formats.config import ModelConfig

CHARACTERS_PER_TOKEN = 32  # more than any text needs: how far to read for `max_tokens` tokens


class Scorer(Protocol):
    """What a model must offer to be evaluated; the engine's LanguageModel does, as does torch's."""

    @property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` of the model, or None."""

    @property
    def config(self) -> ModelConfig:
        """The model's dials."""

    def token_logprobs(self, ids: Sequence[int]) -> np.ndarray:
        """float64 [T-1]: natural log of p(ids[t] | ids[:t]) for t = 1..T-1."""


@dataclass(frozen=True)
class TextScore:
    """The result of `score_text`; `tokens` and `bytes` count what was scored."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    seconds: float
    tokens_per_second: float


def score_text(scorer: Scorer, text: str, *, max_tokens: int | None = None) -> TextScore:
    """Score `text`, or its first `max_tokens` tokens.

    Raises ValueError when the model has no tokenizer, when the text leaves nothing to score, or
    when the model answers with something that is not a probability.
    """
    if scorer.tokenizer is None:
        raise ValueError("this model has no tokenizer, so a text cannot be scored with it")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, it must be at least 1")
    ids, scored_bytes = _encode(scorer, text, max_tokens)
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} token(s): nothing is left to score")
    start = time.perf_counter()
    logprobs = np.asarray(_logprobs(scorer, ids), dtype=np.float64)
    seconds = time.perf_counter() - start
    assert logprobs.shape == (len(ids) - 1,), (logprobs.shape, len(ids))
    if not np.isfinite(logprobs).all() or logprobs.max() > 1e-6:
        raise ValueError("the model's probabilities are not finite: its weights are damaged")
    nats = float(-logprobs.sum())
    loss = nats / len(logprobs)
    return TextScore(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # beyond, float64 has no number for it
        bits_per_byte=nats / math.log(2) / max(scored_bytes, 1),
        tokens=len(logprobs),
        bytes=scored_bytes,
        seconds=seconds,
        tokens_per_second=len(logprobs) / max(seconds, 1e-9),
    )


def _logprobs(scorer: Scorer, ids: Sequence[int]) -> np.ndarray:
    """[T-1], in windows where an engine's model with attention has fewer positions than tokens."""
    limit = getattr(scorer, "max_length", None)
    if limit is None or len(ids) - 1 <= limit:
        return scorer.token_logprobs(ids)
    return np.concatenate(
        [
            scorer.token_logprobs(ids[start : end + 1])[first - start :]
            for start, end, first in windows(len(ids) - 1, limit)
        ]
    )


def _encode(scorer: Scorer, text: str, max_tokens: int | None) -> tuple[list[int], int]:
    """Token ids (bos in front where the config has one) and the bytes of the scored part."""
    bos = scorer.config.bos_token_id
    if max_tokens is not None:
        text = text[: (max_tokens + 1) * CHARACTERS_PER_TOKEN]
    encoding = scorer.tokenizer.encode(text, add_special_tokens=False)
    ids, offsets = list(encoding.ids), encoding.offsets
    first = 0 if bos is not None else 1  # the first scored token of the text
    if max_tokens is not None:
        ids = ids[: max_tokens + first]
    if len(ids) <= first:
        return ids[:1], 0
    begin = 0 if first == 0 else offsets[first][0]
    end = len(text) if max_tokens is None else offsets[len(ids) - 1][1]
    scored = len(text[begin:end].encode("utf-8"))
    return ([bos, *ids] if bos is not None else ids), scored
