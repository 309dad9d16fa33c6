"""Activation of visited nodes, and the surrogate that lets a gradient reach their decisions.

Shape suffixes: N tokens, T trees, L levels of a tree.

A decision is a step of its logit, so its gradient is zero and training hears only of nodes that
were visited. `route_gradient` gives decisions a gradient without changing a single value: with
p_l = sigmoid(|z_l|), the probability that a soft tree would give to the side that was taken at
level l,

    h_m' = h_m * (1 + c_m - stop(c_m)),   c_m = sum of p_l over the levels l above m.

The factor is exactly 1. Its gradient is that of the product of the p_l at p_l = 1: what the soft
tree of arXiv 2308.14711 feels on the path that was taken, the other side counted as adding
nothing. Only logits of visited nodes are read, so masked and conditional forms agree.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nomatmul.ops.activations import activate


def route_factor(logits_NTL: Tensor) -> Tensor:
    """The factor of the surrogate, [N, T, L]: ones, with the gradient that the module names."""
    share_NTL = torch.sigmoid(_taken(logits_NTL))
    above_NTL = share_NTL.cumsum(-1) - share_NTL
    # the last level decides nothing: `above` leaves it out, as it leaves each node's own level out
    return 1 + (above_NTL - above_NTL.detach())


def activate_routed(logits_NTL: Tensor, activation: str, route_gradient: bool) -> Tensor:
    """h [N, T, L] = activation(logits), times `route_factor` if the decisions get a gradient."""
    h_NTL = activate(logits_NTL, activation)
    return h_NTL * route_factor(logits_NTL) if route_gradient else h_NTL


def activate_backward(
    logits_NTL: Tensor, dh_NTL: Tensor, activation: str, route_gradient: bool
) -> Tensor:
    """Gradient of the logits given dh of `activate_routed`, in closed form; all [N, T, L]."""
    z = logits_NTL
    if activation == "gelu":
        density = torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
        slope = 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * density
    elif activation == "silu":
        share = torch.sigmoid(z)
        slope = share * (1 + z * (1 - share))
    else:
        slope = (z > 0).to(z.dtype)
    dz = slope * dh_NTL
    if route_gradient:
        moved = activate(z, activation) * dh_NTL
        below = moved.flip(-1).cumsum(-1).flip(-1) - moved
        taken = torch.sigmoid(_taken(z))
        dz = dz + torch.where(z > 0, 1.0, -1.0).to(z.dtype) * (taken * (1 - taken)) * below
    return dz


def _taken(logits: Tensor) -> Tensor:
    """The logit of the side that was taken: z on the right, -z on the left (0 goes left)."""
    return torch.where(logits > 0, logits, -logits)
