"""The log-probability of a token, and the likeliest tokens beside it.

Legend: V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.ids import log_probabilities
from nomatmul.engine.sampling import largest


def top_logprobs(
    logits_V: NDArray[np.float32], token: int, count: int
) -> tuple[float, list[tuple[int, float]]]:
    """Return the natural log of the token's probability, and (id, log-probability) of the `count`
    likeliest tokens, likeliest first, equal ones by id; all of the vocabulary for a larger count.

    They are those of the model: no temperature, penalty, bias or grammar has a part in them. A
    token has the same one here as in `LanguageModel.token_logprobs`.
    """
    logprob = float(log_probabilities(logits_V[None], np.array([token]))[0])
    values = logits_V.astype(np.float64)
    normaliser = logprob - values[token]
    ids = largest(values, min(count, len(values))) if count else np.zeros(0, np.int64)
    # the token's own value again, not a rounding away from it: whoever compares them finds equals
    best = [(int(one), logprob if one == token else float(values[one] + normaliser)) for one in ids]
    return logprob, best
