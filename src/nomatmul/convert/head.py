"""What int8 rows cost a head that came as floats, before anything is written.

The head alone is judged: both forms get the source's own hidden states. Legend: T positions,
D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nomatmul.convert.agreement import Floats, mean_kl, same_argmax
from nomatmul.formats.quantise import quantise_rows
from nomatmul.reference.linear import stored_linear

# A packed model is to have the most likely token of its source at 97 % of positions, and a mean KL
# below 2e-3: the head may take a third of the one and half of the other.
LEAST_SAME = 0.99
MOST_KL = 1e-3
DEVIATION = 2.0  # of the logits that the KL is of: that of the source's says nothing of its size

_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class HeadCost:
    """int8 rows against the source's floats, on `positions` hidden states of the source: the share
    with the same most likely token, and the mean KL in nats of logits that are scaled to a
    standard deviation of 2."""

    positions: int
    same_argmax: float
    mean_kl: float

    @property
    def bearable(self) -> bool:
        """Whether int8 rows are the default."""
        return self.same_argmax >= LEAST_SAME and self.mean_kl <= MOST_KL


def int8_cost(weight_VD: Floats, hidden_TD: Floats, wanted_TV: Floats) -> HeadCost | None:
    """wanted: the logits of the weight as it is. As the engine computes it, an int8 head takes int8
    activations. None for a model whose numbers are not finite."""
    if not (np.all(np.isfinite(hidden_TD)) and np.all(np.isfinite(wanted_TV))):
        return None
    found_TV = np.empty_like(wanted_TV)
    step = max(1, _BLOCK_ELEMENTS // weight_VD.shape[1])
    for at in range(0, len(weight_VD), step):
        rows = slice(at, at + step)
        found_TV[:, rows] = stored_linear(*quantise_rows(weight_VD[rows]))(hidden_TD)
    if not np.all(np.isfinite(found_TV)):
        return None
    spread = float(np.std(wanted_TV, dtype=np.float64))
    kl = mean_kl(wanted_TV, found_TV, DEVIATION / spread if spread else 1.0)
    return HeadCost(len(wanted_TV), same_argmax(found_TV, wanted_TV), kl)
