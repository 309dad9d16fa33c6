"""Channel mixers, one function a kind, which takes a part of the table and gives its computation.

Legend: N tokens, D hidden size, T trees, L levels of a tree (depth + 1); `...` any leading shape.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nomatmul.formats import architecture as parts
from nomatmul.reference.activations import ACTIVATIONS, Float
from nomatmul.reference.trees import Rows
from nomatmul.reference.weights import Weights

# normed x [..., D] -> (what is added to x, rows [N, T, L] that the tokens visited if any)
Channel = Callable[[Float], tuple[Float, Rows | None]]


def glu(part: parts.GLU, weights: Weights, at: str) -> Channel:
    """down(act(gate) * up)."""
    gate_proj, down_proj, *apart = weights.linears(part, at)
    act = ACTIVATIONS[part.activation]

    def mix(x: Float) -> tuple[Float, None]:
        gate, up = (gate_proj(x), apart[0](x)) if apart else np.split(gate_proj(x), 2, axis=-1)
        return down_proj(act(gate) * up), None

    return mix


def ffn(part: parts.FFN, weights: Weights, at: str) -> Channel:
    """down(act(up))."""
    up_proj, down_proj = weights.linears(part, at)
    act = ACTIVATIONS[part.activation]
    return lambda x: (down_proj(act(up_proj(x))), None)


def fff(part: parts.FFF, weights: Weights, at: str) -> Channel:
    """Trees and, where there is one, the master leaf beside them."""
    trees = weights.trees(at, part)
    master = None if part.master is None else ffn(part.master, weights, f"{at}.master")

    def mix(x: Float) -> tuple[Float, Rows]:
        y_ND, _, rows_NTL = trees(x.reshape(-1, x.shape[-1]))
        y = y_ND.reshape(x.shape)
        return y if master is None else y + master(x)[0], rows_NTL

    return mix


# A kind of the table and its function above.
CHANNELS: dict[str, Callable[..., Channel]] = {"glu": glu, "ffn": ffn, "fff": fff}
