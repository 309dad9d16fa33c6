"""The steps of a ternary layer's forward and backward pass in plain PyTorch, without autograd.

Each function is the reference of the Triton kernel of the same name in `rows`, `rows_backward`,
`glu_backward` and `triton`. Float inputs of any type are computed in float32, float64 stays
float64.

Shape suffixes: N tokens, D features, M outputs, K inputs, G projections that read one input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nomatmul.ops.bitlinear.naive import (
    INT8_MAX,
    INT8_MIN,
    SCALE_FLOOR,
    absmax_quantize,
    root_mean_square,
    round_half_away,
)

Pair = tuple[Tensor, Tensor]


def wide(x: Tensor) -> Tensor:
    """x in the type of the arithmetic."""
    return x if x.dtype == torch.float64 else x.float()


def root(x_ND: Tensor, eps: float) -> Tensor:
    """sqrt(mean(x^2) + eps) over the last axis, kept; as `root_mean_square`, or float64."""
    if x_ND.dtype == torch.float64:
        return (x_ND.square().mean(-1, keepdim=True) + eps).sqrt()
    return root_mean_square(x_ND, eps)


def int8(y_ND: Tensor) -> Pair:
    """(q, step): whole numbers and the value of one unit [..., 1]; as `absmax_quantize`, or
    float64."""
    if y_ND.dtype != torch.float64:
        return absmax_quantize(y_ND)
    absmax = y_ND.abs().amax(-1, keepdim=True).clamp(min=SCALE_FLOOR)
    q_ND = round_half_away(y_ND * (INT8_MAX / absmax)).clamp(INT8_MIN, INT8_MAX)
    return q_ND, absmax / INT8_MAX


def ternarize(*weights: Tensor) -> Pair:
    """(t int8 [G, M, K], w_scale [G]) of G weights of one shape: absmean, the mean in float64."""
    parts, w_scales = [], []
    for weight_MK in weights:
        w_scale = weight_MK.abs().mean(dtype=torch.float64).to(wide(weight_MK).dtype)
        w_scale = w_scale.clamp(min=SCALE_FLOOR)
        t_MK = torch.round(wide(weight_MK) * w_scale.reciprocal()).clamp(-1, 1)
        parts.append(t_MK.to(torch.int8))
        w_scales.append(w_scale)
    return torch.stack(parts), torch.stack(w_scales)


def unrounded(dtype: torch.dtype, *weights: Tensor) -> Pair:
    """What `ternarize` gives, without rounding: the weights in dtype, and scales of one."""
    first = weights[0]
    parts = torch.empty(len(weights), *first.shape, dtype=dtype, device=first.device)
    for part, weight in zip(parts, weights, strict=True):
        part.copy_(weight)
    return parts, torch.ones(len(weights), dtype=wide(first).dtype, device=first.device)


def product(
    q_GNK: Tensor,
    t_GMK: Tensor,
    step_GN: Tensor,
    w_scale_G: Tensor,
    dtype: torch.dtype,
    residual_NM: Tensor | None = None,
) -> Tensor:
    """out [G, N, M] = (sum_k q*t) * (w_scale*step), plus the residual (G = 1), rounded to dtype."""
    kind = torch.float64 if step_GN.dtype == torch.float64 else torch.float32
    acc_GNM = torch.matmul(q_GNK.to(kind), t_GMK.to(kind).transpose(1, 2))
    out_GNM = acc_GNM * (w_scale_G[:, None] * step_GN).unsqueeze(-1)
    if residual_NM is not None:
        out_GNM = out_GNM + residual_NM
    return out_GNM.to(dtype)


def _quantize(y_GND: Tensor, dtype: torch.dtype) -> Pair:
    """(q int8, step) for dtype int8, else (q * step in dtype, step); step has no last axis."""
    q, step = int8(y_GND)
    return (q if dtype == torch.int8 else q * step).to(dtype), step.squeeze(-1)


def _normed(x_ND: Tensor, outer_D: Tensor | None, outer_eps: float) -> Tensor:
    if outer_D is None:
        return wide(x_ND)
    x = wide(x_ND)
    return wide((x / root(x, outer_eps) * outer_D).to(x_ND.dtype))


def norm_quantize(
    x_ND: Tensor,
    outer_D: Tensor | None,
    norms_GD: Tensor,
    outer_eps: float,
    eps: float,
    dtype: torch.dtype,
) -> Pair:
    """The block's norm (if outer_D), each projection's own norm, then absmax to int8.

    Returns (q [G, N, D] int8, step [G, N]); with a float dtype, q * step in that type for q.
    """
    u_ND = _normed(x_ND, outer_D, outer_eps)
    y_GND = u_ND / root(u_ND, eps) * norms_GD.unsqueeze(1)
    return _quantize(y_GND, dtype)


def _norm_gradient(d_ND: Tensor, hat_ND: Tensor, root_N1: Tensor) -> Tensor:
    return (d_ND - hat_ND * (d_ND * hat_ND).mean(-1, keepdim=True)) / root_N1


def norm_backward(
    x_ND: Tensor,
    outer_D: Tensor | None,
    norms_GD: Tensor,
    d_GND: Tensor,
    w_scale_G: Tensor,
    residual_ND: Tensor | None,
    outer_eps: float,
    eps: float,
) -> tuple[Tensor, ...]:
    """Backward of `norm_quantize`, rounding taken as the identity.

    d: gradient of the normed inputs over w_scale; residual: added to the result. Returns
    (dx in x's type, douter [D] (empty without one), one dnorm [D] a projection).
    """
    x = wide(x_ND)
    u_ND = _normed(x_ND, outer_D, outer_eps)
    root_N1 = root(u_ND, eps)
    hat_ND = u_ND / root_N1
    dy_GND = wide(d_GND) * w_scale_G[:, None, None]
    dnorms = [(dy_ND * hat_ND).sum(0) for dy_ND in dy_GND]
    dx_ND = _norm_gradient((dy_GND * norms_GD.unsqueeze(1)).sum(0), hat_ND, root_N1)
    douter_D = x.new_empty(0)
    if outer_D is not None:
        root_N1 = root(x, outer_eps)
        hat_ND = x / root_N1
        douter_D = (dx_ND * hat_ND).sum(0)
        dx_ND = _norm_gradient(dx_ND * outer_D, hat_ND, root_N1)
    if residual_ND is not None:
        dx_ND = dx_ND + residual_ND
    return dx_ND.to(x_ND.dtype), douter_D, *dnorms


def glu_quantize(gu_N2M: Tensor, norm_M: Tensor, eps: float, dtype: torch.dtype) -> Pair:
    """silu(gate) * up, the down projection's norm, absmax. Returns (q [1, N, M], step [1, N])."""
    gate, up = wide(gu_N2M).chunk(2, -1)
    y_NM = gate * torch.sigmoid(gate) * up
    return _quantize((y_NM / root(y_NM, eps) * norm_M).unsqueeze(0), dtype)


def glu_backward(
    gu_N2M: Tensor, norm_M: Tensor, d_NM: Tensor, w_scale_G: Tensor, eps: float,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Backward of `glu_quantize`: (dgu in gu's type, the dequantised input in d's type, dnorm [M]).

    d: gradient of the product's input over w_scale. The kernel writes the second result over d, and
    the first over gu if `in_place`; this reference writes nothing over.
    """
    gate, up = wide(gu_N2M).chunk(2, -1)
    share = torch.sigmoid(gate)
    y_NM = gate * share * up
    root_N1 = root(y_NM, eps)
    hat_NM = y_NM / root_N1
    dequantised, _ = _quantize(hat_NM * norm_M, d_NM.dtype)
    dy_NM = wide(d_NM) * w_scale_G
    dnorm_M = (dy_NM * hat_NM).sum(0)
    dy_NM = _norm_gradient(dy_NM * norm_M, hat_NM, root_N1)
    dgate = dy_NM * up * share * (1 + gate * (1 - share))
    dgu = torch.cat([dgate, dy_NM * gate * share], -1)
    return dgu.to(gu_N2M.dtype), dequantised, dnorm_M


def gate_quantize(
    g_ND: Tensor,
    h_ND: Tensor,
    gate_D: Tensor,
    norm_D: Tensor,
    gate_eps: float,
    eps: float,
    dtype: torch.dtype,
) -> Pair:
    """MLGRU's output: RMSNorm(g) * gate * silu(h), o_proj's norm, absmax. Results [1, N, D]."""
    g, h = wide(g_ND), wide(h_ND)
    y_ND = g / root(g, gate_eps) * gate_D * (h * torch.sigmoid(h))
    return _quantize((y_ND / root(y_ND, eps) * norm_D).unsqueeze(0), dtype)


def gate_backward(
    g_ND: Tensor,
    h_ND: Tensor,
    gate_D: Tensor,
    norm_D: Tensor,
    d_ND: Tensor,
    w_scale_G: Tensor,
    gate_eps: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward of `gate_quantize`: (dg, dh, the dequantised input, dgate [D], dnorm [D]).

    d as in `glu_backward`; dg and dh have g's type. The kernel writes the third result over d.
    """
    g, h = wide(g_ND), wide(h_ND)
    gate_root = root(g, gate_eps)
    g_hat = g / gate_root
    share = torch.sigmoid(h)
    active = h * share
    y_ND = g_hat * gate_D * active
    root_N1 = root(y_ND, eps)
    hat_ND = y_ND / root_N1
    dequantised, _ = _quantize(hat_ND * norm_D, d_ND.dtype)
    dy_ND = wide(d_ND) * w_scale_G
    dnorm_D = (dy_ND * hat_ND).sum(0)
    dy_ND = _norm_gradient(dy_ND * norm_D, hat_ND, root_N1)
    dh_ND = dy_ND * g_hat * gate_D * share * (1 + h * (1 - share))
    dg_ND = dy_ND * active
    dgate_D = (dg_ND * g_hat).sum(0)
    dg_ND = _norm_gradient(dg_ND * gate_D, g_hat, gate_root)
    return dg_ND.to(g_ND.dtype), dh_ND.to(g_ND.dtype), dequantised, dgate_D, dnorm_D
