"""A ternary layer whose gradients autograd makes: what fused operations are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from nomatmul.ops.bitlinear import steps


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def bit_linear(x: Tensor, weight: Tensor, norm: Tensor, eps: float, full: bool = False) -> Tensor:
    """Straight-through quantisers: autograd takes their rounding as the identity.

    full: of the activations only, the weight stays as it is.
    """
    y = rms_norm(x, norm, eps)
    q, step = steps._quantize(y, torch.int8)
    y = y + (q.double() * step.unsqueeze(-1) - y).detach()
    if full:
        return y @ weight.T
    t, w_scale = steps.ternarize(weight)
    return y @ (weight + (t[0] * w_scale - weight).detach()).T
