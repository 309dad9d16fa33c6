"""Between the two integer sums of a ternary FFF: activation, norm of the visited, int8.

Plain PyTorch; `hidden_triton` has the same functions as one pass over a token's visited nodes.

Shape suffixes: N tokens, T trees, L levels, V rows, A = T * L visited nodes of a token.
"""

from __future__ import annotations

from torch import Tensor

from nomatmul.ops.activations import activate
from nomatmul.ops.bitlinear.steps import int8, root, wide
from nomatmul.ops.fff.surrogate import activate_backward


def hidden_quantize(
    logits_NTL: Tensor, rows_NTL: Tensor, norm_V: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor]:
    """(q [N, T, L] whole numbers in the logits' type, step [N, 1])."""
    h_NA = activate(logits_NTL, activation).flatten(1)
    z_NA = h_NA / root(h_NA, eps) * wide(norm_V)[rows_NTL.flatten(1).long()]
    q_NA, step_N1 = int8(z_NA)
    return q_NA.view(logits_NTL.shape), step_N1


def hidden_backward(
    d_NTL: Tensor,
    logits_NTL: Tensor,
    rows_NTL: Tensor,
    norm_V: Tensor,
    step_N1: Tensor,
    eps: float,
    activation: str,
    route_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """(gradient of the logits, what each visit adds to the gradient of its norm weight), [N, T, L].

    d: gradient of q; rounding is the identity and the step a constant.
    """
    h_NA = activate(logits_NTL, activation).flatten(1)
    root_N1 = root(h_NA, eps)
    hat_NA = h_NA / root_N1
    d_NA = d_NTL.flatten(1) / step_N1
    dhat_NA = d_NA * wide(norm_V)[rows_NTL.flatten(1).long()]
    dh_NA = (dhat_NA - hat_NA * (dhat_NA * hat_NA).mean(-1, keepdim=True)) / root_N1
    dh_NTL = dh_NA.view(logits_NTL.shape)
    dlogits = activate_backward(logits_NTL, dh_NTL, activation, route_gradient)
    return dlogits, (d_NA * hat_NA).view(logits_NTL.shape)
