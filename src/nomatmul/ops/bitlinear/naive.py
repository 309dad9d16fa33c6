"""BitLinear in plain PyTorch, for any device, with straight-through gradients (arXiv 1308.3432).

Shape suffixes: N tokens (any number of leading axes), K inputs, M outputs.

Arithmetic (docs/numerics.md): the norm, the maximum and the rounding are float32 whatever the
autocast state is. The product sees whole numbers only: int8 activations and ternary weights are
exact in bfloat16 and float32, so the accumulator is the integer that every other backend gets
(exactly in float32 while |sum| < 2^24). Scales are applied to the product, not to its operands.

The operation is written as small pointwise steps around one `matmul`, without branches on data,
so that torch.compile fuses each side into one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SCALE_FLOOR = 1e-5
"""Smallest absmean and absmax: an all-zero row or matrix stays zero instead of dividing by it."""

INT8_MAX = 127.0
INT8_MIN = -128.0

HALF_SHIFT = 128.0
"""float16 holds 65504 at most: activations enter as q/128 (exact) so that no sum overflows."""


def round_half_away(x: Tensor) -> Tensor:
    """Nearest whole number, ties away from zero.

    Not floor(x + 0.5), which rounds 0.49999997 up: the sum already rounds to 1.
    """
    whole = torch.trunc(x)
    return whole + torch.where((x - whole).abs() >= 0.5, torch.sign(x), 0.0)


def absmean_ternarize(weight_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Ternary weights and their scale, one for the tensor.

    Returns (t, w_scale): t has weight's shape, float32, values -1, 0, +1; w_scale (beta in the
    papers) is a float32 scalar tensor, mean |W| (at least 1e-5). Ties round half to even. Source:
    arXiv 2402.17764, eq. 1-3.
    """
    weight_MK = weight_MK.float()
    w_scale = weight_MK.abs().mean().clamp(min=SCALE_FLOOR)
    return _ternary(weight_MK, w_scale), w_scale


def _ternary(weight_MK: Tensor, w_scale: Tensor) -> Tensor:
    return torch.round(weight_MK.float() * w_scale.reciprocal()).clamp(-1.0, 1.0)


def _round_half_up(x: Tensor) -> Tensor:
    """floor(x + 0.5), the sum rounded, as models were trained that way."""
    return torch.floor(x + 0.5)


_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "away": round_half_away,
    "even": torch.round,
    "up": _round_half_up,
}


def absmax_quantize(y_NK: Tensor, rounding: str = "away") -> tuple[Tensor, Tensor]:
    """Activations as int8 values, one scale a token.

    Returns (q, step): q float32 whole numbers in [-128, 127]; step [..., 1] = absmax / 127, the
    value of one unit. rounding: where ties go, "away" from zero, to "even" or "up".
    """
    y_NK = y_NK.float()
    absmax_N1 = y_NK.abs().amax(dim=-1, keepdim=True).clamp(min=SCALE_FLOOR)
    # A tensor, because torch takes a number over or under a tensor as a product with a reciprocal
    limit_N1 = torch.full_like(absmax_N1, INT8_MAX)
    q_NK = _ROUNDINGS[rounding](y_NK * (limit_N1 / absmax_N1)).clamp(INT8_MIN, INT8_MAX)
    return q_NK, absmax_N1 / limit_N1


def root_mean_square(x_NK: Tensor, eps: float) -> Tensor:
    """sqrt(mean(x^2) + eps) over the last axis, float32 [..., 1]; a norm divides by it.

    Projections that read the same x share it: their norms differ only by the weight. Squares are
    float32, summed in float64; the mean is rounded to float32 (docs/numerics.md says why). The
    root is taken in float64 because torch's float32 root may be one unit off.
    """
    square = x_NK.float().square()
    mean = square.mean(dim=-1, keepdim=True, dtype=torch.float64).float()
    return torch.sqrt((mean + eps).double()).float()


def product_dtype(x: Tensor) -> torch.dtype:
    """Autocast's type if it is on, else x's: of what projections give and gradients are made of."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class _BitLinear(torch.autograd.Function):
    """Forward quantised; backward takes both quantisers as the identity (straight-through)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NK: Tensor,
        weight_MK: Tensor,
        norm_K: Tensor,
        rms_N1: Tensor,
        dtype: torch.dtype,
        full_precision: bool,
    ) -> Tensor:
        t_MK, w_scale = weight_MK, rms_N1.new_ones(())
        if not full_precision:
            t_MK, w_scale = absmean_ternarize(weight_MK)
        y_NK = x_NK.float() / rms_N1 * norm_K.float()
        q_NK, step_N1 = absmax_quantize(y_NK)
        shift = HALF_SHIFT if dtype == torch.float16 else 1.0
        acc_NM = torch.matmul((q_NK / shift).to(dtype), t_MK.to(dtype).t())
        ctx.save_for_backward(x_NK, weight_MK, norm_K, rms_N1, w_scale)
        ctx.dtype, ctx.full_precision = dtype, full_precision
        return (acc_NM.float() * (w_scale * step_N1 * shift)).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor | None, ...]:
        # The quantised operands are recomputed: they cost a pointwise pass, and keeping them
        # would double what a layer remembers.
        x_NK, weight_MK, norm_K, rms_N1, w_scale = ctx.saved_tensors
        dtype = ctx.dtype
        x_hat_NK = x_NK.float() / rms_N1
        q_NK, step_N1 = absmax_quantize(x_hat_NK * norm_K.float())
        y_NK = (q_NK * step_N1).to(dtype)
        grad_NM = grad_NM.to(dtype)

        t_MK = weight_MK if ctx.full_precision else _ternary(weight_MK, w_scale)
        t_MK = t_MK.to(dtype)
        dy_NK = torch.matmul(grad_NM, t_MK).float() * w_scale
        flat_M = grad_NM.reshape(-1, grad_NM.shape[-1])
        dweight_MK = torch.matmul(flat_M.t(), y_NK.reshape(-1, y_NK.shape[-1]))

        leading = tuple(range(x_NK.dim() - 1))
        dnorm_K = (dy_NK * x_hat_NK).sum(dim=leading)
        dx_hat_NK = dy_NK * norm_K.float()
        mean_N1 = (dx_hat_NK * x_hat_NK).mean(dim=-1, keepdim=True)
        dx_NK = (dx_hat_NK - x_hat_NK * mean_N1) / rms_N1
        return (
            dx_NK.to(x_NK.dtype),
            dweight_MK.to(weight_MK.dtype),
            dnorm_K.to(norm_K.dtype),
            *(None,) * 3,
        )


def bit_linear(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    eps: float = 1e-6,
    *,
    rms: Tensor | None = None,
    full_precision: bool = False,
) -> Tensor:
    """RMSNorm(x), int8 per token, times ternary weight: the layer of arXiv 2406.02528, sec. 3.2.

    x: [..., K] float; weight: [M, K] float (latent weights of training); norm_weight: [K].
    rms: root_mean_square(x, eps) when the caller has it already; it is not differentiated through,
    because the gradient of x here holds the whole of the norm's. full_precision: the weight is
    multiplied as it is, by the same int8 activations.

    Returns [..., M] in autocast's dtype, else in x's. Gradients: straight-through in both
    quantisers, the true gradient of the norm, as the authors train.
    Raises ValueError if the shapes disagree.
    """
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"bit_linear: input has {x.shape[-1]} features, weight {weight.shape[-1]}")
    if rms is None:
        rms = root_mean_square(x.detach(), eps)
    return _BitLinear.apply(x, weight, norm_weight, rms.detach(), product_dtype(x), full_precision)


def bit_linear_accumulators(
    x: Tensor, weight: Tensor, norm_weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """The integers inside `bit_linear`, for tests and diagnostics; no gradient.

    Returns (q, t, acc): q int8 [..., K], t int8 [M, K], acc int32 [..., M] = sum_k q*t, exact.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        y_NK = x.float() / root_mean_square(x, eps) * norm_weight.float()
        q_NK, _ = absmax_quantize(y_NK)
        t_MK, _ = absmean_ternarize(weight)
        acc_NM = torch.matmul(q_NK, t_MK.t())
    return q_NK.to(torch.int8), t_MK.to(torch.int8), acc_NM.to(torch.int32)
