"""The dense reference: every logit, a mask of the visited nodes, two dense products.

This is how the authors' training code computes the layer (arXiv 2311.10770), at the cost of the
whole layer. Everything conditional is tested against it; nothing else here makes an N x V tensor.

Shape suffixes: N tokens, K inputs, D outputs, T trees, L levels, V rows of all trees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nomatmul.ops.activations import activate
from nomatmul.ops.bitlinear.steps import wide
from nomatmul.ops.fff.naive import child_rows, roots
from nomatmul.ops.fff.surrogate import route_factor


def all_logits(x_NK: Tensor, w_in_VK: Tensor, bias_V: Tensor | None) -> Tensor:
    """[N, V]: the logit of every node, visited or not; types as in `walk`."""
    logits_NV = wide(torch.matmul(x_NK, w_in_VK.t().to(x_NK.dtype)))
    return logits_NV if bias_V is None else logits_NV + wide(bias_V)


@torch.no_grad()
def visited(logits_NV: Tensor, trees: int, depth: int) -> Tensor:
    """Rows that each token visits, int64 [N, T, L], read off all logits."""
    first_T = roots(trees, depth, logits_NV.device)
    rows = [first_T.expand(len(logits_NV), trees)]
    for _ in range(depth):
        rows.append(child_rows(rows[-1], first_T, logits_NV.gather(1, rows[-1]) > 0))
    return torch.stack(rows, -1)


def walk(
    x_NK: Tensor, w_in_VK: Tensor, bias_V: Tensor | None, trees: int, depth: int
) -> tuple[Tensor, Tensor]:
    """As `naive.walk`, from all logits; differentiable."""
    logits_NV = all_logits(x_NK, w_in_VK, bias_V)
    nodes_NTL = visited(logits_NV, trees, depth)
    logits = logits_NV.gather(1, nodes_NTL.flatten(1)).view(nodes_NTL.shape)
    return logits, nodes_NTL.to(torch.int32)


def combine(h_NTL: Tensor, nodes_NTL: Tensor, w_out_VD: Tensor) -> Tensor:
    """As `naive.combine`, as a dense product of [N, V] and [V, D]; differentiable."""
    w_out = wide(w_out_VD)
    h_NV = w_out.new_zeros(len(h_NTL), len(w_out))
    h_NV = h_NV.scatter(1, nodes_NTL.flatten(1).long(), h_NTL.flatten(1).to(w_out.dtype))
    return torch.matmul(h_NV, w_out)


def fff(
    x_NK: Tensor,
    w_in_VK: Tensor,
    w_out_VD: Tensor,
    bias_V: Tensor | None,
    trees: int,
    depth: int,
    activation: str,
    route_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [N, D], visited logits, rows): all nodes activated, then masked, as the authors do."""
    logits_NV = all_logits(x_NK, w_in_VK, bias_V)
    nodes_NTL = visited(logits_NV, trees, depth)
    rows_NA = nodes_NTL.flatten(1)
    logits_NTL = logits_NV.gather(1, rows_NA).view(nodes_NTL.shape)
    mask_NV = torch.zeros_like(logits_NV)
    if route_gradient:
        mask_NV = mask_NV.scatter(1, rows_NA, route_factor(logits_NTL).flatten(1))
    else:
        mask_NV.scatter_(1, rows_NA, 1.0)
    h_NV = activate(logits_NV, activation) * mask_NV
    y_ND = torch.matmul(h_NV.to(x_NK.dtype), w_out_VD.to(x_NK.dtype))
    return wide(y_ND), logits_NTL, nodes_NTL.to(torch.int32)
