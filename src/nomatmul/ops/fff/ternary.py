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

from nomatmul.ops import choose
from nomatmul.ops.bitlinear import steps, ternary_weights
from nomatmul.ops.fff import combine, hidden, walk
from nomatmul.ops.fff.operators import call, check_logits

_ROWS = "nomatmul.ops.bitlinear.rows"
_ROWS_BACKWARD = "nomatmul.ops.bitlinear.rows_backward"
_HIDDEN = "nomatmul.ops.fff.hidden_triton"


class Straight(torch.autograd.Function):
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


def straight_ternary(
    weight: Tensor, slot: int, dtype: torch.dtype, full_precision: bool = False
) -> tuple[Tensor, Tensor]:
    """(t, w_scale): ternary values of weight [V, K] in dtype and their scale [], one for all.

    The gradient of weight is that of weight / w_scale. slot: from `new_slot`. full_precision: the
    values are the weights themselves, and their scale is one.
    """
    t, w_scale = ternary_weights(slot, [weight], dtype if full_precision else None)
    return Straight.apply(weight, t[0], w_scale[0], dtype), w_scale[0]


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


# -- the two quantisers as operators ---------------------------------------------------------------


@torch.library.custom_op(
    "nomatmul::fff_quantize",
    mutates_args=(),
    schema="(Tensor x, Tensor norm, float eps, ScalarType dtype) -> (Tensor, Tensor)",
)
def _quantize(x: Tensor, norm: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    norms_1K = norm.unsqueeze(0)
    arguments = x, None, norms_1K, 0.0, eps, torch.int8
    if len(x):
        q, step = choose.run("norm_quantize", _ROWS, steps, *arguments)
    else:  # a grid of no programs is an error
        q, step = steps.norm_quantize(*arguments)
    return q[0].to(dtype), step.squeeze(0).unsqueeze(-1)


@_quantize.register_fake
def _(x: Tensor, norm: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((x.shape[0], 1), dtype=kind)


@torch.library.custom_op(
    "nomatmul::fff_quantize_backward",
    mutates_args=(),
    schema="(Tensor d, Tensor x, Tensor norm, Tensor step, float eps) -> (Tensor, Tensor)",
)
def _quantize_backward(
    d: Tensor, x: Tensor, norm: Tensor, step: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    d_1NK = (d.to(step.dtype) / step).unsqueeze(0)
    arguments = x, None, norm.unsqueeze(0), d_1NK, step.new_ones(1), None, 0.0, eps
    if len(x):
        dx, _, dnorm = choose.run("norm_backward", _ROWS_BACKWARD, steps, *arguments)
    else:
        dx, _, dnorm = steps.norm_backward(*arguments)
    return dx, dnorm.to(norm.dtype, copy=True)


@_quantize_backward.register_fake
def _(d: Tensor, x: Tensor, norm: Tensor, step: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(norm)


def _quantize_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, norm, ctx.eps, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, norm, output[1])


def _quantize_gradient(ctx: Any, d: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *_quantize_backward(d, *ctx.saved_tensors, ctx.eps), None, None


_quantize.register_autograd(_quantize_gradient, setup_context=_quantize_context)


def _hidden_step(name: str, implementation: str, x: Tensor, *arguments: Any) -> Any:
    if implementation in ("", "triton") and len(x):
        return choose.run(name, _HIDDEN, hidden, x, *arguments)
    return getattr(hidden, name)(x, *arguments)


@torch.library.custom_op(
    "nomatmul::fff_hidden",
    mutates_args=(),
    schema="(Tensor logits, Tensor nodes, Tensor norm, float eps, str activation,"
    " bool route_gradient, str implementation) -> (Tensor, Tensor)",
)
def _hidden(
    logits: Tensor,
    nodes: Tensor,
    norm: Tensor,
    eps: float,
    activation: str,
    route_gradient: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    arguments = check_logits(logits), nodes, norm, eps, activation
    return _hidden_step("hidden_quantize", implementation, *arguments)


@_hidden.register_fake
def _(logits: Tensor, nodes: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logits), logits.new_empty(logits.shape[0], 1)


@torch.library.custom_op(
    "nomatmul::fff_hidden_backward",
    mutates_args=(),
    schema="(Tensor d, Tensor logits, Tensor nodes, Tensor norm, Tensor step, float eps,"
    " str activation, bool route_gradient, str implementation) -> (Tensor, Tensor)",
)
def _hidden_backward(
    d: Tensor,
    logits: Tensor,
    nodes: Tensor,
    norm: Tensor,
    step: Tensor,
    eps: float,
    activation: str,
    route_gradient: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    arguments = d, logits, nodes, norm, step, eps, activation, route_gradient
    dlogits, dvisits = _hidden_step("hidden_backward", implementation, *arguments)
    # the sum by rows is that of `combine`'s weight gradient, for an output of one column
    ones, column = dvisits.new_ones(len(d), 1), steps.wide(norm).unsqueeze(-1)
    name = "naive" if implementation == "masked" else implementation
    _, dnorm = call("combine_backward", name, ones, dvisits, nodes, column)
    return dlogits, dnorm.squeeze(-1).to(norm.dtype, copy=True)


@_hidden_backward.register_fake
def _(d: Tensor, logits: Tensor, nodes: Tensor, norm: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logits), torch.empty_like(norm)


def _hidden_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, nodes, norm, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, nodes, norm, output[1])


def _hidden_gradient(ctx: Any, d: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    dlogits, dnorm = _hidden_backward(d.contiguous(), *ctx.saved_tensors, *ctx.options)
    return dlogits, None, dnorm, None, None, None, None


_hidden.register_autograd(_hidden_gradient, setup_context=_hidden_context)


# -- the layer -------------------------------------------------------------------------------------


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
    full_precision: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm, int8, walk on integers, activation, norm of the visited, int8, sum of visited rows.

    x: [N, K]; w_in: [V, K] and w_out: [V, D] latent; norm_in: [K]; norm_out: [V]; slots: from
    `new_slot`, for w_in and w_out. full_precision: w_in and w_out are not rounded.

    Returns (y [N, D], logits [N, T, L], rows int32 [N, T, L]), y and logits float32 (float64 for
    float64). Raises ValueError as `walk`.
    """
    if x.dim() != 2 or x.shape[1] != w_in.shape[-1]:
        raise ValueError(f"fff: x must be [N, {w_in.shape[-1]}], got {tuple(x.shape)}")
    dtype = operand_type(x, implementation)
    # A compiled layer has no use for a cache; reading its numbers would compile every layer anew.
    numbers = (0, 0) if torch.compiler.is_compiling() else slots
    with torch.autocast(x.device.type, enabled=False):
        q_NK, step_N1 = _quantize(x, norm_in, eps, dtype)
        t_VK, w_scale_in = straight_ternary(w_in, numbers[0], dtype, full_precision)
        shape: dict[str, Any] = {"trees": trees, "depth": depth, "implementation": implementation}
        acc_NTL, nodes_NTL = walk(q_NK, t_VK, **shape)
        logits_NTL = acc_NTL * (w_scale_in * step_N1).unsqueeze(-1)

        options = eps, activation, route_gradient, implementation or ""
        q_NTL, step_N1 = _hidden(logits_NTL, nodes_NTL, norm_out, *options)
        t_VD, w_scale_out = straight_ternary(w_out, numbers[1], dtype, full_precision)
        acc_ND = combine(q_NTL, nodes_NTL, t_VD, implementation=implementation)
        return acc_ND * (w_scale_out * step_N1), logits_NTL, nodes_NTL
