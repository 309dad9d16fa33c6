"""Token mixers, one function a kind, which takes a part of the table and gives its computation.

Legend: B sequences, T tokens, S cached and new tokens, D hidden size, H heads (G of
keys and values), E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats import architecture as parts
from nomatmul.formats import rotary
from nomatmul.formats.quantise import quantise_activation, to_float16
from nomatmul.reference import exact as exact_sums
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
    at = f"layers.{layer}.mixer"
    q_proj, k_proj, v_proj, o_proj = weights.linears(part, at)
    q_turned = _turned(part, part.q_norm, weights, f"{at}.q_norm")
    k_turned = _turned(part, part.k_norm, weights, f"{at}.k_norm")
    exact = part.causal and weights.exact
    attend = exact_sums.attend if exact else ops.attend

    def mix(x_BTD: Float, state: Pieces, tokens: Tokens) -> tuple[Float, Pieces]:
        batch, steps, _ = x_BTD.shape
        q_BTHE, k_BSGE, v_BSGE = (
            f(x_BTD).reshape(batch, steps, -1, part.head_size) for f in (q_proj, k_proj, v_proj)
        )
        q_BTHE = q_turned(q_BTHE, tokens.positions_BT)
        k_BSGE = k_turned(k_BSGE, tokens.positions_BT)
        total = tokens.seen_BS.shape[1]
        allowed_BTS = np.broadcast_to(tokens.seen_BS[:, None], (batch, steps, total))
        if part.causal:
            if exact:
                k_BSGE, v_BSGE = (_kept(x, weights.kv) for x in (k_BSGE, v_BSGE))
            k_BSGE = np.concatenate([state["k"], k_BSGE], axis=1)
            v_BSGE = np.concatenate([state["v"], v_BSGE], axis=1)
            state = {"k": k_BSGE, "v": v_BSGE}
            allowed_BTS = allowed_BTS & np.tri(steps, total, total - steps, dtype=bool)
        return o_proj(attend(q_BTHE, k_BSGE, v_BSGE, allowed_BTS)), state

    return mix


def _turned(
    part: parts.Attention, norm: parts.Norm | None, weights: Weights, name: str
) -> Callable[[Float, NDArray[np.int64]], Float]:
    """What happens to heads [B, T, H, E] of queries or keys at positions [B, T]: norm, rotation."""
    normed = None if norm is None else weights.norm(name, norm)
    turns = None
    if part.theta is not None:
        turns = rotary.frequencies(part.head_size, part.theta, part.scaling)

    def turned(x_BTHE: Float, positions_BT: NDArray[np.int64]) -> Float:
        if normed is not None:
            x_BTHE = normed(x_BTHE)
        return x_BTHE if turns is None else ops.rotate(x_BTHE, *rotary.tables(positions_BT, *turns))

    return turned


def _kept(x_BSGE: Float, form: str) -> Float:
    """Keys or values as a state keeps them: "f16" rounded to float16, "int8" with a scale a head,
    "f32" as they are.

    Raises ValueError for a value that is not finite then.
    """
    if form == "int8":
        q, step = quantise_activation(x_BSGE, "even")
        return q.astype(np.float32) * step
    kept = x_BSGE if form == "f32" else to_float16(x_BSGE).astype(np.float32)
    if not np.isfinite(kept).all():
        raise ValueError(f"a key or value is not finite as {form}")
    return kept


# A kind of the table and its function above.
MIXERS: dict[str, Callable[..., Mixer]] = {"mlgru": mlgru, "attention": attention}
