"""How far two models' logits agree. Legend: T positions, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_BLOCK_ELEMENTS = 1 << 22  # of float64: several copies of a whole [T, V] would be gigabytes


def relative_error(found: Floats, wanted: Floats) -> float:
    """Root mean square of the difference over that of what is wanted."""
    power = float(np.sqrt(np.mean(np.square(wanted, dtype=np.float64))))
    error = float(np.sqrt(np.mean(np.square(found - wanted, dtype=np.float64))))
    return error / max(power, 1e-30)


def same_argmax(found_TV: Floats, wanted_TV: Floats) -> float:
    """The share of positions with the same most likely token."""
    return float(np.mean(found_TV.argmax(1) == wanted_TV.argmax(1)))


def mean_loss(logits_TV: Floats, ids: Sequence[int]) -> float:
    """Mean of -ln p(ids[t] | before) for t = 1..T-1, in float64."""
    found = _log_probabilities(logits_TV[:-1])
    return float(-np.mean(found[np.arange(len(found)), np.asarray(ids[1:])]))


def mean_kl(wanted_TV: Floats, found_TV: Floats, scale: float = 1.0) -> float:
    """Mean over positions of KL(wanted || found) of the next token, in nats, in float64; of logits
    times `scale`."""
    step = max(1, _BLOCK_ELEMENTS // wanted_TV.shape[1])
    found = [
        _kl(wanted_TV[at : at + step], found_TV[at : at + step], scale)
        for at in range(0, len(wanted_TV), step)
    ]
    return float(np.mean(np.concatenate(found)))


def _kl(wanted_TV: Floats, found_TV: Floats, scale: float) -> NDArray[np.float64]:
    """KL at each position, float64 [T]."""
    wanted, found = (_log_probabilities(logits, scale) for logits in (wanted_TV, found_TV))
    kl: NDArray[np.float64] = np.sum(np.exp(wanted) * (wanted - found), axis=1)
    return kl


def _log_probabilities(logits_TV: Floats, scale: float = 1.0) -> NDArray[np.float64]:
    logits = logits_TV.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logits *= scale
    found: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return found
