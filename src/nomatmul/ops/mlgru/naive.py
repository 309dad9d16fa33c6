"""The recurrence h_t = f_t * h_(t-1) + i_t, in plain PyTorch.

Shape suffixes: B sequences, T steps, D channels, N chunks of C steps.

`mlgru_recurrent` is the definition. `blocked_scan` gives the same numbers (to float
rounding) in about 2 sqrt(T) tensor operations: it walks the C steps of all chunks at once, then
the N chunk ends, then adds what each chunk inherited. The gate stays linear: no logarithm, so
f = 0 and f = 1 are ordinary values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nomatmul.ops.bitlinear.steps import wide


def mlgru_recurrent(
    i_BTD: Tensor, f_BTD: Tensor, h0_BD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step after the other: the reference. Differentiable by autograd.

    Returns (h [B, T, D], h_last [B, D]) in i's dtype.
    """
    h_BD = torch.zeros_like(i_BTD[:, 0]) if h0_BD is None else h0_BD
    states = []
    for t in range(i_BTD.shape[1]):
        h_BD = f_BTD[:, t] * h_BD + i_BTD[:, t]
        states.append(h_BD)
    return torch.stack(states, dim=1), h_BD


def _chunk_length(steps: int) -> int:
    return max(1, min(64, math.isqrt(max(steps - 1, 0)) + 1))


def blocked_scan(i_BTD: Tensor, f_BTD: Tensor, h0_BD: Tensor) -> Tensor:
    """All states h [B, T, D] of the recurrence; no gradient is recorded by design."""
    batch, steps, channels = i_BTD.shape
    length = _chunk_length(steps)
    chunks = -(-steps // length)
    spare = chunks * length - steps
    if spare:
        # f = 1, i = 0 leaves the state alone
        i_BTD = torch.nn.functional.pad(i_BTD, (0, 0, 0, spare))
        f_BTD = torch.nn.functional.pad(f_BTD, (0, 0, 0, spare), value=1.0)
    i_BNCD = i_BTD.reshape(batch, chunks, length, channels)
    f_BNCD = f_BTD.reshape(batch, chunks, length, channels)

    h_BNCD = torch.empty_like(i_BNCD, memory_format=torch.contiguous_format)
    decay_BNCD = torch.empty_like(h_BNCD)
    h_BNCD[:, :, 0] = i_BNCD[:, :, 0]
    decay_BNCD[:, :, 0] = f_BNCD[:, :, 0]
    for c in range(1, length):
        f_BND = f_BNCD[:, :, c]
        torch.addcmul(i_BNCD[:, :, c], f_BND, h_BNCD[:, :, c - 1], out=h_BNCD[:, :, c])
        torch.mul(decay_BNCD[:, :, c - 1], f_BND, out=decay_BNCD[:, :, c])

    carry_BND = torch.empty_like(h_BNCD[:, :, 0])
    carry_BND[:, 0] = h0_BD
    for n in range(1, chunks):
        torch.addcmul(
            h_BNCD[:, n - 1, -1], decay_BNCD[:, n - 1, -1], carry_BND[:, n - 1], out=carry_BND[:, n]
        )
    h_BNCD.addcmul_(decay_BNCD, carry_BND.unsqueeze(2))
    return h_BNCD.reshape(batch, chunks * length, channels)[:, :steps]


def blocked_scan_backward(
    dh_BTD: Tensor, f_BTD: Tensor, h_BTD: Tensor, h0_BD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (di, df, dh0) from dh, the gradient of every state (h_last's added to the last).

    s_t = dh_t + f_(t+1) * s_(t+1) is the same recurrence run backwards; di = s, df = s * h_(t-1).
    """
    gates_BTD = torch.ones_like(f_BTD)
    gates_BTD[:, 1:] = f_BTD[:, 1:].flip(1)
    s_BTD = blocked_scan(dh_BTD.flip(1), gates_BTD, torch.zeros_like(h0_BD)).flip(1)
    previous_BTD = torch.cat([h0_BD.unsqueeze(1), h_BTD[:, :-1]], dim=1)
    return s_BTD, s_BTD * previous_BTD, f_BTD[:, 0] * s_BTD[:, 0]


def _gates(
    i_BTD: Tensor, f_BTD: Tensor, bound_D: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sigmoid of i, sigmoid of f, forget gate, silu(i)) in float32, or float64 for float64."""
    i, f = wide(i_BTD), wide(f_BTD)
    share_BTD, open_BTD = torch.sigmoid(i), torch.sigmoid(f)
    forget_BTD = open_BTD
    if bound_D is not None:
        forget_BTD = bound_D + (1 - bound_D) * open_BTD
    return share_BTD, open_BTD, forget_BTD, i * share_BTD


def gated_scan(i_BTD: Tensor, f_BTD: Tensor, bound_D: Tensor | None) -> Tensor:
    """States [B, T, D] of MLGRU from what its projections give, before their activations.

    f = bound + (1 - bound) * sigmoid(f); h_t = f_t * h_(t-1) + silu(i_t) * (1 - f_t); float32,
    from a state of zeros.
    """
    _, _, forget_BTD, active_BTD = _gates(i_BTD, f_BTD, bound_D)
    h0_BD = torch.zeros_like(active_BTD[:, 0])
    return blocked_scan(active_BTD * (1 - forget_BTD), forget_BTD, h0_BD).contiguous()


def gated_scan_backward(
    i_BTD: Tensor,
    f_BTD: Tensor,
    bound_D: Tensor | None,
    h_BTD: Tensor,
    dh_BTD: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(di, df in i's type, dbound [D] (empty without a bound)) of `gated_scan`.

    dh: gradient of every state.
    """
    share_BTD, open_BTD, forget_BTD, active_BTD = _gates(i_BTD, f_BTD, bound_D)
    h0_BD = torch.zeros_like(h_BTD[:, 0])
    s_BTD, dforget_BTD, _ = blocked_scan_backward(dh_BTD, forget_BTD, h_BTD, h0_BD)
    dforget_BTD = dforget_BTD - s_BTD * active_BTD
    slope_BTD = share_BTD + active_BTD * (1 - share_BTD)
    di_BTD = s_BTD * (1 - forget_BTD) * slope_BTD
    dopen_BTD, dbound_D = dforget_BTD, s_BTD.new_empty(0)
    if bound_D is not None:
        dopen_BTD = dforget_BTD * (1 - bound_D)
        dbound_D = (dforget_BTD * (1 - open_BTD)).sum((0, 1))
    df_BTD = dopen_BTD * open_BTD * (1 - open_BTD)
    return di_BTD.to(i_BTD.dtype), df_BTD.to(f_BTD.dtype), dbound_D
