"""Every operation of docs/numerics.md in plain numpy float32, one function each.

Legend: B sequences, T tokens, D hidden size, K in_features, N out_features, M intermediate size,
H heads, E head size, L layers; `...` any leading shape.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from nomatmul.reference.activations import Float, sigmoid, silu

_ONE = np.float32(1.0)


def rms_norm(x: Float, weight: Float, eps: float) -> Float:
    """Return (x / sqrt(mean(x^2) + eps)) * weight over the last axis.

    Squares are float32, summed in float64; the mean is rounded to float32 and all else is
    float32. Every order of summation then gives the same bits, and so do all backends.
    """
    mean = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float64).astype(np.float32)
    root: Float = np.sqrt(mean + np.float32(eps))
    return (x / root) * weight


def layer_norm(x: Float, weight: Float, bias: Float, eps: float) -> Float:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias over the last axis; sums in
    float64."""
    mean = np.mean(x, axis=-1, keepdims=True, dtype=np.float64).astype(np.float32)
    centred = x - mean
    variance = np.mean(centred * centred, axis=-1, keepdims=True, dtype=np.float64)
    root: Float = np.sqrt(variance.astype(np.float32) + np.float32(eps))
    return centred / root * weight + bias


def exact_product(q: NDArray[np.int8], w_NK: NDArray[np.int8]) -> NDArray[np.int32]:
    """Return int32 [..., N]: q [..., K] @ w^T, exact.

    Computed by float32 matrix products of so many inputs that every partial sum is an integer of at
    most 2^24, so no order of summation can round. (numpy's integer product has no fast path.)
    """
    largest = max(int(w_NK.max(initial=1)), -int(w_NK.min(initial=0)))
    step = (1 << 24) // (128 * largest)
    total = np.zeros((*q.shape[:-1], len(w_NK)), np.int32)
    for at in range(0, q.shape[-1], step):
        part_NK = w_NK[:, at : at + step].astype(np.float32)
        total += (q[..., at : at + step].astype(np.float32) @ part_NK.T).astype(np.int32)
    return total


def mlgru_gates(i: Float, f: Float, lower_bound: Float | None) -> tuple[Float, Float]:
    """Return (input, forget gate) of MLGRU from the outputs of i_proj and f_proj.

    f = sigmoid(f), lifted to lb + (1 - lb) * f where a bound is given; i = silu(i) * (1 - f).
    """
    f = sigmoid(f)
    if lower_bound is not None:
        f = lower_bound + (_ONE - lower_bound) * f
    return silu(i) * (_ONE - f), f


def mlgru_recurrent(i_BTD: Float, f_BTD: Float, h_BD: Float) -> tuple[Float, Float]:
    """Return (h [B, T, D], last h [B, D]) of h_t = f_t * h_(t-1) + i_t, token by token."""
    out = np.empty_like(i_BTD)
    for t in range(i_BTD.shape[1]):
        h_BD = f_BTD[:, t] * h_BD + i_BTD[:, t]
        out[:, t] = h_BD
    return out, h_BD


def mlgru_chunked(i_BTD: Float, f_BTD: Float, h_BD: Float, chunk: int = 16) -> tuple[Float, Float]:
    """Return what `mlgru_recurrent` returns (up to rounding), chunk by chunk.

    Inside a chunk all tokens advance together from a zero state, then the carried state enters
    through the product of forget gates: no logarithms, no division, so nothing can overflow.
    """
    batch, tokens, size = i_BTD.shape
    count = -(-tokens // chunk)
    padding = ((0, 0), (0, count * chunk - tokens), (0, 0))
    i_BCSD = np.pad(i_BTD, padding).reshape(batch, count, chunk, size)
    f_BCSD = np.pad(f_BTD, padding, constant_values=1.0).reshape(batch, count, chunk, size)
    inner, decay = np.empty_like(i_BCSD), np.empty_like(f_BCSD)
    local = np.zeros((batch, count, size), dtype=np.float32)
    product = np.ones((batch, count, size), dtype=np.float32)
    for s in range(chunk):
        local = f_BCSD[:, :, s] * local + i_BCSD[:, :, s]
        product = product * f_BCSD[:, :, s]
        inner[:, :, s], decay[:, :, s] = local, product
    for c in range(count):
        inner[:, c] += decay[:, c] * h_BD[:, None]
        h_BD = inner[:, c, -1]
    return inner.reshape(batch, -1, size)[:, :tokens], h_BD


def rotate(x_BTHE: Float, cos_BTe: Float, sin_BTe: Float) -> Float:
    """Rotate pairs (e, e + E/2) by angles of these cosines and sines [B, T, E/2], as in Llama."""
    half = x_BTHE.shape[-1] // 2
    cos, sin = cos_BTe[:, :, None], sin_BTe[:, :, None]
    first, second = x_BTHE[..., :half], x_BTHE[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def sinusoidal(tokens: int, size: int) -> Float:
    """The positions of crammed BERT, [T, D]: sin at even and cos at odd elements."""
    step = np.exp(
        np.arange(0, size, 2, dtype=np.float32) * np.float32(-math.log(10000.0) / size)
    ).astype(np.float32)
    angle = np.arange(tokens, dtype=np.float32)[:, None] * step
    table = np.zeros((tokens, size), np.float32)
    table[:, 0::2], table[:, 1::2] = np.sin(angle), np.cos(angle[:, : size // 2])
    return table


def attend(q_BTHE: Float, k_BSGE: Float, v_BSGE: Float, allowed_BTS: NDArray[np.bool_]) -> Float:
    """Return softmax(q k^T / sqrt(E)) v as [B, T, H*E], sums in the order of the BLAS; each of G
    heads of keys and values serves H / G heads of queries. Where nothing is allowed, zeros."""
    shared = q_BTHE.shape[2] // k_BSGE.shape[2]
    k_BSHE, v_BSHE = (np.repeat(x, shared, axis=2) for x in (k_BSGE, v_BSGE))
    scores = np.einsum("bthe,bshe->bhts", q_BTHE, k_BSHE) / np.float32(math.sqrt(q_BTHE.shape[-1]))
    scores = np.where(allowed_BTS[:, None], scores, np.float32(-np.inf))
    peak = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(peak), peak, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / np.where(total > 0, total, 1.0)
    out = np.einsum("bhts,bshe->bthe", weights, v_BSHE)
    heads_BTD: Float = out.reshape(*q_BTHE.shape[:2], -1).astype(np.float32)
    return heads_BTD
