"""MLGRU's recurrence h_t = f_t * h_(t-1) + i_t: one function that picks the implementation.

Shape suffixes: B sequences, T steps, D channels.

The scan is one operator of torch, opaque to torch.compile: no graph break, nothing unrolled.
Inside it, float32 on a GPU goes to Triton and everything else to `naive.blocked_scan`
(`nomatmul.ops.choose` says how that is decided).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nomatmul.ops import choose
from nomatmul.ops.mlgru import naive
from nomatmul.ops.mlgru.naive import mlgru_recurrent

__all__ = ["mlgru_recurrent", "mlgru_scan"]

_FAST = "nomatmul.ops.mlgru.triton"


@torch.library.custom_op("nomatmul::mlgru_scan", mutates_args=())
def _scan(i_BTD: Tensor, f_BTD: Tensor, h0_BD: Tensor) -> Tensor:
    return choose.run("blocked_scan", _FAST, naive, i_BTD, f_BTD, h0_BD).contiguous()


@_scan.register_fake
def _(i_BTD: Tensor, f_BTD: Tensor, h0_BD: Tensor) -> Tensor:
    return torch.empty_like(i_BTD, memory_format=torch.contiguous_format)


@torch.library.custom_op("nomatmul::mlgru_scan_backward", mutates_args=())
def _scan_backward(
    dh_BTD: Tensor, f_BTD: Tensor, h_BTD: Tensor, h0_BD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = choose.run("blocked_scan_backward", _FAST, naive, dh_BTD, f_BTD, h_BTD, h0_BD)
    di_BTD, df_BTD, dh0_BD = grads
    return di_BTD.contiguous(), df_BTD.contiguous(), dh0_BD.contiguous()


@_scan_backward.register_fake
def _(dh_BTD: Tensor, f_BTD: Tensor, h_BTD: Tensor, h0_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(f_BTD), like(f_BTD), like(h0_BD)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    _, f_BTD, h0_BD = inputs
    ctx.save_for_backward(f_BTD, output, h0_BD)


def _backward(ctx: Any, dh_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    f_BTD, h_BTD, h0_BD = ctx.saved_tensors
    return _scan_backward(dh_BTD, f_BTD, h_BTD, h0_BD)


_scan.register_autograd(_backward, setup_context=_setup_context)


def mlgru_scan(i: Tensor, f: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All states of h_t = f_t * h_(t-1) + i_t and the last one.

    i, f: [B, T, D], T >= 1; h0: [B, D] or None (zeros). float64 stays float64, every other type
    is computed in float32 whatever autocast says.

    Returns (h [B, T, D], h_last [B, D]), equal to `mlgru_recurrent` to float rounding, with
    gradients for i, f and h0 from both. Raises ValueError if the shapes disagree.
    """
    if i.dim() != 3 or i.shape != f.shape or i.shape[1] < 1:
        raise ValueError(
            f"mlgru_scan needs i and f of one shape [B, T, D] with T >= 1, got "
            f"{tuple(i.shape)} and {tuple(f.shape)}"
        )
    dtype = torch.float64 if i.dtype == torch.float64 else torch.float32
    i, f = i.to(dtype), f.to(dtype)
    if h0 is None:
        h0 = torch.zeros_like(i[:, 0])
    elif h0.shape != (i.shape[0], i.shape[2]):
        raise ValueError(f"mlgru_scan: h0 has shape {tuple(h0.shape)}, i {tuple(i.shape)}")
    h0 = h0.to(dtype)
    if i.shape[1] == 1:  # decoding: one step needs no scan
        h_BD = f[:, 0] * h0 + i[:, 0]
        return h_BD.unsqueeze(1), h_BD
    h = _scan(i, f, h0)
    return h, h[:, -1]
