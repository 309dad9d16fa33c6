"""The ternary FFF: two int8 quantisers around the walk, decisions on whole numbers.

Shape suffixes: N tokens, K inputs, D outputs, T trees, L levels, V rows of all trees, A = T * L.

docs/numerics.md states the arithmetic. `walk` and `combine` get whole numbers, so their sums are
the integers that every other backend has, and paths are the same. Gradients are straight-through,
as in BitLinear: a quantiser is the identity, its scale a constant; norms have their true gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nomatmul.ops.bitlinear import root_mean_square, round_half_away, ternary_weights
from nomatmul.ops.bitlinear.naive import INT8_MAX, INT8_MIN, SCALE_FLOOR
from nomatmul.ops.fff import combine, walk
from nomatmul.ops.fff.naive import wide
from nomatmul.ops.fff.surrogate import activate_routed


class _Straight(torch.autograd.Function):
    """quantised, in dtype; the gradient of source is that of source / scale."""

    @staticmethod
    def forward(
        ctx: Any, source: Tensor, quantised: Tensor, scale: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = source.dtype
        return quantised.to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        return (d.to(scale.dtype) / scale).to(ctx.dtype), None, None, None


def root(x: Tensor, eps: float) -> Tensor:
    """sqrt(mean(x^2) + eps) over the last axis, kept; as `root_mean_square`, or float64."""
    if x.dtype == torch.float64:
        return (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return root_mean_square(x, eps)


def straight_int8(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(q, step): int8 values in dtype and the value of one unit [..., 1], a scale a row.

    y: float32 or float64. The gradient of y is that of y / step.
    """
    with torch.no_grad():
        absmax = y.abs().amax(-1, keepdim=True).clamp(min=SCALE_FLOOR)
        limit = torch.full_like(absmax, INT8_MAX)
        q = round_half_away(y * (limit / absmax)).clamp(INT8_MIN, INT8_MAX)
        step = absmax / limit
    return _Straight.apply(y, q, step, dtype), step


def straight_ternary(weight: Tensor, slot: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(t, beta): ternary values in dtype and their scale [], one for the tensor.

    The gradient of weight is that of weight / beta. slot: from `new_slot`.
    """
    flat = weight if weight.dim() == 2 else weight.flatten(0, -2)
    t, beta = ternary_weights(slot, [flat])
    return _Straight.apply(weight, t[0].view(weight.shape), beta[0], dtype), beta[0]


def operand_type(x: Tensor, implementation: str | None = None) -> torch.dtype:
    """Type of the whole numbers: bfloat16 where x or autocast has it, else float32 or float64."""
    if x.dtype == torch.float64:
        return torch.float64
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    # A dense product in bfloat16 would round its sums: the reference keeps float32
    half = dtype == torch.bfloat16 and implementation != "masked"
    return torch.bfloat16 if half else torch.float32


def ternary_fff(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    norm_in: Tensor,
    norm_out: Tensor,
    *,
    trees: int,
    depth: int,
    eps: float = 1e-6,
    activation: str = "silu",
    route_gradient: bool = False,
    slots: tuple[int, int],
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm, int8, walk on integers, activation, norm of the visited, int8, sum of visited rows.

    x: [N, K]; w_in: [V, K] and w_out: [V, D] latent; norm_in: [K]; norm_out: [V]; slots: from
    `new_slot`, for w_in and w_out. Returns (y [N, D], logits [N, T, L], rows int32 [N, T, L]),
    y and logits float32 (float64 for float64). Raises ValueError as `walk`.
    """
    dtype = operand_type(x, implementation)
    with torch.autocast(x.device.type, enabled=False):
        x_NK = wide(x)
        y_NK = x_NK / root(x_NK, eps) * wide(norm_in)
        q_NK, step_N1 = straight_int8(y_NK, dtype)
        t_VK, beta_in = straight_ternary(w_in, slots[0], dtype)
        shape: dict[str, Any] = {"trees": trees, "depth": depth, "implementation": implementation}
        acc_NTL, nodes_NTL = walk(q_NK, t_VK, **shape)
        logits_NTL = acc_NTL * (beta_in * step_N1).unsqueeze(-1)

        h_NA = activate_routed(logits_NTL, activation, route_gradient).flatten(1)
        rows_NA = nodes_NTL.flatten(1).long()
        z_NA = h_NA / root(h_NA, eps) * wide(norm_out)[rows_NA]
        q_NA, step_N1 = straight_int8(z_NA, z_NA.dtype)
        t_VD, beta_out = straight_ternary(w_out, slots[1], dtype)
        acc_ND = combine(q_NA.view(nodes_NTL.shape), nodes_NTL, t_VD, implementation=implementation)
        return acc_ND * (beta_out * step_N1), logits_NTL, nodes_NTL
