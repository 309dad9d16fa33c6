"""x + GLU(norm(x)) as one operation of torch, with a backward pass written by hand.

Saved for the backward pass: x, and gate and up (unless `keep` is off: then their product is
repeated). Everything element-wise is computed again.

Shape suffixes: N tokens, D hidden, M intermediate.
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
    gate_norm: Tensor,
    weight: Tensor,
    eps: Sequence[float],
    slot: int,
    dtype: torch.dtype,
    full_precision: bool,
) -> Tensor:
    """gate and up side by side [N, 2M]."""
    t, w_scale = weights_for(slot, (weight,), dtype, full_precision)
    q, scale = step("norm_quantize", x_ND, norm, gate_norm[None], eps[0], eps[1], t.dtype)
    return product(q, t, scale, w_scale, dtype)[0]


def _channel_fake(x, norm, gate_weight, down_weight, gate_norm, down_norm, eps, slots, dtype, keep,
                  full_precision):  # fmt: skip
    tokens = x.numel() // x.shape[-1]
    shape = (tokens, gate_weight.shape[0]) if keep else (0,)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, x.new_empty(shape, dtype=dtype)


@operator("channel", _channel_fake)
@plain_math
def _channel(
    x: Tensor,
    norm: Tensor,
    gate_weight: Tensor,
    down_weight: Tensor,
    gate_norm: Tensor,
    down_norm: Tensor,
    eps: Sequence[float],
    slots: Sequence[int],
    dtype: torch.dtype,
    keep: bool,
    full_precision: bool,
) -> tuple[Tensor, Tensor]:
    x_ND = x.reshape(-1, x.shape[-1])
    gu = _project(x_ND, norm, gate_norm, gate_weight, eps, slots[0], dtype, full_precision)
    t, w_scale = weights_for(slots[1], (down_weight,), dtype, full_precision)
    q, scale = step("glu_quantize", gu, down_norm, eps[1], t.dtype)
    if not keep:
        gu = gu.new_empty(0)
    out = product(q, t, scale, w_scale, x.dtype, x_ND)
    return out.view(x.shape), gu


def _channel_backward_fake(
    dout, x, gu, norm, gate_weight, down_weight, gate_norm, down_norm, eps, slots, dtype,
    full_precision,
):  # fmt: skip
    parameters = (norm, gate_weight, down_weight, gate_norm, down_norm)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return [dx, *(torch.empty_like(p) for p in parameters)]


@operator("channel_backward", _channel_backward_fake)
@plain_math
def _channel_backward(
    dout: Tensor,
    x: Tensor,
    gu: Tensor,
    norm: Tensor,
    gate_weight: Tensor,
    down_weight: Tensor,
    gate_norm: Tensor,
    down_norm: Tensor,
    eps: Sequence[float],
    slots: Sequence[int],
    dtype: torch.dtype,
    full_precision: bool,
) -> list[Tensor]:
    x_ND, dout_ND = x.reshape(-1, x.shape[-1]), dout.reshape(-1, x.shape[-1])
    repeated = not gu.numel()
    if repeated:
        gu = _project(x_ND, norm, gate_norm, gate_weight, eps, slots[0], dtype, full_precision)
    t, w_scale = weights_for(slots[1], (down_weight,), dtype, full_precision)
    grad_ND = dout_ND.to(dtype)
    d_NM = input_gradient(grad_ND, t[0])
    dgu, y_NM, ddown_norm = step("glu_backward", gu, down_norm, d_NM, w_scale, eps[1], repeated)
    del gu, d_NM
    ddown = weight_gradient(grad_ND, y_NM, down_weight)
    del y_NM, grad_ND
    y_GND, _ = step("norm_quantize", x_ND, norm, gate_norm[None], eps[0], eps[1], dtype)
    dgate = weight_gradient(dgu, y_GND[0], gate_weight)
    t, w_scale = weights_for(slots[0], (gate_weight,), dtype, full_precision)
    torch.mm(dgu, t[0].to(dtype), out=y_GND[0])  # over y, which has served
    del dgu
    dx, dnorm, dgate_norm = step(
        "norm_backward", x_ND, norm, gate_norm[None], y_GND, w_scale, dout_ND, eps[0], eps[1]
    )
    small = [d.to(norm.dtype) for d in (dnorm, dgate_norm, ddown_norm)]
    return [dx.view(x.shape), small[0], dgate, ddown, small[1], small[2]]


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps, ctx.slots, ctx.dtype, _, ctx.full_precision = inputs
    ctx.save_for_backward(tensors[0], output[1], *tensors[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 11
    rest = ctx.eps, ctx.slots, ctx.dtype, ctx.full_precision
    return (*_channel_backward(dout, *ctx.saved_tensors, *rest), *(None,) * 5)


torch.library.register_autograd("nomatmul::channel", _backward, setup_context=_setup_context)


def channel(
    x: Tensor,
    norm: Tensor,
    weights: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor],
    *,
    eps: tuple[float, float],
    slots: tuple[int, int],
    keep: bool = True,
    full_precision: bool = False,
) -> Tensor:
    """x + down(silu(gate) * up) of a block's GLU; x: [B, T, D], the result has its type.

    norm: the block's norm [D]; weights: latent [2M, D] of gate and up and [D, M] of down; norms:
    the norms inside those two layers; eps: of the block's norm and of theirs; slots: from
    `new_slot`, one a layer. keep=False saves only x. full_precision: weights are not rounded.
    """
    rest = list(eps), list(slots), product_dtype(x), keep, full_precision
    return _channel(x.contiguous(), norm, *weights, *norms, *rest)[0]
