"""Linear recurrences of a matrix-valued state, many steps at a time, as products of matrices.

    S_t = diag(exp(log_t)) S - k_t (look_t^T S) + k_t v_t^T,   y_t = S_t^T q_t

`look` is the key of the delta rule, which takes away what the state holds there before it writes;
without it the middle term is absent. A chunk's steps are solved at once (2406.06484, 2412.06464),
and a chunk changes the state by an affine map, so one small product a chunk is left in sequence.

The delta rule needs the inverse of a unit triangular matrix. A sum of powers overflows where keys
are alike, although the inverse is small; blocks are inverted here and joined, so that nothing is
larger than a part of the inverse.

Shape suffixes: B sequences, T steps, H heads, K key size, V value size, N chunks, C steps of one.
A library of recurrences.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The least logarithm of a decay that a key element has for itself. There products of a chunk have
# factors up to exp(-LOWEST * CHUNK) = 5e34, which float32 and bfloat16 hold. Decays of whole heads
# have no limit: only their differences are exponentiated.
LOWEST, CHUNK = -2.5, 32
CHUNK_OF_HEADS = 64
_SUMMED = 8  # blocks up to this size are joined by sums in full precision, larger ones by products


def _recur(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log: Tensor, look_BTHK: Tensor | None = None
) -> Tensor:
    """y [B, T, H, V] in float32 (float64 for such). T must be a multiple of a chunk, or shorter.

    log: of the decays, [B, T, H, K], none below LOWEST, or [B, T, H, 1] for one a head.
    """
    chunk = min(CHUNK_OF_HEADS if log.shape[-1] == 1 else CHUNK, q_BTHK.shape[1])

    def cut(x: Tensor) -> Tensor:  # [B, H, N, C, .]
        return x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)

    q, k, v, log = cut(q_BTHK), cut(k_BTHK), cut(v_BTHV), cut(log)
    kept = log.cumsum(3)
    left = kept[..., -1:, :]
    reads, writes = q * kept.exp(), k * (left - kept).exp()
    scores = _pairs(q, k, kept, kept).tril()
    added = _product(writes.transpose(-1, -2), v)  # [B, H, N, K, V]
    left = left.exp().transpose(-1, -2)  # [B, H, N, K or 1, 1]
    if look_BTHK is None:
        states = _scaled_states(left, added)
        y = _product(scores, v) + _product(reads, states)
    else:
        look, before = cut(look_BTHK), kept - log
        forgets = _pairs(look, k, before, kept).tril(-1)
        inverse = UnitInverse.apply(forgets)
        # of what is written: by the chunk's own values, and by the state before the chunk
        own = v - inverse @ (forgets @ v)
        old = inverse @ (look * before.exp())  # [B, H, N, C, K]
        added = writes.transpose(-1, -2) @ own
        maps = torch.diag_embed(left.squeeze(-1).expand(*left.shape[:3], k.shape[-1]))
        states = _mapped_states(maps - writes.transpose(-1, -2) @ old, added)
        y = _product(scores, own - _product(old, states)) + _product(reads, states)
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)


recur = _recur


def compile_recurrences() -> None:
    """Element-wise steps in few kernels; the CUDA graph of a training step records those."""
    global recur
    recur = torch.compile(_recur, dynamic=False)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """In bfloat16 on a GPU."""
    if not x.is_cuda:
        return x @ y
    return (x.bfloat16() @ y.bfloat16()).float()


def _pairs(x: Tensor, y: Tensor, x_kept: Tensor, y_kept: Tensor) -> Tensor:
    """[..., C, C]: sum over elements of x_i y_j exp(x_kept_i - y_kept_j); right for i >= j only."""
    if x_kept.shape[-1] > 1:
        return _product(x * x_kept.exp(), (y * (-y_kept).exp()).transpose(-1, -2))
    apart = (x_kept - y_kept.transpose(-1, -2)).clamp(max=0).exp()
    return _product(x, y.transpose(-1, -2)) * apart


def _scaled_states(left: Tensor, added: Tensor) -> Tensor:
    """[B, H, N, K, V]: the state before each chunk."""
    states = [torch.zeros_like(added[:, :, 0])]
    for share, more in zip(left.unbind(2)[:-1], added.unbind(2)[:-1], strict=True):
        states.append(states[-1] * share + more)
    return torch.stack(states, 2)


def _mapped_states(maps: Tensor, added: Tensor) -> Tensor:
    """[B, H, N, K, V]: the state before each chunk; maps: [B, H, N, K, K]."""
    states = [torch.zeros_like(added[:, :, 0])]
    for change, more in zip(maps.unbind(2)[:-1], added.unbind(2)[:-1], strict=True):
        states.append(change @ states[-1] + more)
    return torch.stack(states, 2)


class UnitInverse(torch.autograd.Function):
    """(I + A)^-1 of strictly lower triangular A [..., C, C], C a power of two."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        inverse = unit_inverse(a)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        turned = inverse.transpose(-1, -2)
        return -(turned @ d @ turned).tril(-1)


def unit_inverse(a: Tensor) -> Tensor:
    """Blocks of 1, 2, 4, ... on the diagonal: [[X, 0], [-Y C X, Y]] joins X, Y with C below X."""
    size = a.shape[-1]
    inverse = torch.ones_like(a[..., :1]).unsqueeze(-1)  # [..., blocks, s, s]
    step = 1
    while step < size:
        x, y = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        pairs = a.unflatten(-1, (-1, 2, step)).unflatten(-4, (-1, 2, step))
        below = pairs[..., :, 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        corner = -_small(y, _small(below, x))
        top = torch.cat([x, torch.zeros_like(x)], -1)
        inverse = torch.cat([top, torch.cat([corner, y], -1)], -2)
        step *= 2
    return inverse.squeeze(-3)


def _small(x: Tensor, y: Tensor) -> Tensor:
    if x.shape[-1] > _SUMMED:
        return x @ y
    return (x.unsqueeze(-1) * y.unsqueeze(-3)).sum(-2)
