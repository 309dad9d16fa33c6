"""Token mixers, one function a kind, which takes a part of the table and gives its computation.

Legend: B sequences, T tokens, S cached and new tokens, D hidden size, H heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats import architecture as parts
from nomatmul.reference import ops
from nomatmul.reference.activations import Float, silu
from nomatmul.reference.weights import Weights

# A layer's state: the pieces that the part names (`Part.state`), float32 [B, *shape], or
# [B, S, *shape] of a growing one. Arrays are replaced, never changed, so that forks share them.
Pieces = dict[str, Float]


@dataclass(frozen=True)
class Tokens:
    """What mixers know of the tokens of a pass: mask [B, T] (False: padding), seen [B, S] (the
    same of the state's positions and these), positions [B, T], and the size of MLGRU's chunks
    (None: token by token)."""

    mask_BT: NDArray[np.bool_]
    seen_BS: NDArray[np.bool_]
    positions_BT: NDArray[np.int64]
    chunk: int | None = None


# (normed x [B, T, D], state, tokens) -> (what is added to x, new state)
Mixer = Callable[[Float, Pieces, Tokens], tuple[Float, Pieces]]


def mlgru(part: parts.MLGRU, weights: Weights, layer: int) -> Mixer:
    """The recurrence of arXiv 2406.02528; padding leaves its state as it was."""
    at = f"layers.{layer}.mixer"
    i_proj, f_proj, g_proj, o_proj = weights.linears(part, at)
    g_norm = weights.norm(f"{at}.g_norm", part.g_norm)
    bound_D = weights.lower_bound(layer) if part.bounded else None

    def mix(x_BTD: Float, state: Pieces, tokens: Tokens) -> tuple[Float, Pieces]:
        i_BTD, f_BTD = ops.mlgru_gates(i_proj(x_BTD), f_proj(x_BTD), bound_D)
        kept_BT1 = tokens.mask_BT[..., None]
        i_BTD = np.where(kept_BT1, i_BTD, np.float32(0))
        f_BTD = np.where(kept_BT1, f_BTD, np.float32(1))
        if tokens.chunk is None:
            h_BTD, last_BD = ops.mlgru_recurrent(i_BTD, f_BTD, state["h"])
        else:
            h_BTD, last_BD = ops.mlgru_chunked(i_BTD, f_BTD, state["h"], tokens.chunk)
        return o_proj(g_norm(g_proj(x_BTD)) * silu(h_BTD)), {"h": last_BD}

    return mix


def attention(part: parts.Attention, weights: Weights, layer: int) -> Mixer:
    """Softmax attention, over the keys and values of the state too where it is causal."""
    q_proj, k_proj, v_proj, o_proj = weights.linears(part, f"layers.{layer}.mixer")

    def mix(x_BTD: Float, state: Pieces, tokens: Tokens) -> tuple[Float, Pieces]:
        shape = (*x_BTD.shape[:2], part.heads, part.head_size)
        q_BTHE, k_BSHE, v_BSHE = (f(x_BTD).reshape(shape) for f in (q_proj, k_proj, v_proj))
        if part.theta is not None:
            q_BTHE = ops.rotate(q_BTHE, tokens.positions_BT, part.theta)
            k_BSHE = ops.rotate(k_BSHE, tokens.positions_BT, part.theta)
        total = tokens.seen_BS.shape[1]
        allowed_BTS = np.broadcast_to(tokens.seen_BS[:, None], (*shape[:2], total))
        if part.causal:
            k_BSHE = np.concatenate([state["k"], k_BSHE], axis=1)
            v_BSHE = np.concatenate([state["v"], v_BSHE], axis=1)
            state = {"k": k_BSHE, "v": v_BSHE}
            allowed_BTS = allowed_BTS & np.tri(shape[1], total, total - shape[1], dtype=bool)
        return o_proj(ops.attend(q_BTHE, k_BSHE, v_BSHE, allowed_BTS)), state

    return mix


# A kind of the table and its function above.
MIXERS: dict[str, Callable[..., Mixer]] = {"mlgru": mlgru, "attention": attention}
