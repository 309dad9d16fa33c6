"""x + MLGRU(norm(x)) as one operation of torch, with a backward pass written by hand.

Saved for the backward pass: x, and the gates' inputs i, f, g (unless `keep` is off). Everything
element-wise is computed again from them, the states of the recurrence too.

Shape suffixes: B sequences, T steps, D hidden, N = B*T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nomatmul.ops.bitlinear.naive import product_dtype
from nomatmul.ops.fused.parts import (
    input_gradient,
    operator,
    plain_math,
    product,
    step,
    weight_gradient,
    weights_for,
)


def _project(
    x_ND: Tensor,
    norm: Tensor,
    norms_GD: Tensor,
    weights: Sequence[Tensor],
    eps: Sequence[float],
    slot: int,
    dtype: torch.dtype,
    full_precision: bool,
) -> Tensor:
    """i, f and g before their activations [3, N, D]: one row pass, one product."""
    t, w_scale = weights_for(slot, weights, dtype, full_precision)
    q, scale = step("norm_quantize", x_ND, norm, norms_GD, eps[0], eps[1], t.dtype)
    return product(q, t, scale, w_scale, dtype)


def _mixer_fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    dtype, keep, _ = others[-3:]
    shape = (3, x.shape[0] * x.shape[1], x.shape[2]) if keep else (0,)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, x.new_empty(shape, dtype=dtype)


@operator("mixer", _mixer_fake)
@plain_math
def _mixer(
    x: Tensor,
    norm: Tensor,
    i_weight: Tensor,
    f_weight: Tensor,
    g_weight: Tensor,
    o_weight: Tensor,
    i_norm: Tensor,
    f_norm: Tensor,
    g_norm: Tensor,
    o_norm: Tensor,
    gate: Tensor,
    bound: Tensor | None,
    eps: Sequence[float],
    slots: Sequence[int],
    dtype: torch.dtype,
    keep: bool,
    full_precision: bool,
) -> tuple[Tensor, Tensor]:
    size = x.shape[-1]
    x_ND = x.reshape(-1, size)
    weights = (i_weight, f_weight, g_weight)
    norms_GD = torch.stack([i_norm, f_norm, g_norm])
    ifg = _project(x_ND, norm, norms_GD, weights, eps, slots[0], dtype, full_precision)
    i_BTD, f_BTD = ifg[0].view(x.shape), ifg[1].view(x.shape)
    h_ND = step("gated_scan", i_BTD, f_BTD, bound).view(-1, size)
    t, w_scale = weights_for(slots[1], (o_weight,), dtype, full_precision)
    q, scale = step("gate_quantize", ifg[2], h_ND, gate, o_norm, eps[2], eps[1], t.dtype)
    out = product(q, t, scale, w_scale, x.dtype, x_ND)
    return out.view(x.shape), ifg if keep else ifg.new_empty(0)


def _mixer_backward_fake(dout: Tensor, x: Tensor, ifg: Tensor, *others: Any) -> list[Tensor]:
    *parameters, bound, _eps, _slots, _dtype, _full_precision = others
    norm = parameters[0]
    dbound = norm.new_empty(0) if bound is None else torch.empty_like(bound, dtype=norm.dtype)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return [dx, *(torch.empty_like(p) for p in parameters), dbound]


@operator("mixer_backward", _mixer_backward_fake)
@plain_math
def _mixer_backward(
    dout: Tensor,
    x: Tensor,
    ifg: Tensor,
    norm: Tensor,
    i_weight: Tensor,
    f_weight: Tensor,
    g_weight: Tensor,
    o_weight: Tensor,
    i_norm: Tensor,
    f_norm: Tensor,
    g_norm: Tensor,
    o_norm: Tensor,
    gate: Tensor,
    bound: Tensor | None,
    eps: Sequence[float],
    slots: Sequence[int],
    dtype: torch.dtype,
    full_precision: bool,
) -> list[Tensor]:
    shape, size = x.shape, x.shape[-1]
    x_ND, dout_ND = x.reshape(-1, size), dout.reshape(-1, size)
    weights = (i_weight, f_weight, g_weight)
    norms_GD = torch.stack([i_norm, f_norm, g_norm])
    if not ifg.numel():
        ifg = _project(x_ND, norm, norms_GD, weights, eps, slots[0], dtype, full_precision)
    i_BTD, f_BTD = ifg[0].view(shape), ifg[1].view(shape)
    h_BTD = step("gated_scan", i_BTD, f_BTD, bound)
    t, w_scale = weights_for(slots[1], (o_weight,), dtype, full_precision)
    grad_ND = dout_ND.to(dtype)
    d_ND = input_gradient(grad_ND, t[0])
    dg_ND, dh_ND, y_ND, dgate, do_norm = step(
        "gate_backward", ifg[2], h_BTD.view(-1, size), gate, o_norm, d_ND, w_scale, eps[2], eps[1]
    )
    do_weight = weight_gradient(grad_ND, y_ND, o_weight)
    del d_ND, y_ND, grad_ND
    di_BTD, df_BTD, dbound = step(
        "gated_scan_backward", i_BTD, f_BTD, bound, h_BTD, dh_ND.view(shape)
    )
    del h_BTD, dh_ND
    difg = (di_BTD.view(-1, size), df_BTD.view(-1, size), dg_ND)
    y_GND, _ = step("norm_quantize", x_ND, norm, norms_GD, eps[0], eps[1], dtype)
    dweights = [
        weight_gradient(d, y, w) for d, y, w in zip(difg, y_GND.unbind(), weights, strict=True)
    ]
    t, w_scale = weights_for(slots[0], weights, dtype, full_precision)
    for d, wide, y in zip(difg, t.to(dtype).unbind(), y_GND.unbind(), strict=True):
        torch.mm(d, wide, out=y)  # over y, which has served
    dx, dnorm, *dnorms = step(
        "norm_backward", x_ND, norm, norms_GD, y_GND, w_scale, dout_ND, eps[0], eps[1]
    )
    small = [*dnorms, do_norm, dgate, dbound]
    small = [d.to(norm.dtype) for d in small]
    return [dx.view(shape), dnorm.to(norm.dtype), *dweights, do_weight, *small]


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps, ctx.slots, ctx.dtype, _, ctx.full_precision = inputs
    ctx.save_for_backward(tensors[0], output[1], *tensors[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 17
    saved = ctx.saved_tensors
    grads = _mixer_backward(dout, *saved, ctx.eps, ctx.slots, ctx.dtype, ctx.full_precision)
    dbound = None if saved[-1] is None else grads[-1].to(saved[-1].dtype)
    return (*grads[:-1], dbound, *(None,) * 5)


torch.library.register_autograd("nomatmul::mixer", _backward, setup_context=_setup_context)


def mixer(
    x: Tensor,
    norm: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[Tensor],
    gate: Tensor,
    bound: Tensor | None,
    *,
    eps: tuple[float, float, float],
    slots: tuple[int, int],
    keep: bool = True,
    full_precision: bool = False,
) -> Tensor:
    """x + o_proj(RMSNorm(g) * silu(h)) of a block's MLGRU; x: [B, T, D], the result has its type.

    norm: the block's norm [D]; weights: latent weights of i, f, g and o [D, D] (float32); norms:
    the norms inside those projections; gate: g_norm's weight; bound: lower bound of the forget
    gate [D] or None. eps: of the block's norm, the projections' norms, g_norm. slots: from
    `new_slot`, for (i, f, g) together and for o. keep=False saves only x and repeats the product
    of i, f and g in the backward pass. full_precision: weights are not rounded. No padding mask,
    state from zero.
    """
    rest = list(eps), list(slots), product_dtype(x), keep, full_precision
    return _mixer(x.contiguous(), norm, *weights, *norms, gate, bound, *rest)[0]
