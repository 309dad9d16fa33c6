"""What the fused sublayers share: kernel calls, the products of the backward pass.

Shape suffixes: N tokens, M outputs, K inputs, G matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from nomatmul.ops import choose
from nomatmul.ops.bitlinear import steps
from nomatmul.ops.bitlinear.cache import ternary_weights
from nomatmul.ops.mlgru import naive as scans

F = TypeVar("F", bound=Callable[..., Any])

_FAST = {
    "product": "nomatmul.ops.bitlinear.triton",
    "norm_quantize": "nomatmul.ops.bitlinear.rows",
    "glu_quantize": "nomatmul.ops.bitlinear.rows",
    "gate_quantize": "nomatmul.ops.bitlinear.rows",
    "norm_backward": "nomatmul.ops.bitlinear.rows_backward",
    "glu_backward": "nomatmul.ops.bitlinear.glu_backward",
    "gate_backward": "nomatmul.ops.bitlinear.rows_backward",
    "gated_scan": "nomatmul.ops.mlgru.gated",
    "gated_scan_backward": "nomatmul.ops.mlgru.gated",
}


def step(name: str, x: Tensor, *args: Any, **options: Any) -> Any:
    """Run a step by its name in `bitlinear.steps` or `mlgru.naive`, in triton where that serves."""
    plain = scans if name.startswith("gated_scan") else steps
    return choose.run(name, _FAST[name], plain, x, *args, **options)


def operator(name: str, fake: Callable[..., Any]) -> Callable[[F], Any]:
    """Makes a function on tensors an operator of torch, opaque to torch.compile.

    fake: the same on tensors without data. As torch.library.custom_op, without its checks in every
    call (0.1 ms a block and step); `opcheck` in the tests does them.
    """

    def register(function: F) -> Any:
        full = f"nomatmul::{name}"
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(full, schema, tags=(torch.Tag.needs_fixed_stride_order,))
        torch.library.impl(full, ("cpu", "cuda"), function)
        torch.library.register_fake(full, fake)
        return getattr(torch.ops.nomatmul, name).default

    return register


def plain_math(function: F) -> F:
    """Without autocast: the operation decides on the types of its products itself.

    torch.library reads the annotations of `function` as names of this module, the wrapper's.
    """

    @functools.wraps(function)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return run  # type: ignore[return-value]  # it has the signature of `function`


def product(
    x_GNK: Tensor,
    t_GMK: Tensor,
    step_GN: Tensor,
    w_scale_G: Tensor,
    dtype: torch.dtype,
    residual_NM: Tensor | None = None,
) -> Tensor:
    """As `steps.product`, of int8 and ternary values; or of floats with one product of torch's.

    Inputs quantised to the weights' type are q * step: then there is no scale left to apply.
    """
    if t_GMK.dtype == torch.int8:
        return step("product", x_GNK, t_GMK, step_GN, w_scale_G, dtype, residual_NM)
    w_GKM = t_GMK.transpose(1, 2)
    if residual_NM is None:
        return torch.bmm(x_GNK, w_GKM).to(dtype)
    if residual_NM.dtype == x_GNK.dtype:
        return torch.addmm(residual_NM, x_GNK[0], w_GKM[0]).unsqueeze(0).to(dtype)
    return (torch.mm(x_GNK[0], w_GKM[0]) + residual_NM).unsqueeze(0).to(dtype)


def weights_for(
    slot: int, weights: Sequence[Tensor], dtype: torch.dtype, full_precision: bool
) -> tuple[Tensor, Tensor]:
    """`ternary_weights` of a layer; in full precision they are not rounded but in `dtype`."""
    return ternary_weights(slot, weights, dtype if full_precision else None)


def weight_gradient(grad_NM: Tensor, y_NK: Tensor, like: Tensor) -> Tensor:
    """grad^T y [M, K] in the weight's type; 16-bit operands are summed and kept in float32."""
    if grad_NM.is_cuda and like.dtype == torch.float32 and grad_NM.dtype != torch.float32:
        try:
            return torch.mm(grad_NM.t(), y_NK, out_dtype=torch.float32)
        except TypeError:  # torch before 2.8
            pass
    return torch.mm(grad_NM.t(), y_NK).to(like.dtype)


def input_gradient(grad_NM: Tensor, t_MK: Tensor) -> Tensor:
    """grad @ t [N, K] in grad's type: the gradient of the product's input, over w_scale."""
    return torch.mm(grad_NM, t_MK.to(grad_NM.dtype))
