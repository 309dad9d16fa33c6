"""Ternary products of the forms that published models have beside `bit_linear`'s.

No norm inside, one scale for a block of rows, other ties of the int8 quantiser, or weights only:
one scale for a group of inputs, activations as floats. Plain PyTorch with straight-through
gradients, of latent weights and of stored ternary values alike.

Shape suffixes: N tokens (any number of leading axes), K inputs, M outputs, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nomatmul.ops.bitlinear.naive import (
    HALF_SHIFT,
    SCALE_FLOOR,
    absmax_quantize,
    absmean_ternarize,
    product_dtype,
)


@dataclass(frozen=True)
class Form:
    """How a ternary linear is quantised.

    rounding: ties of the int8 activations, as of `absmax_quantize`. scale_rows: output rows that
    share a scale, 0 for all. scale_group: inputs of a row that share a scale; 0 for all, else the
    activations are floats (weights only).
    """

    rounding: str = "away"
    scale_rows: int = 0
    scale_group: int = 0

    def scale_shape(self, outputs: int, inputs: int) -> tuple[int, ...]:
        """[M, G] of a weights-only matrix, else [blocks of rows]."""
        if self.scale_group:
            return outputs, inputs // self.scale_group
        return (outputs // (self.scale_rows or outputs),)


def ternarize(weight_MK: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Absmean of each block or group: (t float32 [M, K] of -1, 0, +1, scale as `scale_shape`)."""
    outputs, inputs = weight_MK.shape
    shape = form.scale_shape(outputs, inputs)
    if shape == (1,):
        t_MK, scale = absmean_ternarize(weight_MK)
        return t_MK, scale.reshape(1)
    parts = weight_MK.float().reshape(*shape, -1)
    scale = parts.abs().mean(-1).clamp(min=SCALE_FLOOR)
    t = torch.round(parts * scale.reciprocal().unsqueeze(-1)).clamp(-1.0, 1.0)
    return t.reshape(outputs, inputs), scale


def dequantize(values_MK: Tensor, scale: Tensor) -> Tensor:
    """values * scale, float32 [M, K]; scale: [blocks of rows] or [M, G]."""
    parts = values_MK.reshape(*scale.shape, -1).float() * scale.unsqueeze(-1)
    return parts.reshape(values_MK.shape)


def latents(values_MK: Tensor, scale: Tensor) -> Tensor:
    """Float weights [M, K] of which `ternarize` makes these values and, up to rounding, this scale.

    A mean of |W| counts the zeros, so what is not zero is as much larger as it is rare.
    Raises ValueError for a scale below the quantiser's floor.
    """
    parts = values_MK.reshape(*scale.shape, -1).float()
    share = parts.abs().mean(-1)
    lost = (share > 0) & (scale.abs() < SCALE_FLOOR)
    if bool(lost.any()):
        least = float(scale.abs()[lost].min())
        raise ValueError(f"a scale of {least:g} is below {SCALE_FLOOR:g}, the least of training")
    peak = scale / torch.where(share > 0, share, 1.0)
    return (parts * peak.unsqueeze(-1)).reshape(values_MK.shape)


def _of_rows(scale: Tensor, outputs: int) -> Tensor:
    """One scale a row [M] of one a block."""
    return scale if len(scale) == 1 else scale.repeat_interleave(outputs // len(scale))


class _TernaryProduct(torch.autograd.Function):
    """Forward quantised; backward takes both quantisers as the identity (straight-through).

    scale None: `weight` is latent, and quantised again in the backward pass, which costs a
    pointwise pass and keeps nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_NK: Tensor,
        weight_MK: Tensor,
        scale: Tensor | None,
        form: Form,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(y_NK, weight_MK, scale)
        ctx.form, ctx.dtype = form, dtype
        t_MK, scale = ternarize(weight_MK, form) if scale is None else (weight_MK, scale)
        if form.scale_group:
            return torch.matmul(y_NK.to(dtype), dequantize(t_MK, scale).to(dtype).t())
        q_NK, step_N1 = absmax_quantize(y_NK, form.rounding)
        shift = HALF_SHIFT if dtype == torch.float16 else 1.0
        acc_NM = torch.matmul((q_NK / shift).to(dtype), t_MK.to(dtype).t())
        return (acc_NM.float() * (_of_rows(scale, len(t_MK)) * step_N1 * shift)).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor | None, ...]:
        y_NK, weight_MK, scale = ctx.saved_tensors
        form, dtype = ctx.form, ctx.dtype
        dy_NK = dweight_MK = None
        grad_NM = grad_NM.to(dtype)
        if ctx.needs_input_grad[0]:
            t_MK, scale = ternarize(weight_MK, form) if scale is None else (weight_MK, scale)
            if form.scale_group:
                dy_NK = torch.matmul(grad_NM, dequantize(t_MK, scale).to(dtype))
            else:
                scaled_NM = grad_NM.float() * _of_rows(scale, len(t_MK))
                dy_NK = torch.matmul(scaled_NM.to(dtype), t_MK.to(dtype))
            dy_NK = dy_NK.to(y_NK.dtype)
        if ctx.needs_input_grad[1]:
            if not form.scale_group:
                q_NK, step_N1 = absmax_quantize(y_NK, form.rounding)
                y_NK = q_NK * step_N1
            flat_M = grad_NM.reshape(-1, grad_NM.shape[-1])
            flat_K = y_NK.reshape(-1, y_NK.shape[-1]).to(dtype)
            dweight_MK = torch.matmul(flat_M.t(), flat_K).to(weight_MK.dtype)
        return dy_NK, dweight_MK, None, None, None


def ternary_linear(
    y: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    form: Form,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y [..., K] times a ternary matrix: [..., M], in `dtype`, by default autocast's or y's.

    weight: latent floats [M, K]; with a scale, stored values (int8 [M, K]) as they are. Gradients
    are straight-through, of y and of latent weights. Raises ValueError if the shapes disagree.
    """
    if y.shape[-1] != weight.shape[-1]:
        raise ValueError(f"ternary_linear: {y.shape[-1]} features, weight {weight.shape[-1]}")
    return _TernaryProduct.apply(y, weight, scale, form, dtype or product_dtype(y))
